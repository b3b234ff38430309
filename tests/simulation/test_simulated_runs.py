"""Simulated clusters: any ranks, workers, damage, jumps, deaths and resumes, from one seed each.

Whatever happens, the run is the uninterrupted one, batch by batch, and its states tell the truth.
"""

from __future__ import annotations

import pytest

from tests.simulation.cluster import Tally, check

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


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 100_000, SOAK_BLOCK))
def test_a_hundred_thousand_simulated_runs_are_the_uninterrupted_ones(first: int) -> None:
    for seed in range(first, first + SOAK_BLOCK):
        check(seed)
