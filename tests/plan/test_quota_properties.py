"""Ten thousand plans of random classes: what quotas promise, counted sample by sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming_balance.plan.epoch import BalancedPlan

# A line tracer makes thousands of cases three times as slow; smaller tests run the same lines.
pytestmark = pytest.mark.no_cover

GROUPS = 20
CASES_PER_GROUP = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A random plan, and the exact shares it should have."""

    sizes: list[int]
    balance: dict[str, Any]
    shares: list[Fraction]
    batch: int
    length: int
    seed: int

    @property
    def last(self) -> str:
        """What becomes of the last batch."""
        return str(self.balance["last"])

    def plan(self) -> BalancedPlan:
        named = {f"c{number}": size for number, size in enumerate(self.sizes)}
        return BalancedPlan.from_class_sizes(
            named, global_batch_size=self.batch, balance=self.balance, seed=self.seed
        )


def random_case(numbers: np.random.Generator) -> Case:
    """Draw classes of 1, of fewer than a batch asks for, and of many; and one of four rules."""
    classes = int(numbers.integers(1, 21))
    batch = int(numbers.integers(1, 65))
    most = [1, max(1, batch // classes), 20, 400]
    sizes = [int(numbers.integers(1, most[kind] + 1)) for kind in numbers.integers(0, 4, classes)]
    parts = numbers.integers(0, 10, classes)
    parts[int(numbers.integers(classes))] += 1
    name = ["class_balanced", "instance_balanced", "target", "manual_weights"][
        int(numbers.integers(4))
    ]
    balance: dict[str, Any] = {"name": name}
    weights = [1] * classes
    if name == "instance_balanced":
        weights = sizes
    elif name == "target":
        weights = parts.tolist()
        balance["shares"] = {f"c{number}": part for number, part in enumerate(weights)}
    elif name == "manual_weights":
        each = (parts + 1).tolist()
        weights = [size * weight for size, weight in zip(sizes, each, strict=True)]
        balance["weights"] = {f"c{number}": weight for number, weight in enumerate(each)}
    balance["last"] = ["full", "short", "drop"][int(numbers.integers(3))]
    length = int(numbers.integers(batch, 4 * batch + 1))
    return Case(
        sizes=sizes,
        balance=balance | {"num_samples": length},
        shares=[Fraction(weight, sum(weights)) for weight in weights],
        batch=batch,
        length=length,
        seed=int(numbers.integers(2**63)),
    )


def check(case: Case) -> None:
    plan = case.plan()
    whole, rest = divmod(case.length, case.batch)
    sizes = [case.batch] * whole
    if rest and case.last != "drop":
        sizes.append(rest if case.last == "short" else case.batch)
    bounds = np.cumsum([0, *case.sizes])
    exposure = np.zeros(bounds[-1], dtype=np.int64)
    running = np.zeros(len(case.sizes), dtype=np.int64)
    for epoch in range(2):
        assert plan.num_steps(epoch) == len(sizes)
        rows = []
        for step, size in enumerate(sizes):
            members = plan.batch(epoch, step)
            assert len(members) == size
            here = np.bincount(members, minlength=bounds[-1])
            exposure += here
            rows.append(np.add.reduceat(here, bounds[:-1]))
            assert plan.quotas(epoch, step).tolist() == rows[-1].tolist()
        table = np.array(rows)
        totals = table.sum(axis=0)
        running += totals
        assert (table >= 0).all()
        assert totals.sum() == sum(sizes)
        for number, share in enumerate(case.shares):
            ideal = share * sum(sizes)
            assert math.floor(ideal) <= totals[number] <= math.ceil(ideal)
            assert abs(int(running[number]) - (epoch + 1) * ideal) < 1
        check_rows(table, totals, sizes)
        check_fairness(exposure, bounds)
    np.testing.assert_array_equal(plan.exposure(2, 0), exposure)


def check_rows(table: NDArray[np.int64], totals: NDArray[np.int64], sizes: list[int]) -> None:
    """Every batch has the floor or the ceiling of its part of the epoch's totals."""
    is_short = sizes[-1] < sizes[0]
    if is_short:
        last = totals * sizes[-1] / sum(sizes)
        assert (table[-1] >= np.floor(last)).all()
        assert (table[-1] <= np.ceil(last)).all()
        totals, table = totals - table[-1], table[:-1]
    steps = len(table)
    assert (table >= totals // steps).all()
    assert (table <= -(-totals // steps)).all()


def check_fairness(exposure: NDArray[np.int64], bounds: NDArray[np.int64]) -> None:
    """Members of a class have come equally often, give or take one."""
    most = np.maximum.reduceat(exposure, bounds[:-1])
    least = np.minimum.reduceat(exposure, bounds[:-1])
    assert (most - least <= 1).all()


@pytest.mark.parametrize("group", range(GROUPS))
def test_quotas_are_exact_and_exposure_fair_for_any_classes(group: int) -> None:
    for number in range(CASES_PER_GROUP):
        case = random_case(np.random.Generator(np.random.PCG64([group, number])))
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"group {group}, case {number}: {case}") from error
