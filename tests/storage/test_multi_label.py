"""Data sets whose samples have several findings: stored in the open, read back, checked."""

from __future__ import annotations

import gc
import json
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.storage.codecs import decode_member
from streaming_balance.storage.layout import MANIFEST_NAME, TABLE_NAME
from streaming_balance.storage.manifest import json_checksum, manifest_text, read_manifest
from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.storage.table_file import write_table
from streaming_balance.storage.verify import verify_shards
from streaming_balance.storage.writer import EncodedSample, PackWriter, encode_array
from tests.building import Sample, pack, rewrite_column, table_column

CLASSES = ("Effusion", "Mass", "Nodule")
# Packed in this order; the table sorts them by split, set of findings, patient and key.
LABELS = {
    "a": "Mass",
    "b": "Effusion|Nodule",
    "c": "",
    "d": "Mass",
    "e": "Effusion",
    "v": "Effusion|Mass",
    "w": "",
}
SORTED = ["c", "e", "b", "a", "d"]
FINDINGS = {"c": [0, 0, 0], "e": [1, 0, 0], "b": [1, 0, 1], "a": [0, 1, 0], "d": [0, 1, 0]}


def samples() -> list[Sample]:
    """Make a small image per label; v and w are for validation."""
    return [
        Sample(
            key=key,
            image=np.full((2, 2), number, dtype=np.int16),
            label=label,
            split="val" if key in "vw" else "train",
        )
        for number, (key, label) in enumerate(LABELS.items())
    ]


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """Seven samples of three findings."""
    pack(tmp_path / "chest", samples(), classes=CLASSES, multi_label=True)
    return open_shards(tmp_path / "chest")


