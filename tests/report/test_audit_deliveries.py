"""An audit says what a training loop was given: counted there, whatever happened on the way."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streaming_balance.report.audit import audit_run
from streaming_balance.report.sightings import patient_sightings
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.merging import merge_states
from streaming_balance.training.state import LoaderState
from tests.report.witness import (
    Witness,
    audited_shards,
    build,
    check,
    check_one,
    damage,
    of,
    places,
    tallied,
)

CUTMIX = {"name": "cutmix", "probability": 0.5}
STRATEGIES: dict[str, Any] = {
    "natural order": None,
    "class_balanced": "class_balanced",
    "by sample": {"name": "class_balanced", "unit": "sample"},
    "power": {"name": "power", "alpha": 0.25},
    "short last batch": {"name": "class_balanced", "last": "short"},
    "no repeats": {"name": "downsample", "replacement": False},
    "p_k": {"name": "p_k", "P": 2, "M": 3},
    "repeat_factor": {"name": "repeat_factor", "threshold": 0.5},
    "sample_weights": {"name": "sample_weights", "weights": "weight"},
    "schedule": {"name": "deferred", "start_epoch": 2},
    "iid": {"name": "class_balanced", "draw": "iid"},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """21 training patients, some with two samples."""
    return audited_shards(tmp_path_factory.mktemp("sound") / "cohort")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The same with three samples that cannot be read."""
    shards = audited_shards(tmp_path_factory.mktemp("damaged") / "cohort")
    for key in ("H01__a", "H03__b", "L02__a"):
        damage(shards, key)
    return shards


def live(shards: ShardSet, options: Mapping[str, Any], *, seed: int, most_ranks: int = 3) -> None:
    """Train, break, jump and resume at random, and compare at every stop."""
    choose = random.Random(seed)
    witness = Witness()
    loaders = build(shards, choose.randint(1, most_ranks), options)
    patients = shards.patients("train").tolist()
    for _ in range(12):
        action = choose.choice(["train", "train", "train", "jump", "resume"])
        if action == "train":
            witness.train(loaders, choose.randint(1, 4))
        elif action == "jump":
            epoch = choose.randint(0, 5)
            for loader in loaders:
                loader.set_epoch(epoch)
        else:
            state = merge_states([loader.state_dict() for loader in loaders])
            for loader in loaders:
                loader.close()
            loaders = build(shards, choose.randint(1, most_ranks), options)
            for loader in loaders:
                loader.load_state_dict(state)
        tallies = tallied(shards, merge_states([loader.state_dict() for loader in loaders]))
        check(tallies, witness)
        check_one(tallies, choose.choice(patients), witness)
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_audit_is_what_was_received_under_every_strategy(sound: ShardSet, strategy: str) -> None:
    live(sound, {"balance": STRATEGIES[strategy]}, seed=len(strategy))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mixing", [None, CUTMIX, {"name": "mixup"}], ids=str)
def test_an_audit_is_what_was_received_with_others_standing_in_and_mixing(
    damaged: ShardSet, mixing: dict[str, Any] | None, seed: int
) -> None:
    options = {"balance": "class_balanced", "mixing": mixing, "on_error": "substitute"}
    live(damaged, options, seed=seed)


@pytest.mark.parametrize("strategy", ["natural order", "by sample", "iid", "repeat_factor"])
def test_substitutions_are_audited_under_other_strategies(damaged: ShardSet, strategy: str) -> None:
    live(damaged, {"balance": STRATEGIES[strategy], "on_error": "substitute"}, seed=1)


def test_an_epoch_seen_again_is_first_seen_when_it_came_first(sound: ShardSet) -> None:
    # Epoch 3, then epoch 1: numbers fall, and the order of training is what counts.
    (loader,) = build(sound, 1, {"balance": "class_balanced"})
    witness = Witness()
    for epoch in (3, 1):
        loader.set_epoch(epoch)
        witness.train([loader], 2)
    seen = patient_sightings(tallied(sound, loader.state_dict()))
    firsts = {where.epoch for where in seen.first.values() if where is not None}
    lasts = {where.epoch for where in seen.last.values() if where is not None}
    assert firsts == lasts == {1, 3}
    assert any(
        where is not None and later is not None and where > later
        for where, later in zip(seen.first.values(), seen.last.values(), strict=True)
    )
    assert places(seen.first) == of(set(seen.first), witness.first)
    assert places(seen.last) == of(set(seen.last), witness.last)


def test_a_sample_damaged_between_two_deliveries_of_a_batch_was_seen_the_first_time(
    tmp_path: Path,
) -> None:
    shards = audited_shards(tmp_path / "cohort")
    options = {"balance": "class_balanced", "on_error": "substitute", "verify": "always"}
    witness = Witness()
    (loader,) = build(shards, 1, options)
    witness.train([loader], 4)
    key = str(shards.keys("train")[loader.plan.batch(0, 0)[0]])
    state = loader.state_dict()
    loader.close()
    damage(shards, key)
    (loader,) = build(shards, 1, options)
    loader.load_state_dict(state)
    loader.set_epoch(0)
    witness.train([loader], 2)
    tallies = tallied(shards, loader.state_dict())
    loader.close()
    assert witness.first[key] == (0, 0, 0)
    assert witness.substituted[key] == 1
    check(tallies, witness)
    owner = str(shards.patients("train")[shards.keys("train").tolist().index(key)])
    check_one(tallies, owner, witness)


def test_one_ranks_state_alone_is_said_not_to_be_complete(damaged: ShardSet) -> None:
    options = {"balance": "class_balanced", "on_error": "substitute"}
    loaders, witness = build(damaged, 2, options), Witness()
    witness.train(loaders, 2)
    states = [loader.state_dict() for loader in loaders]
    for loader in loaders:
        loader.close()
    audits = [audit_run(damaged, LoaderState.from_dict(state)) for state in states]
    assert [audit.complete for audit in audits] == [False, False]
    known = Counter(record for audit in audits for record in audit.substitutions)
    merged = audit_run(damaged, LoaderState.from_dict(merge_states(states)))
    assert merged.complete
    assert Counter(merged.substitutions) == known
    assert known.total() == sum(witness.substituted.values()) // 2 > 0


def test_every_substitution_is_named_with_its_place_keys_patients_and_reason(
    damaged: ShardSet,
) -> None:
    (loader,) = build(damaged, 1, {"balance": "class_balanced", "on_error": "substitute"})
    witness = Witness()
    for _ in range(3):
        witness.train([loader], 2)
    audit = audit_run(damaged, LoaderState.from_dict(loader.state_dict()))
    loader.close()
    assert audit.substitutions
    keys, patients = damaged.keys("train").tolist(), damaged.patients("train").tolist()
    for record in audit.substitutions:
        planned = loader.plan.batch(record.epoch, record.step)[record.slot]
        assert record.key == keys[planned]
        assert record.patient == patients[planned] == record.key[:3]
        assert record.substitute_patient == record.substitute_key[:3]
        assert record.substitute_patient[0] == record.patient[0]
        assert record.leg == 0
        assert record.reason
    assert {record.key for record in audit.substitutions} <= {"H01__a", "H03__b", "L02__a"}
