"""What had been seen by an earlier state, and what is not an earlier state of a run."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streaming_balance.errors import ResumeError
from streaming_balance.report.audit import audit_of
from streaming_balance.report.history import run_until, seen_since
from streaming_balance.report.runs import rebuild_run
from streaming_balance.report.saved_states import SavedState
from streaming_balance.report.sightings import patient_sightings
from streaming_balance.report.tallies import tally_run
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import BalancedLoader
from streaming_balance.training.merging import merge_states
from streaming_balance.training.records import Recorders, Substitution
from streaming_balance.training.state import LoaderState, Position
from tests.report.witness import (
    Witness,
    audited_shards,
    build,
    check,
    damage,
    of,
    saved,
)

OPTIONS: dict[str, Any] = {"balance": "class_balanced", "on_error": "substitute"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """21 training patients, two samples of whom cannot be read."""
    made = audited_shards(tmp_path_factory.mktemp("before") / "cohort")
    for key in ("H04__a", "L01__a"):
        damage(made, key)
    return made


def merged(loaders: list[BalancedLoader]) -> SavedState:
    """Give the run's state as it comes out of a JSON file."""
    return saved(merge_states([loader.state_dict() for loader in loaders]))


@pytest.mark.parametrize("seed", range(5))
def test_every_earlier_state_says_what_had_been_received_by_then(
    shards: ShardSet, seed: int
) -> None:
    choose = random.Random(seed)
    options, witness, leg = OPTIONS, Witness(), 0
    loaders = build(shards, 2, options)
    kept: list[tuple[SavedState, Counter[str]]] = []
    for _ in range(12):
        kept.append((merged(loaders), Counter(witness.exposure)))
        action = choose.choice(["train", "train", "jump", "resume", "carry"])
        if action == "train":
            witness.train(loaders, choose.randint(1, 4), leg=leg)
        elif action == "jump":
            # Some of these come right after another: a state in between is one of the run, too.
            epoch = loaders[0].epoch + choose.randint(0, 2)
            for loader in loaders:
                loader.set_epoch(epoch)
        else:
            state = merged(loaders).state.to_dict()
            if action == "carry":
                options = {**OPTIONS, "seed": choose.randint(10, 10**6)}
                leg += 1
            loaders = build(shards, choose.randint(1, 3), options)
            for loader in loaders:
                loader.load_state_dict(state, carry_exposure=True)
    run = rebuild_run(shards, merged(loaders))
    later, everybody = tally_run(run), set(shards.patients("train").tolist())
    for state_then, exposure_then in kept:
        earlier = tally_run(run_until(run, state_then))
        audit = audit_of(earlier)
        then = of(everybody, exposure_then)
        assert {name: n for name, n in audit.exposure.items() if n} == then
        assert audit.complete
        assert audit.state_digest == state_then.digest
        now = Counter(of(everybody, witness.exposure))
        since = {name: n for name, n in seen_since(later, earlier).items() if n}
        assert since == dict(now - Counter(then))


def trained(shards: ShardSet, steps: int = 6, **options: Any) -> list[SavedState]:
    """Give a run's states at the start and after each step."""
    loaders, witness = build(shards, 1, OPTIONS | options), Witness()
    states = [merged(loaders)]
    for _ in range(steps):
        witness.train(loaders, 1)
        states.append(merged(loaders))
    for loader in loaders:
        loader.close()
    return states


def test_a_state_counts_as_its_own_earlier_state(shards: ShardSet) -> None:
    last = trained(shards)[-1]
    run = rebuild_run(shards, last)
    tallies = tally_run(run)
    assert set(seen_since(tallies, tally_run(run_until(run, last))).values()) == {0}


def changed(state: LoaderState, **fields: Any) -> LoaderState:
    """Edit a state."""
    return replace(state, **fields)


def record(state: LoaderState) -> Substitution:
    """Give the record the state has."""
    return state.substitutions[0]


NOT_EARLIER: dict[str, tuple[Callable[[LoaderState], LoaderState], str]] = {
    "of a later time": (
        lambda state: changed(state, position=Position(1, 3)),
        r"position: it has epoch 1, step 3, expected at most epoch 1, step 2",
    ),
    "of another plan": (
        lambda state: changed(state, plan_digest="0" * 32),
        r"plan_digest: it has 0000.*, expected [0-9a-f]{32}",
    ),
    "of other data": (
        lambda state: changed(state, shards_digest="0" * 64),
        r"shards_digest: it has 0000",
    ),
    "with a jump": (
        lambda state: changed(
            state, skipped=((Position(0, 1), Position(1, 0)),), position=Position(1, 1)
        ),
        r"skipped: it has",
    ),
    "with a record the later one lacks": (
        lambda state: changed(state, substitutions=(replace(record(state), reason="another"),)),
        r"substitutions: it has 1 that the later state lacks, first at epoch 0.*merge_states",
    ),
    "at a step its epoch does not have": (
        lambda state: changed(state, position=Position(0, 77)),
        r"a place that its plan does not have \(epoch 0 has no step 77\)",
    ),
}


