"""`streaming-balance resample` writes other shares, counts every sample, never for evaluation."""

from __future__ import annotations

import gzip
import hashlib
import inspect
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset

import streaming_balance as sb
from streaming_balance.cli import resample as command
from streaming_balance.cli.app import run
from streaming_balance.errors import ShardError
from streaming_balance.stream.frequencies import DEFAULT_WINDOW
from streaming_balance.stream.resampling import DEFAULT_SHARD_BYTES, resample
from streaming_balance.stream.samples import StreamSample
from streaming_balance.stream.steps import DEFAULT_BUFFER_BYTES
from streaming_balance.stream.writing import RECORD_NAME
from tests.cli.conftest import Call

# webdataset leaves the shards it read open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """60 samples of somebody else's in three shards: 48 HGG and 12 LGG."""
    folder = tmp_path / "tars"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "s-%03d.tar"), maxcount=20, verbose=0) as sink:
        for number in range(60):
            image = np.full((4, 4), number, np.int16)
            told = {"grade": "LGG" if number % 5 == 0 else "HGG", "patient": f"P{number}"}
            sink.write({"__key__": f"k{number:02d}", "IMAGE.npy": image, "json": told})
    return folder


LABEL = ("--label", "json:grade")


def written(out: Path) -> list[dict[str, Any]]:
    """What webdataset reads of the new shards."""
    shards = sorted(str(path) for path in out.glob("*.tar"))
    return list(webdataset.WebDataset(shards, shardshuffle=False))


def grades(out: Path) -> Counter[str]:
    """Samples of each class in the new shards."""
    return Counter(json.loads(sample["json"])["grade"] for sample in written(out))


