"""Replay: exact quota batches from any stream, out of bounded rings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError
from streaming_balance.stream import replay
from streaming_balance.stream.replay import Replay, ReplayRun
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
ROOM = 400 * ITEM_BYTES


def check_batches(
    run: ReplayRun[Sample], stream: list[Sample], target: dict[str, float], batch_size: int
) -> list[list[Sample]]:
    """Feed a stream; check every batch against the classes met by then, and the sums since."""
    met: list[str] = []
    ideal: dict[str, Fraction] = {}
    since: Counter[str] = Counter()
    number, batches = 0, []
    for item in stream:
        label = str(item.label)
        if label not in met and target[label]:
            met.append(label)
            known = shares({name: target[name] for name in met})
            ideal = {name: share * batch_size for name, share in known.items()}
            since, number = Counter(), 0
        for batch in run.feed(item):
            counts = Counter(str(each.label) for each in batch)
            number += 1
            since.update(counts)
            assert len(batch) == batch_size
            assert counts.keys() <= ideal.keys()
            for name, exact in ideal.items():
                assert math.floor(exact) <= counts[name] <= math.ceil(exact)
                assert abs(since[name] - exact * number) < 1
            batches.append(batch)
    assert run.finish() == []
    return batches


@pytest.mark.parametrize("length", [100, 1000, 10_000])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_batch_has_floor_or_ceiling_of_every_share_and_sums_are_within_one(
    name: str, order: str, length: int
) -> None:
    target = even(COMPOSITIONS[name])
    run: ReplayRun[Sample] = Replay(target, batch_size=8, buffer_bytes=ROOM).begin(seed=1)
    stream = samples(labels_of(COMPOSITIONS[name], length, order))
    batches = check_batches(run, stream, target, 8)
    # As many samples go on as came in, but for less than a batch.
    assert len(batches) == length // 8


def test_a_hundred_thousand_samples_give_exact_batches() -> None:
    target = {label: float(number + 1) for number, label in enumerate(COMPOSITIONS["long tail"])}
    stage = Replay(target, batch_size=32, buffer_bytes=ROOM)
    stream = samples(labels_of(COMPOSITIONS["long tail"], 100_000, "random"))
    assert len(check_batches(stage.begin(seed=1), stream, target, 32)) == 3125


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_million_samples_give_exact_batches(name: str, order: str) -> None:
    target = even(COMPOSITIONS[name])
    stream = samples(labels_of(COMPOSITIONS[name], 1_000_000, order))
    stage = Replay(target, batch_size=16, buffer_bytes=ROOM)
    assert len(check_batches(stage.begin(seed=1), stream, target, 16)) == 62_500


@given(
    weights=st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any),
    labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=150),
    batch_size=st.integers(1, 12),
    per_read=st.sampled_from([0.25, 0.7, 1.0, 2.5]),
)
def test_any_target_batch_size_and_pace_gives_exact_batches(
    weights: list[int], labels: list[str], batch_size: int, per_read: float
) -> None:
    target = {name: float(weight) for name, weight in zip("abc", weights, strict=True)}
    stage = Replay(target, batch_size=batch_size, buffer_bytes=ROOM, per_read=per_read)
    batches = check_batches(stage.begin(seed=1), samples(labels), target, batch_size)
    wanted = sum(target[label] > 0 for label in labels)
    assert len(batches) == math.floor(wanted * Fraction(str(per_read)) / batch_size)


def test_what_is_short_of_a_batch_counts_for_the_next_pass() -> None:
    run = Replay(EVEN, batch_size=8, buffer_bytes=ROOM).begin()
    stream = samples(["HGG", "LGG"] * 5)
    assert [len(list(run.over(stream))) for _ in range(8)] == [1, 1, 1, 2, 1, 1, 1, 2]


def test_the_rings_last_beyond_the_pass_so_that_no_pass_begins_one_sided() -> None:
    run = Replay(EVEN, batch_size=4, buffer_bytes=ROOM).begin()
    stream = samples(["HGG"] * 40 + ["LGG"] * 8)
    first, second = list(run.over(stream)), list(run.over(stream))
    assert Counter(item.label for item in first[0]) == {"HGG": 4}
    assert all(Counter(item.label for item in batch) == {"HGG": 2, "LGG": 2} for batch in second)
    assert run.stats()["eras"] == [
        {"classes": ["HGG"], "batches": 10},
        {"classes": ["HGG", "LGG"], "batches": 14},
    ]


def test_each_class_has_its_share_of_the_buffer_and_the_newest_replaces_the_oldest() -> None:
    run: ReplayRun[Sample] = Replay(
        {"HGG": 1, "LGG": 3}, batch_size=4, buffer_bytes=40 * ITEM_BYTES, per_read=0.01
    ).begin()
    for item in samples(["HGG", "LGG"] * 50):
        run.feed(item)
    held = run.stats()["classes"]
    assert (held["HGG"]["held"], held["LGG"]["held"]) == (10, 30)
    state = run.state_dict(lambda item: item.key)["run"]["rings"]
    assert state["HGG"]["ages"] == [f"s{number}" for number in range(80, 100, 2)]
    assert state["LGG"]["ages"] == [f"s{number}" for number in range(41, 100, 2)]


def test_of_two_samples_in_a_ring_neither_goes_on_twice_before_the_other_does() -> None:
    run = Replay(EVEN, batch_size=6, buffer_bytes=60 * ITEM_BYTES, per_read=2).begin(seed=1)
    by_key = {item.key: item for item in samples(labels_of({"HGG": 5, "LGG": 1}, 600, "random"))}
    went_on: dict[str, int] = {}
    entered: dict[tuple[str, str], int] = {}
    for item in by_key.values():
        for key in flat(run.feed(item)):
            went_on[key] = went_on.get(key, 0) + 1
        rings = run.state_dict(lambda held: held.key)["run"]["rings"]
        together = {
            (one, other)
            for ring in rings.values()
            for one in ring["ages"]
            for other in ring["ages"]
        }
        entered = {pair: entered[pair] for pair in entered.keys() & together}
        for one, other in together:
            ahead = went_on.get(one, 0) - went_on.get(other, 0)
            assert abs(ahead - entered.setdefault((one, other), ahead)) <= 1


def test_no_sample_is_twice_in_a_batch_while_its_ring_holds_as_many_as_the_batch_asks() -> None:
    run = Replay(EVEN, batch_size=8, buffer_bytes=ROOM).begin(seed=1)
    stream = samples(["LGG"] * 4 + ["HGG"] * 200)
    assert all(len({item.key for item in batch}) == 8 for batch in run.over(stream))
    assert run.stats()["twins"] == 0


def test_samples_that_are_in_a_batch_again_are_counted() -> None:
    run = Replay(EVEN, batch_size=8, buffer_bytes=ROOM).begin(seed=1)
    batches = list(run.over(samples(["LGG"] * 3 + ["HGG"] * 13)))
    assert run.stats()["twins"] == sum(8 - len({item.key for item in batch}) for batch in batches)
    # Each of the two batches asks three samples to fill four places.
    assert run.stats()["twins"] == 2


def test_a_sample_read_again_takes_the_place_of_the_one_still_held() -> None:
    run: ReplayRun[Sample] = Replay(EVEN, batch_size=2, buffer_bytes=ROOM).begin(seed=1)
    first, second = samples(["HGG", "LGG"]), samples(["HGG", "LGG"])
    list(run.over(first))
    batches = list(run.over(second))
    assert run.stats()["held"] == 2
    assert {id(item) for batch in batches for item in batch} == {id(item) for item in second}


def test_nothing_goes_on_before_all_classes_came_when_told_to_wait() -> None:
    target = {**EVEN, "normal": 0.0}
    stage = Replay(target, batch_size=4, buffer_bytes=ROOM, wait_for_classes=True)
    run = stage.begin()
    for item in samples(["HGG"] * 50):
        assert run.feed(item) == []
    assert run.stats()["unmet"] == ["LGG"]
    batches = [batch for item in samples(["LGG"] * 8) for batch in run.feed(item)]
    assert [Counter(item.label for item in batch) for batch in batches] == [
        {"HGG": 2, "LGG": 2},
        {"HGG": 2, "LGG": 2},
    ]


def test_a_pass_spent_waiting_for_a_class_that_never_came_is_an_error() -> None:
    run = Replay(EVEN, batch_size=4, buffer_bytes=ROOM, wait_for_classes=True).begin()
    for item in samples(["HGG"] * 5):
        run.feed(item)
    with pytest.raises(ConfigError, match=r"without a sample of 'LGG'.*read were 'HGG'"):
        run.finish()


def test_classes_that_never_came_are_in_the_stats() -> None:
    run = Replay({"HGG": 1, "LGG": 1, "x": 1}, batch_size=4, buffer_bytes=ROOM).begin()
    list(run.over(samples(["HGG"] * 8)))
    assert run.stats()["unmet"] == ["LGG", "x"]
    assert run.stats()["classes"]["HGG"]["promised"] == 8


def test_the_promise_of_the_stats_is_the_sum_of_the_shares_of_all_batches() -> None:
    run = Replay({"a": 5, "b": 3, "c": 2}, batch_size=7, buffer_bytes=ROOM).begin()
    list(run.over(samples(["a"] * 70 + ["b"] * 70 + ["c"] * 70)))
    promised = {label: each["promised"] for label, each in run.stats()["classes"].items()}
    assert promised["a"] == pytest.approx(70 * (1 + 5 / 8 + 5 / 10))
    assert promised["b"] == pytest.approx(70 * (3 / 8 + 3 / 10))
    assert promised["c"] == pytest.approx(70 * 2 / 10)


def test_quotas_are_counted_anew_after_an_era_and_a_far_state_is_restored_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A class that is due once in a billion draws: no schedule that far could be worked out.
    stage = Replay({"a": 1e-9, "b": 0.7, "c": 0.3}, batch_size=7, buffer_bytes=1 << 50)
    by_key = {item.key: item for item in samples(["a", "b", "c"])}
    run: ReplayRun[Sample] = stage.begin()
    for item in by_key.values():
        run.feed(item)
    state = run.state_dict(lambda item: item.key)
    state["run"]["eras"][-1]["batches"] = replay.ERA_BATCHES - 1
    restored: ReplayRun[Sample] = stage.begin()
    monkeypatch.setattr(replay, "ERA_BATCHES", 8)
    few: ReplayRun[Sample] = Replay(EVEN, batch_size=3, buffer_bytes=ROOM).begin()
    list(few.over(samples(["HGG", "LGG"] * 30)))
    assert [era["batches"] for era in few.stats()["eras"]] == [0, 8, 8, 4]
    monkeypatch.undo()
    restored.load_state_dict(state, lambda key: by_key[key])
    batches = [batch for _ in range(9) for batch in restored.feed(by_key["s1"])]
    assert len(batches) == 1
    assert [era["batches"] for era in restored.stats()["eras"]][-1] == replay.ERA_BATCHES


def test_the_places_in_a_batch_are_keyed_and_classes_are_mixed() -> None:
    stream = samples(["HGG", "LGG"] * 32)

    def orders(seed: int) -> list[list[str | None]]:
        run = Replay(EVEN, batch_size=8, buffer_bytes=ROOM).begin(seed=seed)
        return [[item.label for item in batch] for batch in run.over(stream)]

    first = orders(1)
    assert len({tuple(order) for order in first}) > 4
    assert first != orders(2)


@pytest.mark.parametrize("place", range(8))
def test_every_place_of_a_batch_is_as_often_one_class_as_the_other(place: int) -> None:
    run = Replay(EVEN, batch_size=8, buffer_bytes=ROOM).begin(seed=1)
    batches = list(run.over(samples(["HGG", "LGG"] * 8000)))
    found = sum(batch[place].label == "HGG" for batch in batches)
    # 2,000 batches: 1,000 of each, and a standard deviation of 22.
    assert abs(found - 1000) < 6 * math.sqrt(2000 / 4)


def test_a_sample_larger_than_its_ring_is_refused_with_the_buffer_it_takes() -> None:
    run = Replay({"HGG": 3, "LGG": 1}, batch_size=4, buffer_bytes=8 * ITEM_BYTES).begin()
    with pytest.raises(ConfigError, match=r"'P7' takes 2049 bytes.*'LGG' has 2048.*=8196 or more"):
        run.feed(Sample("P7", "LGG", 1025))
    wide = Replay({"HGG": 3, "LGG": 1}, batch_size=4, buffer_bytes=8196).begin()
    wide.feed(Sample("P7", "LGG", 1025))
    assert wide.stats()["held"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"replay: batch_size is 0"),
        ({"per_read": 0}, r"replay: per_read is 0; it must be a number in \(0, 1024\]"),
        ({"wait_for_classes": 1}, r"replay: wait_for_classes is 1"),
        ({"target": {"HGG": 999, "LGG": 1}}, r"of which class 'LGG' gets 409; a sample takes 1024"),
        ({"target": ("HGG",)}, r"replay: target"),
        ({"unknown": None}, r"replay: unknown is None"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Replay(**{"target": EVEN, "batch_size": 4, "buffer_bytes": ROOM, **settings})


def test_undeclared_labels_earn_nothing() -> None:
    run = Replay(EVEN, batch_size=2, buffer_bytes=ROOM, unknown="drop").begin()
    assert len(list(run.over(samples(["HGG", "x", "x", "x", "LGG"])))) == 1


def test_the_composition_of_a_short_stream_is_what_the_tests_take_it_for() -> None:
    assert counts_of(COMPOSITIONS["1000:1"], 100) == {"HGG": 100, "LGG": 0}
    assert counts_of(COMPOSITIONS["89/11"], 100) == {"HGG": 89, "LGG": 11}


def test_the_order_in_which_target_names_the_classes_decides_nothing() -> None:
    stream = samples(labels_of({"a": 5, "b": 3, "c": 1}, 200, "random"))
    outputs = [
        [[item.key for item in batch] for batch in _replayed(order).begin(seed=1).over(stream)]
        for order in permutations("abc")
    ]
    assert all(output == outputs[0] for output in outputs)


def _replayed(labels: Iterable[str]) -> Replay:
    """Give a stage whose target names the classes in this order."""
    return Replay(dict.fromkeys(labels, 1), batch_size=4, buffer_bytes=20 * ITEM_BYTES)
