"""How many threads a process may use."""

from __future__ import annotations

import os

from streaming_balance.stream.ranks import number_from_environment

# More readers than this compete for memory bandwidth instead of adding to it.
MOST_DEFAULT_THREADS = 8


def default_num_threads() -> int:
    """Give this process's share of the processors it may run on, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    sharing = number_from_environment("LOCAL_WORLD_SIZE") or 1
    return max(1, min(MOST_DEFAULT_THREADS, processors // sharing))