def members(*shards: Path) -> dict[str, bytes]:
    """What Python's tarfile reads."""
    found = {}
    for shard in shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                found[member.name.lower()] = file.read()
    return found


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_accept_thins_to_even_shares_and_copies_members_byte_for_byte(
    call: Call, tars: Path, tmp_path: Path
) -> None:
    out = tmp_path / "even"
    options = ("--accept", "--target", "LGG=1,HGG=1", "--frequencies", "LGG=12,HGG=48")
    answer = call("resample", f"{tars}/*.tar", *options, *LABEL, "--out", out, "--json")
    assert answer.status == 0
    assert grades(out) == {"LGG": 12, "HGG": 12}
    source, new = members(*tars.iterdir()), members(*out.glob("*.tar"))
    assert len(new) == 48
    assert new.items() <= source.items()
    record = answer.document
    assert record == json.loads((out / RECORD_NAME).read_text())
    counts = record["counts"]
    assert counts["found"] == counts["read"] == 60 == counts["delivered"] + counts["rejected"]
    assert (counts["delivered"], counts["copies"], counts["written"]) == (24, 0, 24)
    assert record["classes"]["LGG"]["realised_share"] == 0.5
    assert record["settings"]["frequencies"] == {"LGG": 12.0, "HGG": 48.0}
    for source_entry, shard in zip(record["sources"], sorted(tars.iterdir()), strict=True):
        assert source_entry["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()


def test_repeat_loses_no_sample_and_names_copies(call: Call, tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "even"
    options = ("--repeat", "--target", "uniform", "--shard-bytes", 40_000, "--shuffle")
    assert call("resample", f"{tars}/*.tar", *options, *LABEL, "--out", out).status == 0
    assert grades(out) == {"LGG": 48, "HGG": 48}
    keys = [sample["__key__"] for sample in written(out)]
    assert len(set(keys)) == 96
    assert Counter(key.partition("__copy")[0] for key in keys).keys() == {
        f"k{number:02d}" for number in range(60)
    }
    assert {key.partition("__")[2] for key in keys} == {"", "copy1", "copy2", "copy3"}
    assert len(list(out.glob("train-*.tar"))) > 1
    assert keys != sorted(keys)


def test_reservoir_keeps_as_many_as_were_asked_of_every_class(
    call: Call, tars: Path, tmp_path: Path
) -> None:
    for name, options, expected in (
        ("each", ("--size", 10), {"LGG": 10, "HGG": 10}),
        ("own", ("--size", "LGG=3,HGG=5"), {"LGG": 3, "HGG": 5}),
        ("all", ("--size", 20, "--target", "LGG=1,HGG=3"), {"LGG": 5, "HGG": 15}),
        ("ratio", ("--size", 30, "--ratio", 0.5), {"LGG": 12, "HGG": 24}),
    ):
        out = tmp_path / name
        answer = call("resample", f"{tars}/*.tar", "--reservoir", *options, *LABEL, "--out", out)
        assert answer.status == 0, answer.err
        assert grades(out) == expected


def test_uniform_counts_the_classes_first_and_count_makes_frequencies_exact(
    call: Call, tars: Path, tmp_path: Path
) -> None:
    counted = ("--accept", "--target", "LGG=1,HGG=2", "--frequencies", "count")
    first = call("resample", f"{tars}/*.tar", *counted, *LABEL, "--out", tmp_path / "a", "--json")
    assert first.document["settings"]["frequencies"] == {"HGG": 48, "LGG": 12}
    assert grades(tmp_path / "a") == {"LGG": 12, "HGG": 24}
    uniform = ("--accept", "--target", "uniform")
    second = call("resample", f"{tars}/*.tar", *uniform, *LABEL, "--out", tmp_path / "b", "--json")
    assert second.document["settings"]["target"] == {"HGG": 1.0, "LGG": 1.0}
    assert grades(tmp_path / "b") == {"LGG": 12, "HGG": 12}


def test_equal_inputs_and_seed_give_equal_bytes_and_another_seed_others(
    call: Call, tars: Path, tmp_path: Path
) -> None:
    options = ("--reservoir", "--size", 10, *LABEL)
    outs = [tmp_path / name for name in "abc"]
    for out, seed in zip(outs, (7, 7, 8), strict=True):
        answer = call("resample", f"{tars}/*.tar", *options, "--seed", seed, "--out", out)
        assert answer.status == 0
    first, same, other = map(folder_bytes, outs)
    assert first == same
    assert first["train-000000.tar"] != other["train-000000.tar"]


def test_an_index_of_the_new_shards_is_a_data_set(call: Call, tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "even"
    options = ("--accept", "--target", "uniform", *LABEL)
    assert call("resample", f"{tars}/*.tar", *options, "--out", out).status == 0
    assert call("index", f"{out}/*.tar", *LABEL, "--out", tmp_path / "index").status == 0
    assert call("verify", tmp_path / "index", "--json").document["ok"]


def test_an_index_of_what_is_read_is_written_on_the_way(
    call: Call, tars: Path, tmp_path: Path
) -> None:
    names = (*LABEL, "--patient", "json:patient", "--image", "image.npy")
    assert call("index", f"{tars}/*.tar", *names, "--out", tmp_path / "index").status == 0
    expected = sb.open_shards(tmp_path / "index")
    for stage, options in (
        ("accept", ("--target", "LGG=1,HGG=1")),
        # Shards pass in another order.
        ("repeat", ("--target", "uniform", "--shuffle", "--seed", 3)),
        ("reservoir", ("--size", 2)),
    ):
        teed = tmp_path / f"{stage}-index"
        tee = ("--tee-index", teed, *names)
        out = tmp_path / stage
        answer = call("resample", f"{tars}/*.tar", f"--{stage}", *options, *tee, "--out", out)
        assert answer.status == 0, answer.err
        shards = sb.open_shards(teed)
        assert shards.digest == expected.digest
        assert folder_bytes(teed) == folder_bytes(tmp_path / "index")
        assert shards.keys("train").tolist() == expected.keys("train").tolist()
        with sb.train_loader(shards, global_batch_size=4, balance="class_balanced") as loader:
            assert Counter(next(iter(loader))["label"].tolist()) == {0: 2, 1: 2}


def test_an_index_on_the_way_is_refused_where_it_would_not_be_whole(
    call: Call, tars: Path, tmp_path: Path
) -> None:
    out = ("--reservoir", "--size", 2, *LABEL, "--out", tmp_path / "out")
    tee = ("--tee-index", tmp_path / "index")
    for options, reason in (
        ((*tee, "--on-error", "skip"), "tee: on_error='skip'"),
        (("--patient", "json:patient"), "--tee-index DIR"),
        ((*tee, "--overwrite", "--image", "scan"), "image is 'scan'"),
    ):
        answer = call("resample", f"{tars}/*.tar", *out, *options)
        assert answer.status == 2
        assert reason in answer.err
    answer = call("resample", "-", *out, *tee)
    assert (answer.status, "passes by" in answer.err) == (2, True)
    assert not list(tmp_path.glob("out*"))
    assert not (tmp_path / "index" / "manifest.json").exists()


def test_real_shards_of_others_are_evened_out_and_read_by_gnu_tar(
    call: Call, shared_data: Path, tmp_path: Path
) -> None:
    source = shared_data / "wds_tar" / "W02_wdsjl_sample" / "sample.tar"
    out = tmp_path / "out"
    options = ("--repeat", "--target", "uniform", "--out", out, "--json")
    record = call("resample", source, *options).document
    # Ten digits, the most frequent one 14 times.
    assert record["counts"]["written"] == 140
    assert {entry["realised_share"] for entry in record["classes"].values()} == {0.1}
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    subprocess.run(
        ["tar", "--extract", "--file", out / "train-000000.tar", "--directory", unpacked],
        check=True,
    )
    originals = members(source)
    found = {path.relative_to(unpacked).as_posix(): path for path in unpacked.rglob("*.*")}
    assert len(found) == 2 * 140
    for name, path in found.items():
        key, dot, field = name.partition(".")
        assert path.read_bytes() == originals[key.partition("__copy")[0] + dot + field]


def test_standard_input_is_resampled_in_one_pass(tars: Path, tmp_path: Path) -> None:
    program = "import sys; from streaming_balance.cli.app import run; sys.exit(run(sys.argv[1:]))"
    options = ["--reservoir", "--size", "4", *LABEL, "--out", str(tmp_path / "out"), "--json"]
    with (tars / "s-000.tar").open("rb") as source:
        answer = subprocess.run(
            [sys.executable, "-c", program, "resample", "-", *options],
            stdin=source,
            capture_output=True,
            check=True,
        )
    record = json.loads(answer.stdout)
    assert record["sources"] == [{"url": "<standard input>", "bytes": None, "sha256": None}]
    assert grades(tmp_path / "out") == {"LGG": 4, "HGG": 4}


def test_shards_for_evaluation_are_refused_whatever_they_are_called(
    call: Call, packed_cohort: Path, tmp_path: Path
) -> None:
    options: tuple[object, ...] = ("--accept", "--target", "uniform", "--out", tmp_path / "out")
    assert call("resample", f"{packed_cohort}/train-*.tar", *options).status == 0
    options += ("--overwrite",)
    refused = call("resample", f"{packed_cohort}/*.tar", *options)
    assert refused.status == 1
    assert "belongs to split 'val', which is for evaluation" in refused.err
    assert "Name training shards only" in refused.err
    # Neither a link of another name nor a copy without its manifest makes it a training shard.
    link = tmp_path / "train-000000.tar"
    link.symlink_to(packed_cohort / "val-000000.tar")
    assert "for evaluation" in call("resample", link, *options).err
    lost = tmp_path / "lost"
    lost.mkdir()
    shutil.copy(packed_cohort / "val-000000.tar", lost)
    assert (
        "was packed for split 'val', and no manifest"
        in call("resample", lost / "*.tar", *options).err
    )
    assert call("resample", lost / "*.tar", *options, "--split", "train").status == 2


@pytest.mark.parametrize("name", ["hard.tar", "test-a.tar", "val-000000.tar.gz", "v.tar.zst"])
def test_a_shard_for_evaluation_stays_one_under_another_name_and_compressed(
    name: str, call: Call, packed_cohort: Path, tmp_path: Path
) -> None:
    content = (packed_cohort / "val-000000.tar").read_bytes()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    elif name.endswith(".zst"):
        content = pa.compress(content, codec="zstd", asbytes=True)
    folder = shutil.copytree(packed_cohort, tmp_path / "cohort")
    (tmp_path / name).write_bytes(content)
    (folder / name).write_bytes(content)
    options: tuple[object, ...] = ("--accept", "--target", "uniform", "--out", tmp_path / "out")
    alone = call("resample", tmp_path / name, *options)
    assert (alone.status, "no manifest is beside it" in alone.err) == (1, True)
    unlisted = call("resample", folder / name, *options)
    assert (unlisted.status, "does not list it" in unlisted.err) == (1, True)
    assert not (tmp_path / "out").exists()


def test_a_damaged_manifest_beside_a_shard_is_no_permission(
    call: Call, packed_cohort: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed_cohort, tmp_path / "cohort")
    manifest = tmp_path / "cohort" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"val"', '"train"'))
    options: tuple[object, ...] = ("--accept", "--target", "uniform", "--out", tmp_path / "out")
    answer = call("resample", tmp_path / "cohort" / "val-000000.tar", *options)
    assert answer.status == 1
    assert "checksum" in answer.err
    assert not (tmp_path / "out").exists()


def test_shards_of_an_index_in_place_keep_their_splits(
    call: Call, tars: Path, tmp_path: Path
) -> None:
    index = ("index", f"{tars}/s-000.tar", *LABEL, "--out", tars, "--split", "test")
    assert call(*index).status == 0
    options = ("--accept", "--target", "uniform", *LABEL, "--out", tmp_path / "out")
    assert "belongs to split 'test'" in call("resample", tars / "s-000.tar", *options).err
    assert call("resample", tars / "s-001.tar", *options).status == 0


@pytest.mark.parametrize(
    ("options", "status", "problem"),
    [
        ((), 2, "give one of --accept, --repeat and --reservoir, not none"),
        (("--accept", "--repeat"), 2, "not --accept and --repeat"),
        (("--accept",), 2, "--accept needs --target"),
        (("--reservoir",), 2, "--reservoir keeps --size samples"),
        (("--accept", "--target", "uniform", "--size", "3"), 2, "--size goes with --reservoir"),
        (("--reservoir", "--size", "3", "--shuffle"), 2, "--shuffle goes with --accept and"),
        (("--accept", "--target", "LGG:1"), 2, "--target has 'LGG:1'; write LGG=1,HGG=2"),
        (("--accept", "--target", "LGG=1,LGG=2"), 2, "names 'LGG' twice"),
        (("--accept", "--target", "LGG=nan"), 2, "--target has 'LGG=nan'"),
        (("--reservoir", "--size", "3.5"), 2, "--size has '3.5'"),
        (("--accept", "--target", "LGG=1"), 2, "'HGG', which was not declared"),
        (("--accept", "--target", "LGG=1,HGG=1", "--label", "cls"), 2, "has no field 'cls'"),
        (("--accept", "--target", "uniform", "--on-error", "stop"), 2, "on_error is 'stop'"),
        (("--accept", "--target", "uniform", "--shard-bytes", "0"), 2, "shard_bytes is 0"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    options: tuple[str, ...], status: int, problem: str, call: Call, tars: Path, tmp_path: Path
) -> None:
    answer = call("resample", f"{tars}/*.tar", *LABEL, *options, "--out", tmp_path / "o", "--json")
    assert answer.status == status
    assert problem in answer.document["error"]["message"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tars"]


def test_programs_start_only_when_allowed(call: Call, tars: Path, tmp_path: Path) -> None:
    options = ("--reservoir", "--size", 4, *LABEL, "--out", tmp_path / "out")
    url = f"pipe:cat {tars}/s-000.tar"
    refused = call("resample", url, *options)
    assert refused.status == 2
    assert "would start a program" in refused.err
    assert call("resample", url, *options, "--allow-pipe").status == 0
    uniform = ("--accept", "--target", "uniform", *LABEL, "--out", tmp_path / "b", "--allow-pipe")
    assert call("resample", url, *uniform).status == 0


def test_damage_stops_the_run_or_is_left_out_and_counted(
    call: Call, tars: Path, tmp_path: Path
) -> None:
    shard = tars / "s-001.tar"
    content = bytearray(shard.read_bytes())
    content[148] ^= 1  # the checksum of the first header
    shard.write_bytes(bytes(content))
    options = ("--reservoir", "--size", 100, *LABEL, "--out", tmp_path / "out")
    stopped = call("resample", f"{tars}/*.tar", *options)
    assert stopped.status == 1
    assert "s-001.tar" in stopped.err
    assert "byte 0" in stopped.err
    assert not (tmp_path / "out").exists()
    skipped = call("resample", f"{tars}/*.tar", *options, "--on-error", "skip", "--json")
    assert skipped.status == 0
    assert "the rest of 1 shards could not be read" in skipped.err
    counts = skipped.document["counts"]
    assert counts["shards_lost"] == 1
    assert counts["found"] == counts["damaged"] + counts["unlabelled"] + counts["read"]
    assert counts["read"] == counts["delivered"] + counts["rejected"] == counts["written"]
    assert [skip["url"] for skip in skipped.document["left_out"]] == [str(shard)]


def test_a_name_that_fits_no_plain_tar_is_refused_with_its_shard(
    call: Call, tmp_path: Path
) -> None:
    with webdataset.TarWriter(str(tmp_path / "long.tar")) as sink:
        sink.write({"__key__": "x" * 120, "cls": 1})
    options = ("--reservoir", "--size", 4, "--out", tmp_path / "out")
    answer = call("resample", tmp_path / "long.tar", *options)
    assert answer.status == 1
    assert "long.tar" in answer.err
    assert "cannot be written: a plain tar holds names" in answer.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.tar"]


def test_a_run_killed_at_work_leaves_nothing_and_the_same_command_starts_over(
    call: Call, tars: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    program = (
        "import os, signal, sys\n"
        "from streaming_balance.cli.app import run\n"
        "from streaming_balance.stream.writing import TarFolder\n"
        "publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "TarFolder.publish = publish\n"
        "run(sys.argv[1:])\n"
    )
    options = ["--accept", "--target", "uniform", *LABEL, "--out", str(out)]
    arguments = ["resample", f"{tars}/*.tar", *options, "--shard-bytes", "5000"]
    answer = subprocess.run([sys.executable, "-c", program, *arguments], check=False)
    assert answer.returncode == -signal.SIGKILL
    assert not out.exists()
    assert list(tmp_path.glob("**/*.json")) == []
    assert call(*arguments).status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tars"]


def test_its_own_output_is_not_read_and_replaced_at_once(
    call: Call, tars: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--accept", "--target", "uniform", *LABEL, "--out", out)
    assert call("resample", f"{tars}/*.tar", *options).status == 0
    before = folder_bytes(out)
    again = call("resample", f"{out}/*.tar", *options, "--overwrite")
    assert again.status == 2
    assert "the folder to be written" in again.err
    assert folder_bytes(out) == before


def test_people_are_told_the_shares_and_what_to_do_next(
    call: Call, tars: Path, tmp_path: Path
) -> None:
    options = ("--repeat", "--target", "uniform", *LABEL, "--out", tmp_path / "out")
    answer = call("resample", f"{tars}/*.tar", *options)
    assert "for training only" in answer.out
    assert "read 60 = delivered 60 + rejected 0; written 96 with 36 copies" in answer.out
    assert "streaming-balance index" in answer.out


def test_help_names_the_defaults_there_are() -> None:
    assert command.DEFAULT_SHARD_BYTES == DEFAULT_SHARD_BYTES
    assert command.DEFAULT_BUFFER_BYTES == DEFAULT_BUFFER_BYTES
    assert command.DEFAULT_WINDOW == DEFAULT_WINDOW
    assert command.RECORD_NAME == RECORD_NAME
    assert run(["resample", "--help"]) == 0
    assert "--split" not in inspect.signature(command.resample).parameters


def test_a_source_that_is_gone_at_the_end_of_the_pass_is_a_changed_one(
    tars: Path, tmp_path: Path
) -> None:
    class Remover:
        def begin(self, shards: Sequence[str]) -> None:
            self.last = Path(shards[-1])

        def add(self, sample: StreamSample) -> None:
            pass

        def finish(self) -> None:
            self.last.unlink()

    with pytest.raises(ShardError, match="was changed while it was read"):
        resample(
            f"{tars}/*.tar",
            lambda stream: stream.reservoir(3),
            out=tmp_path / "out",
            label="json:grade",
            observer=Remover(),
        )
    assert not (tmp_path / "out").exists()
