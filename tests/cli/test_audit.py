"""`streaming-balance audit` as a reviewer asks it: one patient, an earlier state, the proof."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.training.loader import train_loader
from tests.cli.conftest import Call
from tests.report.witness import Witness, audited_cohort, audited_shards, damage
from tests.training.cohorts import packed

OPTIONS: dict[str, Any] = {
    "global_batch_size": 6,
    "balance": "class_balanced",
    "seed": 5,
    "on_error": "substitute",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """21 training patients, one sample of whom cannot be read."""
    made = audited_shards(tmp_path_factory.mktemp("cli") / "cohort")
    damage(made, "L01__a")
    return made


@pytest.fixture(scope="module")
def run(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Witness]:
    """A run of six steps: its states after one and after all, and who saw it; L01 came early."""
    folder, witness = tmp_path_factory.mktemp("states"), Witness()
    with train_loader(shards, **OPTIONS) as loader:
        witness.train([loader], 1)
        (folder / "early.json").write_text(json.dumps(loader.state_dict()))
        witness.train([loader], 3)
        witness.train([loader], 2)
        (folder / "late.json").write_text(json.dumps(loader.state_dict()))
    return folder / "early.json", folder / "late.json", witness


def seen_by(state: Path, shards: ShardSet) -> Counter[str]:
    """Count patients from the plan alone, batch by batch, and from the records of the state."""
    document = json.loads(state.read_text())
    plan = BalancedPlan.for_shards(shards, global_batch_size=6, seed=5)
    owners = shards.patients("train").tolist()
    end = document["position"]["epoch"], document["position"]["step"]
    places = [(epoch, step) for epoch in range(3) for step in range(plan.num_steps(epoch))]
    members = [n for place in places if place < end for n in plan.batch(*place).tolist()]
    counts = Counter(owners[number] for number in members)
    for record in document["substitutions"]:
        counts[owners[record["sample"]]] -= 1
        counts[owners[record["substitute"]]] += 1
    return counts


def test_a_patient_is_answered_with_the_digests_that_prove_it(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness]
) -> None:
    _, late, witness = run
    patient = "H03"
    times = seen_by(late, shards)[patient]
    assert times == witness.exposure[patient] > 0
    document = call("audit", shards.path, "--state", late, "--patient", patient, "--json").document
    assert document["patient"] == patient
    assert document["seen"] is True
    assert document["exposure"] == {patient: times}
    assert sum(one["exposure"] for one in document["samples"].values()) == times
    assert document["samples"].keys() == {"H03__a", "H03__b"}
    assert document["first_seen"] == {patient: list(witness.first[patient][1:])}
    assert document["last_seen"] == {patient: list(witness.last[patient][1:])}
    # Every digest can be had without this program.
    state = json.loads(late.read_text())
    canonical = json.dumps(state, sort_keys=True, separators=(",", ":")).encode()
    assert document["state_digest"] == hashlib.blake2b(canonical, digest_size=32).hexdigest()
    table = (shards.path / "samples.arrow").read_bytes()
    assert document["table_digest"] == hashlib.sha256(table).hexdigest()
    assert document["plan_digest"] == state["plan_digest"]
    assert document["shards_digest"] == shards.digest
    printed = call("audit", shards.path, "--state", late, "--patient", patient).out
    first = witness.first[patient]
    assert f"{patient} (HGG, train): seen" in printed
    assert f"first seen: epoch {first[1]}, step {first[2]}" in printed
    for name in ("plan_digest", "shards_digest", "table_digest", "state_digest"):
        assert document[name] in printed


def test_the_digest_of_a_state_does_not_depend_on_how_its_file_is_laid_out(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness], tmp_path: Path
) -> None:
    _, late, _ = run
    state = json.loads(late.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(dict(reversed(state.items())), indent=4))
    digests = {
        call("audit", shards.path, "--state", path, "--json").document["state_digest"]
        for path in (late, other)
    }
    assert len(digests) == 1


def test_never_seen_is_an_answer(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness]
) -> None:
    early, _, _ = run
    unseen = next(
        name for name in shards.patients("train").tolist() if not seen_by(early, shards)[name]
    )
    answer = call("audit", shards.path, "--state", early, "--patient", unseen)
    assert answer.status == 0
    assert f"{unseen} ({'HGG' if unseen[0] == 'H' else 'LGG'}, train): not seen" in answer.out
    document = call("audit", shards.path, "--state", early, "--patient", unseen, "--json").document
    assert document["seen"] is False
    assert document["first_seen"] == {unseen: None}


def test_a_patient_of_the_validation_split_is_answered_with_the_reason(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness]
) -> None:
    answer = call("audit", shards.path, "--state", run[1], "--patient", "V01")
    assert answer.status == 0
    assert "V01 (HGG, val): not seen" in answer.out
    assert "this run drew from train, never from val" in answer.out


def test_an_unknown_patient_is_a_wrong_call(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness]
) -> None:
    answer = call("audit", shards.path, "--state", run[1], "--patient", "h03")
    assert answer.status == 2
    assert "there is no patient 'h03'" in answer.err
    assert "Did you mean 'H03'?" in answer.err


def test_what_was_seen_before_a_checkpoint_and_since(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness]
) -> None:
    early, late, _ = run
    then, now = seen_by(early, shards), seen_by(late, shards)
    document = call("audit", shards.path, "--state", late, "--before", early, "--json").document
    assert {name: n for name, n in document["exposure"].items() if n} == dict(+then)
    assert {name: n for name, n in document["since"].items() if n} == dict(now - then)
    assert (document["epoch"], document["step"]) == (0, 1)
    assert (document["later"]["epoch"], document["later"]["step"]) == (1, 2)
    assert document["state_digest"] != document["later"]["state_digest"]
    printed = call("audit", shards.path, "--state", late, "--before", early).out
    assert "delivered before epoch 0, step 1" in printed
    assert (
        f"since then, until epoch 1, step 2: {len(now - then)} patients seen, 30 times" in printed
    )


def test_had_the_model_seen_this_patient_by_that_checkpoint(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness]
) -> None:
    early, late, _ = run
    then, now = seen_by(early, shards), seen_by(late, shards)
    patient = next(name for name in now if now[name] == 2 and not then[name])
    command = ("audit", shards.path, "--state", late, "--before", early, "--patient", patient)
    document = call(*command, "--json").document
    assert (document["seen"], document["since"]) == (False, {patient: 2})
    printed = call(*command).out
    assert "not seen before epoch 0, step 1" in printed
    assert "since then, until epoch 1, step 2: seen 2 times" in printed


def test_a_state_of_another_run_is_not_taken_for_an_earlier_one(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness], tmp_path: Path
) -> None:
    early, late, _ = run
    swapped = call("audit", shards.path, "--state", early, "--before", late)
    assert swapped.status == 2
    assert "position: it has epoch 1, step 2, expected at most epoch 0, step 1" in swapped.err
    with train_loader(shards, **{**OPTIONS, "seed": 6}) as loader:
        (tmp_path / "other.json").write_text(json.dumps(loader.state_dict()))
    other = call("audit", shards.path, "--state", late, "--before", tmp_path / "other.json")
    assert other.status == 2
    assert "seed: 6, not 5" in other.err


def test_substitutions_are_named_one_by_one(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness]
) -> None:
    _, late, witness = run
    records = json.loads(late.read_text())["substitutions"]
    assert records
    document = call("audit", shards.path, "--state", late, "--json").document
    assert document["complete"] is True
    assert [
        (one["epoch"], one["step"], one["slot"], one["key"], one["patient"], one["reason"])
        for one in document["substitutions"]
    ] == [
        (one["epoch"], one["step"], one["slot"], "L01__a", "L01", one["reason"]) for one in records
    ]
    assert document["exposure"]["L01"] == 0
    assert document["substituted"] == {"L01": witness.substituted["L01"]}
    printed = call("audit", shards.path, "--state", late).out
    assert "delivered in the place of damaged samples" in printed
    assert "L01__a" in printed
    assert "substitutions of all ranks known: yes" in printed
    answer = call("audit", shards.path, "--state", late, "--patient", "L01").out
    assert "replaced because damaged: " in answer


def test_a_state_of_one_rank_alone_is_said_loudly_not_to_be_complete(
    call: Call, shards: ShardSet, tmp_path: Path
) -> None:
    loaders = [train_loader(shards, rank=rank, num_ranks=2, **OPTIONS) for rank in range(2)]
    Witness().train(loaders, 3)
    path = tmp_path / "rank0.json"
    path.write_text(json.dumps(loaders[0].state_dict()))
    for loader in loaders:
        loader.close()
    answer = call("audit", shards.path, "--state", path)
    assert answer.status == 0
    assert "NOT COMPLETE" in answer.err
    assert "rank 1 of 2" in answer.err
    assert "merge_states" in answer.err
    assert "substitutions of all ranks known: NO" in answer.out
    found = call("audit", shards.path, "--state", path, "--json")
    assert found.document["complete"] is False
    assert "NOT COMPLETE" in found.err
    one = call("audit", shards.path, "--state", path, "--patient", "H00")
    assert "as far as the state knows" in one.out
    assert "NOT COMPLETE" in one.err


def test_a_row_per_patient_is_written(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness], tmp_path: Path
) -> None:
    path = tmp_path / "audit.csv"
    answer = call("audit", shards.path, "--state", run[1], "--csv", path)
    assert f"a row per patient: {path}" in answer.out
    with path.open(newline="") as file:
        rows = {row["patient"]: int(row["exposure"]) for row in csv.DictReader(file)}
    assert {name: n for name, n in rows.items() if n} == dict(+seen_by(run[1], shards))
    assert len(rows) == 24
    path.unlink()
    call("audit", shards.path, "--state", run[1], "--csv", path, "--patient", "H00", "--json")
    assert path.is_file()


def test_a_table_that_cannot_be_written_is_refused_before_anything_is_counted(
    call: Call, tmp_path: Path
) -> None:
    missing = tmp_path / "no data set"
    for path in (tmp_path, tmp_path / "none" / "audit.csv"):
        answer = call("audit", missing, "--state", missing, "--csv", path)
        assert answer.status == 2
        assert "--csv is " in answer.err


def test_what_was_mixed_left_out_or_not_recorded_is_printed(
    call: Call, shards: ShardSet, tmp_path: Path
) -> None:
    options = {
        **OPTIONS,
        "mixing": {"name": "mixup", "probability": 1.0},
        "batch_transform": lambda batch: batch,
        "exclude": ["H03"],
    }
    path, witness = tmp_path / "state.json", Witness()
    with train_loader(shards, **options) as loader:
        witness.train([loader], 2)
        path.write_text(json.dumps(loader.state_dict()))
    printed = call("audit", shards.path, "--state", path).out
    assert "mixing: name mixup, alpha 1.0, probability 1.0" in printed
    assert "mixed into others: 12 samples" in printed
    assert "not audited: batch_transform; what that function did" in printed
    assert "excluded from the plan: 2 samples" in printed
    left_out = call("audit", shards.path, "--state", path, "--patient", "H03").out
    assert "excluded from the plan by name: H03__a, H03__b" in left_out
    assert "not audited: batch_transform" in left_out
    mixed = next(name for name in witness.as_partner if "__" not in name)
    answer = call("audit", shards.path, "--state", path, "--patient", mixed).out
    assert "as the partner of another: " in answer


def test_patients_are_listed_with_first_and_last(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness]
) -> None:
    _, late, witness = run
    printed = call("audit", shards.path, "--state", late, "--patients").out
    line = next(line for line in printed.splitlines() if line.strip().startswith("H03"))
    first, last = witness.first["H03"], witness.last["H03"]
    assert f"epoch {first[1]}, step {first[2]}" in line
    assert f"epoch {last[1]}, step {last[2]}" in line


def test_an_audit_needs_no_volume(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("manifest.json", "samples.arrow"):
        shutil.copy(shards.path / name, bare)
    whole = call("audit", shards.path, "--state", run[1], "--json").document
    assert call("audit", bare, "--state", run[1], "--json").document == whole


def test_after_a_withdrawal_the_new_data_set_and_the_old_table_answer(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness], tmp_path: Path
) -> None:
    _, late, _ = run
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(shards.path, old)
    gone = "H03"
    packed(new, [sample for sample in audited_cohort() if sample.patient != gone])
    refused = call("audit", new, "--state", late)
    assert refused.status == 2
    assert shards.digest in refused.err
    assert "--table" in refused.err
    for shard in old.glob("*.tar"):
        shard.unlink()
    command = ("audit", new, "--state", late, "--table", old)
    document = call(*command, "--json").document
    assert document["absent"] == [gone]
    assert document["shards_digest"] == open_shards(shards.path).digest
    assert {name: n for name, n in document["exposure"].items() if n} == dict(
        +seen_by(late, shards)
    )
    assert f"no longer in the data set: 1 patient: {gone}" in call(*command).out
    assert "no longer in the data set" in call(*command, "--patient", gone).out


def test_of_many_who_left_the_first_are_named_and_all_are_in_the_document(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness], tmp_path: Path
) -> None:
    new = tmp_path / "new"
    packed(new, [sample for sample in audited_cohort() if sample.patient == "L00"])
    command = ("audit", new, "--state", run[1], "--table", shards.path)
    gone = sorted({sample.patient or "" for sample in audited_cohort()} - {"L00"})
    assert len(gone) == 23
    assert f"23 patients: {', '.join(gone[:20])} and 3 more" in call(*command).out
    assert call(*command, "--json").document["absent"] == gone


def test_the_legs_of_a_run_of_two_plans_are_listed(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness], tmp_path: Path
) -> None:
    _, late, _ = run
    first, second = json.loads(late.read_text()), tmp_path / "carried.json"
    with train_loader(shards, **{**OPTIONS, "seed": 6}) as loader:
        loader.load_state_dict(first, carry_exposure=True)
        Witness().train([loader], 2)
        second.write_text(json.dumps(loader.state_dict()))
    answer = call("audit", shards.path, "--state", second)
    assert "plans followed one after another" in answer.out
    assert first["plan_digest"] in answer.out
    document = call("audit", shards.path, "--state", second, "--json").document
    assert [leg["plan_digest"] for leg in document["legs"]] == [
        first["plan_digest"],
        json.loads(second.read_text())["plan_digest"],
    ]
    assert sum(document["exposure"].values()) == 8 * 6
    patient = call("audit", shards.path, "--state", second, "--patient", "H03").out
    assert "first seen: leg 0, epoch" in patient


def test_the_methods_paragraph_is_printed_and_in_the_document(
    call: Call, shards: ShardSet, run: tuple[Path, Path, Witness]
) -> None:
    command = ("audit", shards.path, "--state", run[1])
    document = call(*command, "--json").document
    assert document["methods"].startswith("The data set with content digest ")
    assert document["methods"] in call(*command).out