def stored_members(folder: Path) -> dict[str, bytes]:
    """Every member of every shard, read by the standard library."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def test_labels_are_a_row_of_zeros_and_ones_per_sample_in_table_order(shards: ShardSet) -> None:
    assert shards.keys("train").tolist() == SORTED
    labels = shards.labels("train")
    assert labels.dtype == np.uint8
    assert labels.tolist() == [FINDINGS[key] for key in SORTED]
    assert shards.labels("val").tolist() == [[0, 0, 0], [1, 1, 0]]
    assert (shards.multi_label, shards.classes) == (True, list(CLASSES))


def test_label_words_are_the_findings_joined(shards: ShardSet) -> None:
    words = ["", "Effusion", "Effusion|Nodule", "Mass", "Mass"]
    assert shards.label_words("train").tolist() == words
    assert table_column(shards.path, "label") == [*words, "", "Effusion|Mass"]


def test_labels_cannot_be_written_to(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match="read-only"):
        shards.labels("train")[0, 0] = 1


def test_the_members_hold_an_array_of_the_findings_and_a_list_of_their_names(
    shards: ShardSet,
) -> None:
    members = stored_members(shards.path)
    for key, label in LABELS.items():
        assert f"{key}.cls" not in members
        names = label.split("|") if label else []
        assert json.loads(members[f"{key}.json"])["label"] == names
        vector = bytes(int(name in names) for name in CLASSES)
        assert members[f"{key}.cls.npy"].endswith(b"\n" + vector)


@pytest.mark.parametrize("codec", ["npy", "blosc"])
def test_webdataset_decodes_the_findings_as_an_array(tmp_path: Path, codec: str) -> None:
    pack(tmp_path / "chest", samples(), codec=codec, classes=CLASSES, multi_label=True)
    url = str(tmp_path / "chest/train-000000.tar")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        reader: Any = webdataset.WebDataset(url, shardshuffle=False).decode(decode_member)
        found = {sample["__key__"]: sample["cls.npy"].tolist() for sample in reader}
        gc.collect()
    assert found == FINDINGS


def test_the_manifest_says_multi_label_only_where_it_is_so(
    shards: ShardSet, tmp_path: Path
) -> None:
    stored = json.loads((shards.path / MANIFEST_NAME).read_text())
    assert stored["multi_label"] is True
    pack(tmp_path / "single", [Sample(key="a", image=np.ones((2, 2), dtype=np.int16))])
    assert "multi_label" not in json.loads((tmp_path / "single" / MANIFEST_NAME).read_text())
    assert not open_shards(tmp_path / "single").multi_label


def test_a_manifest_may_not_say_multi_label_false(shards: ShardSet) -> None:
    path = shards.path / MANIFEST_NAME
    body = json.loads(path.read_text())
    del body["checksum"]
    body["multi_label"] = False
    path.write_text(json.dumps(body | {"checksum": json_checksum(body)}))
    with pytest.raises(ShardError, match="multi_label is False; it is true or not there"):
        open_shards(shards.path)


def test_a_manifest_whose_classes_hold_the_separator_is_refused(shards: ShardSet) -> None:
    manifest = replace(read_manifest(shards.path), classes=("Effusion|Mass", "Mass", "Nodule"))
    (shards.path / MANIFEST_NAME).write_text(manifest_text(manifest))
    said = r"does not follow the format: classes name 'Effusion\|Mass'"
    with pytest.raises(ShardError, match=said):
        read_manifest(shards.path)


def test_samples_of_one_finding_each_are_another_data_set_than_samples_of_one_class(
    tmp_path: Path,
) -> None:
    image = np.ones((2, 2), dtype=np.int16)
    same = [Sample(key=name, image=image, label=name) for name in ("Mass", "Nodule")]
    several = pack(tmp_path / "several", same, classes=CLASSES, multi_label=True)
    single = pack(tmp_path / "single", same, classes=CLASSES)
    assert several.digest != single.digest
    assert open_shards(tmp_path / "several").labels("train").tolist() == [[0, 1, 0], [0, 0, 1]]
    assert open_shards(tmp_path / "single").labels("train").tolist() == [1, 2]


def test_the_content_digest_depends_neither_on_codec_nor_on_shard_size(
    shards: ShardSet, tmp_path: Path
) -> None:
    other = pack(
        *(tmp_path / "other", samples()),
        codec="blosc",
        shard_bytes=1,
        classes=CLASSES,
        multi_label=True,
    )
    assert len(other.shards) == 7
    assert other.digest == shards.digest


def test_every_byte_of_a_multi_label_data_set_verifies(shards: ShardSet) -> None:
    report = verify_shards(shards.path)
    assert (report.ok, report.problems, report.samples) == (True, (), 7)


def test_verify_finds_members_that_say_other_findings_than_the_table(shards: ShardSet) -> None:
    # With c counted as an effusion, the rows are still in order: c before e.
    words = ["Effusion", "Effusion", "Effusion|Nodule", "Mass", "Mass", "", "Effusion|Mass"]
    rewrite_column(shards.path, "label", words)
    found = {(p.key, p.problem) for p in verify_shards(shards.path).problems if p.key}
    assert {key for key, _ in found} == {"c"}
    said = "\n".join(problem for _, problem in found)
    assert "is not the array of the findings 'Effusion' that the table says" in said
    assert "says label [], the table says ['Effusion']" in said


def test_a_table_out_of_the_order_of_the_sets_is_refused(shards: ShardSet) -> None:
    words = ["", "Effusion", "Mass", "Effusion|Nodule", "Mass", "", "Effusion|Mass"]
    rewrite_column(shards.path, "label", words)
    with pytest.raises(ShardError, match="does not follow the row before it in order"):
        open_shards(shards.path)


@pytest.mark.parametrize(
    ("word", "wrong", "said"),
    [
        ("Effusion|Nodule", "Nodule|Effusion", "in class order, each once"),
        ("Effusion|Nodule", "Effusion|Edema", "label 'Edema' is no class"),
        ("Effusion", "Effusion|Mass|Nodule", "words are"),
    ],
)
def test_a_table_whose_sets_are_not_written_in_the_one_way_is_refused(
    shards: ShardSet, word: str, wrong: str, said: str
) -> None:
    replace_word(shards.path, word, wrong)
    with pytest.raises(ShardError, match=said):
        open_shards(shards.path)


def replace_word(folder: Path, word: str, wrong: str) -> None:
    """Change one word of the label column's dictionary and let the manifest vouch for it."""
    table = pa.ipc.open_file((folder / TABLE_NAME).read_bytes()).read_all()
    place = table.schema.names.index("label")
    chunk = table.column(place).chunk(0)
    words = [wrong if entry == word else entry for entry in chunk.dictionary.to_pylist()]
    column = pa.DictionaryArray.from_arrays(chunk.indices, pa.array(words, pa.utf8()))
    entry = write_table(
        folder / TABLE_NAME, table.set_column(place, table.schema.field(place), column)
    )
    manifest = read_manifest(folder)
    (folder / MANIFEST_NAME).write_text(manifest_text(replace(manifest, table=entry)))


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("Edema", "has label 'Edema'"),
        ("Effusion|Edema", "has label 'Edema'"),
        ("Nodule|Effusion", r"sample 'a'.*in class order, each once: 'Effusion\|Nodule'"),
        ("Mass|Mass", "sample 'a'.*in class order, each once: 'Mass'"),
    ],
)
def test_the_writer_refuses_findings_it_does_not_know_or_out_of_order(
    tmp_path: Path, label: str, said: str
) -> None:
    wrong = [Sample(key="a", image=np.ones((2, 2), dtype=np.int16), label=label)]
    with pytest.raises(ConfigError, match=said):
        pack(tmp_path / "chest", wrong, classes=CLASSES, multi_label=True)


