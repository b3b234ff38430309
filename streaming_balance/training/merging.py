"""Uniting the states of ranks that stood in for damaged samples, each in its own part of a batch.

Without substitutions the states of all ranks are the same, and any of them is the run's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from streaming_balance.errors import ConfigError, ResumeError
from streaming_balance.training.records import Recorders, united
from streaming_balance.training.state import CarriedFrom, LoaderState

# What ranks know of their own part only; all else of a state is the same on every rank.
_OF_A_RANK = frozenset({"substitutions", "recorders", "carried_from"})


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Unite the states of ranks, so that every substitution of the run is in one of them.

    Needed with `on_error="substitute"` alone. Gather the states of all ranks where the checkpoint
    is written, and save what this gives; it is loaded on any number of ranks.

    Args:
        states: what `state_dict` gave on each rank, after the same step.

    Returns:
        The state of the run. Where ranks are missing it says so, and so does an audit.

    Raises:
        ConfigError: no states.
        ResumeError: they are not of one run at one step; names the field and what ranks have.

    Examples:
        >>> from streaming_balance.storage.shards import open_shards
        >>> from streaming_balance.training.loader import train_loader
        >>> shards = open_shards("shards/demo")
        >>> ranks = [
        ...     train_loader(
        ...         shards, global_batch_size=4, on_error="substitute", rank=rank, num_ranks=2
        ...     )
        ...     for rank in range(2)
        ... ]
        >>> states = [loader.state_dict() for loader in ranks]
        >>> states[0]["recorders"], merge_states(states)["recorders"]
        ({'num_ranks': 2, 'ranks': [0]}, None)
    """
    if isinstance(states, Mapping):
        raise ConfigError("states is one state; give a list with the state of every rank.")
    read = [LoaderState.from_dict(state) for state in states]
    if not read:
        raise ConfigError("states is empty; give the state of every rank.")
    return _merged(read).to_dict()


def _merged(states: Sequence[LoaderState]) -> LoaderState:
    """Unite states as values."""
    first = states[0]
    for number, other in enumerate(states[1:], start=1):
        _check_alike(first, other, number)
    return replace(
        first,
        substitutions=united(state.substitutions for state in states),
        recorders=_all_recorders([state.recorders for state in states]),
        carried_from=_carried([state.carried_from for state in states]),
    )


def _check_alike(first: LoaderState, other: LoaderState, number: int) -> None:
    """Refuse states of two runs, or of two steps of one."""
    for field in fields(LoaderState):
        mine, theirs = getattr(first, field.name), getattr(other, field.name)
        if field.name not in _OF_A_RANK and mine != theirs:
            raise ResumeError(
                f"states 0 and {number} differ in {field.name}: {mine!r} and {theirs!r}. Give the "
                f"states that all ranks of one run gave after the same step."
            )


def _all_recorders(recorders: Sequence[Recorders | None]) -> Recorders | None:
    """Say whose records the states hold together."""
    known = [one for one in recorders if one is not None]
    if len(known) < len(recorders):
        return None
    counts = {one.num_ranks for one in known}
    if len(counts) > 1:
        raise ResumeError(
            f"the states come from runs on {' and '.join(map(str, sorted(counts)))} ranks. Give "
            f"the states that all ranks of one run gave after the same step."
        )
    return Recorders.of((rank for one in known for rank in one.ranks), num_ranks=counts.pop())


def _carried(carried: Sequence[CarriedFrom | None]) -> CarriedFrom | None:
    """Unite the states of the run before."""
    known = [one for one in carried if one is not None]
    if not known:
        return None
    if len(known) < len(carried) or any(one.ordinals != known[0].ordinals for one in known):
        raise ResumeError(
            "the states differ in carried_from. Give the states that all ranks of one run gave "
            "after the same step."
        )
    return replace(known[0], state=_merged([one.state for one in known]))
