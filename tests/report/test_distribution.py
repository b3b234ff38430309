"""Pictures and counts of batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import image

from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.report.distribution import (
    COLOURS,
    batch_class_counts,
    draw_class_counts,
)


def test_counts_run_on_into_the_next_epoch_and_show_absent_classes_as_0() -> None:
    labels = np.array([0] * 6 + [2] * 2)
    plan = BalancedPlan.from_labels(labels, global_batch_size=4, seed=1)
    counts = batch_class_counts(plan, labels, num_classes=3, num_batches=5)
    assert counts.tolist() == [[2, 0, 2]] * 5


def test_every_class_is_drawn_in_its_own_colour_in_proportion_to_its_counts(tmp_path: Path) -> None:
    counts = np.array([[6, 2]] * 10)
    draw_class_counts({"natural": counts}, ["HGG", "LGG"], tmp_path / "batches.png")
    pixels = np.rint(image.imread(tmp_path / "batches.png")[..., :3] * 255).astype(int)
    areas = []
    for colour in COLOURS[:2]:
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        areas.append(int((np.abs(pixels - wanted).max(axis=-1) <= 2).sum()))
    # The legend adds two equal patches; six to two is blurred by them a little.
    assert 2.6 < areas[0] / areas[1] < 3.1
