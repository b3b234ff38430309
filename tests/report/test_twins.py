"""How often a patient meets itself in a batch, as `plan` counts it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from streaming_balance.cli.app import app
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.report.plan_summary import count_twins, summarise_plan
from streaming_balance.storage.shards import open_shards
from tests.building import Sample, pack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve findings of five patients, packed."""
    samples = [
        Sample(
            key=f"s{number:02}",
            image=np.full((2, 2, 2), number, dtype=np.int16),
            label="Mass" if number % 3 else "",
            patient=f"P{number % 5}",
        )
        for number in range(12)
    ]
    pack(tmp_path, samples, classes=("Mass",), multi_label=True)
    return tmp_path


def test_twins_are_counted_across_classes_as_batches_have_them(folder: Path) -> None:
    shards = open_shards(folder)
    balance = {"name": "class_balanced", "target_label": "Mass", "unit": "sample"}
    plan = BalancedPlan.for_shards(shards, balance=balance, global_batch_size=4)
    patients = shards.patients("train").tolist()
    batches = [plan.batch(0, step).tolist() for step in range(plan.num_steps(0))]
    met = [
        sum(times - 1 for times in Counter(patients[row] for row in batch).values())
        for batch in batches
    ]
    found = summarise_plan(shards, plan, split="train", epochs=1).twins
    assert (found.batches, found.twins) == (3, sum(met))
    assert found.batches_with_twins == sum(times > 0 for times in met)
    assert sum(met) > 0


def test_patients_that_take_turns_never_meet_themselves() -> None:
    owners = np.array([f"P{number // 3}" for number in range(30)])
    plan = BalancedPlan.from_labels(
        (np.arange(30) > 14).astype(int), patients=owners, global_batch_size=4
    )
    assert count_twins(plan, owners).twins == 0


def test_the_command_says_how_often_patients_meet_themselves(folder: Path) -> None:
    plain = ["plan", str(folder), "--global-batch-size", "6"]
    answer = CliRunner().invoke(app, plain)
    assert answer.exit_code == 0
    # Six of five patients in each of two batches: one twin at least in both.
    assert "a patient comes more than once in 2 of 2 batches" in answer.output
    single = CliRunner().invoke(app, [*plain[:-1], "1"])
    assert "more than once" not in single.output
