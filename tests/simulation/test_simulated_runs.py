"""Simulated clusters: any ranks, workers, damage, jumps, deaths and resumes, from one seed each.

Whatever happens, the run is the uninterrupted one, batch by batch, and its states tell the truth.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.simulation.cluster import Tally, check
from tests.simulation.drawing import draw_case
from tests.simulation.recipes import KINDS

# A line tracer makes thousands of cases three times as slow; smaller tests run the same lines.
pytestmark = pytest.mark.no_cover

BLOCK = 100
SOAK_BLOCK = 1000


@pytest.mark.parametrize("first", range(0, 1000, BLOCK))
def test_every_simulated_run_is_the_uninterrupted_one_and_its_states_tell_the_truth(
    first: int,
) -> None:
    tally = Tally()
    for seed in range(first, first + BLOCK):
        tally += check(seed)
    # No block passes because nothing happened in it.
    assert tally["cases"] == BLOCK
    assert tally["resumes"] > BLOCK / 2
    assert tally["ranks that died"] > BLOCK / 2
    assert tally["batches received in vain"] > BLOCK / 2
    assert tally["substitutions"] > BLOCK
    assert tally["changes of plan"] > 0


def test_seeds_draw_every_kind_of_strategy_option_and_cluster() -> None:
    cases = [draw_case(seed) for seed in range(200)]
    balances = [case.recipe.balance for case in cases]
    legs = [leg for case in cases for leg in case.legs]
    assert {balance["name"] for balance in balances} == set(KINDS)
    assert {balance["last"] for balance in balances} == {"full", "short", "drop"}
    options = {name for balance in balances for name in balance}
    assert {"draw", "replacement", "num_samples", "strata", "unit", "rotate", "then"} <= options
    assert {len(case.table.classes) for case in cases} == set(range(1, 7))
    assert {leg.num_ranks for leg in legs} == set(range(1, 17))
    assert {leg.workers for leg in legs} == set(range(5))
    assert {len(case.legs) for case in cases} == set(range(1, 6))
    assert any(len(leg.savers) < leg.num_ranks for leg in legs)
    assert any(leg.carry_to is not None for leg in legs)
    assert any(case.recipe.exclude for case in cases)
    assert any(len(np.unique(case.table.owners)) < len(case.table.owners) for case in cases)
    assert max(len(case.damaged) / len(case.table.owners) for case in cases) > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 100_000, SOAK_BLOCK))
def test_a_hundred_thousand_simulated_runs_are_the_uninterrupted_ones(first: int) -> None:
    for seed in range(first, first + SOAK_BLOCK):
        check(seed)
