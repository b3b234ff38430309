"""Pack volumes into shards from a checkout: `python tools/pack_shards.py SOURCE --out DIR`."""

from __future__ import annotations

import sys

from streaming_balance.cli.app import run

if __name__ == "__main__":
    sys.exit(run(["pack", *sys.argv[1:]]))
