"""The tour shows what it claims to show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streaming_balance.cli.app import run

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_the_tour_shows_better_recall_of_the_rare_class_and_the_same_batches_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["demo", "--out", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    # 190 / 3.8 = 50 low-grade patients.
    assert shown["patients"] == {"HGG": 140, "LGG": 50}
    assert shown["balanced_recall"]["LGG"] > shown["natural_recall"]["LGG"] + 0.2
    assert shown["balanced_recall"]["HGG"] > 0.8
    assert shown["equal_batches"] == shown["compared_batches"] == 12
    assert Path(shown["picture"]).read_bytes().startswith(PNG_SIGNATURE)

    # 114 training patients make 15 batches of 8: 10 epochs deliver 600 of each class. 600 is
    # 84 x 7 + 12 and 30 x 20.
    classes = shown["audit"]["classes"]
    assert classes["HGG"]["delivered"] == classes["LGG"]["delivered"] == 600
    assert (classes["HGG"]["exposure_min"], classes["HGG"]["exposure_max"]) == (7, 8)
    assert (classes["LGG"]["exposure_min"], classes["LGG"]["exposure_max"]) == (20, 20)


def test_the_tour_tells_people_as_it_goes_and_can_be_taken_again_in_the_same_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for _ in range(2):
        assert run(["demo", "--out", str(tmp_path), "--patients", "20"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert "made 20 patients: 15 HGG, 5 LGG" in told[0]
    assert "12 of 12 global batches hold the same samples" in told[0]