@pytest.mark.parametrize("what", NOT_EARLIER)
def test_what_the_run_never_was_is_refused_by_field(shards: ShardSet, what: str) -> None:
    edit, complaint = NOT_EARLIER[what]
    states = trained(shards)
    run = rebuild_run(shards, states[-1])
    assert run.state.position == Position(1, 2)
    earlier = states[4].state
    assert earlier.substitutions
    with pytest.raises(ResumeError, match=complaint):
        run_until(run, SavedState.of(edit(earlier)))


def test_settings_that_differ_are_named(shards: ShardSet) -> None:
    run = rebuild_run(shards, trained(shards)[-1])
    with pytest.raises(ResumeError, match=r"plan_digest: .*; seed: 6, not 5"):
        run_until(run, trained(shards, 2, seed=6)[-1])
    with pytest.raises(ResumeError, match=r"mixing: it has Mixing.*, expected None"):
        run_until(run, trained(shards, 2, mixing={"name": "mixup"})[-1])


def test_a_run_carried_on_is_not_earlier_than_what_it_came_from(shards: ShardSet) -> None:
    states = trained(shards)
    (loader,) = build(shards, 1, {**OPTIONS, "seed": 6})
    loader.load_state_dict(states[-1].state.to_dict(), carry_exposure=True)
    carried = merged([loader])
    with pytest.raises(ResumeError, match=r"carried_from: it has 1 change.* expected 0"):
        run_until(rebuild_run(shards, states[-1]), carried)
    # And a state of the old plan from after the change was made elsewhere.
    (other,) = build(shards, 1, OPTIONS)
    other.load_state_dict(states[-1].state.to_dict())
    Witness().train([other], 1)
    with pytest.raises(ResumeError, match=r"position: it has epoch 1, step 3"):
        run_until(rebuild_run(shards, carried), merged([other]))
    run_until(rebuild_run(shards, carried), states[-1])


def test_an_old_plan_that_was_left_elsewhere_is_refused(shards: ShardSet) -> None:
    states = trained(shards)
    carried = []
    for left in (states[-1], states[-2]):
        (loader,) = build(shards, 1, {**OPTIONS, "seed": 6})
        loader.load_state_dict(left.state.to_dict(), carry_exposure=True)
        carried.append(merged([loader]))
    assert carried[0].state.carried_from is not None
    forged = replace(carried[1].state, plan_digest=carried[0].state.plan_digest)
    with pytest.raises(ResumeError, match=r"carried_from\.position: it has .*step=1.*step=2"):
        run_until(rebuild_run(shards, carried[0]), SavedState.of(forged))


def test_the_state_of_an_evaluation_is_refused(shards: ShardSet) -> None:
    run = rebuild_run(shards, trained(shards)[-1])
    with eval_loader(shards, split="val", batch_size=2) as loader:
        evaluation = saved(loader.state_dict())
    with pytest.raises(ResumeError, match="state of an evaluation"):
        run_until(run, evaluation)


def test_records_of_other_ranks_in_the_later_state_complete_the_earlier_one(
    shards: ShardSet,
) -> None:
    loaders, witness = build(shards, 2, OPTIONS), Witness()
    witness.train(loaders, 4)
    alone = [saved(loader.state_dict()) for loader in loaders]
    then = Witness()
    then.exposure.update(witness.exposure)
    then.as_partner, then.as_substitute = witness.as_partner, Counter(witness.as_substitute)
    then.substituted, then.batches = Counter(witness.substituted), witness.batches
    then.first, then.last = dict(witness.first), dict(witness.last)
    assert all(not one.state.complete for one in alone)
    witness.train(loaders, 3)
    run = rebuild_run(shards, merged(loaders))
    for one in alone:
        until = run_until(run, one)
        assert until.state.complete
        assert until.last.saved.digest == one.digest
        check(tally_run(until), then)


def test_states_of_different_ranks_that_disagree_are_not_told_apart_by_guessing(
    shards: ShardSet,
) -> None:
    loaders, witness = build(shards, 2, OPTIONS), Witness()
    witness.train(loaders, 4)
    first = [saved(loader.state_dict()) for loader in loaders]
    witness.train(loaders, 3)
    second = [saved(loader.state_dict()) for loader in loaders]
    assert all(one.state.substitutions for one in first)
    assert first[0].state.recorders == Recorders(num_ranks=2, ranks=(0,))
    with pytest.raises(ResumeError, match="merge_states"):
        run_until(rebuild_run(shards, second[1]), first[0])


def test_first_and_last_sightings_stop_at_the_earlier_state(tmp_path: Path) -> None:
    shards = audited_shards(tmp_path / "cohort")
    loaders, witness = build(shards, 1, OPTIONS), Witness()
    witness.train(loaders, 2)
    then, last = merged(loaders), dict(witness.last)
    witness.train(loaders, 2)
    run = rebuild_run(shards, merged(loaders))
    seen = patient_sightings(tally_run(run_until(run, then)))
    places = {
        name: (where.leg, where.epoch, where.step)
        for name, where in seen.last.items()
        if where is not None
    }
    assert places == of(set(seen.last), last)
