"""The plans behind a state: its own, and those it was carried over from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from streaming_balance.errors import ConfigError, ResumeError
from streaming_balance.plan.epoch import PLAN_VERSION, BalancedPlan
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.state import LoaderState


def plan_of(state: LoaderState, tables: Iterable[ShardSet]) -> BalancedPlan:
    """Build the plan a state names from the settings it holds, and check that it is that plan.

    Args:
        state: a state of training.
        tables: data sets to look in: the one the state belongs to, and those of the runs it was
            carried over from.

    Returns:
        The plan, which goes on from the plans before it where the run was carried over.

    Raises:
        ResumeError: a data set is missing, or the settings do not give the plan that is named.
    """
    settings: Mapping[str, Any] = state.settings
    if "balance" not in settings and {"batch_size", "rank"} <= settings.keys():
        raise ResumeError(
            f"this is the state of an evaluation over {settings.get('split')!r}, which follows no "
            f"plan: it delivers every sample once, in packed order. Give the state of a training "
            f"loader."
        )
    shards = table_of(state, tables := list(tables))
    if settings.get("version") != PLAN_VERSION:
        raise ResumeError(
            f"the state's plan has version {settings.get('version')!r}; this release plans by "
            f"version {PLAN_VERSION}. Use the release that trained."
        )
    try:
        plan = BalancedPlan.for_shards(
            shards,
            global_batch_size=settings["global_batch_size"],
            balance=settings["balance"],
            seed=settings["seed"],
            split=str(settings["split"]),
            exclude=settings["exclude"],
        )
        plan = _carried(plan, state, tables)
    except (KeyError, TypeError, IndexError, ConfigError) as error:
        raise ResumeError(
            f"the state's settings do not give a plan over {shards.path} "
            f"({type(error).__name__}: {error}). Use the state as the loader saved it."
        ) from error
    if plan.digest != state.plan_digest:
        raise ResumeError(
            f"the state names plan {state.plan_digest}, but its settings over {shards.path} give "
            f"{plan.digest}. Use the state as the loader saved it."
        )
    return plan


def table_of(state: LoaderState, tables: Iterable[ShardSet]) -> ShardSet:
    """Give the data set that a state belongs to.

    Raises:
        ResumeError: it is not among these.
    """
    known = list(tables)
    for shards in known:
        if shards.digest == state.shards_digest:
            return shards
    found = " and ".join(f"{shards.path} is {shards.digest}" for shards in known)
    raise ResumeError(
        f"the state belongs to the data set {state.shards_digest}, but {found}. Give the folder "
        f"the run was trained on."
    )


def _carried(plan: BalancedPlan, state: LoaderState, tables: Iterable[ShardSet]) -> BalancedPlan:
    """Let a plan go on from the one before, where the state says so."""
    before = state.carried_from
    if before is None:
        return plan
    old, where = plan_of(before.state, tables), before.state.position
    ordinals = old.ordinals(where.epoch, where.step)
    if ordinals != before.ordinals:
        raise ResumeError(
            f"the state was carried over at ordinals {dict(before.ordinals)}, but the plan before "
            f"stood at {ordinals} there. Use the state as the loader saved it."
        )
    return plan.carried_from(old, epoch=where.epoch, step=where.step)
