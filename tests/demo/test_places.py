"""The demo overwrites what a demo made, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from streaming_balance.demo.places import Places
from streaming_balance.errors import ConfigError


def test_a_new_folder_an_empty_one_and_that_of_an_earlier_demo_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new/inner", "empty"):
        places = Places.claim(tmp_path / name)
        (places.out / "cohort").mkdir()
        assert Places.claim(tmp_path / name) == places


def test_a_folder_with_somebody_elses_data_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cohort").mkdir()
    with pytest.raises(ConfigError, match=r"is not empty and not of an earlier demo.*--out"):
        Places.claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cohort"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        Places.claim(tmp_path / "file")
