"""What a training loader counts, leaves out, refuses and leaves behind."""

from __future__ import annotations

import itertools

import pytest

from streaming_balance.errors import ConfigError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import train_loader
from tests.training.cohorts import run_python


def test_stats_count_what_the_loop_received(small: ShardSet) -> None:
    voxel_bytes = 2 * 4 * 3 * 5 * 4
    with train_loader(small, global_batch_size=4, balance="class_balanced") as loader:
        assert loader.stats()["samples"] == 0
        for _ in itertools.islice(loader, 3):
            pass
        stats = loader.stats()
        assert stats["samples"] == 12
        assert stats["bytes"] == 12 * voxel_bytes
        assert stats["class_counts"] == {"HGG": 6, "LGG": 6}
        # 6 of 9 HGG patients once; 5 LGG patients once and one of them twice.
        assert stats["exposure_spread"] == {"HGG": 1, "LGG": 1}
        assert stats["seconds_waited"] > 0


def test_excluded_patients_are_never_delivered_and_stay_out_of_the_spread(small: ShardSet) -> None:
    with train_loader(
        small, global_batch_size=4, balance="class_balanced", exclude=["L00", "H03"]
    ) as loader:
        # 12 patients: 3 steps, so 6 of each class: HGG 6 of 8, LGG 6 over 4.
        seen = {patient for _ in range(8) for batch in loader for patient in batch["patient"]}
        assert seen == set(small.patients("train")) - {"L00", "H03"}
        # 8 epochs: 48 of each class, 8 HGG patients 6 times each, 4 LGG patients 12 times each.
        assert loader.stats()["exposure_spread"] == {"HGG": 0, "LGG": 0}


def test_balancing_a_split_that_is_not_for_training_is_refused(small: ShardSet) -> None:
    with pytest.raises(ConfigError, match=r"balance is 'class_balanced' on split 'val'.*eval_load"):
        train_loader(small, global_batch_size=4, balance="class_balanced", split="val")


def test_the_natural_order_by_name_is_as_welcome_as_none_on_any_split(small: ShardSet) -> None:
    with (
        train_loader(small, global_batch_size=4, split="val", balance="none") as named,
        train_loader(small, global_batch_size=4, split="val", balance=None) as unnamed,
    ):
        assert named.plan == unnamed.plan


def test_more_ranks_than_a_short_last_batch_holds_are_refused_with_the_way_out(
    small: ShardSet,
) -> None:
    # 14 patients in batches of 4 leave 2 for the last one.
    balance = {"name": "natural", "last": "short"}
    with pytest.raises(ConfigError, match=r"last: short leaves 2 .*fewer than 3 ranks.*last: full"):
        train_loader(small, global_batch_size=4, balance=balance, rank=0, num_ranks=3)


def test_an_unknown_split_is_refused_with_the_nearest(small: ShardSet) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'train'"):
        train_loader(small, global_batch_size=4, split="trian")


def test_a_hundred_epochs_leave_no_file_thread_or_object_behind(small: ShardSet) -> None:
    script = """
import gc, os, sys, threading
from streaming_balance.storage.shards import open_shards
from streaming_balance.training.loader import train_loader
shards = open_shards(sys.argv[1])
loader = train_loader(shards, global_batch_size=4, balance="class_balanced", num_threads=2)
def count():
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(gc.get_objects())
for _ in range(5):
    for batch in loader: pass
before = count()
for _ in range(100):
    for batch in loader: pass
after = count()
assert after[:2] == before[:2], (before, after)
assert after[2] - before[2] < 200, (before, after)
loader.close()
print(threading.active_count())
"""
    ended = run_python(script, small.path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.split() == ["1"]
