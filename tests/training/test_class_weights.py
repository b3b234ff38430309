"""Class weights from labels: the numbers, the label order, and the tensor by class number."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from streaming_balance.errors import ConfigError
from streaming_balance.training.class_weights import (
    LabelWeights,
    compute_class_weights,
    compute_effective_num_weights,
    compute_weights_from_config,
)

GLIOMA = [0] * 75 + [1] * 210
EXACT = 1e-12


@pytest.mark.parametrize("strategy", ["inverse_freq", "inverse_frequency", "balanced"])
def test_inverse_frequency_has_the_three_names_people_know(strategy: str) -> None:
    weights = compute_class_weights(GLIOMA, strategy)
    assert weights == pytest.approx({0: 1.9, 1: 0.6785714285714286}, rel=EXACT)
    assert weights == compute_class_weights(torch.tensor(GLIOMA))


def test_uniform_weights_are_ones_and_effective_ones_not_normalised() -> None:
    assert compute_class_weights(GLIOMA, "uniform") == {0: 1.0, 1: 1.0}
    expected = {0: 0.01383291809534577, 1: 0.005277019300045822}
    assert compute_class_weights(GLIOMA, "effective_num") == pytest.approx(expected, rel=EXACT)
    assert compute_effective_num_weights(GLIOMA) == pytest.approx(expected, rel=EXACT)
    tenth = compute_effective_num_weights(np.array(GLIOMA), beta=0.9)
    assert tenth[0] == pytest.approx(0.10003701254271812, rel=EXACT)


def test_weights_are_python_floats_by_plain_labels() -> None:
    for labels in (np.array(GLIOMA), torch.tensor(GLIOMA)):
        for weights in (
            compute_class_weights(labels),
            compute_effective_num_weights(labels),
            compute_weights_from_config(labels, "inverse_frequency"),
        ):
            assert [type(label) for label in weights] == [int, int]
            assert [type(weight) for weight in weights.values()] == [float, float]
            assert json.loads(json.dumps(weights)).keys() == {"0", "1"}


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ([10, 9, 1, 10], [1, 9, 10]),
        (["10", "9", "1", "10"], ["1", "9", "10"]),
        (["b", "a", "c"], ["a", "b", "c"]),
    ],
)
def test_weights_print_in_label_order(labels: list[Any], order: list[Any]) -> None:
    weights = compute_class_weights(labels)
    assert list(weights) == order
    places = [repr(weights).index(f"{label!r}:") for label in order]
    assert places == sorted(places)
    assert list(LabelWeights(dict(reversed(weights.items())))) == order


def test_weights_survive_copies_and_processes() -> None:
    weights = compute_class_weights(["b", "a", "b"])
    for again in (copy.copy(weights), copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        assert isinstance(again, LabelWeights)
        assert list(again.items()) == list(weights.items())


def test_a_tensor_holds_the_weights_by_class_number() -> None:
    weights = compute_class_weights(GLIOMA)
    assert torch.equal(weights.to_tensor(2), torch.tensor([1.9, 19 / 28]))
    assert weights.to_tensor(2).dtype == torch.float32
    assert weights.to_tensor(4).tolist()[2:] == [0.0, 0.0]
    exact = weights.to_tensor(2, dtype=torch.float64)
    assert exact.tolist() == pytest.approx([1.9, 0.6785714285714286], rel=EXACT)


def test_numbers_with_gaps_keep_their_places_in_the_tensor() -> None:
    assert compute_class_weights([0, 2, 2, 2]).to_tensor().tolist() == pytest.approx([2, 0, 2 / 3])
    assert compute_class_weights([0.0, 2.0]).to_tensor(3).tolist() == [1, 0, 1]
    assert compute_class_weights([True, False, False]).to_tensor(2).tolist() == [0.75, 1.5]


def test_text_labels_are_numbered_in_label_order_unless_another_order_is_given() -> None:
    weights = compute_class_weights(["LGG"] * 75 + ["HGG"] * 210)
    by_label = weights.to_tensor(2, dtype=torch.float64).tolist()
    assert by_label == pytest.approx([19 / 28, 1.9])
    declared = weights.to_tensor(classes=["LGG", "none yet", "HGG"], dtype=torch.float64).tolist()
    assert declared == pytest.approx([1.9, 0.0, 19 / 28])
    # The class numbers of a data set whose labels are text that reads as numbers.
    assert compute_class_weights(["10", "9", "9"]).to_tensor(2).tolist() == [0.75, 1.5]


@pytest.mark.parametrize(
    ("weights", "num_classes", "classes", "said"),
    [
        ({0: 1.0, 5: 2.0}, 5, None, "num_classes is 5, but label 5 is class 5; .* at least 6"),
        ({"a": 1.0, "b": 2.0}, 1, None, "num_classes is 1, but label 'b' is class 1"),
        ({-1: 1.0, 0: 2.0}, None, None, "label -1 is negative"),
        ({"LGG": 1.0}, None, ["HGG"], "given for 'LGG', which is none of the classes 'HGG'"),
        ({}, None, None, "there are no class weights"),
    ],
)
def test_weights_that_fit_no_tensor_are_refused(
    weights: dict[Any, float], num_classes: int | None, classes: list[str] | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        LabelWeights(weights).to_tensor(num_classes, classes=classes)


def test_a_configuration_s_weights_are_normalised_over_the_classes_present() -> None:
    weights = compute_weights_from_config(
        GLIOMA, "inverse_frequency", normalize=True, num_classes=3
    )
    expected = {0: 1.4736842105263157, 1: 0.5263157894736842, 2: 0.0}
    assert weights == pytest.approx(expected, rel=EXACT)
    effective = compute_weights_from_config(GLIOMA, "effective_num", 0.999, None, True, 3)
    expected = {0: 1.4477198757000231, 1: 0.5522801242999769, 2: 0.0}
    assert effective == pytest.approx(expected, rel=EXACT)
    plain = compute_weights_from_config(GLIOMA, "inverse_frequency")
    assert plain == pytest.approx({0: 1.9, 1: 0.6785714285714286}, rel=EXACT)


@pytest.mark.parametrize(
    "written",
    [
        [3.0, 1.0],
        (3, 1),
        {0: 3.0, 1: 1.0},
        {"1": 1, "0": 3},
        np.array([3, 1]),
        torch.tensor([3, 1]),
    ],
    ids=["list", "tuple", "by number", "by text", "array", "tensor"],
)
def test_manual_weights_may_be_written_in_every_way(written: Any) -> None:
    weights = compute_weights_from_config(GLIOMA, "manual", manual_weights=written)
    assert weights == {0: 3.0, 1: 1.0}
    scaled = compute_weights_from_config(GLIOMA, "manual", manual_weights=written, normalize=True)
    assert scaled == {0: 1.5, 1: 0.5}


def test_text_classes_may_be_counted_but_not_made_up() -> None:
    weights = compute_weights_from_config(["a", "b", "b"], "inverse_frequency", num_classes=2)
    assert weights == {"a": 1.5, "b": 0.75}
    with pytest.raises(ConfigError, match="num_classes is 3, but there is a label 'a'"):
        compute_weights_from_config(["a", "b", "b"], "inverse_frequency", num_classes=3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "inverse"}, "method is 'inverse'; allowed: "),
        ({"method": "effective_num", "beta": 1}, r"beta is 1; it must be a number in \[0, 1\)"),
        ({"method": "manual"}, "manual_weights is None, but method 'manual' needs them"),
        ({"method": "manual", "manual_weights": []}, "manual_weights is"),
        ({"method": "manual", "manual_weights": [1, -1]}, "gives class 1 -1; use numbers > 0"),
        ({"method": "manual", "manual_weights": [1, 0]}, "gives class 1 0; use numbers > 0"),
        ({"method": "manual", "manual_weights": [1, True]}, "gives class 1 True"),
        ({"method": "manual", "manual_weights": [1]}, "has 1 entries for the 2 classes"),
        ({"method": "manual", "manual_weights": {0: 1}}, "leaves out 1"),
        ({"method": "uniform", "num_classes": 1}, "num_classes is 1, but there is a label 1; .* 0"),
        ({"method": "uniform", "num_classes": 0}, "num_classes is 0; use null or an integer"),
        ({"method": "uniform", "num_classes": True}, "num_classes is True; use null or an integer"),
    ],
)
def test_settings_of_weights_that_make_no_sense_are_refused(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        compute_weights_from_config(GLIOMA, **options)


def test_computing_manual_weights_points_to_where_they_belong() -> None:
    with pytest.raises(ConfigError, match=r"compute_weights_from_config\(\.\.\., method='manual'"):
        compute_class_weights(GLIOMA, "manual")


def test_a_list_of_weights_for_text_labels_is_refused_with_the_mapping_to_write() -> None:
    with pytest.raises(ConfigError, match=r"Write a mapping: \{HGG: 1\.0, LGG: 1\.0\}"):
        compute_weights_from_config(["LGG", "HGG"], "manual", manual_weights=[2.8, 1.0])


@pytest.mark.parametrize("labels", [np.array(GLIOMA, dtype=np.float32), np.array(GLIOMA) == 1])
@pytest.mark.parametrize("written", [{0: 2.0, 1: 1.0}, [2.0, 1.0], {"0": 2.0, "1": 1.0}])
def test_manual_weights_by_class_number_fit_labels_that_are_fractions_or_flags(
    labels: Any, written: Any
) -> None:
    weights = compute_weights_from_config(labels, "manual", manual_weights=written)
    assert weights == {0: 2.0, 1: 1.0}


def test_a_class_without_samples_needs_no_manual_weight() -> None:
    settings: dict[str, Any] = {"manual_weights": {0: 1.0, 1: 3.0}, "num_classes": 3}
    assert compute_weights_from_config(GLIOMA, "manual", **settings) == {0: 1.0, 1: 3.0, 2: 0.0}
    weights = compute_weights_from_config(GLIOMA, "manual", normalize=True, **settings)
    assert weights == {0: 0.5, 1: 1.5, 2: 0.0}
