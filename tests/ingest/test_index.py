"""Foreign shards indexed in place: what is found where, what is refused, what a crash leaves."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from streaming_balance.errors import BalanceError, ConfigError, ShardError, SplitError
from streaming_balance.ingest.index import index_shards
from streaming_balance.ingest.index_builder import IndexBuilder, IndexReport
from streaming_balance.ingest.index_rules import IndexRules
from streaming_balance.ingest.pack import write_shards
from streaming_balance.storage.layout import MANIFEST_NAME, TABLE_NAME
from streaming_balance.storage.manifest import json_checksum
from streaming_balance.storage.shards import open_shards
from streaming_balance.storage.verify import verify_shards
from streaming_balance.stream.tarstream import read_samples
from tests.building import pack, random_samples

Members = Mapping[str, bytes]


def npy(array: NDArray[Any]) -> bytes:
    """Write an array as numpy does."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def write_tar(path: Path, members: Members, *, tar_format: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar as Python does, a PAX header before every member where the format has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            info.mtime = 1.5  # half a second needs a PAX header
            tar.addfile(info, io.BytesIO(payload))
    return path


def samples(*keys: str, label: str = "1") -> dict[str, bytes]:
    """Give members of small, different images and a label for each key."""
    members = {}
    for number, key in enumerate(keys):
        values = np.frombuffer(hashlib.sha256(key.encode()).digest()[:12], np.uint8) + number
        members[f"{key}.npy"] = npy(values.reshape(3, 4))
        members[f"{key}.cls"] = label.encode()
    return members


def oracle(path: Path) -> dict[str, tuple[int, bytes]]:
    """Say where Python's own tarfile finds the files of a tar, and what they hold."""
    with tarfile.open(path) as tar:
        return {
            member.name: (member.offset_data, tar.extractfile(member).read())  # type: ignore[union-attr]
            for member in tar.getmembers()
            if member.isfile()
        }


def placed(out: Path, split: str = "train") -> dict[str, tuple[int, int, int]]:
    """Give offset, size and xxh3 of every member of an index, by its name in the tar."""
    shards = open_shards(out)
    fields = (*shards.arrays, *(shards.manifest.kept_members or ()))
    found = {}
    for field in fields:
        places = shards.table.members(split, field)
        names = shards.table.member_names(split, field)
        for row in np.flatnonzero(places.present).tolist():
            found[str(names[row])] = (
                int(places.offset[row]),
                int(places.stored_bytes[row]),
                int(places.xxh3[row]),
            )
    return found


def expected(path: Path) -> dict[str, tuple[int, int, int]]:
    """Give the same as the oracle sees it."""
    return {
        name: (offset, len(payload), xxhash.xxh3_64_intdigest(payload))
        for name, (offset, payload) in oracle(path).items()
    }


REAL = {
    "W02_wdsjl_sample/sample.tar": ("cls", 90),
    "W03_webdataset_mpdata/mpdata.tar": (None, 100),
    "W04_aistore_small_mnist/small-mnist-3.tar": ("cls", 3),
    "W05_lhotse_features/features.000000.tar": ("json:type", 2),
    "W06_wenet_shard/shards_000000000.tar": (None, 2),
    "W07_torchdata_fakedata/json.tar": (None, 3),
    "W07_torchdata_fakedata/csv.tar": (None, 3),
    "W01_webdataset_compressed/compressed.tar": (None, 3),
}