def writer_for(folder: Path) -> PackWriter:
    """Open a writer that gives every sample a shard of its own."""
    return PackWriter(
        folder,
        classes=CLASSES,
        splits=["train", "val"],
        train_splits=["train"],
        codec="npy",
        columns=[],
        shard_bytes=1,
        settings={"multi_label": True},
        overwrite=False,
        multi_label=True,
    )


def encoded(key: str, label: str) -> EncodedSample:
    """Encode one small sample."""
    image = encode_array("image", np.ones((2, 2), dtype=np.int16), axes="HW", codec="npy")
    return EncodedSample(
        key=key, patient=key, label=label, split="train", columns={}, arrays=(image,), details={}
    )


def test_an_interrupted_pack_is_finished_with_the_same_bytes(tmp_path: Path) -> None:
    labels = {"a": "Mass|Nodule", "b": "", "c": "Effusion|Mass"}
    for folder, stops_after in (("whole", ()), ("resumed", (1, 2))):
        for count in (*stops_after, 3):
            with writer_for(tmp_path / folder) as writer:
                for key, label in list(labels.items())[:count]:
                    writer.add(encoded(key, label))
                if count == 3:
                    writer.finish(found=3, rejected=[])
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert "samples.arrow" in names
    for name in names:
        whole, resumed = (tmp_path / folder / name for folder in ("whole", "resumed"))
        assert whole.read_bytes() == resumed.read_bytes()


def test_an_interrupted_pack_whose_findings_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    with writer_for(tmp_path / "chest") as writer:
        writer.add(encoded("a", "Mass"))
        writer.add(encoded("b", "Mass"))
    with writer_for(tmp_path / "chest") as writer:
        assert writer.finished_keys() == {"a"}
        with pytest.raises(ConfigError, match="sample 'a' changed since the pack was interrupted"):
            writer.add(encoded("a", "Mass|Nodule"))


def test_a_split_without_samples_has_labels_of_no_rows_and_all_columns(tmp_path: Path) -> None:
    with writer_for(tmp_path / "chest") as writer:
        writer.add(encoded("a", "Mass|Nodule"))
        writer.finish(found=1, rejected=[])
    shards = open_shards(tmp_path / "chest")
    assert shards.labels("val").shape == (0, 3)
    assert shards.label_words("val").tolist() == []
    assert shards.labels("train").tolist() == [[0, 1, 1]]
