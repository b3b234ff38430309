"""What a loader logs when it starts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streaming_balance.config import read_settings
from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.announcement import announcement
from streaming_balance.training.loader import train_loader

ON = {"enabled": True}


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    """The messages of one level."""
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_the_active_strategies_and_the_classes_before_and_after_are_logged(
    small: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "compute: {seed: 42}\n"
        "data: {balancing: {weighted_sampler: {enabled: true}, "
        "class_weights: {enabled: true, basis: sampled}}}"
    )
    with caplog.at_level(logging.INFO):
        train_loader(small, global_batch_size=4, balance=str(path)).close()
    active, before, after, weights = said(caplog, logging.INFO)
    assert active == (
        "balancing with class_balanced (weighted_sampler), "
        "class_weights (inverse_frequency, basis sampled); seed 42"
    )
    # 9 HGG and 5 LGG patients; four batches of 4 hold 8 and 8.
    assert before == (
        "classes before: HGG: 9 patients (64.3%), LGG: 5 patients (35.7%); "
        "largest to smallest 1.800"
    )
    assert after == (
        "classes after: HGG: 8 draws (50.0%), LGG: 8 draws (50.0%); largest to smallest 1.000"
    )
    assert weights == "class weights for the loss: HGG: 1.0000, LGG: 1.0000"
    assert said(caplog, logging.WARNING) == []


def test_a_plain_name_is_said_once(small: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train_loader(small, global_batch_size=4, balance="power").close()
        train_loader(small, global_batch_size=4).close()
    starts = [line for line in said(caplog, logging.INFO) if line.startswith("balancing")]
    assert starts == ["balancing with power; seed 0", "balancing with instance_balanced; seed 0"]


def test_sampling_and_weights_that_turn_the_classes_round_are_warned_about(
    small: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    section = {"weighted_sampler": ON, "class_weights": ON}
    with caplog.at_level(logging.WARNING):
        train_loader(small, global_batch_size=4, balance=section).close()
    (warning,) = said(caplog, logging.WARNING)
    # Weights 14 / (2 * 9) and 14 / (2 * 5) on equal shares: 5/14 and 9/14 of the loss.
    assert "0.357 from HGG, 0.643 from LGG" in warning
    assert "basis: sampled" in warning


def test_only_the_first_rank_logs(small: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train_loader(small, global_batch_size=4, rank=1, num_ranks=2).close()
    assert caplog.records == []


@pytest.mark.parametrize("rank", [0, 1])
def test_weights_that_do_not_fit_the_classes_are_refused_on_every_rank(
    small: ShardSet, rank: int
) -> None:
    section: Any = {"class_weights": {**ON, "method": "manual", "manual_weights": {"LGG": 2.0}}}
    with pytest.raises(ConfigError, match="class_weights: manual_weights leaves out 'HGG'"):
        train_loader(small, global_batch_size=4, balance=section, rank=rank, num_ranks=2)


def test_ranks_that_do_not_divide_the_batch_are_warned_about_with_a_size_that_fits() -> None:
    plan = BalancedPlan.from_labels([0, 0, 1, 1], global_batch_size=4)
    messages = announcement(
        plan, read_settings("class_balanced"), num_ranks=3, classes_declared=False
    )
    warnings = [text for level, text in messages if level == logging.WARNING]
    assert any(
        "ranks get 1 or 2 samples" in text and "global_batch_size=6" in text for text in warnings
    )


def test_a_schedule_is_said_where_it_starts_and_where_it_ends() -> None:
    labels = ["LGG"] * 75 + ["HGG"] * 210
    settings = read_settings({"name": "progressively_balanced", "num_epochs": 5})
    plan = BalancedPlan.from_labels(labels, global_batch_size=19, balance=settings.strategy)
    messages = announcement(plan, settings, num_ranks=1, classes_declared=False)
    after = [text for _, text in messages if text.startswith("classes after")]
    assert after == [
        "classes after in epoch 0: HGG: 210 draws (73.7%), LGG: 75 draws (26.3%); "
        "largest to smallest 2.800",
        "classes after in epoch 4: HGG: 142.5 draws (50.0%), LGG: 142.5 draws (50.0%); "
        "largest to smallest 1.000",
    ]


def test_findings_are_said_in_percent_of_the_samples() -> None:
    table = np.array([[1, 1], [1, 0], [0, 0], [0, 0]])
    settings = read_settings(None)
    plan = BalancedPlan.from_labels(table, global_batch_size=2, balance=settings.strategy)
    messages = announcement(plan, settings, num_ranks=1, classes_declared=False)
    before, after = (text for _, text in messages if text.startswith("classes"))
    assert "2 samples (50.0%)" in before
    assert "1 samples (25.0%)" in before
    assert "2 draws (50.0%)" in after


def test_weights_of_many_classes_are_said_shortly() -> None:
    labels = list(range(100)) * 2
    settings = read_settings({"class_weights": ON})
    plan = BalancedPlan.from_labels(labels, global_batch_size=100, balance=settings.strategy)
    messages = announcement(plan, settings, num_ranks=1, classes_declared=False)
    (weights,) = [text for _, text in messages if text.startswith("class weights")]
    assert weights.count(":") == 21
    assert weights.endswith(", ...")
