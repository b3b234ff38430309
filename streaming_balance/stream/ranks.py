"""Which of the processes that train together this one is."""

from __future__ import annotations

import os

import torch.distributed

from streaming_balance.errors import ConfigError
from streaming_balance.plan.options import whole_number


def find_ranks(rank: int | None, num_ranks: int | None) -> tuple[int, int]:
    """Give the data-parallel rank and the number of ranks.

    Args:
        rank: as the user gave it, or None to look it up.
        num_ranks: as the user gave it, or None to look it up.

    Returns:
        The arguments; else those of an initialised `torch.distributed`; else `RANK` and
        `WORLD_SIZE` of the environment, as torchrun sets them; else rank 0 of 1.

    Raises:
        ConfigError: only one of the two is known, or they contradict each other.

    Examples:
        >>> find_ranks(1, 4)
        (1, 4)
    """
    if rank is None and num_ranks is None:
        rank, num_ranks = _surrounding_ranks()
    if rank is None or num_ranks is None:
        raise ConfigError(
            f"rank is {rank} and num_ranks is {num_ranks}; give both, or neither to take them from "
            f"torch.distributed or from RANK and WORLD_SIZE."
        )
    number, ranks = whole_number(rank), whole_number(num_ranks)
    if number is None or ranks is None or not 0 <= number < ranks:
        raise ConfigError(
            f"rank is {rank!r} and num_ranks is {num_ranks!r}; both are integers, and rank must "
            f"lie in 0..num_ranks-1."
        )
    return number, ranks


def number_from_environment(name: str) -> int | None:
    """Read a whole number from an environment variable, None where it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"the environment has {name}={text!r}; it must be a number.") from error


def _surrounding_ranks() -> tuple[int | None, int | None]:
    """Look ranks up in torch.distributed, then in the environment."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    rank, num_ranks = number_from_environment("RANK"), number_from_environment("WORLD_SIZE")
    return (0, 1) if rank is None and num_ranks is None else (rank, num_ranks)
