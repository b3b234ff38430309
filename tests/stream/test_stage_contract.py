"""What every stage keeps: counts reconcile, memory is bounded, states are exact, choices keyed."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from streaming_balance.errors import ConfigError, ResumeError
from streaming_balance.stream.accept import Accept
from streaming_balance.stream.repeat import Repeat
from streaming_balance.stream.replay import Replay
from streaming_balance.stream.reservoir import Reservoir
from streaming_balance.stream.shuffle import Shuffle
from streaming_balance.stream.stages import ITEM_BYTES, BareItem, Stage, StageRun
from tests.stream.labelled import (
    ORDERS,
    Sample,
    Watch,
    flat,
    labels_of,
    samples,
    saved_and_restored,
)

THREE = {"a": 70, "b": 25, "c": 5}
TARGET = {"a": 0.5, "b": 0.3, "c": 0.2}
ROOM = 20 * (ITEM_BYTES + 100)
STAGES: dict[str, Stage] = {
    "accept, declared": Accept(TARGET, frequencies=THREE),
    "accept, counted": Accept(TARGET, window=16),
    "accept, unknown dropped": Accept({"a": 1, "b": 1}, unknown="drop", pseudo_counts=0.5),
    "repeat, declared": Repeat(TARGET, buffer_bytes=ROOM, frequencies=THREE),
    "repeat, counted": Repeat(TARGET, buffer_bytes=ROOM, window=8, most_copies=7),
    "repeat, no room": Repeat(TARGET, buffer_bytes=ITEM_BYTES + 1, frequencies=THREE),
    "replay": Replay(TARGET, batch_size=7, buffer_bytes=2 * ROOM),
    "replay, waiting": Replay(TARGET, batch_size=4, buffer_bytes=ROOM, wait_for_classes=True),
    "replay, thrice": Replay(
        {"a": 1, "b": 1, "c": 0}, batch_size=3, buffer_bytes=ROOM, per_read=3, unknown="drop"
    ),
    "reservoir": Reservoir(6),
    "reservoir, target": Reservoir(11, target=TARGET),
    "reservoir, ratio": Reservoir(12, ratio=0.5, rotate=True),
    "reservoir, named": Reservoir({"a": 5, "b": 3}, unknown="drop", class_bytes=ROOM // 5),
    "reservoir, weighted": Reservoir(4, weights=lambda item: len(item.key), class_bytes=ROOM),
    "reservoir, windows": Reservoir(4, window=17),
    "shuffle": Shuffle(ROOM),
    "shuffle, no room": Shuffle(ITEM_BYTES + 1),
}
BOUNDS = {
    **dict.fromkeys(["accept, declared", "accept, counted", "accept, unknown dropped"], 0),
    **dict.fromkeys(["repeat, declared", "repeat, counted", "shuffle"], ROOM),
    **dict.fromkeys(["repeat, no room", "shuffle, no room"], ITEM_BYTES + 1),
    **dict.fromkeys(["replay, waiting", "replay, thrice"], ROOM),
    "replay": 2 * ROOM,
    "reservoir": 3 * 6 * (ITEM_BYTES + 100),
    "reservoir, target": 11 * (ITEM_BYTES + 100),
    "reservoir, ratio": 3 * 12 * (ITEM_BYTES + 100),
    "reservoir, named": 2 * (ROOM // 5),
    "reservoir, weighted": 3 * 4 * (ITEM_BYTES + 100),
    "reservoir, windows": 3 * 4 * (ITEM_BYTES + 100),
}
every_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
every_order = pytest.mark.parametrize("order", ORDERS)


def stream_of(order: str, length: int = 100, seed: int = 0) -> list[Sample]:
    """A stream of three classes whose samples have 0 to 99 bytes."""
    stream = samples(labels_of(THREE, length, order, seed))
    for number, item in enumerate(stream):
        item.num_bytes = number * 37 % 100
    return stream


def check_counts(run: StageRun[Any, Any], *, read: int, outputs: Counter[str]) -> None:
    """Compare the stats with what the test itself saw come and go."""
    stats = run.stats()
    assert stats["read"] == read
    assert stats["delivered"] + stats["rejected"] + stats["buffered"] == read
    assert stats["delivered"] + stats["copies"] == outputs.total()
    for count in ("read", "delivered", "copies", "rejected"):
        strangers = stats["unknown"] if count in ("read", "rejected") else 0
        assert sum(each[count] for each in stats["classes"].values()) == stats[count] - strangers
    for label, each in stats["classes"].items():
        assert each["delivered"] + each["copies"] == outputs[label]
        assert each["realised_share"] == outputs[label] / max(1, outputs.total())


@every_order
@every_stage
def test_at_every_step_every_sample_read_is_delivered_rejected_or_buffered(
    stage: Stage, order: str
) -> None:
    run = stage.begin(seed=5)
    outputs: Counter[str] = Counter()
    read = 0
    labels = {item.key: str(item.label) for item in stream_of(order)}
    for _ in range(3):
        for item in stream_of(order):
            outputs.update(labels[key] for key in flat(run.feed(item)))
            read += 1
            check_counts(run, read=read, outputs=outputs)
        outputs.update(labels[key] for key in flat(run.finish()))
        check_counts(run, read=read, outputs=outputs)
    assert run.stats()["passes"] == 3


@every_order
@every_stage
def test_a_sample_counts_as_delivered_when_it_goes_on_for_the_first_time(
    stage: Stage, order: str
) -> None:
    run = stage.begin(seed=5)
    gone: set[str] = set()
    for item in stream_of(order):
        gone.update(flat(run.feed(item)))
        assert run.stats()["delivered"] == len(gone)
    gone.update(flat(run.finish()))
    assert run.stats()["delivered"] == len(gone)


@pytest.mark.parametrize("order", ["common first", "random"])
@every_stage
def test_a_run_restored_at_any_step_goes_on_as_if_it_had_never_stopped(
    stage: Stage, order: str
) -> None:
    passes = [stream_of(order, 60, seed) for seed in range(3)]
    by_key = {item.key: item for item in passes[0]}
    steps: list[Sample | None] = []
    for stream in passes:
        steps.extend(by_key[item.key] for item in stream)
        steps.append(None)
    whole = stage.begin(seed=9)
    outputs, stats = [], []
    for step in steps:
        outputs.append(flat(whole.finish() if step is None else whole.feed(step)))
        stats.append(whole.stats())
    running = stage.begin(seed=9)
    for place, step in enumerate(steps):
        restored = saved_and_restored(running, lambda: stage.begin(seed=9), by_key)
        assert restored.stats() == running.stats()
        for later in range(place, len(steps)):
            # To the end from a few places only; three steps from every place.
            if later > place + 3 and place % 20:
                break
            then = steps[later]
            assert (
                flat(restored.finish() if then is None else restored.feed(then)) == (outputs[later])
            )
            assert restored.stats() == stats[later]
        # Every state is also that of a run which was itself restored before every step.
        running = saved_and_restored(running, lambda: stage.begin(seed=9), by_key)
        running.finish() if step is None else running.feed(step)
        assert running.stats() == stats[place]


@every_stage
def test_saving_changes_nothing(stage: Stage) -> None:
    saving, alone = stage.begin(seed=1), stage.begin(seed=1)
    for item in stream_of("random"):
        first = json.dumps(saving.state_dict(lambda held: held.key))
        assert json.dumps(saving.state_dict(lambda held: held.key)) == first
        assert flat(saving.feed(item)) == flat(alone.feed(item))
    assert flat(saving.finish()) == flat(alone.finish())


@every_stage
def test_the_same_seed_gives_the_same_pass_after_pass(stage: Stage) -> None:
    first, second = stage.begin(seed=3), stage.begin(seed=3)
    for _ in range(3):
        assert flat(first.over(stream_of("random"))) == flat(second.over(stream_of("random")))


@every_stage
def test_the_global_generators_are_neither_read_nor_moved(stage: Stage) -> None:
    def moved_to(seed: int) -> tuple[list[str], Any, Any]:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global state is what is looked at
        keys = flat(stage.begin(seed=3).over(stream_of("random")))
        return keys, random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002

    keys, state, numpy_state = moved_to(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert random.getstate() == state
    assert np.random.get_state()[1].tolist() == numpy_state  # type: ignore[index]  # noqa: NPY002
    assert moved_to(2)[0] == keys


@every_stage
def test_another_seed_gives_something_else(stage: Stage) -> None:
    results = {tuple(flat(stage.begin(seed=seed).over(stream_of("blocked")))) for seed in range(12)}
    assert len(results) > 1


@pytest.mark.parametrize("name", STAGES)
@every_order
def test_never_more_is_held_than_the_bound_by_the_stats_and_by_counting_who_is_alive(
    name: str, order: str
) -> None:
    watch = Watch()
    run = STAGES[name].begin(seed=5)
    most = 0
    for _ in range(2):
        for number, label in enumerate(labels_of(THREE, 300, order)):
            run.feed(watch.make(label, number * 37 % 101))
            alive = watch.sizes()
            size = sum(alive) + ITEM_BYTES * len(alive)
            most = max(most, size)
            assert size <= BOUNDS[name]
            stats = run.stats()
            assert (stats["held"], stats["buffered_bytes"]) == (len(alive), size)
            # A full window is held for a moment before it goes on, which only the run sees.
            seen = stats["most_buffered_bytes"]
            assert seen == most or (name == "reservoir, windows" and most < seen <= BOUNDS[name])
        run.finish()
    # The bound is used, not only kept: samples too large for it apart, which pass through.
    assert "no room" in name or most >= BOUNDS[name] // 2


@every_stage
def test_a_pass_without_a_sample_is_no_trouble(stage: Stage) -> None:
    run = stage.begin()
    assert list(run.over([])) == []
    assert run.stats()["read"] == 0


@every_stage
def test_settings_are_frozen_plain_and_make_the_same_stage_again(stage: Stage) -> None:
    settings = json.loads(json.dumps(stage.settings))
    assert settings == stage.settings
    if settings.get("weights") is None:
        assert type(stage)(**settings) == stage
    for name in settings:
        with pytest.raises(FrozenInstanceError):
            setattr(stage, name, 1)


def state_of(stage: Stage) -> dict[str, Any]:
    """The state of a run in the middle of a pass."""
    run = stage.begin(seed=4)
    for item in stream_of("random", 40):
        run.feed(item)
    return run.state_dict(lambda item: item.key)


@every_stage
def test_a_state_of_another_seed_stage_version_or_of_no_kind_is_refused(stage: Stage) -> None:
    state = state_of(stage)

    def refused(changed: Any, seed: int = 4) -> str:
        with pytest.raises(ResumeError) as caught:
            stage.begin(seed=seed).load_state_dict(changed, lambda key: BareItem(key, "a"))
        return str(caught.value)

    assert "seed: state has 4, run has 5" in refused(state, seed=5)
    assert "stage: state has 'sieve'" in refused({**state, "stage": "sieve"})
    assert "version 9; this release reads version 1" in refused({**state, "version": 9})
    assert "the state is a list" in refused([state])
    assert f"{stage.name}: " in refused({**state, "settings": None})


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (Accept(TARGET, frequencies={**THREE, "a": 71}), "frequencies: state has"),
        (Accept(TARGET, window=5), "window: state has 1000, run has 5"),
        (Accept({**TARGET, "a": 1.0}, frequencies=THREE), "target: state has"),
    ],
)
def test_a_state_of_other_settings_is_refused_by_their_names(
    changed: Stage, difference: str
) -> None:
    state = state_of(STAGES["accept, declared"])
    with pytest.raises(ResumeError, match=difference):
        changed.begin(seed=4).load_state_dict(state, lambda key: BareItem(key, "a"))


def answer_to(stage: Stage, state: dict[str, Any]) -> str:
    """Load a state and give the error's text, or nothing if there was none."""
    try:
        stage.begin(seed=4).load_state_dict(state, lambda key: BareItem(key, "a"))
    except ResumeError as error:
        return str(error)
    return ""


