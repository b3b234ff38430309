"""A folder of tars is whole or absent, holds what was given byte for byte, and no clock."""

from __future__ import annotations

import errno
import hashlib
import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import webdataset

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.stream import writing
from streaming_balance.stream.seen import SeenKeys
from streaming_balance.stream.writing import RECORD_NAME, TarFolder

SAMPLES: list[dict[str, object]] = [
    {"__key__": f"site/P{number}", "image.npy": bytes([number]) * (700 * number), "cls": b"1"}
    for number in range(6)
]


def write(out: Path, samples: Sequence[Mapping[str, object]], shard_bytes: int = 1 << 20) -> Path:
    """Write samples and a small record."""
    with TarFolder(out, shard_bytes=shard_bytes, overwrite=False) as folder:
        for sample in samples:
            folder.add(sample)
        folder.publish({"seed": 0})
    return out


def names_in(folder: Path) -> list[str]:
    """All there is in a folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


# webdataset leaves the shards it read open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_gnu_tar_and_webdataset_read_what_was_given(tmp_path: Path) -> None:
    out = write(tmp_path / "out", SAMPLES)
    listed = subprocess.run(
        ["tar", "--list", "--file", out / "train-000000.tar"],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [
        f"{sample['__key__']}.{name}" for sample in SAMPLES for name in ("image.npy", "cls")
    ]
    assert listed.stdout.split() == expected
    assert listed.stderr == ""
    read = list(webdataset.WebDataset(str(out / "train-000000.tar"), shardshuffle=False))
    kept = [{name: sample[name] for name in ("__key__", "image.npy", "cls")} for sample in read]
    assert kept == SAMPLES


def test_tars_are_closed_before_they_grow_too_large_and_are_listed_with_their_digests(
    tmp_path: Path,
) -> None:
    out = write(tmp_path / "out", SAMPLES, shard_bytes=6000)
    record = json.loads((out / RECORD_NAME).read_text())
    assert record["seed"] == 0
    listed = {tar["name"]: tar for tar in record["shards"]}
    assert names_in(out) == sorted([RECORD_NAME, *listed])
    assert len(listed) > 2
    for name, tar in listed.items():
        content = (out / name).read_bytes()
        assert (tar["bytes"], tar["sha256"]) == (
            len(content),
            hashlib.sha256(content).hexdigest(),
        )
        assert len(content) <= 6000 or tar["samples"] == 1
        with tarfile.open(out / name) as archive:
            assert len(archive.getmembers()) == 2 * tar["samples"]
    assert sum(tar["samples"] for tar in listed.values()) == len(SAMPLES)


def test_the_same_samples_give_the_same_bytes_at_any_time_and_place(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", SAMPLES, 6000), write(tmp_path / "b", SAMPLES, 6000)
    assert names_in(first) == names_in(second)
    for name in names_in(first):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_copies_of_a_sample_get_keys_of_their_own(tmp_path: Path) -> None:
    samples = [{"__key__": key, "cls": b"0"} for key in ("P1", "./P2", "P1", "./P2", "P1")]
    out = write(tmp_path / "out", samples)
    with tarfile.open(out / "train-000000.tar") as archive:
        assert archive.getnames() == [
            *("P1.cls", "P2.cls", "P1__copy1.cls", "P2__copy1.cls", "P1__copy2.cls")
        ]


@pytest.mark.parametrize("keys", [("P1", "P1", "P1__copy1"), ("P1__copy1", "P1", "P1")])
def test_a_sample_named_like_a_copy_of_another_one_is_refused(
    keys: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(ShardError, match=r"would be written as 'P1__copy1', but so was another"):
        write(tmp_path / "out", [{"__key__": key, "cls": b"0"} for key in keys])


@pytest.mark.parametrize("key", ["x" * 97, "a/" + "x" * 120, "Pätient", "../P1", "P\\1"])
def test_names_that_fit_no_plain_header_are_refused_with_shard_and_key(
    key: str, tmp_path: Path
) -> None:
    sample = {"__key__": key, "__url__": "their.tar", "cls": b"0"}
    with pytest.raises(ShardError) as refusal:
        write(tmp_path / "out", [sample])
    assert "their.tar" in str(refusal.value)
    assert repr(key) in str(refusal.value)
    assert "PAX" in str(refusal.value)
    assert names_in(tmp_path) == []


def test_names_up_to_the_last_character_that_fits_are_written(tmp_path: Path) -> None:
    keys = ["x" * 96, "d" * 155 + "/" + "x" * 96]
    out = write(tmp_path / "out", [{"__key__": key, "cls": b"0"} for key in keys])
    with tarfile.open(out / "train-000000.tar") as archive:
        assert archive.getnames() == [key + ".cls" for key in keys]


def test_decoded_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'cls' is int, not bytes"):
        write(tmp_path / "out", [{"__key__": "P1", "cls": 1}])


def test_nothing_is_left_where_nothing_was_added(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not one sample went on"):
        write(tmp_path / "out", [])
    assert names_in(tmp_path) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"holds 'notes\.txt', which no earlier resample"):
            TarFolder(out, shard_bytes=1 << 20, overwrite=overwrite)
    assert names_in(tmp_path) == ["out"]
    assert (out / "notes.txt").read_text() == "mine"


def test_a_mount_point_is_refused_before_anything_is_read() -> None:
    # /proc is one everywhere; its parent would take the work folder.
    with pytest.raises(ConfigError, match="/proc is a mount point; name a folder within it"):
        TarFolder(Path("/proc"), shard_bytes=1 << 20, overwrite=False)


def test_an_earlier_run_is_replaced_only_when_asked_and_only_once_the_new_one_is_whole(
    tmp_path: Path,
) -> None:
    out = write(tmp_path / "out", SAMPLES, 6000)
    before = {name: (out / name).read_bytes() for name in names_in(out)}
    with pytest.raises(ConfigError, match="--overwrite to replace them"):
        write(out, SAMPLES)
    folder = TarFolder(out, shard_bytes=1 << 20, overwrite=True)
    folder.add(SAMPLES[0])
    folder.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert {name: (out / name).read_bytes() for name in names_in(out)} == before
    with TarFolder(out, shard_bytes=1 << 20, overwrite=True) as folder:
        folder.add(SAMPLES[0])
        folder.publish({})
    assert names_in(out) == [RECORD_NAME, "train-000000.tar"]
    assert names_in(tmp_path) == ["out"]


def test_what_was_to_be_replaced_comes_back_where_the_new_folder_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "out", SAMPLES, 6000)
    before = {name: (out / name).read_bytes() for name in names_in(out)}
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with TarFolder(out, shard_bytes=1 << 20, overwrite=True) as folder:
        folder.add(SAMPLES[0])
        with pytest.raises(ShardError, match="cannot be replaced: Input/output error"):
            folder.publish({})
    assert {name: (out / name).read_bytes() for name in names_in(out)} == before
    assert names_in(tmp_path) == ["out"]


def test_what_a_killed_run_was_about_to_replace_is_not_lost(tmp_path: Path) -> None:
    out = write(tmp_path / "out", SAMPLES, 6000)
    before = {name: (out / name).read_bytes() for name in names_in(out)}
    # As it stands between the two renames.
    (tmp_path / ".out.resample" / "new").mkdir(parents=True)
    out.rename(tmp_path / ".out.resample" / "old")
    with pytest.raises(ConfigError, match="--overwrite to replace them"):
        write(out, SAMPLES)
    assert {name: (out / name).read_bytes() for name in names_in(out)} == before
    with TarFolder(out, shard_bytes=1 << 20, overwrite=True) as folder:
        folder.add(SAMPLES[0])
        folder.publish({})
    assert names_in(out) == [RECORD_NAME, "train-000000.tar"]
    assert names_in(tmp_path) == ["out"]


def test_more_samples_than_can_be_told_apart_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SeenKeys", partial(SeenKeys, max_bytes=16 << 10))
    samples = [{"__key__": f"P{number}", "cls": b"1"} for number in range(769)]
    write(tmp_path / "most", samples[:768])
    with pytest.raises(ShardError, match="sample 'P768' is one more than the 768 whose keys"):
        write(tmp_path / "more", samples)
    assert names_in(tmp_path) == ["most"]


def test_two_writers_of_one_folder_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with TarFolder(out, shard_bytes=1 << 20, overwrite=False) as folder:
        folder.add(SAMPLES[0])
        with pytest.raises(ConfigError, match="is being packed by process"):
            TarFolder(out, shard_bytes=1 << 20, overwrite=False)


WRITES_AND_DIES = """
import os, signal, sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from streaming_balance.stream import writing
folder = writing.TarFolder(Path(sys.argv[1]), shard_bytes=2048, overwrite=False)
for number in range(4):
    folder.add({"__key__": f"P{number}", "cls": b"1"})
if sys.argv[2] == "before the folder gets its name":
    Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    folder.publish({})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["while tars are written", "before the folder gets its name"])
def test_a_killed_run_leaves_no_folder_and_the_next_one_starts_clean(
    moment: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    answer = subprocess.run([sys.executable, "-c", WRITES_AND_DIES, out, moment], check=False)
    assert answer.returncode == -signal.SIGKILL
    assert not out.exists()
    # What is left is hidden, so that no pattern of shards finds it.
    assert names_in(tmp_path) == [".out.resample"]
    write(out, SAMPLES)
    assert names_in(tmp_path) == ["out"]
    assert names_in(out) == [RECORD_NAME, "train-000000.tar"]
