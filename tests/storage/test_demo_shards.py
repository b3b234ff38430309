"""The packed cohort beside the format page is sound, and is what the tools make of it today."""

from __future__ import annotations

from pathlib import Path

from streaming_balance.demo.cohort import make_cohort
from streaming_balance.ingest.pack import write_shards
from streaming_balance.storage.shards import open_shards
from streaming_balance.storage.verify import verify_shards


def test_every_byte_of_the_demo_shards_is_sound(project_root: Path) -> None:
    report = verify_shards(project_root / "shards" / "demo")
    assert report.ok, report.problems
    assert report.samples == 19


def test_the_demo_shards_stay_small(project_root: Path) -> None:
    folder = project_root / "shards" / "demo"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1 << 20


def test_the_demo_shards_hold_what_packing_the_generated_cohort_gives(
    project_root: Path, tmp_path: Path
) -> None:
    make_cohort(tmp_path / "patients", patients=19, seed=0)
    report = write_shards(
        tmp_path / "patients", tmp_path / "packed", split="train=0.7,val=0.3", classes="LGG,HGG"
    )
    # The content digest leaves codec releases out, which may compress to other bytes.
    assert report.digest == open_shards(project_root / "shards" / "demo").digest
