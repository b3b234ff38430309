"""Strata from packing to batches: a column of the table is balanced jointly with the label."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from streaming_balance.errors import ConfigError
from streaming_balance.report.audit import audit_run
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import train_loader
from streaming_balance.training.state import LoaderState
from tests.building import Sample
from tests.training.cohorts import packed, voxels

# Site A sends 12 of the 16 HGG and 2 of the 8 LGG: a model could learn the site for the label.
SITES = [("HGG", "A")] * 12 + [("HGG", "B")] * 4 + [("LGG", "A")] * 2 + [("LGG", "B")] * 6
UNIFORM = {"name": "class_balanced", "strata": ["label", "site"], "strata_shares": "uniform"}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """24 patients of two labels and two sites."""
    samples = [
        Sample(key=f"P{number:02d}", image=voxels(number), label=label, columns={"site": site})
        for number, (label, site) in enumerate(SITES)
    ]
    return packed(tmp_path_factory.mktemp("sites") / "cohort", samples)


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """16 patients, half of them with Hernia, three in four taken from the front."""
    samples = [
        Sample(
            key=f"P{number:02d}",
            image=voxels(number),
            label="Hernia|Mass" if number % 2 else "Mass",
            columns={"view": "AP" if number % 8 < 2 else "PA"},
        )
        for number in range(16)
    ]
    folder: Path = tmp_path_factory.mktemp("views") / "cohort"
    return packed(folder, samples, classes=["Hernia", "Mass"], multi_label=True)


def joint_counts(batch: dict[str, Any]) -> Counter[tuple[str, str]]:
    """Count label and site of a batch by the keys that were packed."""
    return Counter(SITES[int(key[1:])] for key in batch["key"])


def test_uniform_strata_make_label_and_site_independent_in_every_batch(sites: ShardSet) -> None:
    with train_loader(sites, global_batch_size=8, balance=UNIFORM, num_threads=1) as train:
        batches = list(train)
    assert len(batches) == 3
    for batch in batches:
        assert joint_counts(batch) == {
            (label, site): 2 for label in ("HGG", "LGG") for site in "AB"
        }


def test_natural_strata_keep_the_sites_of_each_label(sites: ShardSet) -> None:
    balance = {"name": "class_balanced", "strata": "site"}
    with train_loader(sites, global_batch_size=8, balance=balance, num_threads=1) as train:
        batches = list(train)
    for batch in batches:
        # 4 of each label; of HGG 3 in 4 from site A, of LGG 1 in 4.
        assert joint_counts(batch) == {
            ("HGG", "A"): 3,
            ("HGG", "B"): 1,
            ("LGG", "A"): 1,
            ("LGG", "B"): 3,
        }


def test_two_ranks_share_every_stratum(sites: ShardSet) -> None:
    for rank in range(2):
        with train_loader(
            sites, global_batch_size=8, balance=UNIFORM, rank=rank, num_ranks=2, num_threads=1
        ) as train:
            for batch in train:
                assert len(batch["key"]) == 4
                assert set(joint_counts(batch).values()) == {1}


def test_a_column_that_was_not_packed_is_named_with_those_that_were(sites: ShardSet) -> None:
    with pytest.raises(ConfigError, match=r"'scanner'.*site"):
        train_loader(
            sites, global_batch_size=8, balance={"name": "class_balanced", "strata": "scanner"}
        )


def test_an_audit_rebuilds_the_strata_from_the_state_alone(sites: ShardSet) -> None:
    with train_loader(sites, global_batch_size=8, balance=UNIFORM, num_threads=1) as train:
        delivered = Counter(key for batch in train for key in batch["key"])
        state = json.loads(json.dumps(train.state_dict()))
    found = audit_run(sites, LoaderState.from_dict(state))
    assert found.exposure == {f"P{n:02d}": delivered[f"P{n:02d}"] for n in range(24)}
    assert {label: entry.delivered for label, entry in found.classes.items()} == {
        "HGG": 12,
        "LGG": 12,
    }


def test_one_finding_and_a_column_are_balanced_jointly(views: ShardSet) -> None:
    balance = {
        "name": "class_balanced",
        "target_label": "Hernia",
        "strata": "view",
        "strata_shares": "uniform",
    }
    seen = dict(
        zip(views.keys("train").tolist(), views.column("train", "view").tolist(), strict=True)
    )
    with train_loader(views, global_batch_size=4, balance=balance, num_threads=1) as train:
        batches = list(train)
    assert len(batches) == 4
    for batch in batches:
        counts = Counter(
            (row[0], seen[key])
            for row, key in zip(batch["label"].tolist(), batch["key"], strict=True)
        )
        assert counts == {(has, view): 1 for has in (0, 1) for view in ("AP", "PA")}