@pytest.mark.parametrize("name", REAL)
def test_real_shards_of_other_people_are_placed_where_tarfile_finds_them(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    label, count = REAL[name]
    path = shared_data / "wds_tar" / name
    if label is None:
        table = tmp_path / "labels.csv"
        keys = [sample.key for sample in read_samples(path)]
        table.write_text("key,label\n" + "".join(f"{key},a\n" for key in keys))
        label = f"csv:{table}"
    report = index_shards(path, out=tmp_path / "index", label=label)
    assert (report.found, report.indexed, report.rejected) == (count, count, ())
    assert placed(tmp_path / "index") == expected(path)
    listed = json.loads((shared_data / "expected.json").read_text())[f"wds_tar/{name}"]
    offsets = {member["name"]: member.get("offset_data") for member in listed["members"]}
    for member, (offset, _, _) in placed(tmp_path / "index").items():
        assert offsets.get(member, offset) == offset
    assert report.manifest.shards[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert verify_shards(tmp_path / "index").ok


def test_real_classes_are_counted_as_they_are(shared_data: Path, tmp_path: Path) -> None:
    name = "wds_tar/W02_wdsjl_sample/sample.tar"
    counts = json.loads((shared_data / "expected.json").read_text())[name]["cls_counts"]
    index_shards(shared_data / name, out=tmp_path)
    shards = open_shards(tmp_path)
    assert shards.classes == [str(number) for number in range(10)]
    found = np.bincount(shards.labels("train"), minlength=10).tolist()
    assert dict(zip(shards.classes, found, strict=True)) == counts


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_headers_before_a_payload_shift_it_and_are_followed(
    tar_format: int, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "a.tar", samples("P1", "b" * 120 + "/P2"), tar_format=tar_format)
    index_shards(path, out=tmp_path / "index")
    assert placed(tmp_path / "index") == expected(path)


def test_folders_and_files_without_a_key_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, {"README": b"text", **samples("P1"), "x/LICENSE": b"more", **samples("P2")})
    index_shards(path, out=tmp_path / "index")
    wanted = {name: place for name, place in expected(path).items() if "." in name}
    assert placed(tmp_path / "index") == wanted


def test_nothing_is_copied_or_written_beside_the_tars(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "tars" / "a.tar", samples("P1", "P2"))
    before = path.stat().st_mtime_ns
    index_shards(path, out=tmp_path / "index")
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mtime_ns == before
    assert {entry.name for entry in (tmp_path / "index").iterdir()} == {MANIFEST_NAME, TABLE_NAME}


def test_an_index_of_our_own_shards_has_the_digest_of_the_pack(tmp_path: Path) -> None:
    manifest = pack(tmp_path / "pack", random_samples(9), shard_bytes=4096)
    report = index_shards(
        str(tmp_path / "pack" / "train-*.tar"),
        out=tmp_path / "index",
        label="json:label",
        patient="json:patient",
        classes=manifest.classes,
    )
    assert report.digest == manifest.digest


@pytest.mark.parametrize(
    ("tar", "out", "name"),
    [
        ("home/index/a.tar", "home/index", "a.tar"),
        ("home/index/deep/a.tar", "home/index", "deep/a.tar"),
        ("home/tars/a.tar", "home/index", "../tars/a.tar"),
        ("far/away/a.tar", "home/index", "{root}/far/away/a.tar"),
    ],
)
def test_a_tar_nearby_is_found_from_the_index_and_another_by_its_absolute_path(
    tar: str, out: str, name: str, tmp_path: Path
) -> None:
    write_tar(tmp_path / tar, samples("P1"))
    report = index_shards(tmp_path / tar, out=tmp_path / out)
    assert report.manifest.shards[0].name == name.format(root=tmp_path)
    assert open_shards(tmp_path / out).read("train", 0)["image"].shape == (3, 4)


def test_a_path_that_no_manifest_can_hold_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "line\nbreak.tar", samples("P1"))
    with pytest.raises(ConfigError, match="a path that no manifest can hold"):
        index_shards(path, out=tmp_path / "i")


def test_a_table_cut_short_is_refused_by_the_same_command(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("P1"))
    index_shards(path, out=tmp_path / "i")
    (tmp_path / "i" / TABLE_NAME).write_bytes(b"")
    with pytest.raises(ShardError, match=r"index is damaged.*--overwrite"):
        index_shards(path, out=tmp_path / "i")
    assert index_shards(path, out=tmp_path / "i", overwrite=True).indexed == 1


def test_labels_may_be_nested_in_json_and_numbers_stay_numbers(tmp_path: Path) -> None:
    members = {}
    for key, grade in (("a", 10), ("b", 2), ("c", 2.0), ("d", "2")):
        members[f"{key}.json"] = json.dumps({"x": {"grade": grade}, "who": {"id": key}}).encode()
    path = write_tar(tmp_path / "a.tar", members)
    index_shards(path, out=tmp_path / "i", label="json:x.grade", patient="json:who.id")
    shards = open_shards(tmp_path / "i")
    assert shards.classes == ["2", "10"]
    assert shards.labels("train").tolist() == [0, 0, 0, 1]
    assert shards.patients("train").tolist() == ["b", "c", "d", "a"]


