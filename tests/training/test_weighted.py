"""Weighted samplers: torch's shares, by whole numbers, and no index left out by chance."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import WeightedRandomSampler

from streaming_balance.errors import ConfigError
from streaming_balance.plan.weights import effective_numbers
from streaming_balance.training.samplers import BalancedSampler
from streaming_balance.training.weighted import create_weighted_sampler, get_weighted_sampler
from tests.training.sampler_cases import global_states_untouched

LABELS = [1] * 10 + [0] * 90
NAMES = ["LGG"] * 75 + ["HGG"] * 210


def drawn(sampler: BalancedSampler, labels: Any) -> Counter[Any]:
    """Count an epoch's draws per class."""
    return Counter(labels[index] for index in sampler)


def test_both_functions_give_one_class_of_sampler() -> None:
    one, other = get_weighted_sampler(LABELS), create_weighted_sampler(LABELS, {0: 1, 1: 9})
    assert type(one) is type(other) is BalancedSampler
    assert len(one) == len(other) == len(list(one)) == 100


@pytest.mark.parametrize("name", ["inverse_freq", "inverse_frequency", "balanced"])
def test_inverse_frequency_draws_every_class_alike(name: str) -> None:
    assert drawn(get_weighted_sampler(LABELS, name), LABELS) == {0: 50, 1: 50}


def test_uniform_weights_leave_the_natural_shares() -> None:
    assert drawn(get_weighted_sampler(LABELS, "uniform"), LABELS) == {0: 90, 1: 10}


@pytest.mark.parametrize("name", ["effective_num", "effective_number"])
def test_effective_numbers_weigh_each_sample_by_its_inverse(name: str) -> None:
    sizes = np.array([90, 10])
    weights = sizes / effective_numbers(sizes, beta=0.999)
    share = weights[1] / weights.sum()
    counts = drawn(get_weighted_sampler(LABELS, name, num_samples=10_000), LABELS)
    assert abs(counts[1] - 10_000 * share) < 1


def test_a_strategy_with_options_is_taken_as_everywhere() -> None:
    sampler = get_weighted_sampler(LABELS, {"name": "target", "shares": {0: 0.8, 1: 0.2}})
    assert drawn(sampler, LABELS) == {0: 80, 1: 20}


def test_every_sample_of_a_class_comes_equally_often_give_or_take_one() -> None:
    counts = Counter(itertools.chain(*itertools.repeat(get_weighted_sampler(LABELS), 7)))
    rare, common = [counts[i] for i in range(10)], [counts[i] for i in range(10, 100)]
    assert sum(rare) == sum(common) == 350
    assert set(rare) == {35}
    assert set(common) == {3, 4}


def test_any_batch_of_eight_is_nearly_half_and_half() -> None:
    sampler = get_weighted_sampler(LABELS)
    labels = [LABELS[i] for i in [*sampler, *sampler]]
    windows = [sum(labels[first : first + 8]) for first in range(len(labels) - 7)]
    assert min(windows) >= 2
    assert max(windows) <= 6


def test_num_samples_is_the_length_of_an_epoch() -> None:
    sampler = get_weighted_sampler(LABELS, num_samples=33)
    assert len(sampler) == len(list(sampler)) == 33
    assert set(drawn(sampler, LABELS).values()) == {16, 17}
    assert len(get_weighted_sampler(LABELS, num_samples=np.int64(12))) == 12  # type: ignore[arg-type]


def test_without_replacement_nobody_comes_twice_in_an_epoch() -> None:
    sampler = get_weighted_sampler(LABELS, replacement=False)
    for _ in range(5):
        epoch = list(sampler)
        assert len(set(epoch)) == len(epoch) == 20
    with pytest.raises(ConfigError, match=r"class '1' has only 10.*allow replacement"):
        get_weighted_sampler(LABELS, num_samples=100, replacement=False)


def test_epochs_differ_and_are_reached_by_number() -> None:
    sampler = get_weighted_sampler(LABELS)
    first, second = list(sampler), list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    other = get_weighted_sampler(LABELS)
    other.load_state_dict(sampler.state_dict())
    assert list(other) == second


def test_the_generator_gives_the_seed_and_keeps_its_state() -> None:
    generator = torch.Generator().manual_seed(42)
    state = generator.get_state()
    sampler = get_weighted_sampler(LABELS, generator=generator)
    assert torch.equal(generator.get_state(), state)
    assert sampler.plan.seed == 42
    torch.rand(3, generator=generator)
    again = get_weighted_sampler(LABELS, generator=generator)
    assert again.plan.digest == sampler.plan.digest
    largest = torch.Generator().manual_seed(-1)
    assert get_weighted_sampler(LABELS, generator=largest).plan.seed == 2**64 - 1


