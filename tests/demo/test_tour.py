"""The tour shows what it claims to show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streaming_balance.cli.app import run
from streaming_balance.demo import trainer

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_the_tour_shows_better_recall_of_the_rare_class_and_the_same_batches_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["demo", "--out", str(tmp_path / "demo"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    # As many as in BraTS 2018.
    assert shown["patients"] == {"HGG": 210, "LGG": 75}
    assert shown["splits"] == {"train": {"HGG": 126, "LGG": 45}, "val": {"HGG": 84, "LGG": 30}}
    assert shown["recall"]["balanced"]["LGG"] > shown["recall"]["natural"]["LGG"]
    assert shown["recall"]["balanced"]["HGG"] > 0.7
    assert shown["rare_class"] == "LGG"
    assert shown["rare_per_batch"]["class_balanced"] == [4, 4]
    assert shown["rare_per_batch"]["natural order"] == [2, 3]

    # 171 training patients make 22 batches of 8, so five epochs are 110 steps; the run stops in
    # the middle of epoch 2, 55 steps before its end.
    assert shown["steps"] == 110
    assert shown["resumed_batches_equal"] is True
    assert shown["resumption"]["equal"] == shown["resumption"]["compared"] == 55

    # 110 batches deliver 440 of each class. 440 is 126 x 3 + 62 and 45 x 9 + 35.
    classes = shown["audit"]["classes"]
    assert classes["HGG"]["delivered"] == classes["LGG"]["delivered"] == 440
    assert (classes["HGG"]["exposure_min"], classes["HGG"]["exposure_max"]) == (3, 4)
    assert (classes["LGG"]["exposure_min"], classes["LGG"]["exposure_max"]) == (9, 10)
    assert all(entry["seen"] == entry["patients"] for entry in classes.values())
    assert Path(shown["paths"]["picture"]).read_bytes().startswith(PNG_SIGNATURE)
    state = ["--state", shown["paths"]["state"]]
    assert run(["audit", shown["paths"]["cohort"], *state, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == classes


def test_the_tour_tells_people_as_it_goes_and_can_be_taken_again_in_the_same_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for _ in range(2):
        assert run(["demo", "--out", str(tmp_path), "--patients", "20"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert "20 generated patients, 15 HGG and 5 LGG" in told[0]
    assert "PASS: 5 of 5 global batches hold what the uninterrupted run's hold" in told[0]
    assert f"streaming-balance audit {tmp_path}/cohort --state {tmp_path}/state.json\n" in told[0]


def test_numbers_told_are_those_of_the_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["demo", "--out", str(tmp_path), "--patients", "57", "--seed", "3"]
    assert run([*command, "--json"]) == 0
    recall = json.loads(capsys.readouterr().out)["recall"]
    assert run(command) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for label in ("HGG", "LGG"):
        natural, balanced = (f"{recall[name][label]:.0%}" for name in ("natural", "balanced"))
        assert any(row[:1] == [label] and row[2:] == [natural, balanced] for row in rows)


def test_batches_that_are_not_the_same_are_told_and_end_with_exit_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter(range(10**6))
    # As if every reading gave other voxels.
    monkeypatch.setattr(trainer, "_checksum", lambda _: str(next(numbers)))
    command = ["demo", "--out", str(tmp_path), "--patients", "20"]
    assert run(command) == 1
    assert "FAIL: 0 of 5 global batches" in capsys.readouterr().out
    assert run([*command, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["resumed_batches_equal"] is False


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--patients", "19"], "at least 20 patients"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_a_tour_that_could_show_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    assert run(["demo", "--out", str(tmp_path), *options]) == 2
    assert complaint in capsys.readouterr().err


def test_a_folder_of_somebody_elses_files_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").touch()
    assert run(["demo", "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
