"""States in files, and states that go where no run went."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streaming_balance.errors import ConfigError, ResumeError
from streaming_balance.report import saved_states
from streaming_balance.report.audit import audit_of, audit_run
from streaming_balance.report.saved_states import SavedState, read_saved_state, read_state
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.state import LoaderState, Position
from tests.building import Sample
from tests.report.witness import Witness, audited_shards, build, tallied
from tests.training.cohorts import packed, voxels


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """21 training patients."""
    return audited_shards(tmp_path_factory.mktemp("states") / "cohort")


@pytest.fixture(scope="module")
def state(shards: ShardSet) -> dict[str, Any]:
    """The state after two epochs of four steps and a jump to epoch 4."""
    (loader,) = build(shards, 1, {"balance": "class_balanced"})
    witness = Witness()
    for _ in range(2):
        witness.train([loader], 4)
    loader.set_epoch(4)
    witness.train([loader], 1)
    document: dict[str, Any] = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    return document


def test_a_file_gives_the_state_and_the_digest_of_its_document(
    state: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps(state, indent=3))
    found = read_saved_state(path)
    assert found.state.to_dict() == state
    assert read_state(path) == found.state
    canonical = json.dumps(state, sort_keys=True, separators=(",", ":")).encode()
    assert found.digest == hashlib.blake2b(canonical, digest_size=32).hexdigest()
    assert SavedState.of(found.state).digest == found.digest


def test_the_digest_is_that_of_the_file_although_a_release_before_wrote_less(
    state: dict[str, Any], tmp_path: Path
) -> None:
    older = {name: value for name, value in state.items() if name != "carried_from"}
    path = tmp_path / "older.json"
    path.write_text(json.dumps(older))
    canonical = json.dumps(older, sort_keys=True, separators=(",", ":")).encode()
    assert read_saved_state(path).digest == hashlib.blake2b(canonical, digest_size=32).hexdigest()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the state .*none\.json: No such file"):
        read_saved_state(tmp_path / "none.json")


def test_a_file_too_large_for_a_state_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(saved_states.MAX_STATE_BYTES + 1)
    with pytest.raises(ResumeError, match="larger than 67108864 bytes"):
        read_saved_state(path)


@pytest.mark.parametrize(
    ("position", "complaint"),
    [
        ((3, 0), "goes from epoch 4, step 0 back to epoch 3, step 0 without a jump"),
        ((4, 5), "a place that its plan does not have .*epoch 4 has no step 5"),
    ],
)
def test_a_state_that_went_no_way_a_run_goes_is_refused(
    shards: ShardSet, state: dict[str, Any], position: tuple[int, int], complaint: str
) -> None:
    edited = replace(LoaderState.from_dict(state), position=Position(*position))
    with pytest.raises(ResumeError, match=complaint):
        audit_run(shards, edited)


def test_a_class_that_the_data_set_has_no_more_is_still_counted(tmp_path: Path) -> None:
    def made(name: str, labels: tuple[str, ...]) -> ShardSet:
        samples = [
            Sample(key=f"{label}{number}", image=voxels(number), label=label)
            for label in labels
            for number in range(3)
        ]
        return packed(tmp_path / name, samples, classes=labels)

    old, new = made("old", ("HGG", "LGG", "MET")), made("new", ("HGG", "LGG"))
    (loader,) = build(old, 1, {"balance": "class_balanced"})
    witness = Witness()
    witness.train([loader], 2)
    state = loader.state_dict()
    loader.close()
    (loader,) = build(new, 1, {"balance": "class_balanced"})
    loader.load_state_dict(state, carry_exposure=old)
    witness.train([loader], 1, leg=1)
    audit = audit_of(tallied(new, loader.state_dict(), tables=[old]))
    loader.close()
    counts = {label: (entry.patients, entry.delivered) for label, entry in audit.classes.items()}
    assert counts == {"HGG": (3, 7), "LGG": (3, 7), "MET": (3, 4)}