def test_a_table_gives_labels_patients_splits_and_strata(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a", "b", "c", "d"))
    table = tmp_path / "labels.csv"
    table.write_text(
        "key,label,patient,split,site\n"
        "a,HGG,P1,train,x\nb,LGG,P2,val,y\nc,HGG,P1,train,y\nd,HGG,P3,val,x\ne,LGG,P4,val,x\n"
    )
    report = index_shards(path, out=tmp_path / "i", label=f"csv:{table}", classes="LGG,HGG")
    shards = open_shards(tmp_path / "i")
    assert (shards.splits, shards.classes) == (("train", "val"), ["LGG", "HGG"])
    assert shards.keys("val").tolist() == ["b", "d"]
    assert shards.patients("train").tolist() == ["P1", "P1"]
    assert shards.column("val", "site").tolist() == ["y", "x"]
    assert [entry.split for entry in report.manifest.shards] == ["train", "val"]
    assert any("1 row(s) of the table name no sample: 'e'" in text for text in report.warnings)
    assert verify_shards(tmp_path / "i").ok


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a", "b"))
    table = tmp_path / "labels.csv"
    table.write_text("key,label,patient,split\na,0,P1,train\nb,0,P1,val\n")
    with pytest.raises(SplitError, match="P1"):
        index_shards(path, out=tmp_path / "i", label=f"csv:{table}")
    assert not (tmp_path / "i" / MANIFEST_NAME).exists()


def test_the_same_voxels_in_two_splits_are_refused(tmp_path: Path) -> None:
    image = npy(np.arange(6, dtype=np.int16).reshape(2, 3))
    path = write_tar(tmp_path / "a.tar", {"a.npy": image, "b.npy": image})
    table = tmp_path / "labels.csv"
    table.write_text("key,label,split\na,0,train\nb,0,val\n")
    with pytest.raises(SplitError, match="identical voxels"):
        index_shards(path, out=tmp_path / "i", label=f"csv:{table}")


def test_without_a_patient_every_key_is_its_own_and_that_is_said(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a", "b"))
    report = index_shards(path, out=tmp_path / "i")
    assert open_shards(tmp_path / "i").patients("train").tolist() == ["a", "b"]
    assert any("every key counts as a patient of its own" in text for text in report.warnings)
    written = json.loads((tmp_path / "i" / MANIFEST_NAME).read_text())
    assert written["foreign"] == {
        "keys": "webdataset",
        "label": "cls",
        "patient": None,
        "members": ["cls"],
    }


def test_missing_labels_are_counted_and_the_first_keys_named(tmp_path: Path) -> None:
    members = samples("a", "b", "c") | {f"{key}.txt": b"x" for key in "defghijk"}
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ConfigError, match=r"8 of 11 samples have no label \(cls\): 'd'.*3 more"):
        index_shards(path, out=tmp_path / "i")


def test_missing_patients_are_refused_too(tmp_path: Path) -> None:
    members = samples("a") | {"a.json": b'{"p": "P1"}'} | samples("b") | {"b.json": b"{}"}
    ordered = dict(sorted(members.items()))
    path = write_tar(tmp_path / "a.tar", ordered)
    with pytest.raises(ConfigError, match=r"1 of 2 samples have no patient \(json:p\): 'b'"):
        index_shards(path, out=tmp_path / "i", patient="json:p")


def test_a_label_that_is_no_text_names_its_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.cls": b"\xff\xfe"})
    with pytest.raises(ShardError, match=r"a\.tar: sample 'a' at byte 0: its label cannot be read"):
        index_shards(path, out=tmp_path / "i")


@pytest.mark.parametrize("second", ["a.tar", "b.tar"])
def test_a_key_that_comes_twice_is_refused_with_both_places(second: str, tmp_path: Path) -> None:
    keys = ("x", "y", "x") if second == "a.tar" else ("x", "y")
    members = [(name, payload) for key in keys for name, payload in samples(key).items()]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    if second == "b.tar":
        write_tar(tmp_path / "b.tar", samples("x"))
    with pytest.raises(ShardError, match=r"'x'.*byte \d+.*byte \d+ .*unique_keys='shard'"):
        index_shards(str(tmp_path / "*.tar"), out=tmp_path / "i")


def test_keys_that_start_anew_in_each_shard_are_told_apart_by_its_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples("000", "001"))
    write_tar(tmp_path / "b.tar", {"000.npy": npy(np.eye(3)), "000.cls": b"0"})
    index_shards(str(tmp_path / "*.tar"), out=tmp_path / "i", unique_keys="shard")
    shards = open_shards(tmp_path / "i")
    assert shards.keys("train").tolist() == ["b/000", "a/000", "a/001"]
    np.testing.assert_array_equal(shards.read("train", 0)["image"], np.eye(3))


