"""The promises of a plan, counted over the batches it delivers and nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming_balance.plan.epoch import BalancedPlan

# A line tracer makes thousands of cases three times as slow; smaller tests run the same lines.
pytestmark = pytest.mark.no_cover

RANKS = (1, 2, 3, 4, 5, 7, 8, 16)
# Powers and effective numbers are known to float precision only.
HAIR = Fraction(1, 10**9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan and what an onlooker knows about its samples."""

    plan: BalancedPlan
    """The plan under test."""
    labels: NDArray[np.int64]
    """`(N,)` class of every sample."""
    owners: NDArray[np.int64]
    """`(N,)` patient of every sample."""
    balance: dict[str, Any]
    """The options it was built with."""

    def steps(self, epochs: int) -> Iterator[tuple[int, int]]:
        """Walk through all steps of some epochs."""
        for epoch in range(epochs):
            for step in range(self.plan.num_steps(epoch)):
                yield epoch, step

    def sizes(self) -> list[int]:
        """Count the patients of every class."""
        classes = range(len(self.plan.classes))
        return [len(np.unique(self.owners[self.labels == label])) for label in classes]

    def pool(self) -> list[int]:
        """Count the patients of every class that the strategy uses."""
        sizes = self.sizes()
        if self.balance["name"] != "downsample" or self.balance["rotate"]:
            return sizes
        ratio = Fraction(str(self.balance["target_ratio"]))
        return [min(size, int(min(sizes) / ratio)) for size in sizes]

    def counts(self, batch: NDArray[np.int64]) -> list[int]:
        """Count a batch by class."""
        return [int((self.labels[batch] == label).sum()) for label in range(len(self.plan.classes))]


@st.composite
def balances(draw: st.DrawFn, classes: int) -> dict[str, Any]:
    """Any quota strategy with any options that go together."""
    name = draw(
        st.sampled_from(
            ["class_balanced", "power", "effective_number", "manual_weights", "target",
             "upsample", "downsample", "instance_balanced"]
        )
    )  # fmt: skip
    balance: dict[str, Any] = {"name": name, "last": draw(st.sampled_from(["full", "drop"]))}
    weights = st.lists(st.integers(1, 9), min_size=classes, max_size=classes)
    if name == "manual_weights":
        balance["weights"] = dict(enumerate(draw(weights)))
    if name == "target":
        balance["shares"] = dict(enumerate(draw(weights)))
    if name in ("upsample", "downsample"):
        balance["target_ratio"] = draw(st.sampled_from([1.0, 0.7, 0.5, 0.3]))
    if name == "downsample":
        balance["rotate"] = draw(st.booleans())
    if draw(st.booleans()):
        balance["replacement"] = False
    elif draw(st.booleans()):
        balance["last"] = "short"
    if balance.get("replacement", True) and draw(st.booleans()):
        balance["num_samples"] = draw(st.sampled_from(["oversample", "undersample", 37]))
    return balance


