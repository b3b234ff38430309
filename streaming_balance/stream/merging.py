"""What several reservoirs kept of one stream, as one reservoir would have kept it.

Workers and ranks each read a part of the stream; their runs, or the states of these, are merged
before the pass is finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from streaming_balance.errors import ResumeError
from streaming_balance.stream.reservoir import Reservoir, ReservoirRun
from streaming_balance.stream.stages import Item


def merge_runs(runs: Sequence[ReservoirRun[Item]]) -> ReservoirRun[Item]:
    """Give one run that read what all of these read, to be fed on or finished.

    Args:
        runs: runs with equal settings and seed, in the same pass; they stay as they are.

    Raises:
        ResumeError: settings, seeds or passes differ, runs have windows, or two read one sample.

    Examples:
        >>> from streaming_balance.stream.stages import BareItem
        >>> stream = [BareItem(f"P{number}", "LGG") for number in range(100)]
        >>> first, second, alone = [Reservoir(10).begin(seed=1) for _ in range(3)]
        >>> _ = [first.feed(item) for item in stream[:70]], [second.feed(i) for i in stream[70:]]
        >>> merged = merge_runs([second, first]).finish()
        >>> [item.key for item in merged] == [item.key for item in alone.over(stream)]
        True
    """
    first, *others = _checked(runs)
    merged: ReservoirRun[Item] = first.stage.begin(seed=first.seed)
    merged.passes = first.passes
    for run in (first, *others):
        merged.absorb(run)
    return merged


def merge_states(stage: Reservoir, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Give the state of one run that read what the runs of all these states read.

    Args:
        stage: the settings of all of them.
        states: what their `state_dict` gave; samples stay as they were saved.

    Raises:
        ResumeError: as `merge_runs`, or a state that does not belong to `stage`.

    Examples:
        >>> from streaming_balance.stream.stages import BareItem
        >>> runs = [Reservoir(10).begin(seed=1) for _ in range(2)]
        >>> _ = [run.feed(BareItem(f"P{number}", "LGG")) for number, run in enumerate(runs)]
        >>> state = merge_states(Reservoir(10), [run.state_dict(lambda i: i.key) for run in runs])
        >>> sorted(entry["item"] for entry in state["run"]["kept"]["LGG"]["entries"])
        ['P0', 'P1']
    """
    runs: list[ReservoirRun[Any]] = []
    for state in states:
        seed = state.get("seed")
        run = stage.begin(seed=seed if isinstance(seed, int) else 0)
        # A reservoir never looks at what it holds, so saved samples are as good as restored ones.
        run.load_state_dict(state, lambda saved: saved)
        runs.append(run)
    return merge_runs(runs).state_dict(lambda saved: saved)


def _checked(runs: Sequence[ReservoirRun[Item]]) -> Sequence[ReservoirRun[Item]]:
    """Refuse runs that are not parts of one whole."""
    if not runs:
        raise ResumeError("reservoir: there is no run to merge; give at least one.")
    first = runs[0]
    if first.stage.window is not None:
        raise ResumeError(
            f"reservoir: runs with a window (here {first.stage.window}) cannot be merged: each run "
            f"has windows of its own. Leave window out to sample the whole pass."
        )
    mine = {**first.stage.settings, "seed": first.seed, "passes": first.passes}
    for number, run in enumerate(runs[1:], 1):
        theirs = {**run.stage.settings, "seed": run.seed, "passes": run.passes}
        differences = [
            f"{name}: run 0 has {mine[name]!r}, run {number} has {theirs[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        ]
        if differences:
            raise ResumeError(
                f"reservoir: runs that differ cannot be merged. {'; '.join(differences)}. Begin "
                f"all of them alike and merge them before the pass is finished."
            )
    _check_apart(runs)
    return runs


def _check_apart(runs: Sequence[ReservoirRun[Item]]) -> None:
    """Refuse runs that read the same samples: their counts would be too high."""
    for one, other in combinations(runs, 2):
        for label in one.kept.keys() & other.kept.keys():
            if one.kept[label].has_any_of(other.kept[label]):
                raise ResumeError(
                    f"reservoir: two of the runs read the same sample of class {label!r}. Give "
                    f"every worker and rank its own shards, and merge each run once."
                )