def test_shards_of_one_name_are_refused_where_it_tells_keys_apart(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "t.tar", samples("000"))
    write_tar(tmp_path / "b" / "t.tar", samples("000", label="2"))
    with pytest.raises(ShardError, match=r"so must the names of shards\. Rename one"):
        index_shards(str(tmp_path / "*/t.tar"), out=tmp_path / "i", unique_keys="shard")


@pytest.mark.parametrize("kind", ["link", "hard link", "copy"])
def test_a_tar_under_two_names_is_refused(kind: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"000.txt": b"x", "000.cls": b"0"})
    if kind == "link":
        (tmp_path / "b.tar").symlink_to(path)
    elif kind == "hard link":
        (tmp_path / "b.tar").hardlink_to(path)
    else:
        shutil.copy(path, tmp_path / "b.tar")
    with pytest.raises(ShardError, match=r"b\.tar and .*a\.tar are the same.*count twice"):
        index_shards(str(tmp_path / "*.tar"), out=tmp_path / "i", unique_keys="shard")
    assert not (tmp_path / "i" / MANIFEST_NAME).exists()


def test_keys_are_kept_as_they_are_folders_letters_and_case(tmp_path: Path) -> None:
    keys = ["dir/P 1", "dir/p 1", "Größe"]
    path = write_tar(tmp_path / "a.tar", samples(*keys))
    index_shards(path, out=tmp_path / "i")
    assert open_shards(tmp_path / "i").keys("train").tolist() == sorted(keys)


def test_keys_with_dots_are_cut_at_the_last_one_when_asked(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("1.2.840", "1.2.841"))
    index_shards(path, out=tmp_path / "i", keys="last_dot")
    assert open_shards(tmp_path / "i").keys("train").tolist() == ["1.2.840", "1.2.841"]