def test_a_generator_of_another_library_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"generator is Generator; .*torch\.Generator\(\)"):
        get_weighted_sampler(LABELS, generator=np.random.default_rng(0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("targets", "weights"),
    [
        (NAMES, {"LGG": 2.8, "HGG": 1.0}),
        (NAMES, {"LGG": np.float32(2.8), "HGG": 1, "no such patient": 0.0}),
        (np.array(NAMES), {"LGG": torch.tensor(2.8), "HGG": torch.tensor(1.0)}),
        ([2 if name == "LGG" else 1 for name in NAMES], [1.0, 2.8]),
        ([1 if name == "LGG" else 0 for name in NAMES], torch.tensor([1.0, 2.8])),
        # As in weights[targets]: a weight for every number, whether or not it has samples.
        (torch.tensor([2 if name == "LGG" else 0 for name in NAMES]), np.array([1.0, 7.0, 2.8])),
        ([3 if name == "LGG" else 1 for name in NAMES], (0.0, 1.0, 0.0, 2.8)),
    ],
)
def test_weights_by_name_or_in_label_order_give_the_share_of_the_formula(
    targets: Any, weights: Any
) -> None:
    share = Fraction(75) * Fraction("2.8") / (75 * Fraction("2.8") + 210)
    sampler = create_weighted_sampler(targets, weights, num_samples=1000)
    rare = sum(NAMES[index] == "LGG" for index in sampler)
    assert rare == 1000 * share == 500


def test_the_shares_are_those_of_torch_s_weighted_random_sampler() -> None:
    weights = {0: 0.5, 1: 3.0, 2: 1.25}
    labels = [0] * 70 + [1] * 20 + [2] * 10
    draws = 60_000
    per_sample = [weights[label] for label in labels]
    generator = torch.Generator().manual_seed(1)
    theirs = Counter(
        labels[i] for i in WeightedRandomSampler(per_sample, draws, generator=generator)
    )
    ours = drawn(create_weighted_sampler(labels, weights, num_samples=draws), labels)
    total = sum(per_sample)
    for label in weights:
        share = weights[label] * labels.count(label) / total
        assert abs(ours[label] - draws * share) < 1
        # Five standard deviations of a binomial.
        assert abs(theirs[label] - ours[label]) < 5 * (draws * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(
    ("targets", "weights", "said"),
    [
        (NAMES, [1.0, 2.8], r"a list, but the labels are text.*Write a mapping: \{HGG: 1.0, LGG"),
        (NAMES, {"LGG": 2.8}, "leaves out 'HGG'"),
        (NAMES, {"LGG": 2.8, "HGG": 1, "LGGs": 2}, "names 'LGGs', but .* Did you mean 'LGG'"),
        (NAMES, {"LGG": 2.8, "HGG": 0}, "gives class 'HGG' 0.0; use numbers > 0"),
        (NAMES, {"LGG": 2.8, "HGG": -1}, "gives class 'HGG' -1.0"),
        (NAMES, {"LGG": 2.8, "HGG": "much"}, "class_weights has 'much'"),
        (LABELS, [1.0], "has 1 entries for 2 classes '0', '1'"),
        (LABELS, {}, r"weights is \{\}"),
        ([["a"], ["a", "b"]], {"a": 1, "b": 2}, "several labels per sample.*repeat_factor"),
        (np.eye(2), [1.0, 2.0], "several labels per sample"),
    ],
)
def test_weights_that_fit_no_label_are_refused(targets: Any, weights: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        create_weighted_sampler(targets, weights)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_samples": True}, "num_samples is True"),
        ({"replacement": "no"}, "replacement is 'no'"),
        ({"strategy": "inverse_frequencies"}, "Did you mean 'inverse_frequency'"),
    ],
)
def test_a_wrong_argument_is_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        get_weighted_sampler(LABELS, **wrong)


def test_the_length_of_an_epoch_is_shared_by_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        ranks.append(get_weighted_sampler(LABELS))
    assert [len(sampler) for sampler in ranks] == [50, 50]
    assert drawn(ranks[0], LABELS) + drawn(ranks[1], LABELS) == {0: 50, 1: 50}


def test_more_weights_than_torch_can_take() -> None:
    labels = np.zeros(2**24 + 1, dtype=np.int8)
    labels[::1000] = 1
    with pytest.raises(RuntimeError, match="2\\^24"):
        list(WeightedRandomSampler(torch.ones(len(labels)), 1))  # type: ignore[arg-type]
    sampler = get_weighted_sampler(labels)
    assert len(sampler) == len(labels)
    first = [labels[index] for index in itertools.islice(sampler, 2000)]
    assert abs(sum(map(int, first)) - 1000) <= 3


def test_nothing_touches_the_global_generators() -> None:
    with global_states_untouched():
        list(get_weighted_sampler(LABELS))
        list(create_weighted_sampler(LABELS, [1.0, 9.0]))


@pytest.mark.parametrize(
    "targets",
    [
        np.array([0.0] * 90 + [1.0] * 10),
        torch.tensor([0.0] * 90 + [1.0] * 10, dtype=torch.bfloat16),
        np.array([False] * 90 + [True] * 10),
    ],
)
@pytest.mark.parametrize("weights", [{0: 1.0, 1: 9.0}, [1.0, 9.0], torch.tensor([1.0, 9.0])])
def test_weights_by_class_number_fit_labels_that_are_fractions_or_flags(
    targets: Any, weights: Any
) -> None:
    indices = list(create_weighted_sampler(targets, weights))
    assert sum(index >= 90 for index in indices) == 50


@pytest.mark.parametrize("targets", [[0] * 90 + [1] * 10, ["HGG"] * 90 + ["LGG"] * 10])
def test_a_weight_per_sample_is_not_taken_for_one_per_class(targets: list[Any]) -> None:
    weights = torch.tensor([1.0] * 90 + [9.0] * 10)
    with pytest.raises(ConfigError, match=r"100 entries, one per sample.*'sample_weights'"):
        create_weighted_sampler(targets, weights)
