"""Repeat: no sample lost, copies within 1 of the sum of the rates, and never two in a row."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError
from streaming_balance.stream.repeat import Repeat, repeat_rates
from streaming_balance.stream.stages import ITEM_BYTES
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
ROUNDING = Fraction(1, 10**6)
ROOM = 64 * ITEM_BYTES


def rates_by_hand(target: dict[str, float], counts: dict[str, int]) -> dict[str, Fraction]:
    """r_c / min r with r = t / p: the class nearest to its target goes on once."""
    frequency = shares(counts)
    ratios = {label: share / frequency[label] for label, share in shares(target).items()}
    least = min(ratios.values())
    return {label: ratio / least for label, ratio in ratios.items()}


@pytest.mark.parametrize("name", ["HGG_LGG", "three_class"])
def test_the_reference_rates_are_met(vectors: dict[str, Any], name: str) -> None:
    counts = vectors["datasets"]["counts"][name]
    labels = [f"c{number}" for number in range(len(counts))]
    sizes = {label: Fraction(count) for label, count in zip(labels, counts, strict=True)}
    uniform = {label: Fraction(1, len(labels)) for label in labels}
    rates = repeat_rates(uniform, sizes, frozenset(labels))
    expected = vectors["stream_rates"]["cases"][name]["over_rate"]
    assert [float(rates[label]) for label in labels] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("length", [100, 1000, 10_000])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_copies_of_a_class_are_within_one_of_the_sum_of_its_rates_and_no_sample_is_lost(
    name: str, order: str, length: int
) -> None:
    check_declared(name, order, length)


def test_a_hundred_thousand_samples_are_repeated_to_within_one_of_the_sum_of_the_rates() -> None:
    check_declared("long tail", "random", 100_000)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_million_samples_are_repeated_to_within_one_of_the_sum_of_the_rates(
    name: str, order: str
) -> None:
    check_declared(name, order, 1_000_000)


def check_declared(name: str, order: str, length: int) -> None:
    there = {label: n for label, n in counts_of(COMPOSITIONS[name], length).items() if n}
    target = even(there)
    rates = rates_by_hand(target, there)
    stream = samples(labels_of(COMPOSITIONS[name], length, order))
    run = Repeat(target, buffer_bytes=ROOM, frequencies=there).begin(seed=3)
    copies: Counter[str] = Counter(item.key for item in run.over(stream))
    by_class: Counter[str] = Counter()
    for item in stream:
        label = str(item.label)
        rate = rates[label]
        assert int(rate) <= copies[item.key] <= int(rate) + (rate.denominator > 1)
        by_class[label] += copies[item.key]
    assert copies.keys() == {item.key for item in stream}
    assert copies.total() == by_class.total()
    most = max(there.values())
    for label in there:
        # n_c times n_max / n_c: every class comes as often as the most frequent one.
        assert abs(by_class[label] - most) <= 1 + ROUNDING


@given(
    labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=100),
    window=st.integers(1, 40),
    most=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_counted_frequencies_change_at_borders_only_and_are_cut_at_most_copies(
    labels: list[str], window: int, most: int, seed: int
) -> None:
    target = {"a": 1.0, "b": 2.0, "c": 3.0}
    run = Repeat(target, buffer_bytes=ROOM, window=window, most_copies=most).begin(seed=seed)
    promised = dict.fromkeys("abc", Fraction(0))
    given_out: Counter[str] = Counter()
    border, cut = 0, 0
    frozen: Counter[str] = Counter()
    for place, label in enumerate(labels):
        if place == border:
            frozen = Counter(labels[:place])
            border = place + min(window, max(1, place))
        ratios = {name: share / (frozen[name] + 1) for name, share in shares(target).items()}
        met = [name for name in "abc" if frozen[name]] or list("abc")
        rate = ratios[label] / min(ratios[name] for name in met) if label in met else Fraction(1)
        cut += rate > most
        promised[label] += min(rate, Fraction(most))
        given_out.update(str(item.label) for item in run.feed(Sample(f"s{place}", label)))
        stats = run.stats()["classes"][label]
        assert abs(stats["given"] - promised[label]) <= 1 + ROUNDING
        assert stats["promised"] == pytest.approx(float(promised[label]))
    given_out.update(str(item.label) for item in run.finish())
    assert run.stats()["cut_to_most_copies"] == cut
    assert run.stats()["pending_copies"] == 0
    for label in "abc":
        assert abs(given_out[label] - promised[label]) <= 1 + ROUNDING


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["89/11", "long tail"])
def test_no_copy_follows_another_of_the_same_sample(name: str, order: str) -> None:
    counts = COMPOSITIONS[name]
    run = Repeat(even(counts), buffer_bytes=ROOM, frequencies=counts).begin(seed=1)
    keys = flat(run.over(samples(labels_of(counts, 2000, order))))
    assert all(first != second for first, second in pairwise(keys))


def test_copies_stand_at_least_half_a_buffer_apart_while_the_stream_lasts() -> None:
    run = Repeat(EVEN, buffer_bytes=ROOM, frequencies={"HGG": 9, "LGG": 1}).begin(seed=1)
    stream = samples(labels_of({"HGG": 9, "LGG": 1}, 3000, "random"))
    keys = [item.key for sample in stream for item in run.feed(sample)]
    last: dict[str, int] = {}
    distances = []
    for place, key in enumerate(keys):
        if key in last:
            distances.append(place - last[key])
        last[key] = place
    assert len(distances) > 1000
    assert min(distances) >= 32


def test_the_rest_of_a_pass_is_spread_evenly() -> None:
    run = Repeat(EVEN, buffer_bytes=ROOM, frequencies={"HGG": 10, "LGG": 1}).begin(seed=1)
    stream = samples(["HGG"] * 20 + ["LGG"] * 2)
    assert [item for sample in stream for item in run.feed(sample)] == []
    places = [place for place, item in enumerate(run.finish()) if item.key == "s20"]
    # Half of its 10 copies in the first half of all 40, give or take its neighbours' phases.
    assert len(places) == 10
    assert 4 <= sum(place < 20 for place in places) <= 6
    assert max(second - first for first, second in pairwise(places)) <= 10


def test_one_sample_that_outweighs_all_others_meets_itself_no_oftener_than_it_must() -> None:
    run = Repeat(EVEN, buffer_bytes=ROOM, frequencies={"HGG": 20, "LGG": 1}).begin(seed=1)
    keys = flat(run.over(samples(["HGG"] * 5 + ["LGG"])))
    # 20 copies have 5 others to stand between: 6 runs, so 14 of them follow another.
    assert sum(first == second for first, second in pairwise(keys)) == 14


def test_the_order_is_keyed_by_seed_and_pass() -> None:
    stream = samples(labels_of({"HGG": 3, "LGG": 1}, 60, "random"))
    run = Repeat(EVEN, buffer_bytes=8 * ITEM_BYTES, frequencies={"HGG": 3, "LGG": 1}).begin(seed=1)
    first, second = flat(run.over(stream)), flat(run.over(stream))
    assert sorted(first) == sorted(second)
    assert first != second


def test_the_extra_copy_of_a_fraction_falls_to_others_in_another_pass() -> None:
    stream = samples(["LGG"] * 10)
    run = Repeat(EVEN, buffer_bytes=ROOM, frequencies={"HGG": 3, "LGG": 2}).begin(seed=1)
    extra, total = set(), 0
    for number in range(1, 21):
        copies = Counter(flat(run.over(stream)))
        extra.add(tuple(sorted(key for key in copies if copies[key] == 2)))
        total += copies.total()
        assert total == 15 * number
    assert len(extra) > 1


def test_what_a_pass_could_not_give_is_given_in_the_next() -> None:
    stream = samples(["LGG"] * 7)
    run = Repeat(EVEN, buffer_bytes=ROOM, frequencies={"HGG": 3, "LGG": 2}).begin(seed=1)
    total = 0
    for number in range(1, 101):
        total += len(list(run.over(stream)))
        assert abs(total - Fraction(21, 2) * number) <= 1 + ROUNDING


def test_a_sample_larger_than_the_buffer_goes_on_at_once_with_its_copies() -> None:
    run = Repeat(EVEN, buffer_bytes=ROOM, frequencies={"HGG": 3, "LGG": 1}).begin()
    run.feed(Sample("small", "HGG"))
    assert flat(run.feed(Sample("large", "LGG", ROOM))) == ["large"] * 3
    stats = run.stats()
    assert (stats["passed_through"], stats["held"], stats["buffered"]) == (1, 1, 1)
    assert (stats["delivered"], stats["copies"]) == (1, 2)
    assert flat(run.finish()) == ["small"]


def test_a_class_that_appears_late_goes_on_once_until_the_next_border() -> None:
    run = Repeat(EVEN, buffer_bytes=ROOM, window=128).begin()
    for item in samples(["HGG"] * 512):
        run.feed(item)
    run.feed(Sample("late", "LGG"))
    assert run.stats()["classes"]["LGG"]["given"] == 1
    for item in samples(["HGG"] * 127):
        run.feed(item)
    run.feed(Sample("later", "LGG"))
    # 639 + 1 against 1 + 1 by then.
    assert run.stats()["classes"]["LGG"]["given"] == 1 + 320


def test_undeclared_labels_are_left_out_and_counted_when_asked() -> None:
    run = Repeat(EVEN, buffer_bytes=ROOM, unknown="drop").begin()
    assert flat(run.over(samples(["HGG", "lgg", None]))) == ["s0"]
    assert run.stats()["unknown"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": {"HGG": 1.0, "LGG": 0.0}}, r"gives class 'LGG' 0, but repeat loses no sample"),
        ({"most_copies": 0}, r"repeat: most_copies is 0"),
        ({"frequencies": {"HGG": 1}}, r"repeat: frequencies gives class 'LGG' None"),
        ({"window": -1}, r"repeat: window is -1"),
        ({"pseudo_counts": "many"}, r"repeat: pseudo_counts is 'many'"),
        ({"unknown": "pass"}, r"repeat: unknown is 'pass'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Repeat(**{"target": EVEN, "buffer_bytes": ROOM, **settings})


def test_declared_frequencies_that_need_more_copies_than_allowed_are_refused() -> None:
    stage = Repeat(EVEN, buffer_bytes=ROOM, frequencies={"HGG": 50_000, "LGG": 2})
    with pytest.raises(ConfigError, match=r"class 'LGG' has to go on 25000 times.*is 10000"):
        stage.begin()
