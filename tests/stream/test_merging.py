"""Merging: parts of a stream, read by any number of workers, keep what one reader would."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ResumeError
from streaming_balance.stream.merging import merge_runs, merge_states
from streaming_balance.stream.reservoir import Reservoir, ReservoirRun
from streaming_balance.stream.stages import ITEM_BYTES, Stage
from tests.stream.labelled import Sample, flat, labels_of, samples, saved_and_restored

STAGES = {
    "plain": Reservoir(12),
    "bytes": Reservoir(12, class_bytes=9 * (ITEM_BYTES + 25)),
    "weighted": Reservoir(12, weights=lambda item: 1.0 + item.num_bytes % 5),
    "ratio": Reservoir(15, ratio=0.5),
    "target": Reservoir(25, target={"a": 2, "b": 2, "c": 1}, on_short="report"),
    "rotating": Reservoir(12, rotate=True),
}
every_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)


def stream_of(length: int = 300) -> list[Sample]:
    """Three classes, and sizes of 0 to 49 bytes."""
    stream = samples(labels_of({"a": 70, "b": 25, "c": 5}, length, "random"))
    for number, item in enumerate(stream):
        item.num_bytes = number * 13 % 50
    return stream


def dealt(
    stage: Stage, stream: list[Sample], workers: int, seed: int
) -> list[ReservoirRun[Sample]]:
    """Give each worker a part, some of them perhaps nothing, and feed all in turns."""
    runs: list[Any] = [stage.begin(seed=1) for _ in range(workers)]
    for item, number in zip(
        stream, np.random.default_rng(seed).integers(0, workers, len(stream)), strict=True
    ):
        runs[number].feed(item)
    return runs


@pytest.mark.parametrize("workers", range(1, 17))
@every_stage
def test_any_split_over_up_to_sixteen_workers_keeps_what_one_reader_keeps(
    stage: Reservoir, workers: int
) -> None:
    stream = stream_of()
    alone = stage.begin(seed=1)
    expected = flat(alone.over(stream))
    runs = dealt(stage, stream, workers, workers)
    merged = merge_runs(runs[::-1])
    assert flat(merged.finish()) == expected
    mine, theirs = merged.stats(), alone.stats()
    for name in ("read", "delivered", "rejected", "last_emission", "passes"):
        assert mine[name] == theirs[name]
    assert {name: each["rejected"] for name, each in mine["classes"].items()} == {
        name: each["rejected"] for name, each in theirs["classes"].items()
    }
    # The runs themselves are as they were.
    assert sum(run.stats()["read"] for run in runs) == len(stream)


@every_stage
def test_workers_that_stop_and_go_on_anywhere_keep_the_same(stage: Reservoir) -> None:
    stream = stream_of()
    by_key = {item.key: item for item in stream}
    expected = flat(stage.begin(seed=1).over(stream))
    choices = np.random.default_rng(5)
    runs: list[Any] = [stage.begin(seed=1) for _ in range(5)]
    for item in stream:
        number = int(choices.integers(0, 5))
        if choices.integers(0, 4) == 0:
            runs[number] = saved_and_restored(runs[number], lambda: stage.begin(seed=1), by_key)
        runs[number].feed(item)
    assert flat(merge_runs(runs).finish()) == expected


@every_stage
def test_merged_states_are_the_state_of_one_reader(stage: Reservoir) -> None:
    stream = stream_of()
    by_key = {item.key: item for item in stream}
    runs = dealt(stage, stream, 7, 0)
    states = [json.loads(json.dumps(run.state_dict(lambda item: item.key))) for run in runs]
    merged = merge_states(stage, states)
    run = stage.begin(seed=1)
    run.load_state_dict(json.loads(json.dumps(merged)), lambda key: by_key[key])
    assert flat(run.finish()) == flat(stage.begin(seed=1).over(stream))


@given(parts=st.lists(st.integers(0, 3), min_size=60, max_size=60), cut=st.integers(0, 60))
def test_a_merged_run_reads_on(parts: list[int], cut: int) -> None:
    stage = STAGES["bytes"]
    stream = stream_of(60)
    runs: list[Any] = [stage.begin(seed=1) for _ in range(4)]
    for item, number in zip(stream[:cut], parts[:cut], strict=True):
        runs[number].feed(item)
    # Merged in two steps, in another order, and fed the rest.
    merged = merge_runs([merge_runs([runs[2], runs[0]]), merge_runs([runs[3], runs[1]])])
    rest = flat(merged.over(stream[cut:]))
    assert rest == flat(stage.begin(seed=1).over(stream))


def test_what_is_held_after_merging_is_counted() -> None:
    runs = dealt(STAGES["plain"], stream_of(), 4, 0)
    stats = merge_runs(runs).stats()
    assert stats["held"] == stats["buffered"] == 36
    assert stats["read"] == stats["rejected"] + 36
    assert stats["buffered_bytes"] == sum(each["kept_bytes"] for each in stats["classes"].values())
    assert stats["most_buffered_bytes"] >= stats["buffered_bytes"]


def test_labels_that_were_turned_away_are_counted_together() -> None:
    stage = Reservoir({"a": 3}, unknown="drop")
    runs = [stage.begin(seed=1) for _ in range(2)]
    for run, label in zip(runs, ["x", "b"], strict=True):
        run.feed(Sample("s0", label))
    stats = merge_runs(runs).stats()
    assert (stats["unknown"], stats["unknown_labels"]) == (2, ["b", "x"])


def test_runs_of_the_same_samples_are_refused() -> None:
    stage = Reservoir(3)
    runs: list[Any] = [stage.begin(seed=1) for _ in range(3)]
    for number, run in enumerate(runs):
        run.feed(Sample(f"s{number % 2}", "a"))
    with pytest.raises(ResumeError, match="two of the runs read the same sample of class 'a'"):
        merge_runs(runs)


def test_runs_of_other_settings_seeds_or_passes_are_refused_by_name() -> None:
    def run(size: int = 3, seed: int = 1, passes: int = 0) -> Any:
        made = Reservoir(size).begin(seed=seed)
        for _ in range(passes):
            made.finish()
        return made

    for other, message in [
        (run(size=4), "size: run 0 has 3, run 1 has 4"),
        (run(seed=2), "seed: run 0 has 1, run 1 has 2"),
        (run(passes=1), "passes: run 0 has 0, run 1 has 1"),
    ]:
        with pytest.raises(ResumeError, match=message):
            merge_runs([run(), other])


def test_runs_with_windows_and_no_runs_at_all_are_refused() -> None:
    with pytest.raises(ResumeError, match=r"with a window \(here 9\) cannot be merged"):
        merge_runs([Reservoir(3, window=9).begin()])
    with pytest.raises(ResumeError, match="there is no run to merge"):
        merge_runs([])


def test_states_of_another_stage_are_refused() -> None:
    state = Reservoir(3).begin(seed=1).state_dict(lambda item: item)
    with pytest.raises(ResumeError, match="size: state has 3, run has 4"):
        merge_states(Reservoir(4), [state])
    with pytest.raises(ResumeError, match="seed: state has None"):
        merge_states(Reservoir(3), [{**state, "seed": None}])