@every_stage
def test_a_damaged_state_is_an_error_of_ours(stage: Stage) -> None:
    whole = state_of(stage)
    for part in ("counts", "run"):
        for name in whole[part]:
            for damage in ("gone", None, "x", [1]):
                state = copy.deepcopy(whole)
                if damage == "gone":
                    del state[part][name]
                else:
                    state[part][name] = damage
                answer = answer_to(stage, state)
                assert "the state is damaged" in answer or (not answer and damage != "gone")


def test_what_restoring_a_sample_raises_is_passed_on() -> None:
    state = state_of(STAGES["shuffle"])

    def gone(key: str) -> BareItem:
        raise ResumeError(f"{key}: the shard was replaced")

    with pytest.raises(ResumeError, match=r"^s\d+: the shard was replaced$"):
        STAGES["shuffle"].begin(seed=4).load_state_dict(state, gone)


@pytest.mark.parametrize("name", ["replay", "reservoir, named"])
def test_a_sample_that_is_refused_changes_nothing(name: str) -> None:
    def refused() -> dict[str, Any]:
        run = STAGES[name].begin(seed=4)
        for item in stream_of("random", 40):
            run.feed(item)
        before = json.dumps([run.state_dict(lambda item: item.key), run.stats()])
        with pytest.raises(ConfigError, match="sample 'huge' takes"):
            run.feed(Sample("huge", "a", 1 << 30))
        assert json.dumps([run.state_dict(lambda item: item.key), run.stats()]) == before
        return run.stats()

    assert refused()["read"] == 40


def test_a_held_sample_without_a_byte_still_takes_room() -> None:
    run = Shuffle(10 * ITEM_BYTES).begin()
    for item in samples(["a"] * 100):
        run.feed(item)
    assert run.stats()["held"] == 10


@pytest.mark.parametrize(
    "build",
    [
        lambda size: Shuffle(size),
        lambda size: Repeat(TARGET, buffer_bytes=size),
        lambda size: Replay(TARGET, batch_size=4, buffer_bytes=size),
        lambda size: Reservoir(4, class_bytes=size),
    ],
    ids=["shuffle", "repeat", "replay", "reservoir"],
)
@pytest.mark.parametrize("size", [0, -1, ITEM_BYTES, 1.5, True, "1 MB"])
def test_a_buffer_that_holds_nothing_is_refused(build: Callable[[Any], Stage], size: Any) -> None:
    with pytest.raises(ConfigError, match=rf"bytes is {size!r}; it must be a number of bytes"):
        build(size)
