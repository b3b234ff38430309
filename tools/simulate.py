"""Run a simulated cluster from a seed: `python tools/simulate.py --seed 17`.

Ranks, workers, damaged samples, jumps, checkpoints, deaths and resumes all follow from the seed;
every batch and every saved state is compared with the uninterrupted run. With `--cases` it runs so
many seeds and says what happened in them; the first that fails is named.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `tests` lies

from tests.simulation.cluster import Tally, check


def main() -> int:
    """Read the command line, run the cases, say what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=int, help="show all that happens in one case")
    what.add_argument("--cases", type=int, help="run so many cases, and show what fails")
    parser.add_argument("--first-seed", type=int, default=0, help="of these cases (default: 0)")
    options = parser.parse_args()
    tally = Tally()
    try:
        if options.seed is not None:
            tally += check(options.seed, print)
        for seed in range(options.first_seed, options.first_seed + (options.cases or 0)):
            tally += check(seed)
    except Exception:  # noqa: BLE001 - whatever went wrong in the package is what is looked for
        traceback.print_exc(file=sys.stdout)
        return 1
    for event, times in tally.items():
        print(f"{times:>9,} {event}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
