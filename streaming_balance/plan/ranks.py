"""Dealing a global batch to the ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.keys import stream_key, words
from streaming_balance.plan.options import whole_number


def check_ranks(rank: int, num_ranks: int, *, global_batch_size: int) -> tuple[int, int]:
    """Refuse a rank that does not exist, and more ranks than samples in a global batch.

    Returns:
        The rank and the number of ranks as plain integers.

    Raises:
        ConfigError: names the values and the nearest that work.

    Examples:
        >>> check_ranks(1, 2, global_batch_size=8)
        (1, 2)
    """
    number, ranks = whole_number(rank), whole_number(num_ranks)
    if number is None or ranks is None or not 0 <= number < ranks:
        raise ConfigError(
            f"rank is {rank!r} and num_ranks is {num_ranks!r}; both are integers, and rank must "
            f"lie in 0..num_ranks-1."
        )
    if ranks > global_batch_size:
        raise ConfigError(
            f"global_batch_size is {global_batch_size} for {num_ranks} ranks, so some rank would "
            f"get no sample. Use global_batch_size >= {num_ranks}, or at most {global_batch_size} "
            f"ranks."
        )
    return number, ranks


def rank_slots(size: int, *, rank: int, num_ranks: int, key: int) -> NDArray[np.int64]:
    """Deal the slots of a class-sorted global batch round-robin, from a keyed start.

    The slots of a class are consecutive, so every rank gets the floor or the ceiling of every
    class's count and of the batch, whether or not the ranks divide it.

    Args:
        size: samples in the global batch.
        rank: this rank, in [0, num_ranks).
        num_ranks: number of data-parallel ranks R.
        key: 128-bit key of this global batch.

    Returns:
        This rank's positions in the global batch, in a keyed order so that a rank batch is not
        sorted by class.

    Examples:
        >>> parts = [rank_slots(8, rank=r, num_ranks=3, key=7) for r in range(3)]
        >>> sorted(slot for part in parts for slot in part.tolist())
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    start = key % num_ranks
    slots = np.arange((rank - start) % num_ranks, size, num_ranks, dtype=np.int64)
    shuffle = words(stream_key(0, "slots", key, rank, num_ranks), len(slots))
    return slots[np.argsort(shuffle, kind="stable")]
