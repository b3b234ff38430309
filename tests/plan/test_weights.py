"""Class weights against exact rationals, and what sampling and weights do to a loss together."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError
from streaming_balance.plan.weights import (
    METHODS,
    effective_number_weights,
    effective_numbers,
    inverse_frequency_weights,
    is_reversed,
    loss_shares,
    normalised,
    weigh_classes,
)

GLIOMA = {"LGG": 75, "HGG": 210}
THREE = {0: 100, 1: 20, 2: 5}
LONG_TAIL = {0: 921, 1: 103}
EXACT = 1e-12

# From exact rationals, or 60 decimal digits rounded once to a float64.
INVERSE_FREQUENCY = [
    (GLIOMA, [1.9, 0.6785714285714286], [1.4736842105263157, 0.5263157894736842]),
    (
        THREE,
        [0.4166666666666667, 2.0833333333333335, 8.333333333333334],
        [0.11538461538461539, 0.5769230769230769, 2.3076923076923075],
    ),
    (LONG_TAIL, [0.5559174809989142, 4.970873786407767], [0.201171875, 1.798828125]),
]
# sizes, beta, effective numbers, 1 / E_n normalised to the number of classes
EFFECTIVE = [
    (GLIOMA, 0.9, [9.99630011514965, 9.999999997540046], [1.000185028348722, 0.9998149716512782]),
    (
        GLIOMA,
        0.99,
        [52.94133584143498, 87.88311836429514],
        [1.2481229749473326, 0.7518770250526674],
    ),
    (
        GLIOMA,
        0.999,
        [72.29132660999853, 189.50091768497353],
        [1.4477198757000231, 0.5522801242999769],
    ),
    (
        GLIOMA,
        0.9999,
        [74.72317403627393, 207.8206367846381],
        [1.4710684065655464, 0.5289315934344537],
    ),
    (GLIOMA, 0.0, [1.0, 1.0], [1.0, 1.0]),
    (
        THREE,
        0.999,
        [95.20785288629096, 19.811135170465317, 4.990009995001],
        [0.12055229076066773, 0.5793471532594386, 2.3001005559798937],
    ),
    (
        THREE,
        0.992,
        [69.01428507461517, 18.550541614356337, 4.920637444096],
        [0.1600357237436772, 0.5953869860069704, 2.2445772902493526],
    ),
    (LONG_TAIL, 0.9, [10.0, 9.99980636740211], [0.9999903182763706, 1.0000096817236295]),
    (
        LONG_TAIL,
        0.9990234375,
        [607.6116785194458, 98.034736176146],
        [0.27785795870141883, 1.7221420412985813],
    ),
]


@pytest.mark.parametrize(("sizes", "balanced", "scaled"), INVERSE_FREQUENCY)
def test_inverse_frequency_is_n_over_k_times_the_class_size(
    sizes: dict[object, int], balanced: list[float], scaled: list[float]
) -> None:
    weights = inverse_frequency_weights(sizes)
    assert list(weights) == list(sizes)
    assert list(weights.values()) == pytest.approx(balanced, rel=EXACT)
    assert list(normalised(weights).values()) == pytest.approx(scaled, rel=EXACT)


@pytest.mark.parametrize(("sizes", "beta", "numbers", "scaled"), EFFECTIVE)
def test_effective_numbers_keep_twelve_digits(
    sizes: dict[object, int], beta: float, numbers: list[float], scaled: list[float]
) -> None:
    counts = np.array(list(sizes.values()))
    assert effective_numbers(counts, beta=beta).tolist() == pytest.approx(numbers, rel=EXACT)
    weights = effective_number_weights(sizes, beta=beta)
    assert [1 / weight for weight in weights.values()] == pytest.approx(numbers, rel=EXACT)
    assert list(normalised(weights).values()) == pytest.approx(scaled, rel=EXACT)


@given(st.integers(1, 3000), st.integers(0, 10**9 - 1))
def test_effective_numbers_are_the_exact_geometric_sum(size: int, billionths: int) -> None:
    beta = billionths / 10**9
    # 1 - beta^n and 1 - beta of the very float64, without a rounding in between.
    exact = Fraction(beta)
    expected = (1 - exact**size) / (1 - exact)
    found = effective_numbers(np.array([size]), beta=beta)
    assert found.tolist() == pytest.approx([float(expected)], rel=EXACT)


def test_effective_numbers_of_empty_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"class sizes are \[75, 0\]; each must be at least 1"):
        effective_numbers(np.array([75, 0]), beta=0.9)


def test_a_beta_next_to_one_tends_to_inverse_frequency() -> None:
    weights = normalised(effective_number_weights(GLIOMA, beta=1 - 2**-53))
    assert list(weights.values()) == pytest.approx([1.4736842105263157, 0.5263157894736842])


@pytest.mark.parametrize(
    ("method", "normalize", "expected"),
    [
        ("inverse_frequency", False, [1.9, 0.6785714285714286, 0.0]),
        ("inverse_frequency", True, [1.4736842105263157, 0.5263157894736842, 0.0]),
        ("effective_num", True, [1.4477198757000231, 0.5522801242999769, 0.0]),
        ("uniform", True, [1.0, 1.0, 0.0]),
    ],
)
def test_a_class_without_samples_weighs_nothing_and_counts_for_nothing(
    method: str, normalize: bool, expected: list[float]
) -> None:
    weights = weigh_classes(method, {**GLIOMA, "none yet": 0}, beta=0.999, normalize=normalize)
    assert list(weights.values()) == pytest.approx(expected, rel=EXACT)


def test_every_alias_gives_the_weights_of_its_method() -> None:
    for alias, method in METHODS.items():
        written = {"LGG": 3.0, "HGG": 1.0} if method == "manual" else None
        found = weigh_classes(alias, GLIOMA, manual_weights=written)
        assert found == weigh_classes(method, GLIOMA, manual_weights=written)
    assert weigh_classes("balanced", GLIOMA) == inverse_frequency_weights(GLIOMA)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=20))
def test_inverse_frequency_weighs_every_class_alike_and_a_sample_one_on_average(
    counts: list[int],
) -> None:
    weights = inverse_frequency_weights(dict(enumerate(counts)))
    masses = [weights[label] * count for label, count in enumerate(counts)]
    assert masses == pytest.approx([sum(counts) / len(counts)] * len(counts), rel=EXACT)


def test_manual_weights_are_taken_by_name_or_in_label_order() -> None:
    named = weigh_classes("manual", GLIOMA, manual_weights={"HGG": 1.0, "LGG": 2.8})
    assert named == {"LGG": 2.8, "HGG": 1.0}
    assert weigh_classes("manual", {0: 75, 1: 210}, manual_weights=[3.0, 1.0]) == {0: 3.0, 1: 1.0}
    declared = weigh_classes("manual", GLIOMA, manual_weights=[2.8, 1.0], is_ordered=True)
    assert declared == {"LGG": 2.8, "HGG": 1.0}
    # A file's keys are text.
    assert weigh_classes("manual", {0: 75, 1: 210}, manual_weights={"0": 3.0, "1": 1.0}) == {
        0: 3.0,
        1: 1.0,
    }


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (None, "manual_weights is None, but method 'manual' needs them, such as {LGG: 1.0"),
        ([2.8, 1.0], "a swapped list would boost the majority in silence. Write a mapping: {LGG"),
        ([1.0], "has 1 entries for the 2 classes 'LGG', 'HGG'. Write a mapping: {LGG: 1.0, HGG"),
        ({"LGG": 1.0}, "leaves out 'HGG'; the classes are 'LGG', 'HGG'"),
        ({"LGG": 1.0, "hgg": 1.0}, "names 'hgg', but the classes are 'LGG', 'HGG'."),
        ({"LGG": 1.0, "HGG": 1.0, "HGGs": 2.0}, "Did you mean 'HGG'?"),
    ],
)
def test_manual_weights_that_do_not_fit_the_classes_are_refused_with_what_to_write(
    weights: dict[str, float] | list[float] | None, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        weigh_classes("manual", GLIOMA, manual_weights=weights)
    assert said in str(caught.value)


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"method is 'inverse_freqency'; .*Did you mean 'inverse"):
        weigh_classes("inverse_freqency", GLIOMA)


def test_a_beta_out_of_range_is_refused_whatever_the_method() -> None:
    for method in ("inverse_frequency", "effective_num"):
        with pytest.raises(ConfigError, match=r"beta is 1\.0; it must be a number in \[0, 1\)"):
            weigh_classes(method, GLIOMA, beta=1.0)


def test_classes_without_any_sample_cannot_be_weighed() -> None:
    with pytest.raises(ConfigError, match="no class of 'LGG' has a sample"):
        weigh_classes("uniform", {"LGG": 0})


def test_balanced_sampling_under_inverse_frequency_gives_the_rare_class_the_larger_share() -> None:
    weights = inverse_frequency_weights(GLIOMA)
    both = loss_shares({"LGG": 0.5, "HGG": 0.5}, weights)
    assert list(both.values()) == pytest.approx([0.7368421052631579, 0.2631578947368421], rel=EXACT)
    assert is_reversed(GLIOMA, both)
    alone = loss_shares({"LGG": 75 / 285, "HGG": 210 / 285}, weights)
    assert list(alone.values()) == pytest.approx([0.5, 0.5], rel=EXACT)
    assert not is_reversed(GLIOMA, alone)


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 10)).filter(
            lambda pair: pair[0] or not pair[1]
        ),
        min_size=1,
        max_size=6,
    )
)
def test_reversed_means_some_rarer_class_has_notably_more(pairs: list[tuple[int, int]]) -> None:
    sizes = {label: float(size) for label, (size, _) in enumerate(pairs)}
    shares = {label: share / 10 for label, (_, share) in enumerate(pairs)}
    expected = any(
        sizes[rare] < sizes[common] and shares[rare] > shares[common] + 0.01
        for rare, common in itertools.permutations(sizes, 2)
    )
    assert is_reversed(sizes, shares) is expected