@st.composite
def cases(draw: st.DrawFn, *, natural_unit: bool = False) -> Case:
    """Up to five classes of up to 30 patients with one to three samples each, shuffled."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    batch = draw(st.integers(1, 24))
    balance = draw(balances(len(sizes)))
    many = draw(st.booleans())
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels: list[int] = []
    owners: list[int] = []
    for label, size in enumerate(sizes):
        for _ in range(size):
            owner = owners[-1] + 1 if owners else 0
            for _ in range(int(random.integers(1, 4)) if many else 1):
                labels.append(label)
                owners.append(owner)
    order = random.permutation(len(labels))
    label_array, owner_array = np.array(labels)[order], np.array(owners)[order]
    if balance["name"] == "instance_balanced" and not natural_unit:
        balance["unit"] = "patient"
    present = sum(size > 0 for size in sizes)
    if balance["last"] == "drop" or "replacement" in balance:
        batch = min(batch, present)
    seed = draw(st.integers(0, 2**64 - 1))
    plan = BalancedPlan.from_labels(
        label_array,
        patients=[f"P{owner:03}" for owner in owner_array],
        global_batch_size=batch,
        balance=balance,
        seed=seed,
    )
    return Case(plan=plan, labels=label_array, owners=owner_array, balance=balance)


def owed_shares(case: Case) -> list[Fraction]:
    """Work out the shares from the formulas, by patients per class."""
    balance, sizes = case.balance, case.sizes()
    ratio = Fraction(str(balance.get("target_ratio", 1.0)))
    weights: dict[str, list[Fraction]] = {
        "class_balanced": [Fraction(1) for _ in sizes],
        "instance_balanced": [Fraction(size) for size in sizes],
        "power": [Fraction(math.sqrt(size / sum(sizes))) for size in sizes],
        "effective_number": [size * Fraction(0.001 / (1 - 0.999**size)) for size in sizes],
        "upsample": [Fraction(max(size, int(ratio * max(sizes)))) for size in sizes],
        "downsample": [Fraction(min(size, int(min(sizes) / ratio))) for size in sizes],
    }
    named = balance.get("weights") or balance.get("shares") or {}
    weights["manual_weights"] = [sizes[c] * Fraction(weight) for c, weight in named.items()]
    weights["target"] = [Fraction(weight) for weight in named.values()]
    total = sum(weights[balance["name"]], Fraction(0))
    return [weight / total for weight in weights[balance["name"]]]


@given(case=cases())
@settings(max_examples=60)
def test_every_batch_holds_floor_or_ceiling_of_its_share_of_every_class(case: Case) -> None:
    plan, shares = case.plan, owed_shares(case)
    running = np.zeros(len(shares), dtype=np.int64)
    draws_before = 0
    for epoch in range(4):
        steps = plan.num_steps(epoch)
        rows = [case.counts(plan.batch(epoch, step)) for step in range(steps)]
        for step, row in enumerate(rows):
            assert row == plan.quotas(epoch, step).tolist()
            assert sum(row) == plan.batch_size(epoch, step)
        totals = np.sum(rows, axis=0)
        draws = sum(sum(row) for row in rows)
        even, last = rows, rows[-1]
        if sum(last) < plan.global_batch_size:
            even = rows[:-1]
            for total, late in zip(totals.tolist(), last, strict=True):
                assert total * sum(last) // draws <= late <= -(-total * sum(last) // draws)
        for number in range(len(shares)):
            column = [row[number] for row in even]
            if column:
                assert max(column) - min(column) <= 1
                assert min(column) == sum(column) // len(column)
        running += totals
        draws_before += draws
        for share, total, got in zip(shares, totals.tolist(), running.tolist(), strict=True):
            assert math.floor(share * draws - HAIR) <= total <= math.ceil(share * draws + HAIR)
            assert abs(got - share * draws_before) < 1 + HAIR


@given(case=cases())
@settings(max_examples=60)
def test_patients_of_a_class_are_delivered_equally_often_at_every_step(case: Case) -> None:
    plan = case.plan
    assert plan.guarantees["fair_exposure"]
    pool = case.pool()
    turns = np.zeros(case.owners.max() + 1, dtype=np.int64)
    for epoch, step in case.steps(5):
        np.add.at(turns, case.owners[plan.batch(epoch, step)], 1)
        for label, members in enumerate(pool):
            had = turns[np.unique(case.owners[case.labels == label])]
            seen = had[had > 0]
            assert len(seen) <= members
            least = seen.min() if len(seen) == members else 0
            assert had.max() - least <= 1


@given(case=cases())
@settings(max_examples=60)
def test_nobody_is_twice_in_a_batch_that_could_do_without(case: Case) -> None:
    plan = case.plan
    assert plan.guarantees["no_twin_in_a_batch"]
    pool = case.pool()
    for epoch, step in case.steps(5):
        batch = plan.batch(epoch, step)
        repeats = Counter(case.owners[batch].tolist())
        for label, count in enumerate(case.counts(batch)):
            here = {int(owner) for owner in case.owners[batch][case.labels[batch] == label]}
            most = max((repeats[owner] for owner in here), default=0)
            assert most <= (-(-count // pool[label]) if count else 0)


@given(case=cases(), num_ranks=st.sampled_from(RANKS))
@settings(max_examples=40)
def test_the_union_over_ranks_is_the_same_batch_for_every_number_of_ranks(
    case: Case, num_ranks: int
) -> None:
    plan = case.plan
    for epoch, step in case.steps(2):
        whole = plan.batch(epoch, step)
        if num_ranks > len(whole):
            continue
        parts = [
            plan.rank_batch(epoch, step, rank=rank, num_ranks=num_ranks)
            for rank in range(num_ranks)
        ]
        assert sorted(np.concatenate(parts).tolist()) == sorted(whole.tolist())
        quotas = case.counts(whole)
        for part in parts:
            assert len(whole) // num_ranks <= len(part) <= -(-len(whole) // num_ranks)
            for got, quota in zip(case.counts(part), quotas, strict=True):
                assert quota // num_ranks <= got <= -(-quota // num_ranks)


@given(case=cases(natural_unit=True), data=st.data())
@settings(max_examples=40)
def test_any_batch_can_be_had_without_the_others(case: Case, data: st.DataObject) -> None:
    plan = case.plan
    rebuilt = BalancedPlan.from_labels(
        case.labels,
        patients=[f"P{owner:03}" for owner in case.owners],
        global_batch_size=plan.global_batch_size,
        balance=case.balance,
        seed=plan.seed,
    )
    assert rebuilt == plan
    assert rebuilt.digest == plan.digest
    in_turn = {place: plan.batch(*place).tolist() for place in case.steps(3)}
    for place in data.draw(st.lists(st.sampled_from(sorted(in_turn)), max_size=12)):
        assert rebuilt.batch(*place).tolist() == in_turn[place]


@given(
    sizes=st.lists(st.integers(2, 30), min_size=2, max_size=4),
    batch=st.integers(1, 10),
    name=st.sampled_from(["class_balanced", "downsample", "instance_balanced", "power"]),
)
@settings(max_examples=60)
def test_without_replacement_nobody_comes_twice_in_an_epoch(
    sizes: list[int], batch: int, name: str
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    plan = BalancedPlan.from_labels(
        labels,
        global_batch_size=min(batch, len(sizes)),
        balance={"name": name, "replacement": False},
    )
    for epoch in range(6):
        steps = range(plan.num_steps(epoch))
        drawn = np.concatenate([plan.batch(epoch, step) for step in steps])
        assert np.bincount(drawn).max() == 1


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    batch=st.integers(1, 12),
    ratio=st.sampled_from([1.0, 0.75, 0.5, 0.3]),
    rotate=st.booleans(),
    last=st.sampled_from(["full", "short", "drop"]),
    seed=st.integers(0, 2**64 - 1),
)
@example(sizes=[39, 25, 9, 15], batch=11, ratio=0.5, rotate=True, last="drop", seed=124)
@example(sizes=[28, 16, 26], batch=3, ratio=0.75, rotate=False, last="drop", seed=943)
@settings(max_examples=80)
def test_downsampling_repeats_nobody_in_an_epoch_that_asks_for_no_more_than_there_are(
    sizes: list[int], batch: int, ratio: float, rotate: bool, last: str, seed: int
) -> None:
    kept = [min(size, int(min(sizes) / Fraction(str(ratio)))) for size in sizes]
    pool = sizes if rotate else kept
    labels = np.repeat(np.arange(len(sizes)), sizes)
    plan = BalancedPlan.from_labels(
        labels,
        global_batch_size=min(batch, sum(kept)),
        balance={"name": "downsample", "target_ratio": ratio, "rotate": rotate, "last": last},
        seed=seed,
    )
    # A class whose ideal lies above its size must repeat somebody in the long run, anyway.
    draws = sum(plan.batch_size(0, step) for step in range(plan.num_steps(0)))
    fits = [
        draws * Fraction(count, sum(kept)) <= most for count, most in zip(kept, pool, strict=True)
    ]
    for epoch in range(8):
        steps = range(plan.num_steps(epoch))
        drawn = np.concatenate([plan.batch(epoch, step) for step in steps])
        times = np.bincount(drawn, minlength=len(labels))
        for number, is_enough in enumerate(fits):
            if is_enough:
                assert times[labels == number].max() <= 1


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), batch=st.integers(1, 20))
@settings(max_examples=60)
def test_natural_order_with_a_short_last_batch_gives_everybody_once_an_epoch(
    sizes: list[int], batch: int
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    plan = BalancedPlan.from_labels(
        labels, global_batch_size=batch, balance={"name": "natural", "last": "short"}
    )
    for epoch in range(4):
        steps = range(plan.num_steps(epoch))
        drawn = np.concatenate([plan.batch(epoch, step) for step in steps])
        assert sorted(drawn.tolist()) == list(range(len(labels)))


@pytest.mark.parametrize("rotate", [True, False])
def test_downsampling_uses_the_majority_in_turn_or_one_fixed_part_of_it(rotate: bool) -> None:
    labels = np.repeat([0, 1], [10, 40])
    plan = BalancedPlan.from_labels(
        labels, global_batch_size=4, balance={"name": "downsample", "rotate": rotate}
    )
    epochs = [
        set(np.concatenate([plan.batch(epoch, step) for step in range(5)]).tolist())
        for epoch in range(4)
    ]
    majority = [{sample for sample in epoch if sample >= 10} for epoch in epochs]
    assert [len(part) for part in majority] == [10, 10, 10, 10]
    assert len(set.union(*majority)) == (40 if rotate else 10)


def test_twins_are_kept_apart_up_to_the_very_bound() -> None:
    # 9 patients and 5 a batch: 2q - 1 = 9. With fewer the bound is ceil(5 / n), which is 1 too.
    for patients in (9, 8, 5):
        labels = [0] * patients + [1] * 50
        plan = BalancedPlan.from_labels(labels, global_batch_size=10)
        for step in range(plan.num_steps(0) * 20):
            batch = plan.batch(*divmod(step, plan.num_steps(0)))
            assert np.bincount(batch).max() == 1


def test_a_class_smaller_than_its_share_of_a_batch_repeats_evenly() -> None:
    plan = BalancedPlan.from_labels([0] * 3 + [1] * 50, global_batch_size=16)
    for step in range(plan.num_steps(0)):
        times = np.bincount(plan.batch(0, step), minlength=53)
        assert times[:3].max() == 3
        assert times[:3].sum() == 8
        assert times[3:].max() == 1


def test_a_single_short_batch_an_epoch_repeats_evenly() -> None:
    # 9 draws an epoch, 4 or 5 of 3 patients: never more than twice in a batch.
    balance = {"name": "class_balanced", "num_samples": 9, "last": "short"}
    for seed in range(20):
        plan = BalancedPlan.from_labels(
            [0] * 3 + [1] * 5, global_batch_size=20, balance=balance, seed=seed
        )
        for epoch in range(10):
            times = np.bincount(plan.batch(epoch, 0), minlength=8)
            assert times.sum() == 9
            assert times[:3].max() <= 2
            assert times[3:].max() <= 1


def test_a_batch_smaller_than_the_number_of_classes_serves_them_in_turn() -> None:
    labels = np.repeat(np.arange(10), 12)
    plan = BalancedPlan.from_labels(labels, global_batch_size=3)
    totals = np.zeros(10, dtype=np.int64)
    for step in range(plan.num_steps(0)):
        counts = np.bincount(labels[plan.batch(0, step)], minlength=10)
        assert counts.max() == 1
        totals += counts
    assert totals.tolist() == [12] * 10


def test_a_rare_class_appears_exactly_as_often_as_it_is_owed() -> None:
    labels = np.repeat([0, 1], [5, 995])
    plan = BalancedPlan.from_labels(labels, global_batch_size=10, balance=None)
    for epoch in range(3):
        rare = [int((plan.batch(epoch, step) < 5).sum()) for step in range(100)]
        assert sorted(rare) == [0] * 95 + [1] * 5


@settings(max_examples=40)
@given(
    weights=st.lists(st.integers(0, 50), min_size=3, max_size=20).filter(any),
    batch=st.integers(1, 40),
    seed=st.integers(0, 2**64 - 1),
)
def test_up_to_twenty_classes_of_any_shares_are_carried_within_one(
    weights: list[int], batch: int, seed: int
) -> None:
    sizes = {f"c{number}": 7 + number for number in range(len(weights))}
    plan = BalancedPlan.from_class_sizes(
        sizes,
        global_batch_size=batch,
        seed=seed,
        balance={"name": "target", "shares": dict(zip(sizes, weights, strict=True))},
    )
    labels = np.repeat(np.arange(len(weights)), list(sizes.values()))
    running = np.zeros(len(weights), dtype=np.int64)
    for epoch in range(8):
        for step in range(plan.num_steps(epoch)):
            running += np.bincount(labels[plan.batch(epoch, step)], minlength=len(weights))
        draws = (epoch + 1) * plan.num_steps(epoch) * batch
        for weight, got in zip(weights, running.tolist(), strict=True):
            assert abs(got - Fraction(weight * draws, sum(weights))) < 1
