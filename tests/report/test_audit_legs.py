"""Runs of several plans, and of data sets that are no longer what they were."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streaming_balance.errors import ResumeError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.report.audit import audit_of, audit_run
from streaming_balance.report.patient import answer_for
from streaming_balance.report.runs import rebuild_run
from streaming_balance.report.sightings import patient_sightings
from streaming_balance.storage.shards import ShardSet, open_shards, open_table
from streaming_balance.training.loader import BalancedLoader
from streaming_balance.training.merging import merge_states
from tests.report.witness import (
    Witness,
    audited_cohort,
    audited_shards,
    build,
    check,
    check_one,
    damage,
    nonzero,
    of,
    places,
    saved,
    tallied,
)
from tests.training.cohorts import packed

BALANCED = {"balance": "class_balanced"}
CHANGES: tuple[dict[str, Any], ...] = (
    BALANCED,
    {"balance": "class_balanced", "seed": 6},
    {"balance": {"name": "power", "alpha": 0.25}, "global_batch_size": 9},
    {"balance": "class_balanced", "exclude": ["H03", "L04__a"]},
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """21 training patients, two samples of whom cannot be read."""
    made = audited_shards(tmp_path_factory.mktemp("legs") / "cohort")
    for key in ("H04__a", "L01__a"):
        damage(made, key)
    return made


@pytest.fixture
def old(tmp_path: Path) -> ShardSet:
    """The data set as it was."""
    return audited_shards(tmp_path / "old")


@pytest.fixture
def new(tmp_path: Path) -> ShardSet:
    """Packed anew: H02 and L05 withdrew their consent, H12 joined."""
    samples = [sample for sample in audited_cohort(hgg=13) if sample.patient not in {"H02", "L05"}]
    return packed(tmp_path / "new", samples, shard_bytes=8192)


def state_of(loaders: list[BalancedLoader]) -> dict[str, Any]:
    """Give the run's state as JSON has it, and end its loaders."""
    state: dict[str, Any] = json.loads(
        json.dumps(merge_states([loader.state_dict() for loader in loaders]))
    )
    for loader in loaders:
        loader.close()
    return state


def go_on(
    shards: ShardSet,
    state: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    carry: bool | ShardSet = True,
    num_ranks: int = 1,
) -> list[BalancedLoader]:
    """Build loaders that go on from a state."""
    loaders = build(shards, num_ranks, options)
    for loader in loaders:
        loader.load_state_dict(state, carry_exposure=carry)
    return loaders


def without_shards(shards: ShardSet) -> ShardSet:
    """Delete a data set's volumes, and open what is left."""
    for shard in shards.path.glob("*.tar"):
        shard.unlink()
    return open_table(shards.path)


@pytest.mark.parametrize("seed", range(4))
def test_exposure_is_summed_over_all_plans_of_a_run(shards: ShardSet, seed: int) -> None:
    choose = random.Random(seed)
    witness = Witness()
    options = {**BALANCED, "on_error": "substitute"}
    loaders = build(shards, choose.randint(1, 3), options)
    leg = 0
    for turn in range(12):
        action = choose.choice(["train", "train", "jump", "resume", "carry"])
        if turn == 0 or action == "train":
            witness.train(loaders, choose.randint(1, 4), leg=leg)
        elif action == "jump":
            epoch = loaders[0].epoch + choose.randint(0, 2)
            for loader in loaders:
                loader.set_epoch(epoch)
        else:
            state = state_of(loaders)
            if action == "carry":
                others = {**choose.choice(CHANGES), "on_error": "substitute"}
                leg += others != options
                options = others
            loaders = go_on(shards, state, options, num_ranks=choose.randint(1, 3))
        tallies = tallied(shards, merge_states([loader.state_dict() for loader in loaders]))
        assert len(tallies.run.legs) == leg + 1
        check(tallies, witness)
        check_one(tallies, choose.choice(list(tallies.names)), witness)
    for loader in loaders:
        loader.close()


def test_each_leg_is_listed_with_its_span_and_digests(shards: ShardSet) -> None:
    options = {**BALANCED, "on_error": "substitute"}
    loaders = build(shards, 1, options)
    witness = Witness()
    witness.train(loaders, 4)
    witness.train(loaders, 1)
    first = loaders[0].plan
    state = state_of(loaders)
    loaders = go_on(shards, state, {**options, "seed": 6})
    witness.train(loaders, 3, leg=1)
    second = loaders[0].plan
    audit = audit_of(tallied(shards, loaders[0].state_dict()))
    loaders[0].close()
    spans = [(leg.start, leg.stop, leg.batches, leg.samples) for leg in audit.legs]
    # The carried plan begins epoch 1 anew.
    assert spans == [((0, 0), (1, 1), 5, 30), ((1, 0), (1, 3), 3, 18)]
    assert [leg.plan_digest for leg in audit.legs] == [first.digest, second.digest]
    assert [leg.settings["seed"] for leg in audit.legs] == [5, 6]
    assert {leg.shards_digest for leg in audit.legs} == {shards.digest}
    assert audit.legs[0].state_digest == saved(state).digest
    assert audit.plan_digest == second.digest
    assert sum(entry.delivered for entry in audit.classes.values()) == 48


