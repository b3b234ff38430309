"""Faults met while training: named exactly, at the right batch, and nothing lost before it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from streaming_balance.errors import ShardError
from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import BalancedLoader, train_loader
from tests.training.cohorts import cohort, packed, run_python, take


def loader_of(shards: ShardSet, **options: object) -> BalancedLoader:
    """Build the loader most tests use."""
    return train_loader(
        shards,
        global_batch_size=4,
        balance="class_balanced",
        seed=6,
        num_threads=2,
        **options,  # type: ignore[arg-type]
    )


def victim_of(shards: ShardSet, step: int) -> tuple[int, Path, int]:
    """Choose a sample that first comes at a step; give its number, shard and byte offset."""
    with loader_of(shards) as loader:
        members = [batch["sample"].tolist() for batch in loader]
    earlier = set(itertools.chain(*members[:step]))
    sample = next(n for n in members[step] if n not in earlier)
    table = shards.table.members("train", "image")
    shard = shards.manifest.shards[int(table.shard[sample])]
    return sample, shards.path / shard.name, int(table.offset[sample])


def flip(path: Path, place: int) -> None:
    """Turn one bit, keeping size and times, as a failing disk does."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("codec", ["npy", "blosc"])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_flipped_bit_is_raised_at_its_batch_again_and_again_and_nothing_before_is_lost(
    tmp_path: Path, codec: str, step: int
) -> None:
    shards = packed(tmp_path / "cohort", cohort(), codec=codec, shard_bytes=8192)
    sample, path, offset = victim_of(shards, step)
    with loader_of(shards) as sound:
        expected = take(sound, 6)
    flip(path, offset + 140)
    key = shards.keys("train")[sample]
    with loader_of(open_shards(shards.path)) as loader:
        if step:
            assert take(loader, step) == expected[:step]
        for _ in range(3):
            with pytest.raises(ShardError) as error:
                next(iter(loader))
            text = str(error.value)
            assert str(path) in text
            assert f"sample '{key}'" in text
            assert f"byte {offset}" in text
            assert "streaming-balance verify" in text
            assert loader.state_dict()["position"] == {"epoch": 0, "step": step}
        flip(path, offset + 140)
        assert take(loader, 6 - step) == expected[step:]


def test_a_flipped_bit_is_raised_from_the_for_loop_in_evaluation_too(tmp_path: Path) -> None:
    shards = packed(tmp_path / "cohort", cohort())
    place = shards.table.members("val", "image")
    third = int(shards.packed_order("val")[2])
    path = shards.path / shards.manifest.shards[int(place.shard[third])].name
    flip(path, int(place.offset[third]) + 130)
    got = []
    with (
        eval_loader(shards, split="val", batch_size=1) as loader,
        pytest.raises(ShardError, match="V02"),
    ):
        got += [batch["key"][0] for batch in loader]
    with eval_loader(shards, split="val", batch_size=1) as loader:
        assert [batch["key"][0] for batch in itertools.islice(loader, 2)] == ["V00", "V01"]


def test_a_shard_cut_while_training_is_an_error_with_its_place(tmp_path: Path) -> None:
    shards = packed(tmp_path / "cohort", cohort(), shard_bytes=1 << 20)
    path = shards.path / shards.manifest.shards[0].name
    with loader_of(shards, prefetch_bytes=0) as loader:
        next(iter(loader))
        os.truncate(path, 4096)
        with pytest.raises(ShardError, match=r"train-000000\.tar.*short read"):
            take(loader, 20)


def test_a_shard_removed_before_training_is_named(tmp_path: Path) -> None:
    shards = packed(tmp_path / "cohort", cohort(), shard_bytes=1 << 20)
    (shards.path / shards.manifest.shards[0].name).unlink()
    with loader_of(shards) as loader, pytest.raises(ShardError, match=r"train-000000\.tar is miss"):
        next(iter(loader))


@pytest.fixture
def small_path(tmp_path: Path) -> Path:
    """A small data set."""
    return packed(tmp_path / "cohort", cohort()).path


def test_few_file_descriptors_are_enough_for_many_shards(tmp_path: Path) -> None:
    shards = packed(tmp_path / "cohort", cohort(hgg=60, lgg=30), shard_bytes=2048)
    assert len(shards.manifest.shards) > 80
    script = """
import resource, sys
from streaming_balance.storage.shards import open_shards
from streaming_balance.training.loader import train_loader
shards = open_shards(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
with train_loader(shards, global_batch_size=8, num_threads=4) as loader:
    print(sum(len(batch["sample"]) for batch in loader))
"""
    ended = run_python(script, shards.path)
    assert ended.stdout == "96\n", ended.stderr[-1500:]


def test_a_straggling_sample_changes_no_order(small_path: Path) -> None:
    shards = open_shards(small_path)

    def straggle(sample: dict[str, object]) -> dict[str, object]:
        if int(str(sample["sample"])) % 5 == 0:
            # Busy work instead of a sleep: other threads overtake this one.
            sum(range(300_000))
        return sample

    with loader_of(shards) as quick, loader_of(shards, transform=straggle) as slow:
        assert take(slow, 8) == take(quick, 8)
