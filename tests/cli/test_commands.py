"""Every command: its numbers worked by hand, its JSON, and its exit status."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from streaming_balance.ingest.nifti_writing import write_nifti
from streaming_balance.ingest.pack import write_shards
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.shards import open_shards
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.state import LoaderState, Position
from tests.cli.conftest import Call

COMMANDS = ("pack", "verify", "inspect", "plan", "audit", "demo")
# Slot 0 of the first batch is sample 7 under seed 3.
RECORD = {"epoch": 0, "step": 0, "slot": 0, "sample": 7, "substitute": 1, "reason": "cut short"}
BALANCED = ("--balance", "class_balanced", "--global-batch-size", "8")


def save_state(
    path: Path,
    folder: Path,
    position: tuple[int, int],
    *,
    skipped: tuple[tuple[Position, Position], ...] = (),
    plan: BalancedPlan | None = None,
) -> BalancedPlan:
    """Write the state a training loop would have at a position, and give its plan."""
    shards = open_shards(folder)
    plan = plan or BalancedPlan.for_shards(shards, global_batch_size=8, seed=3)
    state = LoaderState(
        plan_digest=plan.digest,
        settings=plan.settings,
        shards_digest=shards.digest,
        position=Position(*position),
        skipped=skipped,
    )
    path.write_text(json.dumps(state.to_dict()))
    return plan


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_examples(call: Call, command: str) -> None:
    answer = call(command, "--help")
    assert answer.status == 0
    assert f"  streaming-balance {command}" in answer.out
    assert "--json" in answer.out


def test_help_says_how_long_the_demo_takes_and_what_a_layout_is(call: Call) -> None:
    assert "in about a minute on two cores" in " ".join(call("demo", "--help").out.split())
    shown = " ".join(call("pack", "--help").out.split())
    assert "brats for a folder, manifest for a table" in shown


def test_called_with_nothing_it_lists_the_commands_and_the_exit_statuses(call: Call) -> None:
    answer = call()
    assert answer.status == 0
    assert all(command in answer.out for command in COMMANDS)
    assert "0 done, 1 the data is bad, 2 the call is wrong" in answer.out


def test_pack_reports_what_it_packed_and_leaves_a_complete_data_set_alone(
    call: Call, raw_cohort: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cohort"
    command = ("pack", raw_cohort, "--out", out, "--split", "train=0.5,val=0.5", "--json")
    first, second = call(*command), call(*command)
    assert first.status == second.status == 0
    assert first.document["found"] == first.document["packed"] == 38
    assert first.document["rejected"] == []
    assert first.document["digest"] == open_shards(out).digest
    assert (first.document["new"], second.document["new"]) == (True, False)
    tables = call(*command[:-1])
    assert "left alone" in tables.out
    assert "found 38 = packed 38 + rejected 0" in tables.out


def test_pack_passes_every_option_on(call: Call, raw_cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "cohort"
    options = ("--codec", "npy", "--crop-or-pad", "6,8,10", "--classes", "LGG,HGG", "--jobs", "1")
    answer = call("pack", raw_cohort, "--out", out, "--shard-bytes", 50_000, "--seed", 4, *options)
    assert answer.status == 0
    shards = open_shards(out)
    assert shards.classes == ["LGG", "HGG"]
    assert shards.manifest.codec == "npy"
    assert shards.manifest.settings["seed"] == 4
    assert len(shards.manifest.shards) > 3
    assert shards.read("train", 0)["image"].shape == (4, 6, 8, 10)


def test_pack_to_a_folder_of_another_pack_says_how_to_replace_it(
    call: Call, raw_cohort: Path, packed_cohort: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cohort"
    shutil.copytree(packed_cohort, out)
    refused = call("pack", raw_cohort, "--out", out)
    assert refused.status == 2
    assert "overwrite" in refused.err
    assert call("pack", raw_cohort, "--out", out, "--overwrite").status == 0
    assert open_shards(out).splits == ("train",)


def test_json_has_at_least_the_documented_entries(
    call: Call, packed_cohort: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cohort"
    shutil.copytree(packed_cohort, out)
    (out / "val-000000.tar").write_bytes(b"")
    save_state(tmp_path / "state.json", packed_cohort, (1, 0))
    for case in ("raw/HGG/P1", "raw/LGG/P2"):
        folder = tmp_path / case
        folder.mkdir(parents=True)
        voxels = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
        write_nifti(folder / f"{folder.name}_t1.nii", voxels)
    (tmp_path / "raw/HGG/P1/P1_t1.nii").write_bytes(b"")
    packed = call("pack", tmp_path / "raw", "--out", tmp_path / "small", "--json").document
    assert {"found", "packed", "rejected", "digest"} <= packed.keys()
    assert [entry.keys() for entry in packed["rejected"]] == [{"patient", "path", "reason"}]
    shown = call("inspect", packed_cohort, "--json").document
    assert {"digest", "splits"} <= shown.keys()
    entries = {"samples", "patients", "bytes", "classes", "shapes"}
    assert all(entries <= split.keys() for split in shown["splits"].values())
    checked = call("verify", out, "--json").document
    assert {"ok", "problems"} <= checked.keys()
    assert all(
        {"shard", "key", "offset", "problem"} <= problem.keys() for problem in checked["problems"]
    )
    assert checked["problems"]
    audited = call("audit", packed_cohort, "--state", tmp_path / "state.json", "--json").document
    entries = {"epoch", "step", "exposure", "classes", "plan_digest", "shards_digest"}
    assert entries <= audited.keys()


def test_inspect_counts_splits_classes_bytes_and_shapes(call: Call, packed_cohort: Path) -> None:
    answer = call("inspect", packed_cohort, "--json")
    assert answer.status == 0
    document = answer.document
    for name in ("train", "val"):
        split = document["splits"][name]
        assert (split["samples"], split["patients"]) == (19, 19)
        assert split["classes"] == {"HGG": 14, "LGG": 5}
        assert split["shapes"] == {"4x8x8x8": 19}
        assert split["bytes"] == sum(
            path.stat().st_size for path in packed_cohort.glob(f"{name}-*")
        )
    assert document["arrays"] == ["image", "seg"]
    assert document["codecs"] == ["blosc"]
    assert document["dtypes"] == ["int16"]
    tables = call("inspect", packed_cohort).out
    assert "4x8x8x8 (19)" in tables
    assert document["digest"] in tables


def test_plan_counts_what_balancing_will_do(call: Call, packed_cohort: Path) -> None:
    # 19 patients in batches of 8: 3 steps, 24 draws, 12 of each class. In 10 epochs 120 of each:
    # 120 / 14 lies between 8 and 9, 120 / 5 is 24.
    answer = call("plan", packed_cohort, *BALANCED, "--epochs", 10, "--ranks", 3, "--json")
    assert answer.status == 0
    document = answer.document
    assert document["steps"] == 3
    high, low = document["classes"]["HGG"], document["classes"]["LGG"]
    assert (high["patients"], high["before"], high["after"], high["share"]) == (14, 14, 12, 0.5)
    assert (low["patients"], low["before"], low["after"], low["share"]) == (5, 5, 12, 0.5)
    assert (high["exposure_min"], high["exposure_max"]) == (8, 9)
    assert (low["exposure_min"], low["exposure_max"]) == (24, 24)
    assert (low["quota_least"], low["quota_most"], low["delivered"]) == (4, 4, 120)
    assert document["splits"]["val"] == {"HGG": 14, "LGG": 5}
    assert document["rank_batch"] == [2, 3]
    assert document["guarantees"]["exact_quotas"] is True


def test_plan_of_the_285_names_of_brats_2018_is_as_worked_by_hand(
    call: Call, shared_data: Path, tmp_path: Path
) -> None:
    names = shared_data / "tree" / "brats18_names" / "brats18_cases.csv"
    with names.open(newline="") as file:
        cases = [(row["grade"], row["case"]) for row in csv.DictReader(file)]
    assert Counter(grade for grade, _ in cases) == {"HGG": 210, "LGG": 75}
    for number, (grade, case) in enumerate(cases):
        folder = tmp_path / "raw" / grade / case
        folder.mkdir(parents=True)
        voxels = np.arange(8, dtype=np.int16).reshape(2, 2, 2) + number
        write_nifti(folder / f"{case}_flair.nii", voxels)
    out = tmp_path / "cohort"
    assert call("pack", tmp_path / "raw", "--out", out).status == 0

    # 285 draws fill 36 batches of 8, so 144 of each class; in 10 epochs 1440, which is
    # 210 x 6 + 180 and 75 x 19 + 15.
    document = call("plan", out, *BALANCED, "--epochs", 10, "--json").document
    high, low = document["classes"]["HGG"], document["classes"]["LGG"]
    assert document["steps"] == 36
    assert (high["before"], high["after"]) == (210, 144)
    assert (low["before"], low["after"]) == (75, 144)
    assert (high["exposure_min"], high["exposure_max"]) == (6, 7)
    assert (low["exposure_min"], low["exposure_max"]) == (19, 20)

    save_state(tmp_path / "state.json", out, (10, 0))
    exposure = call("audit", out, "--state", tmp_path / "state.json", "--json").document["exposure"]
    grades = {case: grade for grade, case in cases}
    times = Counter((grades[patient], count) for patient, count in exposure.items())
    assert times == {("HGG", 6): 30, ("HGG", 7): 180, ("LGG", 19): 60, ("LGG", 20): 15}


def test_plan_takes_strategy_options_from_the_command_line_or_a_file_alike(
    call: Call, packed_cohort: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "compute: {seed: 9}\ndata: {balancing: {strategy: {name: power, alpha: 0.25}}}"
    )
    batch = ("--global-batch-size", "8", "--json")
    spelled = ("--balance", "power", "--set", "alpha=0.25", "--seed", "9")
    from_file = call("plan", packed_cohort, "--config", config, *batch).document
    from_options = call("plan", packed_cohort, *spelled, *batch).document
    assert from_file["digest"] == from_options["digest"]
    assert from_file["settings"]["seed"] == 9
    other_seed = call("plan", packed_cohort, "--config", config, "--seed", 0, *batch).document
    assert other_seed["settings"]["seed"] == 0


def test_plan_says_the_weights_of_the_loss_and_where_they_are_too_much(
    call: Call, packed_cohort: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "data: {balancing: {weighted_sampler: {enabled: true}, class_weights: {enabled: true}}}"
    )
    options = ("plan", packed_cohort, "--config", config, "--global-batch-size", 8)
    document = call(*options, "--json").document
    counts = {label: entry["patients"] for label, entry in document["classes"].items()}
    total = sum(1 / count for count in counts.values())
    for label, weight in document["class_weights"].items():
        assert weight == pytest.approx(len(counts) / counts[label] / total)
    assert any("basis: sampled" in warning for warning in document["warnings"])
    printed = call(*options).out
    assert "class weights for the loss: HGG: " in printed
    assert "note: class_weights come on top of class_balanced sampling" in printed


def test_plan_prints_tables_for_people(call: Call, packed_cohort: Path) -> None:
    answer = call("plan", packed_cohort, *BALANCED, "--ranks", 2)
    assert answer.status == 0
    assert "an epoch of 3 steps of 8" in answer.out
    assert "a rank's part of a batch: 4 samples" in answer.out
    assert "kept     exact quotas" in answer.out


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plan_draws_what_it_counts_when_asked(
    call: Call, packed_cohort: Path, tmp_path: Path, suffix: str
) -> None:
    picture = tmp_path / f"plan{suffix}"
    answer = call("plan", packed_cohort, *BALANCED, "--epochs", 4, "--plot", picture)
    assert answer.status == 0
    assert answer.out.endswith(f"picture: {picture}\n")
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    document = call("plan", packed_cohort, *BALANCED, "--plot", picture, "--json").document
    assert document["plot"] == str(picture)
    assert "plot" not in call("plan", packed_cohort, *BALANCED, "--json").document


def test_the_picture_of_a_plan_shows_the_patients_of_the_split_by_their_classes(
    call: Call, packed_cohort: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "plan.svg"
    call("plan", packed_cohort, *BALANCED, "--epochs", 10, "--plot", picture)
    words = re.findall(r">([^<>]+)</text>|>([^<>]+)</tspan>", picture.read_text())
    said = {first or second for first, second in words}
    # 19 patients take 3 batches of 8, 12 draws of each class an epoch: 120 over 14 and over 5.
    assert {"HGG", "LGG", "14 patients, 8–9 times", "5 patients, 24 times"} <= said
    assert {"14 (73.7%)", "5 (26.3%)", "12 (50.0%)"} <= said


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("plan.jpg", "pictures are written as .png or .svg"),
        ("missing/plan.png", "there is no folder"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_counted(
    call: Call, tmp_path: Path, name: str, complaint: str
) -> None:
    answer = call("plan", tmp_path / "no data set", *BALANCED, "--plot", tmp_path / name)
    assert answer.status == 2
    assert complaint in answer.err
    assert not any(tmp_path.iterdir())


def test_plan_without_a_strategy_shows_the_natural_order(call: Call, packed_cohort: Path) -> None:
    answer = call("plan", packed_cohort, "--global-batch-size", 19, "--split", "val", "--json")
    classes = answer.document["classes"]
    assert {label: entry["after"] for label, entry in classes.items()} == {"HGG": 14, "LGG": 5}


def test_validation_is_not_balanced_even_in_a_plan(call: Call, packed_cohort: Path) -> None:
    answer = call("plan", packed_cohort, *BALANCED, "--split", "val")
    assert answer.status == 2
    assert "'val'" in answer.err


@pytest.mark.parametrize("position", [(0, 0), (0, 1), (1, 2), (7, 0)])
def test_audit_counts_what_the_batches_up_to_the_state_hold(
    call: Call, packed_cohort: Path, tmp_path: Path, position: tuple[int, int]
) -> None:
    state = tmp_path / "state.json"
    plan = save_state(state, packed_cohort, position)
    patients = open_shards(packed_cohort).patients("train")
    before = [(e, s) for e in range(8) for s in range(3) if (e, s) < position]
    delivered = [str(patients[n]) for place in before for n in plan.batch(*place).tolist()]
    answer = call("audit", packed_cohort, "--state", state, "--json")
    assert answer.status == 0
    document = answer.document
    counts = {str(name): 0 for name in patients} | Counter(delivered)
    assert document["exposure"] == counts
    assert (document["epoch"], document["step"]) == position
    assert document["plan_digest"] == plan.digest
    assert document["shards_digest"] == open_shards(packed_cohort).digest
    assert sum(entry["delivered"] for entry in document["classes"].values()) == len(delivered)


def test_audit_leaves_out_what_was_jumped_over_and_counts_again_what_was_repeated(
    call: Call, packed_cohort: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.json"
    ahead, back = (Position(0, 1), Position(2, 0)), (Position(2, 2), Position(0, 0))
    plan = save_state(state, packed_cohort, (0, 2), skipped=(ahead, back))
    trained = [(0, 0), (2, 0), (2, 1), (0, 0), (0, 1)]
    patients = open_shards(packed_cohort).patients("train")
    counts = Counter(str(patients[n]) for place in trained for n in plan.batch(*place).tolist())
    exposure = call("audit", packed_cohort, "--state", state, "--json").document["exposure"]
    assert exposure == {str(name): 0 for name in patients} | counts


def test_audit_prints_classes_and_on_request_patients(
    call: Call, packed_cohort: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.json"
    plan = save_state(state, packed_cohort, (1, 0))
    answer = call("audit", packed_cohort, "--state", state)
    assert "delivered before epoch 1, step 0" in answer.out
    assert plan.digest in answer.out
    assert "Brats_demo_0" not in answer.out
    assert "Brats_demo_0" in call("audit", packed_cohort, "--state", state, "--patients").out


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not a state saved as JSON"),
        ("[" * 100_000, "not a state saved as JSON"),
        ("[]", "must be what state_dict() gave"),
        ('{"version": 99}', "version 99"),
        ('{"version": 1}', "damaged"),
        ("{}", "not the state of a loader"),
        ('{"model": {"bias": [0.5]}, "epoch": 3}', "not the state of a loader"),
    ],
)
def test_audit_of_what_is_no_state_says_so(
    call: Call, packed_cohort: Path, tmp_path: Path, content: str, complaint: str
) -> None:
    state = tmp_path / "state.json"
    state.write_text(content)
    answer = call("audit", packed_cohort, "--state", state)
    assert answer.status == 2
    assert complaint in answer.err
    assert str(state) in answer.err


@pytest.mark.parametrize(
    ("wrapped", "place"),
    [
        (lambda state: {"model": {}, "data": state}, "['data']"),
        (
            lambda state: {"version": 3, "loaders": [None, {"train": state}]},
            "['loaders'][1]['train']",
        ),
    ],
)
def test_audit_of_a_checkpoint_says_where_in_it_the_state_is(
    call: Call,
    packed_cohort: Path,
    tmp_path: Path,
    wrapped: Callable[[object], object],
    place: str,
) -> None:
    path = tmp_path / "checkpoint.json"
    save_state(path, packed_cohort, (1, 0))
    path.write_text(json.dumps(wrapped(json.loads(path.read_text()))))
    answer = call("audit", packed_cohort, "--state", path)
    assert answer.status == 2
    assert "not the state of a loader" in answer.err
    assert f"holds one at {place}" in answer.err


def test_audit_of_an_evaluation_state_says_there_is_nothing_to_audit(
    call: Call, packed_cohort: Path, tmp_path: Path
) -> None:
    path = tmp_path / "state.json"
    with eval_loader(open_shards(packed_cohort), split="val", batch_size=4) as loader:
        path.write_text(json.dumps(loader.state_dict()))
    answer = call("audit", packed_cohort, "--state", path)
    assert answer.status == 2
    assert "state of an evaluation" in answer.err
    assert "nothing to audit" in answer.err


def test_audit_leaves_excluded_patients_out_of_the_classes_and_counts_them(
    call: Call, packed_cohort: Path, tmp_path: Path
) -> None:
    shards = open_shards(packed_cohort)
    high = shards.keys("train")[shards.labels("train") == 0].tolist()
    plan = BalancedPlan.for_shards(shards, global_batch_size=8, seed=3, exclude=high[:3])
    save_state(tmp_path / "state.json", packed_cohort, (4, 0), plan=plan)
    command = ("audit", packed_cohort, "--state", tmp_path / "state.json")
    document = call(*command, "--json").document
    # 16 patients in batches of 8: 2 steps, 8 of each class in an epoch, 32 in four. 32 / 11 lies
    # between 2 and 3, 32 / 5 between 6 and 7.
    row = document["classes"]["HGG"]
    assert (row["patients"], row["seen"], row["delivered"]) == (11, 11, 32)
    assert (row["exposure_min"], row["exposure_max"]) == (2, 3)
    row = document["classes"]["LGG"]
    assert (row["patients"], row["exposure_min"], row["exposure_max"]) == (5, 6, 7)
    assert document["excluded"] == 3
    assert [document["exposure"][key] for key in high[:3]] == [0, 0, 0]
    assert "excluded from the plan: 3 samples" in call(*command).out


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        (("shards_digest",), "0" * 64, "belongs to the data set 0000"),
        (("plan_digest",), "0" * 32, "names plan 0000"),
        (("settings", "seed"), 4, "names plan"),
        (("settings", "seed"), "4", "do not give a plan"),
        (("settings", "balance"), {"name": "no_such"}, "do not give a plan"),
        (("settings", "version"), 99, "plan has version 99"),
        (("position", "step"), 4, "a place that its plan does not have"),
        (("substitutions",), [{"sample": 10**6}], "the state is damaged"),
        (("substitutions",), [RECORD | {"slot": 8}], "a place that its plan does not have"),
        (("substitutions",), [RECORD | {"substitute": 19}], "a place that its plan does not have"),
        (("substitutions",), [RECORD | {"sample": 10**6}], "a record has sample 1000000"),
        (("substitutions",), [RECORD | {"epoch": 1}], "a place that was delivered 0 times"),
    ],
)
def test_audit_of_another_runs_or_an_edited_state_is_refused(
    call: Call,
    packed_cohort: Path,
    tmp_path: Path,
    place: tuple[str, ...],
    value: object,
    complaint: str,
) -> None:
    path = tmp_path / "state.json"
    save_state(path, packed_cohort, (1, 0))
    state = json.loads(path.read_text())
    target = state
    for name in place[:-1]:
        target = target[name]
    target[place[-1]] = value
    path.write_text(json.dumps(state))
    answer = call("audit", packed_cohort, "--state", path)
    assert answer.status == 2
    assert complaint in answer.err


def test_verify_passes_a_sound_data_set_and_names_a_flipped_bit(
    call: Call, packed_cohort: Path, tmp_path: Path
) -> None:
    assert call("verify", packed_cohort, "--json").document["ok"] is True
    assert "is sound: 38 samples" in call("verify", packed_cohort).out
    out = tmp_path / "cohort"
    shutil.copytree(packed_cohort, out)
    shard = out / "val-000000.tar"
    stored = bytearray(shard.read_bytes())
    stored[700] ^= 1
    shard.write_bytes(stored)
    answer = call("verify", out, "--json")
    assert answer.status == 1
    assert answer.document["ok"] is False
    assert {problem["shard"] for problem in answer.document["problems"]} == {shard.name}
    tables = call("verify", out)
    assert tables.status == 1
    assert shard.name in tables.out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--balance", "class_balancd"), "Did you mean 'class_balanced'?"),
        (("--balance", "power", "--set", "alhpa=1"), "Did you mean 'alpha'?"),
        (("--balance", "power", "--set", "alpha"), "write OPTION=VALUE"),
        (("--balance", "power", "--set", "alpha=1", "--set", "alpha=0"), "twice"),
        (("--balance", "power", "--set", "name=target"), "twice"),
        (("--set", "alpha=1"), "name the strategy with --balance"),
        (("--balance", "power", "--config", "x.yaml"), "give one of them"),
        (("--config", "/nowhere/x.yaml"), "cannot read the configuration /nowhere/x.yaml"),
        (("--epochs", "0"), "epochs is 0"),
        (("--ranks", "9"), "9"),
        (("--ranks", "0"), "0"),
        (("--seed", "-1"), "seed is -1"),
        (("--split", "tain"), "Did you mean 'train'?"),
        (("--global-batch-size", "x"), "'--global-batch-size'"),
        (("--no-such-option",), "--no-such-option"),
    ],
)
def test_a_wrong_call_gets_one_message_and_status_2(
    call: Call, packed_cohort: Path, options: tuple[str, ...], complaint: str
) -> None:
    plain = call("plan", packed_cohort, "--global-batch-size", 8, *options)
    assert plain.status == 2
    assert complaint in plain.err
    assert plain.err.startswith("error: ")
    assert plain.out == ""
    as_json = call("plan", packed_cohort, "--global-batch-size", 8, *options, "--json")
    assert as_json.status == 2
    assert complaint in as_json.document["error"]["message"]


@pytest.mark.parametrize(
    ("option", "value"), [("--size", "8,x,8"), ("--size", "0,8,8"), ("--crop-or-pad", "")]
)
def test_sides_that_are_no_numbers_are_refused(
    call: Call, raw_cohort: Path, tmp_path: Path, option: str, value: str
) -> None:
    answer = call("pack", raw_cohort, "--out", tmp_path / "out", option, value)
    assert answer.status == 2
    assert f"{option} is {value!r}" in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_bad_data_gets_status_1(call: Call, tmp_path: Path, command: str) -> None:
    options = ("--global-batch-size", "8") if command == "plan" else ()
    answer = call(command, tmp_path, *options, "--json")
    assert answer.status == 1
    assert answer.document["error"]["kind"] == "ShardError"
    assert str(tmp_path) in answer.err


def test_the_module_runs_as_the_program_and_ends_with_its_status(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "streaming_balance"]
    shown = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("Usage: streaming-balance")
    failed = subprocess.run(
        [*program, "inspect", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


def test_labels_are_printed_as_they_are(call: Call, tmp_path: Path) -> None:
    voxels = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
    rows = ["patient,label,image"]
    for number, label in enumerate(["[red]NO", "[/]"]):
        write_nifti(tmp_path / f"{number}.nii", voxels + number)
        rows.append(f"P{number},{label},{number}.nii")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    write_shards(tmp_path / "table.csv", tmp_path / "out")
    for answer in (
        call("inspect", tmp_path / "out"),
        call("plan", tmp_path / "out", "--global-batch-size", 2),
    ):
        # Once in the heading of a table, or at the start of a row, and never taken for a colour.
        assert "[red]NO" in answer.out
        assert "[/]" in answer.out
    assert any(line.lstrip().startswith("[red]NO") for line in answer.out.splitlines())