def test_a_run_carried_to_a_data_set_packed_anew_is_audited_from_both_tables(
    old: ShardSet, new: ShardSet
) -> None:
    loaders, witness = build(old, 2, BALANCED), Witness()
    witness.train(loaders, 3)
    loaders = go_on(new, state_of(loaders), BALANCED, carry=old)
    witness.train(loaders, 4, leg=1)
    state = state_of(loaders)
    tallies = tallied(new, state, tables=[without_shards(old)])
    check(tallies, witness)
    for patient in ("H02", "L05", "H12", "H03"):
        check_one(tallies, patient, witness)
    audit = audit_of(tallies)
    assert audit.absent == ("H02", "L05")
    assert [leg.shards_digest for leg in audit.legs] == [old.digest, new.digest]
    # 12 of HGG and 9 of LGG were there, one joined HGG, and whoever left has been counted.
    assert (audit.classes["HGG"].patients, audit.classes["LGG"].patients) == (13, 9)


def test_a_leg_whose_data_set_is_not_given_is_named_with_the_way_out(
    old: ShardSet, new: ShardSet
) -> None:
    loaders = build(old, 1, BALANCED)
    Witness().train(loaders, 3)
    state = state_of(loaders)
    with pytest.raises(ResumeError, match=rf"data set {old.digest}.*--table"):
        rebuild_run(new, saved(state))
    loaders = go_on(new, state, BALANCED, carry=old)
    carried = state_of(loaders)
    with pytest.raises(ResumeError, match=rf"data set {old.digest}.*--table"):
        rebuild_run(new, saved(carried))
    with pytest.raises(ResumeError, match=rf"data set {new.digest}.*--table"):
        rebuild_run(old, saved(carried))
    rebuild_run(old, saved(carried), tables=[new])


def test_after_a_withdrawal_the_old_audit_can_still_be_answered(
    old: ShardSet, new: ShardSet
) -> None:
    loaders, witness = build(old, 1, BALANCED), Witness()
    witness.train(loaders, 4)
    state = state_of(loaders)
    left = without_shards(old)
    tallies = tallied(new, state, tables=[left])
    check(tallies, witness)
    audit = audit_of(tallies)
    assert audit.absent == ("H02", "L05")
    assert audit.shards_digest == old.digest != new.digest
    for patient in audit.absent:
        answer = answer_for(patient, tallies)
        assert answer.seen is (witness.exposure[patient] > 0)
        assert not answer.is_present
    # Whoever joined later is known, and was not seen.
    assert not answer_for("H12", tallies).seen
    assert answer_for("H12", tallies).is_present
    assert answer_for("H03", tallies).is_present


def test_excluding_somebody_leaves_the_order_of_the_others_alone(old: ShardSet) -> None:
    gone = {"H02", "L05"}
    plans = [
        BalancedPlan.for_shards(old, global_batch_size=6, seed=5, exclude=exclude)
        for exclude in ((), sorted(gone))
    ]
    owners = old.patients("train").tolist()
    for letter, kept in (("H", 11), ("L", 8)):
        drawn = []
        for plan in plans:
            walked = [owners[n] for step in range(3) for n in plan.batch(0, step).tolist()]
            drawn.append([name for name in walked if name[0] == letter and name not in gone])
        # Three batches hold nine of each class: no more than a pass, so nobody comes twice.
        shared = min(map(len, drawn))
        assert kept >= shared > 5
        assert drawn[0][:shared] == drawn[1][:shared]


def test_a_withdrawn_patient_is_audited_as_excluded(shards: ShardSet) -> None:
    loaders = build(shards, 1, {**BALANCED, "exclude": ["H03"], "on_error": "substitute"})
    Witness().train(loaders, 4)
    tallies = tallied(shards, state_of(loaders))
    answer = answer_for("H03", tallies)
    assert answer.excluded == ("H03__a", "H03__b")
    assert not answer.seen
    assert answer.times.first_seen is None
    assert audit_of(tallies).excluded == 2


def test_a_patient_of_another_split_was_not_seen(shards: ShardSet) -> None:
    loaders = build(shards, 1, {**BALANCED, "on_error": "substitute"})
    Witness().train(loaders, 4)
    answer = answer_for("V01", tallied(shards, state_of(loaders)))
    assert (answer.seen, answer.split, answer.samples) == (False, "val", {})


def test_the_shortest_way_from_python_counts_all_legs_too(shards: ShardSet) -> None:
    options = {**BALANCED, "on_error": "substitute"}
    loaders, witness = build(shards, 1, options), Witness()
    witness.train(loaders, 2)
    loaders = go_on(shards, state_of(loaders), {**options, "seed": 9})
    witness.train(loaders, 2, leg=1)
    state = saved(state_of(loaders)).state
    audit = audit_run(open_shards(shards.path), state)
    assert nonzero(audit.exposure) == of(set(audit.exposure), witness.exposure)
    seen = patient_sightings(tallied(shards, state.to_dict()))
    assert places(seen.first) == of(set(audit.exposure), witness.first)
