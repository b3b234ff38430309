"""What the demo compares: runs that differ in their batches alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from streaming_balance.demo.places import Places
from streaming_balance.demo.runs import Experiment
from streaming_balance.storage.shards import ShardSet


@pytest.fixture(scope="module")
def experiment(shards: ShardSet) -> Experiment:
    return Experiment(shards, epochs=3, seed=1)


def test_natural_and_balanced_runs_take_the_same_number_of_steps(experiment: Experiment) -> None:
    # 23 training patients make 3 full batches of 8.
    assert experiment.steps == len(experiment.natural.batches) == len(experiment.balanced.batches)
    assert experiment.steps == 9


def test_only_the_balanced_run_sees_as_much_of_both_classes(experiment: Experiment) -> None:
    labels = experiment.shards.labels("train")
    for run, least, most in ((experiment.natural, 2, 3), (experiment.balanced, 4, 4)):
        low_grades = [
            int(np.sum(labels[[entry.sample for entry in batch]])) for batch in run.batches
        ]
        assert (min(low_grades), max(low_grades)) == (least, most)


def test_stopping_in_mid_epoch_and_resuming_on_other_ranks_changes_no_batch(
    experiment: Experiment, tmp_path: Path
) -> None:
    places = Places.claim(tmp_path)
    found = experiment.stop_and_resume(places)
    # Epoch 1 of 3, step 1 of 3: the fifth of nine batches comes next.
    assert (found.epoch, found.step, found.ranks) == (1, 1, 2)
    assert found.equal == found.compared == 5
    assert found.is_equal
    saved = json.loads((places.checkpoint / "state.json").read_text())
    assert saved["position"] == {"epoch": 1, "step": 1}
    assert json.loads(places.state.read_text())["position"] == {"epoch": 3, "step": 0}


def test_a_resumed_run_that_differs_is_said_to_differ(shards: ShardSet, tmp_path: Path) -> None:
    experiment = Experiment(shards, epochs=1, seed=1)
    # Held against the run of another seed, no batch is the same.
    experiment.balanced = Experiment(shards, epochs=1, seed=2).balanced
    found = experiment.stop_and_resume(Places.claim(tmp_path))
    assert (found.compared, found.equal) == (2, 0)
    assert not found.is_equal
