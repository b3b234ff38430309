"""Measure how fast a plan answers: who is in a batch, and which part of it is a rank's.

    python tools/benchmark_plan.py --ranks 4096 --rounds 5

Two plans over three classes, 80 : 19 : 1: one of 10^8 samples known by the sizes of their classes,
one of 10^7 known by their labels. Nothing is read. Every figure is a median over rounds; each round
builds its plan anew. Memory is the peak of what Python and NumPy allocate, from before building to
after the last step, measured in a round of its own because watching costs time; of labels it does
not count the array that was handed over.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.epoch import BalancedPlan

SHARES = {"common": 0.80, "rare": 0.19, "rarest": 0.01}
# Steps walked after the first, over which a figure is averaged within a round.
STEPS_WALKED = 50
RANKS_ALONE = 50
EPOCH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What one round measured, in seconds."""

    build: float
    """From labels or sizes to a plan."""
    first_step: float
    """The first global batch anybody asks for, in the middle of an epoch."""
    next_step: float
    """Every global batch after it, mean."""
    random_step: float
    """A global batch anywhere in any epoch, mean."""
    part_of_all: float
    """One rank's part, mean over all ranks of a step asked in one process, the batch included."""
    part_alone: float
    """One rank's part of the next step in a process of its own, mean."""


HEADINGS = {
    "build": "build",
    "first_step": "first step",
    "next_step": "next step",
    "random_step": "random step",
    "part_of_all": "a rank's part, all ranks in one process",
    "part_alone": "a rank's part, alone in its process",
}


def from_sizes(samples: int, batch: int) -> Callable[[], BalancedPlan]:
    """Plan over classes known by their sizes."""
    sizes = {label: round(share * samples) for label, share in SHARES.items()}
    return lambda: BalancedPlan.from_class_sizes(sizes, global_batch_size=batch, seed=1)


def from_labels(samples: int, batch: int) -> Callable[[], BalancedPlan]:
    """Plan over a label per sample, in a mixed order."""
    counts = [round(share * samples) for share in SHARES.values()]
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    return lambda: BalancedPlan.from_labels(labels, global_batch_size=batch, seed=1)


def measure(build: Callable[[], BalancedPlan], *, ranks: int) -> Timing:
    """Build a plan and ask it, once around.

    Args:
        build: gives a new plan.
        ranks: number of data-parallel ranks.

    Returns:
        What each question took.
    """
    started = time.perf_counter()
    plan = build()
    built = time.perf_counter() - started
    middle = plan.num_steps(EPOCH) // 2
    first = _seconds(lambda: plan.batch(EPOCH, middle))
    walking = _seconds(
        lambda: [plan.batch(EPOCH, middle + n) for n in range(1, 1 + STEPS_WALKED)],
    )
    random = np.random.default_rng(1)
    places = [
        (int(epoch), int(random.integers(plan.num_steps(int(epoch)))))
        for epoch in random.integers(0, 1000, STEPS_WALKED)
    ]
    jumping = _seconds(lambda: [plan.batch(*place) for place in places])
    # Back to where walking ended, so that what follows is the next step, as in training.
    last = middle + STEPS_WALKED
    plan.batch(EPOCH, last)

    def ask(step: int, rank: int) -> NDArray[np.int64]:
        return plan.rank_batch(EPOCH, step, rank=rank, num_ranks=ranks)

    together = _seconds(lambda: [ask(last + 1, rank) for rank in range(ranks)])
    alone = _seconds(lambda: [ask(last + 2 + n, n % ranks) for n in range(RANKS_ALONE)])
    return Timing(
        build=built,
        first_step=first,
        next_step=walking / STEPS_WALKED,
        random_step=jumping / STEPS_WALKED,
        part_of_all=together / ranks,
        part_alone=alone / RANKS_ALONE,
    )


def peak_bytes(build: Callable[[], BalancedPlan], *, ranks: int) -> int:
    """Give the most memory that building a plan and asking it takes at once."""
    tracemalloc.start()
    try:
        measure(build, ranks=ranks)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def row(name: str, timings: list[Timing], memory: int) -> str:
    """Write one line of the table."""
    cells = [name]
    for entry in fields(Timing):
        cells.append(_readable(statistics.median(getattr(t, entry.name) for t in timings)))
    return f"| {' | '.join([*cells, f'{memory / 2**20:.1f} MiB'])} |"


def _seconds(work: Callable[[], object]) -> float:
    """Time a piece of work."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _readable(seconds: float) -> str:
    """Write a time in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def main() -> None:
    """Measure both plans and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4096, help="data-parallel ranks")
    parser.add_argument("--per-rank", type=int, default=2, help="samples of a step on every rank")
    parser.add_argument("--sized", type=int, default=10**8, help="samples known by class sizes")
    parser.add_argument("--labelled", type=int, default=10**7, help="samples known by labels")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    batch = options.ranks * options.per_rank
    plans = {
        f"{options.sized:.0e} from sizes": from_sizes(options.sized, batch),
        f"{options.labelled:.0e} from labels": from_labels(options.labelled, batch),
    }
    print(f"{options.ranks} ranks, global batch {batch}, three classes")
    print(f"| samples | {' | '.join(HEADINGS.values())} | peak memory |")
    print("|---|" + "---:|" * (len(HEADINGS) + 1))
    for name, build in plans.items():
        timings = []
        for number in range(options.rounds):
            timings.append(measure(build, ranks=options.ranks))
            print(f"{name}: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        print(row(name, timings, peak_bytes(build, ranks=options.ranks)), flush=True)


if __name__ == "__main__":
    main()
