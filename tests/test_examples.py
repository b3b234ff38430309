"""The examples that need a packed cohort run, and say what they should."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from streaming_balance.demo.cohort import make_cohort
from streaming_balance.ingest.pack import write_shards


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 HGG and 4 LGG patients to train on."""
    folder = tmp_path_factory.mktemp("examples")
    make_cohort(folder / "patients", patients=19, shape=(12, 12, 12))
    write_shards(folder / "patients", folder / "cohort", split="train=0.8,val=0.2")
    return folder / "cohort"


def test_the_diffusion_example_learns_under_the_class_weights_of_its_file(
    cohort: Path, project_root: Path, tmp_path: Path
) -> None:
    answer = subprocess.run(
        [
            *(sys.executable, str(project_root / "examples" / "diffusion.py")),
            *(str(cohort), "--steps", "40"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    # Inverse frequency of 11 and 4, summing to 2: 2 * 4 / 15 and 2 * 11 / 15.
    assert "weights: HGG 0.5333, LGG 1.4667" in answer.stdout
    found = re.search(r"loss: ([\d.]+) at first, ([\d.]+) after 40 steps", answer.stdout)
    assert found is not None
    assert float(found[2]) < 0.8 * float(found[1])
    assert "class_weights (inverse_frequency, basis natural)" in answer.stderr
    assert "classes before: HGG: 11 samples (73.3%), LGG: 4 samples (26.7%)" in answer.stderr
