"""What a training loader counts, leaves out, refuses and leaves behind."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from streaming_balance.errors import ConfigError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.evaluation import EvalLoader, eval_loader
from streaming_balance.training.loader import BalancedLoader, train_loader
from tests.building import Sample
from tests.training.cohorts import PROJECT_ROOT, packed, run_python, voxels


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


def test_the_spread_compares_patients_of_several_samples_whenever_it_is_asked_for(
    tmp_path: Path,
) -> None:
    # Patient A has 3 samples, B and C one each; D, of the other class, has 2.
    owners = ["A", "A", "A", "B", "C", "D", "D"]
    samples = [
        Sample(
            key=f"{owner}{number}",
            image=voxels(number),
            patient=owner,
            label="LGG" if owner == "D" else "HGG",
        )
        for number, owner in enumerate(owners)
    ]
    shards = packed(tmp_path / "owners", samples)
    received = dict.fromkeys(owners, 0)
    with train_loader(shards, global_batch_size=3, seed=1) as loader:
        for batch in itertools.islice(itertools.chain(loader, loader), 4):
            for patient in batch["patient"]:
                received[patient] += 1
            of_hgg = [received[patient] for patient in "ABC"]
            # One rank, so the run's deliveries are those counted here, by hand.
            assert loader.stats()["exposure_spread"] == {
                "HGG": max(of_hgg) - min(of_hgg),
                "LGG": 0,
            }


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
from streaming_balance.training.evaluation import EvalLoader, eval_loader
from streaming_balance.training.loader import BalancedLoader, train_loader
from tests.building import Sample
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


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", ["train", "val"])
def test_a_loader_that_is_copied_or_sent_elsewhere_says_where_to_build_it(
    small: ShardSet, kind: str, way: Callable[[object], object]
) -> None:
    loader: BalancedLoader | EvalLoader = (
        train_loader(small, global_batch_size=4)
        if kind == "train"
        else eval_loader(small, split="val", batch_size=4)
    )
    with loader, pytest.raises(ConfigError, match="Build the loader in the process that uses it"):
        way(loader)


def test_a_data_set_sent_to_spawned_ranks_is_opened_again_there(small: ShardSet) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.training.spawned_ranks", str(small.path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=PROJECT_ROOT,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    every_rank = sorted(key for line in ended.stdout.splitlines() for key in line.split())
    with train_loader(small, global_batch_size=4, seed=3) as loader:
        assert every_rank == sorted(key for batch in loader for key in batch["key"])
