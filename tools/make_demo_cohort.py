"""Make a small BraTS-like cohort of generated patients: `python tools/make_demo_cohort.py OUT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from streaming_balance.demo.cohort import make_cohort
from streaming_balance.errors import ConfigError


def main() -> int:
    """Read the command line, make the cohort, say what was made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to fill")
    parser.add_argument("--patients", type=int, default=95, help="how many (default: 95)")
    parser.add_argument("--side", type=int, default=24, help="voxels per axis (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds, equal bytes (default: 0)")
    options = parser.parse_args()
    shape = (options.side, options.side, options.side)
    try:
        counts = make_cohort(options.out, patients=options.patients, shape=shape, seed=options.seed)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: " + ", ".join(f"{count} {label}" for label, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