def test_a_cut_shard_is_refused_and_leaves_no_data_set(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a", "b"))
    whole = path.read_bytes()
    for end in range(512, len(whole) - 9000, 512):
        path.write_bytes(whole[:end])
        with pytest.raises(ShardError, match=r"a\.tar"):
            index_shards(path, out=tmp_path / "i")
    assert not (tmp_path / "i" / MANIFEST_NAME).exists()


@pytest.mark.parametrize(
    ("beginning", "name"), [(b"\x1f\x8b\x08", "a.tar.gz"), (b"\x28\xb5\x2f\xfd", "a.tar")]
)
def test_compressed_tars_are_refused_with_what_to_do(
    beginning: bytes, name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(beginning + bytes(600))
    with pytest.raises(ConfigError, match=r"compressed.*gunzip.*stream"):
        index_shards(path, out=tmp_path / "i")


@pytest.mark.parametrize(
    "url", ["https://host/a.tar", "pipe:cat a.tar", "s3://bucket/a.tar", "-", io.BytesIO()]
)
def test_what_is_not_on_local_disk_is_refused_with_what_to_do(url: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be indexed in place.*Copy.*stream"):
        index_shards([url], out=tmp_path / "i")


def index_of(path: Path, out: Path, **settings: Any) -> IndexReport:
    return index_shards(path, out=out, label="json:y", **settings)


def arrays(**fields: NDArray[Any]) -> dict[str, bytes]:
    """Give the members of one sample with these arrays."""
    members = {f"a.{name.replace('_', '.')}": npy(array) for name, array in fields.items()}
    return members | {"a.json": b'{"y": 1}'}


IMAGE, MASK = np.full((2, 3), 7, np.float32), np.ones((2, 3), np.uint8)


@pytest.mark.parametrize(
    ("fields", "settings", "image", "seg"),
    [
        ({"npy": IMAGE}, {}, IMAGE, None),
        ({"image_npy": IMAGE, "other_npy": MASK}, {}, IMAGE, None),
        ({"image_npy": IMAGE, "seg_npy": MASK}, {}, IMAGE, MASK),
        ({"scan_npy": IMAGE, "seg_npy": MASK}, {}, IMAGE, MASK),
        ({"x_npy": IMAGE, "y_npy": MASK}, {"image": "x"}, IMAGE, None),
        ({"x_npy": IMAGE, "y_npy": MASK}, {"image": "x.npy", "seg": "y.npy"}, IMAGE, MASK),
        ({"npy": IMAGE}, {"image": "none"}, None, None),
    ],
)
def test_image_and_mask_are_found_by_name_or_by_being_alone_or_by_asking(
    fields: dict[str, Any], settings: dict[str, str], image: Any, seg: Any, tmp_path: Path
) -> None:
    index_of(write_tar(tmp_path / "a.tar", arrays(**fields)), tmp_path / "i", **settings)
    sample = open_shards(tmp_path / "i").read("train", 0)
    for name, wanted in (("image", image), ("seg", seg)):
        if wanted is None:
            assert name not in sample
        else:
            np.testing.assert_array_equal(sample[name], wanted)
            assert sample[name].dtype == wanted.dtype


def test_several_arrays_that_may_be_the_image_must_be_told_apart(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", arrays(x_npy=IMAGE, y_npy=MASK))
    with pytest.raises(ConfigError, match=r"arrays x\.npy, y\.npy; say which.*--image x\.npy"):
        index_of(path, tmp_path / "i")


def test_an_image_field_that_nobody_has_or_decodes_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": b"x", "a.json": b'{"y": 1}'})
    with pytest.raises(ConfigError, match="no decoder reads png"):
        index_of(path, tmp_path / "i", image="png")
    with pytest.raises(ConfigError, match=r"image is 'pgn'; fields there: json, png.*mean 'png'"):
        index_of(path, tmp_path / "i", image="pgn")


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (npy(np.asfortranarray(np.ones((2, 3)))), "Fortran order"),
        (npy(np.ones((2, 3), ">i2")), "little-endian"),
        (npy(np.ones(3)), r"shape \(3,\)"),
        (npy(np.ones((2, 0))), r"shape \(2, 0\)"),
        (b"no array", "no .npy header"),
        (npy(np.ones((2, 3)))[:-1], ""),
    ],
)
def test_an_array_that_is_no_image_is_listed_with_the_reason(
    array: bytes, reason: str, tmp_path: Path
) -> None:
    members = {**samples("a"), "b.npy": array, "b.cls": b"0", **samples("c")}
    report = index_shards(write_tar(tmp_path / "a.tar", members), out=tmp_path / "i")
    assert (report.found, report.indexed, len(report.rejected)) == (3, 2, 1)
    assert "'b.npy'" in report.rejected[0].reason
    assert re.search(reason, report.rejected[0].reason)


def test_a_sample_without_the_image_of_the_others_is_listed(tmp_path: Path) -> None:
    members = {**samples("a"), "b.cls": b"0"}
    report = index_shards(write_tar(tmp_path / "a.tar", members), out=tmp_path / "i")
    assert [case.reason for case in report.rejected] == ["has no npy, only cls"]


def test_arrays_that_are_all_no_images_say_how_to_keep_them(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", arrays(npy=np.ones(3)))
    with pytest.raises(ShardError, match=r"nothing indexed.*--image none"):
        index_of(path, tmp_path / "i")
    assert index_of(path, tmp_path / "i", image="none").indexed == 1


def test_pickles_are_bytes_like_any_other_and_never_opened(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.pyd": b"cos\nsystem\n", "a.json": b'{"y": 1}'})
    index_of(path, tmp_path / "i")
    assert open_shards(tmp_path / "i").read("train", 0)["pyd"].tobytes() == b"cos\nsystem\n"


def test_the_same_command_again_leaves_a_complete_index_alone(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a", "b"))
    first = index_shards(path, out=tmp_path / "i")
    before = (tmp_path / "i" / MANIFEST_NAME).stat()
    second = index_shards(path, out=tmp_path / "i")
    assert (first.is_new, second.is_new, second.digest) == (True, False, first.digest)
    after = (tmp_path / "i" / MANIFEST_NAME).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_another_command_is_refused_unless_it_may_overwrite(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a", "b"))
    index_shards(path, out=tmp_path / "i")
    with pytest.raises(ConfigError, match=r"index of other shards or settings.*--overwrite"):
        index_shards(path, out=tmp_path / "i", split="val")
    assert open_shards(tmp_path / "i").splits == ("train",)
    index_shards(path, out=tmp_path / "i", split="val", overwrite=True)
    assert open_shards(tmp_path / "i").splits == ("val",)


def test_a_changed_table_of_labels_is_another_command(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a"))
    table = tmp_path / "labels.csv"
    table.write_text("key,label\na,0\n")
    index_shards(path, out=tmp_path / "i", label=f"csv:{table}")
    table.write_text("key,label\na,1\n")
    with pytest.raises(ConfigError, match="other shards or settings"):
        index_shards(path, out=tmp_path / "i", label=f"csv:{table}")


def test_an_index_never_replaces_a_packed_data_set(tmp_path: Path) -> None:
    pack(tmp_path, random_samples(3))
    with pytest.raises(ConfigError, match="holds a packed data set"):
        index_shards(str(tmp_path / "*.tar"), out=tmp_path, overwrite=True, label="json:label")
    assert verify_shards(tmp_path).ok


def test_packing_over_an_index_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a"))
    index_shards(path, out=tmp_path / "i")
    table = tmp_path / "scans.csv"
    (tmp_path / "p.npy").write_bytes(npy(IMAGE))
    table.write_text("patient,label,image\nP1,0,p.npy\n")
    with pytest.raises(ConfigError, match="holds a complete data set"):
        write_shards(table, tmp_path / "i")


@pytest.mark.parametrize("victim", [TABLE_NAME, MANIFEST_NAME])
def test_a_crash_before_the_manifest_leaves_no_data_set_and_the_same_command_ends_it(
    victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a", "b"))
    whole = index_shards(path, out=tmp_path / "whole" / "i")
    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        if Path(target).name == victim:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            index_shards(path, out=tmp_path / "i")
    with pytest.raises(ShardError, match="unfinished"):
        open_shards(tmp_path / "i")
    again = index_shards(path, out=tmp_path / "i")
    assert (again.is_new, again.digest) == (True, whole.digest)
    assert verify_shards(tmp_path / "i").ok
    assert {entry.name for entry in (tmp_path / "i").iterdir()} == {MANIFEST_NAME, TABLE_NAME}


def test_a_table_whose_manifest_was_lost_is_not_taken_for_a_crashed_index(tmp_path: Path) -> None:
    pack(tmp_path / "i", random_samples(3))
    (tmp_path / "i" / MANIFEST_NAME).unlink()
    path = write_tar(tmp_path / "a.tar", samples("a"))
    with pytest.raises(ConfigError, match="sample table without its manifest"):
        index_shards(path, out=tmp_path / "i")


def test_samples_that_pass_make_the_same_index(tmp_path: Path) -> None:
    """As they come from a stream, whose payloads are read by place or come with a header."""
    first = write_tar(tmp_path / "a.tar", samples("a", "b"))
    large = {"c.npy": npy(np.zeros((90, 91, 92), np.int16)), "c.cls": b"0"}
    second = write_tar(tmp_path / "b.tar", large, tar_format=tarfile.USTAR_FORMAT)
    rules = IndexRules(patient=None)
    with IndexBuilder(tmp_path / "passing", rules) as builder:
        for _ in range(2):  # a second epoch brings nothing new
            for sample in read_samples([first, second]):
                builder.add(sample)
        report = builder.finish()
    direct = index_shards([first, second], out=tmp_path / "direct")
    assert report.manifest == direct.manifest


def test_a_key_that_passes_again_from_another_shard_is_refused(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "a.tar", samples("x"))
    second = write_tar(tmp_path / "b.tar", samples("x"))
    with IndexBuilder(tmp_path / "i") as builder:
        builder.add(next(read_samples(first)))
        with pytest.raises(ShardError, match=r"b\.tar: the key 'x' stands at byte 0.*a\.tar"):
            builder.add(next(read_samples(second)))


def test_a_sample_that_cannot_be_read_again_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a"))
    with (
        IndexBuilder(tmp_path / "i") as builder,
        path.open("rb") as file,
        pytest.raises(ConfigError, match="plain tars on local disk"),
    ):
        builder.add(next(read_samples(file)))


def test_leaving_before_the_end_leaves_an_earlier_index_as_it_was(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a"))
    index_shards(path, out=tmp_path / "i")
    with IndexBuilder(tmp_path / "i", overwrite=True) as builder:
        builder.add(next(read_samples(path)))
    assert verify_shards(tmp_path / "i").ok


def test_a_shard_that_grows_meanwhile_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a"))
    with IndexBuilder(tmp_path / "i") as builder:
        for sample in read_samples(path):
            builder.add(sample)
        with path.open("ab") as file:
            file.write(bytes(512))
        with pytest.raises(ShardError, match="changed meanwhile"):
            builder.finish()


def test_a_shard_that_changes_after_it_was_digested_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with IndexBuilder(tmp_path / "i") as builder:
        builder.add(next(read_samples(path)))
        builder.add_shard(path, num_bytes=path.stat().st_size, sha256=digest)
        path.unlink()
        with pytest.raises(ShardError, match="now None: it was changed meanwhile"):
            builder.finish()


def test_a_crash_while_an_index_is_replaced_leaves_no_mixture_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a"))
    index_shards(path, out=tmp_path / "i")

    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        if target.name == TABLE_NAME:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            index_shards(path, out=tmp_path / "i", split="val", overwrite=True)
    with pytest.raises(ShardError, match="unfinished"):
        open_shards(tmp_path / "i")
    assert index_shards(path, out=tmp_path / "i", split="val").is_new


def test_two_indexers_of_one_folder_are_told_apart(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a"))
    with IndexBuilder(tmp_path / "i"), pytest.raises(ConfigError, match="process"):
        index_shards(path, out=tmp_path / "i")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"label": "json"}, "label is 'json'"),
        ({"label": "json:a..b"}, "name a field"),
        ({"patient": "who"}, "patient is 'who'"),
        ({"axes": "HWC"}, "axes is 'HWC'"),
        ({"keys": "first"}, "keys is 'first'"),
        ({"unique_keys": "all"}, "unique_keys is 'all'"),
        ({"split": "a b"}, "split 'a b'"),
        ({"classes": "1,1"}, "each must be named once"),
        ({"classes": "0"}, "label '1' of 1 sample"),
        ({"train_splits": ["val"]}, "train_splits"),
        ({"classes": []}, "classes is"),
        ({"classes": 5}, "classes is"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    settings: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a"))
    with pytest.raises(BalanceError, match=problem):
        index_shards(path, out=tmp_path / "i", **settings)


def test_samples_whose_fields_differ_without_end_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"a{n}.x{n}.jpg": b"x" for n in range(70)})
    with pytest.raises(ConfigError, match=r"over 64.*last_dot"):
        index_shards(path, out=tmp_path / "i")


def test_a_manifest_that_says_impossible_things_of_shards_is_refused(
    tmp_path: Path,
) -> None:
    path = write_tar(tmp_path / "a.tar", samples("a"))
    index_shards(path, out=tmp_path / "i")
    shutil.copytree(tmp_path / "i", tmp_path / "j")
    changes: tuple[tuple[Callable[[dict[str, Any]], object], str], ...] = (
        (lambda body: body["shards"][0].update(name="../../x.tar"), "no path of a shard"),
        (lambda body: body["shards"].append(dict(body["shards"][0])), "count different|twice"),
        (
            lambda body: body["shards"].append({**body["shards"][0], "samples": 0}),
            "listed twice for one split",
        ),
        (
            lambda body: body["shards"].append({**body["shards"][0], "samples": 0, "bytes": 1}),
            "listed twice|two sizes or digests",
        ),
        (lambda body: body["foreign"].update(members=["cls", "cls"]), "listed twice"),
        (lambda body: body["foreign"].update(members="cls"), "is no list"),
        (lambda body: body["foreign"].update(more=1), "foreign has the names"),
    )
    for change, problem in changes:
        body = json.loads((tmp_path / "i" / MANIFEST_NAME).read_text())
        del body["checksum"]
        change(body)
        body["checksum"] = json_checksum(body)
        (tmp_path / "j" / MANIFEST_NAME).write_text(json.dumps(body))
        with pytest.raises(ShardError, match=problem):
            open_shards(tmp_path / "j")
