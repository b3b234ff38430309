"""Reservoir: who is kept depends on who came, and on nothing else."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError
from streaming_balance.plan.keys import stream_key
from streaming_balance.stream.reservoir import Reservoir
from streaming_balance.stream.stages import ITEM_BYTES, BareItem
from streaming_balance.stream.tallies import MOST_CLASSES
from tests.stream.labelled import (
    COMPOSITIONS,
    ORDERS,
    Sample,
    counts_of,
    flat,
    labels_of,
    samples,
)

# A line tracer makes thousands of cases three times as slow; smaller tests run the same lines.
pytestmark = pytest.mark.no_cover


def smallest(stream: Iterable[Sample], size: int, seed: int) -> set[str]:
    """The keys whose hashes are smallest in their class, found by sorting everybody."""
    by_class: dict[str, list[tuple[int, str]]] = {}
    for item in stream:
        rank = stream_key(seed, "reservoir", str(item.label), item.key)
        by_class.setdefault(str(item.label), []).append((rank, item.key))
    return {key for ranked in by_class.values() for _, key in sorted(ranked)[:size]}


@pytest.mark.parametrize("length", [100, 1000, 10_000])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_class_keeps_its_smallest_hashes_in_any_order(name: str, length: int) -> None:
    stream = samples(labels_of(COMPOSITIONS[name], length, "common first"))
    results = set()
    for number in range(4):
        order = np.random.default_rng(number).permutation(length)
        run = Reservoir(20).begin(seed=3)
        results.add(tuple(flat(run.over(stream[place] for place in order))))
        assert run.stats()["most_buffered_bytes"] <= 20 * len(COMPOSITIONS[name]) * ITEM_BYTES
    assert len(results) == 1
    assert set(results.pop()) == smallest(stream, 20, 3)


@pytest.mark.parametrize("order", ORDERS)
def test_a_hundred_thousand_samples_leave_the_smallest_hashes(order: str) -> None:
    stream = samples(labels_of(COMPOSITIONS["1000:1"], 100_000, order))
    run = Reservoir(100).begin(seed=1)
    assert set(flat(run.over(stream))) == smallest(stream, 100, 1)
    assert run.stats()["classes"]["LGG"]["delivered"] == 99


@pytest.mark.slow
def test_a_million_samples_leave_the_smallest_hashes() -> None:
    stream = samples(labels_of(COMPOSITIONS["long tail"], 1_000_000, "random"))
    assert set(flat(Reservoir(500).begin(seed=1).over(stream))) == smallest(stream, 500, 1)


@given(order=st.permutations(range(60)), size=st.integers(1, 12), bound=st.booleans())
def test_any_order_of_the_stream_gives_the_same_in_the_same_order(
    order: list[int], size: int, bound: bool
) -> None:
    stream = [Sample(f"s{number}", "ab"[number % 3 == 0], number * 7 % 50) for number in range(60)]
    stage = Reservoir(size, class_bytes=6 * ITEM_BYTES if bound else None)
    expected = flat(stage.begin(seed=2).over(stream))
    assert flat(stage.begin(seed=2).over(stream[number] for number in order)) == expected


def test_a_hash_is_that_of_seed_label_and_key() -> None:
    # Typed parts with their lengths, as every random stream of the package is named.
    parts = [b"i\x01\x00\x00\x00\x05", b"s\x09\x00\x00\x00reservoir", b"s\x01\x00\x00\x00a"]

    def word(key: str) -> int:
        name = b"".join(parts) + b"s" + len(key).to_bytes(4, "little") + key.encode()
        digest = hashlib.blake2b(name, digest_size=16, person=b"sb-stream-v1").digest()
        return int.from_bytes(digest, "little")

    stream = samples(["a"] * 50)
    expected = sorted((item.key for item in stream), key=word)[:5]
    assert set(flat(Reservoir(5).begin(seed=5).over(stream))) == set(expected)


def test_a_smaller_reservoir_keeps_a_part_of_what_a_larger_one_keeps() -> None:
    stream = samples(labels_of(COMPOSITIONS["long tail"], 2000, "random"))
    kept = [set(flat(Reservoir(size).begin(seed=1).over(stream))) for size in range(1, 40)]
    assert all(one < more for one, more in pairwise(kept))


def test_more_data_lets_nobody_in_who_was_out() -> None:
    stream = samples(["a"] * 600)
    for length in range(50, 600, 50):
        before = set(flat(Reservoir(20).begin(seed=1).over(stream[:length])))
        after = set(flat(Reservoir(20).begin(seed=1).over(stream[: length + 50])))
        assert {key for key in after if int(key[1:]) < length} <= before


def test_another_class_in_the_stream_changes_nothing_for_the_first() -> None:
    alone = samples(["a"] * 100)
    others = [Sample(f"t{number}", "b") for number in range(100)]
    kept = flat(Reservoir(10).begin(seed=1).over(alone))
    both = flat(Reservoir(10).begin(seed=1).over([*others, *alone]))
    assert [key for key in both if key[0] == "s"] == kept


def test_inclusion_is_uniform_over_ten_thousand_keys() -> None:
    trials, size, keys = 100, 1000, 10_000
    stream = [BareItem(f"patient-{number}", "a") for number in range(keys)]
    run = Reservoir(size, rotate=True).begin(seed=1)
    found = Counter(item.key for _ in range(trials) for item in run.over(stream))
    mean = trials * size / keys
    counts = np.array([found[item.key] for item in stream])
    # Each is binomial; drawing exactly `size` makes all of them one degree of freedom fewer.
    chi_square = float(((counts - mean) ** 2).sum() / (mean * (1 - size / keys)))
    assert counts.sum() == trials * size
    assert abs(chi_square - (keys - 1)) < 5 * math.sqrt(2 * (keys - 1))


def inclusion(weights: list[float], size: int) -> list[float]:
    """Chance of each to be among the first `size` drawn in proportion to the weights left."""
    chances = [0.0] * len(weights)
    for order in permutations(range(len(weights)), size):
        chance, left = 1.0, sum(weights)
        for member in order:
            chance *= weights[member] / left
            left -= weights[member]
        for member in order:
            chances[member] += chance
    return chances


CASES = ["[1, 2, 3, 4] k=1", "[1, 2, 3, 4] k=2", "[1, 2, 3, 4] k=3"]
CASES += ["[1, 1, 1, 1, 1] k=2", "[1, 1, 10] k=2"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["function", "mapping"])
def test_weighted_inclusion_is_within_five_sigma_of_the_reference(
    vectors: dict[str, Any], case: str, form: str
) -> None:
    text, size = case.split(" k=")
    weights = [float(weight) for weight in text.strip("[]").split(", ")]
    expected = vectors["reservoir"]["weighted_inclusion"][f"w={case}"]["inclusion"]
    assert inclusion(weights, int(size)) == pytest.approx(expected, rel=1e-12)
    trials = 20_000
    stream = [BareItem(f"P{number}", "a") for number in range(len(weights))]
    by_key = {item.key: weight for item, weight in zip(stream, weights, strict=True)}
    given_as: Any = by_key if form == "mapping" else lambda item: by_key[item.key]
    run = Reservoir(int(size), weights=given_as, rotate=True).begin(seed=4)
    found = Counter(item.key for _ in range(trials) for item in run.over(stream))
    for item, chance in zip(stream, expected, strict=True):
        sigma = math.sqrt(trials * chance * (1 - chance))
        assert abs(found[item.key] - trials * chance) < 5 * sigma


@pytest.mark.parametrize("number", [0, 1])
def test_uniform_inclusion_is_within_five_sigma_of_the_reference(
    vectors: dict[str, Any], number: int
) -> None:
    case = vectors["reservoir"]["uniform"][number]
    trials = 300
    stream = [BareItem(f"P{place}", "a") for place in range(case["n"])]
    run = Reservoir(case["k"], rotate=True).begin(seed=1)
    found = Counter(item.key for _ in range(trials) for item in run.over(stream))
    sigma = math.sqrt(trials * case["inclusion"] * (1 - case["inclusion"]))
    worst = max(abs(found[item.key] - trials * case["inclusion"]) for item in stream)
    assert worst < 5 * sigma


def test_a_weight_of_zero_never_goes_on_and_is_no_sample_of_the_ratio() -> None:
    stream = samples(["a"] * 10 + ["b"] * 30)
    stage = Reservoir(50, ratio=1.0, weights=lambda item: int(item.key[1:]) % 2)
    kept = list(stage.begin().over(stream))
    assert all(int(item.key[1:]) % 2 for item in kept)
    assert Counter(item.label for item in kept) == {"a": 5, "b": 5}


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), None, "2", True])
def test_a_weight_that_is_none_is_refused_by_sample(weight: Any) -> None:
    run = Reservoir(2, weights=lambda _: weight).begin()
    with pytest.raises(ConfigError, match=rf"weight of sample 'P1' is {weight!r}"):
        run.feed(Sample("P1", "a"))
    assert run.stats()["read"] == 0
    assert run.stats()["classes"] == {}


def test_a_sample_without_a_weight_is_refused_by_name() -> None:
    run = Reservoir(2, weights={"P1": 1.0}).begin()
    run.feed(Sample("P1", "a"))
    with pytest.raises(ConfigError, match="weight of sample 'P2' is None"):
        run.feed(Sample("P2", "a"))


@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=40),
    room=st.integers(1, 8),
    most=st.integers(1, 10),
)
def test_of_bounded_bytes_the_longest_run_of_smallest_hashes_that_fits_is_kept(
    sizes: list[int], room: int, most: int
) -> None:
    bound = room * ITEM_BYTES + 900
    stream = [Sample(f"s{number}", "a", size) for number, size in enumerate(sizes)]
    run = Reservoir(most, class_bytes=bound).begin(seed=1)
    ranked = sorted(stream, key=lambda item: stream_key(1, "reservoir", "a", item.key))
    expected, taken = [], 0
    for item in ranked[:most]:
        taken += item.num_bytes + ITEM_BYTES
        if taken > bound:
            break
        expected.append(item.key)
    assert set(flat(run.over(stream))) == set(expected)
    assert run.stats()["most_buffered_bytes"] <= bound


def test_a_sample_larger_than_the_bytes_of_its_class_is_refused() -> None:
    run = Reservoir(5, class_bytes=2048).begin()
    with pytest.raises(ConfigError, match=r"'P1' takes 2049 bytes.*Use class_bytes=2049"):
        run.feed(Sample("P1", "a", 1025))


@pytest.mark.parametrize("name", ["HGG_LGG", "three_class"])
def test_one_pass_downsampling_meets_the_reference_counts(
    vectors: dict[str, Any], name: str
) -> None:
    cases = vectors["down_up_sampling"]["cases"][name]
    labels = [f"c{n}" for n, count in enumerate(cases["counts"]) for _ in range(count)]
    for case in cases["target_ratio"].values():
        run = Reservoir(300, ratio=case["target_ratio"], on_short="raise").begin(seed=1)
        found = Counter(item.label for item in run.over(samples(labels)))
        assert [found[f"c{n}"] for n in range(len(cases["counts"]))] == case["down_counts"]
        last = run.stats()["last_emission"]
        assert last["ratio"] == pytest.approx(case["achieved_min_over_max_down"], rel=1e-12)
        assert last["short"] == {}


def test_downsampling_takes_the_smallest_hashes() -> None:
    stream = samples(["a"] * 10 + ["b"] * 40)
    kept = flat(Reservoir(30, ratio=0.5).begin(seed=1).over(stream))
    assert set(kept) == smallest(stream[:10], 10, 1) | smallest(stream[10:], 20, 1)


def test_a_ratio_that_does_not_fit_is_reported_with_what_was_achieved() -> None:
    run = Reservoir({"HGG": 40, "LGG": 20}, ratio=1.0).begin()
    found = Counter(item.label for item in run.over(samples(["HGG"] * 210 + ["LGG"] * 75)))
    assert found == {"HGG": 40, "LGG": 20}
    last = run.stats()["last_emission"]
    assert last["asked"] == {"HGG": 75, "LGG": 75}
    assert last["short"] == {
        "HGG": {"asked": 75, "went_on": 40},
        "LGG": {"asked": 75, "went_on": 20},
    }
    assert last["ratio"] == 0.5


def test_a_ratio_that_does_not_fit_raises_when_asked_and_leaves_the_run_as_it_was() -> None:
    run = Reservoir(40, ratio=0.5, on_short="raise").begin()
    for item in samples(["HGG"] * 210 + ["LGG"] * 30):
        run.feed(item)
    with pytest.raises(ConfigError, match=r"60 samples of class 'HGG' are asked for.*210.*40 are"):
        run.finish()
    assert run.stats()["held"] == 70
    assert run.stats()["passes"] == 0


def test_shares_of_a_total_are_apportioned_and_what_is_short_is_reported() -> None:
    target = {"a": 0.61, "b": 0.24, "c": 0.15}
    stage = Reservoir(10, target=target)
    assert stage.sizes == {"a": 6, "b": 2, "c": 2}
    run = stage.begin()
    found = Counter(item.label for item in run.over(samples(["a"] * 9 + ["b"] * 9 + ["c"])))
    assert found == {"a": 6, "b": 2, "c": 1}
    stats = run.stats()
    assert stats["last_emission"]["short"] == {"c": {"asked": 2, "went_on": 1}}
    assert stats["classes"]["a"]["wanted_share"] == pytest.approx(0.61)
    assert stats["classes"]["a"]["realised_share"] == pytest.approx(6 / 9)
    strict = Reservoir(10, target=target, on_short="raise").begin()
    with pytest.raises(ConfigError, match="2 samples of class 'b' are asked for, but of 0"):
        list(strict.over(samples(["a"] * 9)))


def test_every_window_gives_the_smallest_hashes_of_its_samples() -> None:
    stream = samples(labels_of({"a": 3, "b": 1}, 250, "random"))
    run = Reservoir(5, window=100).begin(seed=1)
    outputs = [flat(run.feed(item)) for item in stream]
    assert [place for place, keys in enumerate(outputs) if keys] == [99, 199]
    assert set(outputs[99]) == smallest(stream[:100], 5, 1)
    assert set(outputs[199]) == smallest(stream[100:200], 5, 1)
    assert set(flat(run.finish())) == smallest(stream[200:], 5, 1)


def test_all_passes_keep_the_same_unless_they_rotate() -> None:
    stream = samples(["a"] * 100)
    fixed, turning = Reservoir(10).begin(seed=1), Reservoir(10, rotate=True).begin(seed=1)
    kept = [flat(fixed.over(stream)) for _ in range(4)]
    assert len({frozenset(keys) for keys in kept}) == 1
    assert len({tuple(keys) for keys in kept}) == 4
    assert len({frozenset(flat(turning.over(stream))) for _ in range(4)}) == 4


def test_the_order_in_which_samples_go_on_mixes_the_classes() -> None:
    stream = samples(["a"] * 100 + ["b"] * 100)
    labels = [str(item.label) for item in Reservoir(100).begin(seed=1).over(stream)]
    changes = sum(first != second for first, second in pairwise(labels))
    assert abs(changes - 100) < 5 * math.sqrt(50)


def test_a_key_that_is_kept_and_comes_again_is_rejected() -> None:
    run = Reservoir(5).begin()
    assert flat(run.over([Sample("P1", "a"), Sample("P1", "a"), Sample("P1", "b")])) != []
    classes = run.stats()["classes"]
    assert (classes["a"]["delivered"], classes["a"]["rejected"]) == (1, 1)
    assert classes["b"]["delivered"] == 1


def test_more_labels_than_can_be_classes_are_refused() -> None:
    run = Reservoir(1).begin()
    for number in range(MOST_CLASSES):
        run.feed(Sample(f"s{number}", f"class {number}"))
    with pytest.raises(ConfigError, match="has the label 'one more', after 1000 others"):
        run.feed(Sample("x", "one more"))


def test_labels_that_have_no_size_are_refused_or_counted() -> None:
    with pytest.raises(ConfigError, match=r"has the label 'c', which was not declared"):
        Reservoir({"a": 1}).begin().feed(Sample("P1", "c"))
    with pytest.raises(ConfigError, match="has no label"):
        Reservoir(3).begin().feed(Sample("P1", None))
    run = Reservoir({"a": 1, "b": 3}, unknown="drop").begin()
    list(run.over(samples(["a", "c", None])))
    assert run.stats()["unknown"] == 2
    assert run.stats()["classes"]["a"]["wanted_share"] == 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, r"reservoir: size is 0"),
        ({"size": {}}, r"reservoir: size is \{\}"),
        ({"size": {"a": 0}}, r"reservoir: size of class 'a' is 0"),
        ({"size": {"a": 1}, "target": {"a": 1}}, r"give a number as size, or leave target out"),
        ({"target": {"a": 1}, "ratio": 0.5}, r"target and ratio both say"),
        ({"target": {"a": 0}}, r"reservoir: target are all 0"),
        ({"ratio": 0}, r"reservoir: ratio is 0; it must be a number in \(0, 1\]"),
        ({"ratio": 1.5}, r"reservoir: ratio is 1.5"),
        ({"weights": 3}, r"reservoir: weights is 3"),
        ({"weights": {"P1": -1}}, r"reservoir: weights gives class 'P1' -1"),
        ({"window": 0}, r"reservoir: window is 0"),
        ({"rotate": "yes"}, r"reservoir: rotate is 'yes'"),
        ({"on_short": "rise"}, r"on_short is 'rise'.*Did you mean 'raise'"),
        ({"unknown": "own_class"}, r"reservoir: unknown is 'own_class'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Reservoir(**{"size": 3, **settings})


@pytest.mark.parametrize(
    ("weights", "kind"), [(None, None), ({"P1": 1.0}, "mapping"), (len, "function")]
)
def test_of_weights_the_settings_hold_the_kind(
    weights: Callable[[Any], float] | dict[str, float] | None, kind: str | None
) -> None:
    assert Reservoir(3, weights=weights).settings["weights"] == kind


def test_the_compositions_have_as_many_of_each_class_as_the_tests_think() -> None:
    assert counts_of(COMPOSITIONS["1000:1"], 100_000)["LGG"] == 99


def test_a_window_that_would_end_short_raises_and_leaves_the_run_as_it_was() -> None:
    stage = Reservoir(4, target={"a": 1, "b": 1}, window=4, on_short="raise")
    stream = samples(["a"] * 3 + ["b"] + ["a"] * 4)
    run = stage.begin()
    for item in stream[:3]:
        run.feed(item)
    state, stats = run.state_dict(lambda item: item.key), run.stats()
    for _ in range(3):
        with pytest.raises(ConfigError, match="2 samples of class 'b' are asked for, but of 1"):
            run.feed(stream[3])
        assert (run.state_dict(lambda item: item.key), run.stats()) == (state, stats)


def test_a_window_that_ends_as_asked_goes_on_where_that_is_checked_first() -> None:
    stream = samples(labels_of({"a": 1, "b": 1}, 60, "random"))
    strict = Reservoir(4, target={"a": 1, "b": 1}, window=20, on_short="raise").begin(seed=1)
    lenient = Reservoir(4, target={"a": 1, "b": 1}, window=20).begin(seed=1)
    assert flat(strict.over(stream)) == flat(lenient.over(stream)) != []


@pytest.mark.parametrize("kind", [np.float32, np.int64, np.float64])
def test_weights_may_be_numbers_of_numpy(kind: Callable[[float], Any]) -> None:
    stream = samples(labels_of({"a": 1}, 50, "random"))
    ours, plain = (
        Reservoir(9, weights=weigh).begin(seed=1)
        for weigh in (lambda item: kind(len(item.key)), lambda item: len(item.key))
    )
    assert flat(ours.over(stream)) == flat(plain.over(stream))
