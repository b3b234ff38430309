"""Shuffle: every sample once, in an order keyed by seed and pass."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from streaming_balance.stream.shuffle import Shuffle
from streaming_balance.stream.stages import ITEM_BYTES, BareItem
from streaming_balance.stream.tallies import MOST_CLASSES
from tests.stream.labelled import Sample, flat, samples


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 1000])
def test_every_sample_goes_on_exactly_once(length: int) -> None:
    stream = samples(["a"] * length)
    keys = flat(Shuffle(10 * ITEM_BYTES).begin().over(stream))
    assert Counter(keys) == Counter(item.key for item in stream)


def test_the_order_differs_from_pass_to_pass_and_is_the_same_for_the_same_seed() -> None:
    stream = samples(["a"] * 200)

    def passes(seed: int) -> list[tuple[str, ...]]:
        run = Shuffle(50 * ITEM_BYTES).begin(seed=seed)
        return [tuple(flat(run.over(stream))) for _ in range(5)]

    assert len(set(passes(1))) == 5
    assert passes(1) == passes(1)
    assert not set(passes(1)) & set(passes(2))


def test_all_orders_of_four_samples_are_as_likely_as_each_other() -> None:
    run = Shuffle(100 * ITEM_BYTES).begin(seed=7)
    stream = samples(["a"] * 4)
    found = Counter(tuple(flat(run.over(stream))) for _ in range(24_000))
    assert len(found) == 24
    # Chi-square at 23 degrees of freedom: mean 23, standard deviation 6.8.
    assert sum((count - 1000) ** 2 / 1000 for count in found.values()) < 23 + 5 * math.sqrt(46)


def test_a_sample_goes_as_far_back_as_the_buffer_is_long_and_farther() -> None:
    stream = samples(["a"] * 20_000)
    keys = flat(Shuffle(100 * ITEM_BYTES).begin(seed=1).over(stream))
    delays = [place - int(key[1:]) for place, key in enumerate(keys)]
    # It leaves with a chance of 1 in 101 at every step: 100 steps on average, and at once at best.
    assert min(delays) == -100
    waited = [delay + 100 for delay in delays[: len(delays) // 2]]
    assert sum(waited) / len(waited) == pytest.approx(100, rel=0.05)


def test_a_sample_larger_than_the_buffer_goes_on_at_once() -> None:
    run = Shuffle(4 * ITEM_BYTES).begin()
    small, large = Sample("small", "a"), Sample("large", "a", 4 * ITEM_BYTES)
    assert run.feed(small) == []
    assert run.feed(large) == [large]
    assert (run.stats()["passed_through"], run.stats()["held"]) == (1, 1)


def test_samples_without_a_label_are_shuffled_and_counted() -> None:
    run = Shuffle(4 * ITEM_BYTES).begin()
    assert len(list(run.over(samples([None, "a", None])))) == 3
    stats = run.stats()
    assert (stats["read"], stats["delivered"]) == (3, 3)
    assert stats["classes"].keys() == {"a"}
    assert stats["classes"]["a"]["wanted_share"] is None


def test_labels_that_differ_from_sample_to_sample_take_no_memory() -> None:
    run = Shuffle(4 * ITEM_BYTES).begin()
    for number in range(3 * MOST_CLASSES):
        run.feed(BareItem(f"P{number}", f"caption {number}"))
    stats = run.stats()
    assert len(stats["classes"]) == MOST_CLASSES
    again = Shuffle(4 * ITEM_BYTES).begin()
    again.load_state_dict(run.state_dict(lambda item: item), lambda item: item)
    assert again.stats() == stats
    run.finish()
    again.finish()
    assert run.stats() == again.stats()
    assert run.stats()["read"] == run.stats()["delivered"] == 3 * MOST_CLASSES
