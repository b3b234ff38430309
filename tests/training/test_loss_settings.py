"""Where a loss takes its weights from, and what it refuses."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streaming_balance.config import load_config
from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.training.class_weights import compute_class_weights
from streaming_balance.training.losses import ClassWeightedCrossEntropyLoss, ClassWeightedMSELoss

GLIOMA = ["LGG"] * 75 + ["HGG"] * 210


def test_weights_are_taken_by_number_by_name_or_from_labels() -> None:
    for weights, classes in (
        ([1.0, 5.0], None),
        ((1.0, 5.0), None),
        (torch.tensor([1.0, 5.0]), None),
        (np.array([1.0, 5.0]), None),
        ({1: 5.0, 0: 1.0}, None),
        ({"1": 5.0, "0": 1.0}, None),
        ({"HGG": 5.0, "LGG": 1.0}, ["LGG", "HGG"]),
    ):
        loss = ClassWeightedMSELoss(weights, classes=classes)  # type: ignore[arg-type]
        assert loss.class_weights.tolist() == [1.0, 5.0]
    counted = compute_class_weights([0] * 75 + [1] * 210)
    assert ClassWeightedMSELoss(counted).class_weights.tolist() == pytest.approx([1.9, 19 / 28])


def test_counted_text_labels_never_guess_which_number_they_are() -> None:
    counted = compute_class_weights(GLIOMA)
    with pytest.raises(ConfigError, match=r"say which is which with classes=, such as classes=sha"):
        ClassWeightedMSELoss(counted)
    declared = ClassWeightedMSELoss(counted, classes=["LGG", "HGG", "none yet"])
    assert declared.class_weights.tolist() == pytest.approx([1.9, 19 / 28, 0.0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"class_weights": []}, r"class_weights are \[\]; give one finite number per class"),
        ({"class_weights": [1.0, math.nan]}, "give one finite number per class"),
        ({"class_weights": [1.0, True]}, "give one finite number per class"),
        ({"class_weights": "12"}, "give one finite number per class"),
        ({"class_weights": 2.0}, "give one finite number per class"),
        ({"class_weights": [1.0, -1.0]}, "use numbers of at least 0"),
        ({"class_weights": [0.0, 0.0]}, "one of them above 0"),
        ({"class_weights": {"LGG": 1.0}}, "say which is which with classes="),
        ({"class_weights": {"LGG": 1.0}, "classes": ["LGG", "HGG"]}, "leave out class 'HGG'"),
        ({"class_weights": {0: 1.0, 2: 1.0}}, "leave out class 1"),
        ({"class_weights": {"lgg": 1.0}, "classes": ["LGG"]}, "'lgg', which is none of the cla"),
        ({"class_weights": {-1: 1.0}}, "label -1 is negative"),
        ({"class_weights": {}}, "there are no class weights"),
        ({"class_weights": [1.0], "reduction": "avg"}, "reduction is 'avg'; allowed: 'mean'"),
        ({"class_weights": [1.0], "reduction": "weightedmean"}, "Did you mean 'weighted_mean'"),
    ],
)
def test_weights_that_make_no_sense_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ClassWeightedMSELoss(**arguments)


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ([0.0], "logit_adjustment has 1 numbers for 2 classes"),
        ([0.0, -math.inf], "logit_adjustment are .*; give one finite number per class"),
        ({0: -1.0, 2: -1.0}, "logit_adjustment leave out class 1"),
        ({"LGG": -1.0, "HGG": 0.0}, "logit_adjustment are given by labels 'LGG', 'HGG'"),
    ],
)
def test_adjustments_that_make_no_sense_are_refused(added: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ClassWeightedCrossEntropyLoss([1.0, 1.0], logit_adjustment=added)


@pytest.mark.parametrize(
    ("shapes", "labels", "said"),
    [
        (((3, 4), (3, 5)), [0, 1, 1], r"prediction has shape \(3, 4\) and target \(3, 5\)"),
        (((3,), (3,)), [0, 1, 1], "of rank 2 or more"),
        (((3, 4), (3, 4)), [0, 1], r"labels have shape \(2,\); give one class number for each"),
        (((3, 4), (3, 4)), [0, 1, 2], "labels hold class 2; there are weights for 0 to 1"),
        (((3, 4), (3, 4)), [0, -1, 1], "labels hold class -1; .* and -100 is ignored"),
        (((3, 4), (3, 4)), [0.0, 1.0, 1.0], "labels have dtype torch.float32"),
        (((3, 4), (3, 4)), [[1.0, 0.0, 0.0]] * 3, "or shares of the 2 classes"),
    ],
)
def test_batches_that_do_not_fit_a_squared_error_are_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], labels: list[Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        ClassWeightedMSELoss([1.0, 5.0])(*map(torch.zeros, shapes), torch.tensor(labels))


@pytest.mark.parametrize(
    ("shape", "labels", "said"),
    [
        (
            (3, 3),
            [0, 1, 1],
            r"logits have shape \(3, 3\); with weights for 2 classes give \(B, 2\)",
        ),
        ((3,), [0, 1, 1], r"logits have shape \(3,\)"),
        ((3, 2), [0, 1], r"labels have shape \(2,\)"),
        ((3, 2, 4), [0, 1, 1], r"each place of \(3, 4\)"),
        ((3, 2), [0, 1, 5], "labels hold class 5"),
        ((3, 2), [0.5, 0.5, 1.0], "labels have dtype torch.float32"),
    ],
)
def test_batches_that_do_not_fit_a_cross_entropy_are_refused(
    shape: tuple[int, ...], labels: list[Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        ClassWeightedCrossEntropyLoss([1.0, 5.0])(torch.zeros(shape), torch.tensor(labels))


def test_the_weights_are_shown_where_a_model_is_printed() -> None:
    assert "[1.9, 0.6786], reduction='mean'" in repr(ClassWeightedMSELoss([1.9, 0.6785714]))
    assert repr(ClassWeightedMSELoss([1.0] * 1000)).count("1, ") == 20


def write(folder: Path, section: str) -> Path:
    """Write a configuration whose `class_weights` are these."""
    path = folder / "run.yaml"
    path.write_text(f"data: {{balancing: {{class_weights: {section}}}}}")
    return path


def test_a_loss_comes_from_the_file_that_drives_the_sampling(tmp_path: Path) -> None:
    path = write(tmp_path, "{enabled: true}")
    plan = BalancedPlan.from_labels(GLIOMA, global_batch_size=8, balance=None)
    for config in (path, str(path), load_config(path), {"class_weights": {"enabled": True}}):
        loss = ClassWeightedMSELoss.from_config(config, plan)
        assert loss.class_weights.tolist() == pytest.approx(
            [0.5263157894736842, 1.4736842105263157]
        )
    entropy = ClassWeightedCrossEntropyLoss.from_config(path, plan, reduction="sum")
    assert isinstance(entropy, ClassWeightedCrossEntropyLoss)
    assert entropy.reduction == "sum"


def test_a_file_that_enables_no_class_weights_gives_weights_of_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = BalancedPlan.from_labels(GLIOMA, global_batch_size=8)
    section = {"weighted_sampler": {"enabled": True}}
    with caplog.at_level(logging.WARNING):
        assert ClassWeightedMSELoss.from_config(section, plan).class_weights.tolist() == [1.0, 1.0]
    assert caplog.records == []
    loaded = load_config(write(tmp_path, "{enabled: false, normalize: false}"))
    assert ClassWeightedMSELoss.from_config(loaded, plan).class_weights.tolist() == [1.0, 1.0]


def test_labels_that_are_numbers_weigh_by_the_number_they_are() -> None:
    plan = BalancedPlan.from_labels([1] * 75 + [3] * 210, global_batch_size=8, balance=None)
    section = {"class_weights": {"enabled": True, "normalize": False}}
    loss = ClassWeightedMSELoss.from_config(section, plan)
    assert loss.class_weights.tolist() == pytest.approx([0.0, 1.9, 0.0, 19 / 28])


def test_a_list_of_manual_weights_follows_the_declared_class_order() -> None:
    plan = BalancedPlan.from_class_sizes({"LGG": 75, "HGG": 210}, global_batch_size=8, balance=None)
    section = {
        "class_weights": {
            "enabled": True,
            "method": "manual",
            "manual_weights": [2.8, 1.0],
            "normalize": False,
        }
    }
    with pytest.raises(ConfigError, match=r"Write a mapping: \{LGG: 1\.0, HGG: 1\.0\}"):
        ClassWeightedMSELoss.from_config(section, plan)
    loss = ClassWeightedMSELoss.from_config(section, plan, classes=["LGG", "HGG"])
    assert loss.class_weights.tolist() == pytest.approx([2.8, 1.0])


def test_a_loss_on_top_of_balanced_sampling_is_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = BalancedPlan.from_labels(GLIOMA, global_batch_size=8)
    with caplog.at_level(logging.WARNING):
        ClassWeightedMSELoss.from_config({"class_weights": {"enabled": True}}, plan)
    assert "0.263 from HGG, 0.737 from LGG" in caplog.text
    caplog.clear()
    sampled = {"class_weights": {"enabled": True, "basis": "sampled"}}
    with caplog.at_level(logging.WARNING):
        loss = ClassWeightedMSELoss.from_config(sampled, plan)
    assert loss.class_weights.tolist() == [1.0, 1.0]
    assert caplog.records == []
