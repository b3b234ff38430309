"""Accept: within 1 of the sum of its rates at every prefix, on the label alone."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError
from streaming_balance.stream.accept import Accept, accept_rates
from tests.stream.labelled import (
    COMPOSITIONS,
    ORDERS,
    Sample,
    counts_of,
    even,
    flat,
    labels_of,
    samples,
    shares,
)

EVEN = {"HGG": 0.5, "LGG": 0.5}
# Rates are rounded to 2**-52, which a million of them cannot make visible.
ROUNDING = Fraction(1, 10**9)


def rates_by_hand(
    target: dict[str, float], counts: dict[str, int]
) -> tuple[dict[str, Fraction], Fraction]:
    """a_c = r_c / max r with r = t / p, and max r: the definition, in exact arithmetic."""
    frequency = shares(counts)
    ratios = {label: share / frequency[label] for label, share in shares(target).items()}
    most = max(ratios.values())
    return {label: ratio / most for label, ratio in ratios.items()}, most


def worst_distance(
    run: Any, stream: list[Sample], rate_of: Any
) -> tuple[Counter[str], dict[str, Fraction], Fraction]:
    """Feed a stream; give what was kept, what was promised, and the largest difference ever."""
    kept: Counter[str] = Counter()
    promised: dict[str, Fraction] = {}
    worst = Fraction(0)
    for item in stream:
        label = str(item.label)
        promised[label] = promised.get(label, Fraction(0)) + rate_of(label)
        kept[label] += len(run.feed(item))
        worst = max(worst, abs(kept[label] - promised[label]))
    assert run.finish() == []
    return kept, promised, worst


@pytest.mark.parametrize("name", ["HGG_LGG to 50/50", "three_class to uniform", "1:99 to 50/50"])
def test_the_reference_rates_are_met(vectors: dict[str, Any], name: str) -> None:
    case = vectors["tf_rejection_resample"]["cases"][name]
    labels = [f"c{number}" for number in range(len(case["ratio"]))]
    # p = t / r, with the target uniform.
    sizes = {label: 1 / Fraction(ratio) for label, ratio in zip(labels, case["ratio"], strict=True)}
    uniform = {label: Fraction(1, len(labels)) for label in labels}
    rates = accept_rates(uniform, sizes, frozenset(labels))
    assert [float(rates[label]) for label in labels] == pytest.approx(
        case["accept_plain"], rel=1e-12
    )


def test_a_stream_that_is_balanced_already_is_kept_whole() -> None:
    # TensorFlow's rejection resampling computes 0/0 here.
    stream = samples(["HGG", "LGG"] * 50)
    run = Accept(EVEN, frequencies={"HGG": 1, "LGG": 1}).begin()
    assert list(run.over(stream)) == stream


@pytest.mark.parametrize("length", [100, 1000, 10_000])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_with_declared_frequencies_every_prefix_is_within_one_of_the_sum_of_the_rates(
    name: str, order: str, length: int
) -> None:
    check_declared(name, order, length)


@pytest.mark.parametrize("name", ["1000:1", "long tail"])
def test_a_hundred_thousand_samples_are_within_one_of_the_sum_of_the_rates(name: str) -> None:
    check_declared(name, "random", 100_000)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_million_samples_are_within_one_of_the_sum_of_the_rates(name: str, order: str) -> None:
    check_declared(name, order, 1_000_000)


def check_declared(name: str, order: str, length: int) -> None:
    counts = counts_of(COMPOSITIONS[name], length)
    there = {label: count for label, count in counts.items() if count}
    target = even(there)
    rates, most = rates_by_hand(target, there)
    stream = samples(labels_of(COMPOSITIONS[name], length, order))
    run = Accept(target, frequencies=there).begin(seed=3)
    kept, promised, worst = worst_distance(run, stream, lambda label: rates[label])
    assert worst <= 1 + ROUNDING
    # Every class ends within 1 of the same number: the share of all that should be kept.
    for label in there:
        assert promised[label] == length / most / len(there)
        assert abs(kept[label] - promised[label]) <= 1 + ROUNDING
    assert length <= most * sum(kept.values()) + max(Fraction(1000), most * len(there))


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_no_more_samples_are_read_than_max_t_over_p_per_output_and_one_window(name: str) -> None:
    length, window = 20_000, 1000
    counts = counts_of(COMPOSITIONS[name], length)
    _, most = rates_by_hand(even(counts), counts)
    for frequencies in (None, counts):
        for order in ORDERS:
            run = Accept(even(counts), frequencies=frequencies, window=window).begin(seed=1)
            kept = len(list(run.over(samples(labels_of(COMPOSITIONS[name], length, order)))))
            assert length <= most * kept + window


def counted_rates(labels: list[str], target: dict[str, float], window: int) -> list[Fraction]:
    """The rate of each sample by the rules, worked out from the whole history each time."""
    rates: list[Fraction] = []
    border = 0
    frozen: Counter[str] = Counter()
    for place, label in enumerate(labels):
        if place == border:
            frozen = Counter(labels[:place])
            border = place + min(window, max(1, place))
        sizes = {name: Fraction(frozen[name] + 1) for name in target}
        ratios = {name: share / sizes[name] for name, share in shares(target).items()}
        met = [name for name in target if frozen[name] and target[name]] or list(target)
        rates.append(min(Fraction(1), ratios[label] / max(ratios[name] for name in met)))
    return rates


@given(
    labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=120),
    weights=st.tuples(*[st.integers(0, 9)] * 3).filter(any),
    window=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_counted_frequencies_change_at_borders_only_and_every_prefix_is_within_one(
    labels: list[str], weights: tuple[int, ...], window: int, seed: int
) -> None:
    target = {name: float(weight) for name, weight in zip("abc", weights, strict=True)}
    rates = iter(counted_rates(labels, target, window))
    run = Accept(target, window=window).begin(seed=seed)
    _, promised, worst = worst_distance(run, samples(labels), lambda _: next(rates))
    assert worst <= 1 + ROUNDING
    for label, total in promised.items():
        assert run.stats()["classes"][label]["promised"] == pytest.approx(float(total), abs=1e-9)


@pytest.mark.parametrize("name", ["89/11", "99/1", "long tail"])
def test_counted_frequencies_reach_the_target_on_a_stream_in_random_order(name: str) -> None:
    stream = samples(labels_of(COMPOSITIONS[name], 20_000, "random"))
    run = Accept(even(COMPOSITIONS[name])).begin(seed=1)
    # By the second half every frequency is known to a few percent.
    for item in stream[:10_000]:
        run.feed(item)
    kept = Counter(item.label for item in run.over(stream[10_000:]))
    for label in COMPOSITIONS[name]:
        assert kept[label] / kept.total() == pytest.approx(1 / len(COMPOSITIONS[name]), rel=0.2)


def test_a_class_that_has_not_come_yet_does_not_hold_the_others_back() -> None:
    run = Accept({"HGG": 0.4, "LGG": 0.6}).begin()
    stream = samples(["HGG"] * 500)
    # One rate of 2/3 for the first sample, when nothing is known; from then on all are kept.
    assert len(list(run.over(stream))) >= 499


def test_a_class_that_appears_late_is_kept_whole() -> None:
    run = Accept(EVEN, window=100).begin()
    list(run.over(samples(["HGG"] * 1000)))
    assert len(list(run.over(samples(["LGG"] * 50)))) == 50


def test_pseudo_counts_for_each_class_are_frequencies_before_anything_is_counted() -> None:
    run = Accept(EVEN, pseudo_counts={"HGG": 300, "LGG": 100}).begin()
    assert run.stats()["classes"]["HGG"]["rate"] == pytest.approx(1 / 3)
    assert run.stats()["classes"]["LGG"]["rate"] == 1


def test_a_share_of_zero_leaves_a_class_out() -> None:
    run = Accept({"HGG": 1.0, "normal": 0.0}, frequencies={"HGG": 1, "normal": 9}).begin()
    stream = samples(["HGG", "normal", "normal"] * 20)
    assert {item.label for item in run.over(stream)} == {"HGG"}
    assert run.stats()["classes"]["normal"]["rejected"] == 40


def test_every_pass_keeps_other_samples_and_all_passes_together_are_within_one() -> None:
    stream = samples(["HGG"] * 10 + ["LGG"] * 5)
    run = Accept(EVEN, frequencies={"HGG": 10, "LGG": 5}).begin(seed=2)
    kept: Counter[str] = Counter()
    choices = set()
    for number in range(1, 41):
        keys = flat(run.over(stream))
        choices.add(tuple(keys))
        kept.update(str(stream[int(key[1:])].label) for key in keys)
        assert abs(kept["HGG"] - 5 * number) <= 1
        assert kept["LGG"] == 5 * number
    assert len(choices) > 1


@given(
    rates=st.lists(st.integers(1, 30), min_size=2, max_size=2),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=30),
    seed=st.integers(0, 999),
)
def test_passes_of_any_length_never_lose_the_sum(
    rates: list[int], lengths: list[int], seed: int
) -> None:
    counts = {"HGG": max(rates), "LGG": min(rates)}
    run = Accept(EVEN, frequencies=counts).begin(seed=seed)
    rate = Fraction(min(rates), max(rates))
    kept, read = 0, 0
    for length in lengths:
        for item in samples(["HGG"] * length):
            kept, read = kept + len(run.feed(item)), read + 1
            assert abs(kept - read * rate) < 1 + ROUNDING
        run.finish()


def test_the_phase_of_a_class_is_keyed_by_its_label_and_the_seed() -> None:
    def kept(target: dict[str, float], counts: dict[str, int], seed: int) -> list[str]:
        run = Accept(target, frequencies=counts).begin(seed=seed)
        return [item.key for item in run.over(samples(["HGG"] * 100))]

    alone = kept(EVEN, {"HGG": 10, "LGG": 1}, 1)
    # Another class beside it, at the same rate for this one: nothing changes for this one.
    three = kept({"HGG": 1, "LGG": 1, "x": 1}, {"HGG": 10, "LGG": 1, "x": 1}, 1)
    assert alone == three
    assert len({tuple(kept(EVEN, {"HGG": 10, "LGG": 1}, seed)) for seed in range(40)}) >= 8


def test_two_classes_of_one_rate_are_not_kept_in_step() -> None:
    target = {"a": 1, "b": 1, "rare": 1}
    counts = {"a": 10, "b": 10, "rare": 1}
    firsts = set()
    for seed in range(20):
        run = Accept(target, frequencies=counts).begin(seed=seed)
        kept = run.over(samples(["a"] * 10 + ["b"] * 10))
        firsts.add(tuple(int(item.key[1:]) % 10 for item in kept))
    assert any(first != second for first, second in firsts)


def test_what_the_caller_does_to_a_mapping_later_changes_no_stage() -> None:
    target, counts, added = {"HGG": 1.0, "LGG": 1.0}, {"HGG": 9, "LGG": 1}, {"HGG": 1, "LGG": 2}
    stages = [Accept(target, frequencies=counts), Accept(target, pseudo_counts=added)]
    before = [stage.settings for stage in stages]
    for mapping in (target, counts, added):
        mapping.clear()
    assert [stage.settings for stage in stages] == before


def test_the_label_alone_decides() -> None:
    class Sealed:
        def __init__(self, key: str, label: str) -> None:
            self.key, self.label = key, label

        @property
        def num_bytes(self) -> int:
            raise AssertionError("nobody may look")

    run = Accept(EVEN).begin()
    assert len(list(run.over([Sealed(f"s{n}", "HGG") for n in range(10)]))) == 10


def test_an_undeclared_label_is_an_error_that_names_sample_label_and_way_out() -> None:
    run = Accept(EVEN).begin()
    with pytest.raises(ConfigError, match=r"sample 's9' has the label 'lgg'.*Did you mean 'LGG'"):
        run.feed(Sample("s9", "lgg"))
    with pytest.raises(ConfigError, match=r"sample 's9' has no label.*unknown='drop'"):
        run.feed(Sample("s9", None))
    assert run.stats()["read"] == 0


def test_undeclared_labels_are_counted_and_left_out_when_asked() -> None:
    run = Accept(EVEN, unknown="drop").begin()
    assert [item.label for item in run.over(samples(["HGG", "lgg", None, "lgg"]))] == ["HGG"]
    stats = run.stats()
    assert (stats["read"], stats["delivered"], stats["rejected"], stats["unknown"]) == (4, 1, 3, 3)
    assert stats["unknown_labels"] == ["lgg", ""]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": {"HGG": 0.0}}, r"accept: target are all 0"),
        ({"target": {"HGG": -1.0}}, r"accept: target gives class 'HGG' -1.0"),
        ({"target": [0.5, 0.5]}, r"target is \[0.5, 0.5\].*must map labels"),
        ({"target": {}}, r"target is \{\}"),
        ({"frequencies": {"HGG": 1}}, r"frequencies gives class 'LGG' None, but target gives"),
        ({"frequencies": {"HGG": 1, "LGG": 0}}, r"frequencies gives class 'LGG' 0.0"),
        ({"frequencies": {"HGG": 1, "LGG": 1, "lgg": 1}}, r"names 'lgg'.*Did you mean 'LGG'"),
        ({"frequencies": [1, 2]}, r"frequencies is \[1, 2\]; it must map"),
        ({"window": 0}, r"accept: window is 0"),
        ({"window": 1.5}, r"accept: window is 1.5"),
        ({"pseudo_counts": 0}, r"accept: pseudo_counts is 0"),
        ({"pseudo_counts": float("nan")}, r"accept: pseudo_counts is nan"),
        ({"pseudo_counts": {"HGG": 1}}, r"pseudo_counts names 'HGG', but target names"),
        ({"pseudo_counts": {"HGG": 1, "LGG": 0}}, r"pseudo_counts gives class 'LGG' 0"),
        ({"unknown": "dorp"}, r"unknown is 'dorp'.*Did you mean 'drop'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Accept(**{"target": EVEN, **settings})


def test_a_seed_outside_its_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed is -1"):
        Accept(EVEN).begin(seed=-1)
