"""The label table of NIH ChestX-ray14: 112,120 images, several findings each, one to 184 a patient.

What plans deliver is checked against the file as `csv` reads it and `Counter` counts it.
"""

from __future__ import annotations

import csv
import gzip
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from streaming_balance.errors import ConfigError
from streaming_balance.ingest.dividing import divide_by_findings
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.splits import check_patients_apart, split_patients

# A line tracer makes thousands of cases three times as slow; smaller tests run the same lines.
pytestmark = pytest.mark.no_cover

FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}
HERNIA = {"name": "class_balanced", "target_label": "Hernia", "unit": "sample"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The columns a plan needs, as the file has them."""

    findings: list[list[str]]
    """Findings of every image; `No Finding` is one."""
    patients: list[str]
    """Patient of every image."""
    views: list[str]
    """View position of every image: PA or AP."""


@pytest.fixture(scope="module")
def table(shared_data: Path) -> Table:
    """Read the table."""
    path = shared_data / "labelled" / "nih_label_table" / "Data_Entry_2017_v2020.csv.gz"
    if not path.is_file():
        pytest.skip("the label table of NIH ChestX-ray14 is not among the real test data")
    with gzip.open(path, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    return Table(
        findings=[row["Finding Labels"].split("|") for row in rows],
        patients=[row["Patient ID"] for row in rows],
        views=[row["View Position"] for row in rows],
    )


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long something takes."""
    start = time.perf_counter()
    yield
    sys.stdout.write(f"{what}: {time.perf_counter() - start:.2f} s\n")


def counted(plan: BalancedPlan, epoch: int, count: Callable[[int], list[str]]) -> Counter[str]:
    """Count what the samples of an epoch have."""
    steps = range(plan.num_steps(epoch))
    return Counter(
        name
        for step in steps
        for number in plan.batch(epoch, step).tolist()
        for name in count(number)
    )


def test_the_natural_order_has_every_image_once_and_the_counts_of_the_file(table: Table) -> None:
    with timed("natural plan"):
        plan = BalancedPlan.from_labels(table.findings, balance=None, global_batch_size=512)
    expected = Counter(name for names in table.findings for name in names)
    assert plan.sizes == expected
    assert (expected["Hernia"], expected["No Finding"], len(expected)) == (227, 60361, 15)
    plan = BalancedPlan.from_labels(
        table.findings, balance={"name": "none", "last": "short"}, global_batch_size=512
    )
    assert counted(plan, 1, table.findings.__getitem__) == expected
    assert plan.exposure(2, 0).tolist() == [2] * 112120


def test_repeat_factors_of_the_file_are_met_image_by_image(table: Table) -> None:
    balance = {"name": "repeat_factor", "threshold": 0.02, "last": "short"}
    with timed("repeat_factor plan"):
        plan = BalancedPlan.from_labels(
            table.findings, patients=table.patients, balance=balance, global_batch_size=256
        )
    images = Counter(name for names in table.findings for name in names)
    by_name = {
        name: max(1.0, math.sqrt(0.02 / (count / len(table.findings))))
        for name, count in images.items()
    }
    factors = [max(by_name[name] for name in names) for names in table.findings]
    with timed("exposure of ten epochs"):
        exposure = plan.exposure(10, 0)
    assert all(
        math.floor(factor - 1e-9) * 10 <= times <= math.ceil(factor + 1e-9) * 10
        for factor, times in zip(factors, exposure.tolist(), strict=True)
    )
    assert abs(int(exposure.sum()) - 10 * math.fsum(factors)) <= 10
    hernias = [number for number, names in enumerate(table.findings) if "Hernia" in names]
    expected = sum(factors[number] for number in hernias)
    assert abs(int(exposure[hernias].sum()) - 10 * expected) < 0.01 * 10 * expected
    first = counted(plan, 0, table.findings.__getitem__)
    assert first["Hernia"] == int(plan.exposure(1, 0)[hernias].sum())
    with timed("batch of a far epoch"):
        assert len(plan.batch(5000, 17)) == 256


def test_the_rarest_finding_is_half_of_every_batch(table: Table) -> None:
    with timed("Hernia plan"):
        plan = BalancedPlan.from_labels(
            table.findings, patients=table.patients, balance=HERNIA, global_batch_size=64
        )
    assert plan.sizes == {"no Hernia": 111893, "Hernia": 227}
    for step in (0, 1, plan.num_steps(0) - 1):
        batch = plan.batch(0, step).tolist()
        assert sum("Hernia" in table.findings[number] for number in batch) == 32
    exposure = plan.exposure(2, 5)
    has = np.array(["Hernia" in names for names in table.findings])
    total = 64 * (2 * plan.num_steps(0) + 5)
    assert int(exposure[has].sum()) == int(exposure[~has].sum()) == total // 2
    for mine in (exposure[has], exposure[~has]):
        assert mine.max() - mine.min() <= 1


def test_patients_with_and_without_a_hernia_must_be_planned_by_sample(table: Table) -> None:
    has: dict[str, set[bool]] = {}
    for patient, names in zip(table.patients, table.findings, strict=True):
        has.setdefault(patient, set()).add("Hernia" in names)
    torn = sum(len(found) == 2 for found in has.values())
    with pytest.raises(ConfigError, match=rf"^{torn} patients have .* Set unit: sample"):
        BalancedPlan.from_labels(
            table.findings,
            patients=table.patients,
            balance={**HERNIA, "unit": "patient"},
            global_batch_size=64,
        )
    keep = [n for n, patient in enumerate(table.patients) if len(has[patient]) == 1]
    plan = BalancedPlan.from_labels(
        [table.findings[number] for number in keep],
        patients=[table.patients[number] for number in keep],
        balance={**HERNIA, "unit": "patient"},
        global_batch_size=64,
    )
    assert plan.sizes["Hernia"] == sum(found == {True} for found in has.values())
    by_patient = Counter[str]()
    for number, times in zip(keep, plan.exposure(3, 0).tolist(), strict=True):
        by_patient[table.patients[number]] += times
    for having in (True, False):
        mine = [count for patient, count in by_patient.items() if has[patient] == {having}]
        assert max(mine) - min(mine) <= 1


def test_view_positions_are_balanced_within_and_without_hernia(table: Table) -> None:
    cells = [
        ("Hernia" if "Hernia" in names else "no Hernia", view)
        for names, view in zip(table.findings, table.views, strict=True)
    ]
    sizes = Counter(cells)
    for shares in ("natural", "uniform"):
        with timed(f"{shares} strata plan"):
            plan = BalancedPlan.from_labels(
                table.findings,
                strata={"view": table.views},
                balance={**HERNIA, "strata": ["label", "view"], "strata_shares": shares},
                global_batch_size=64,
            )
        for step in range(0, plan.num_steps(0), 97):
            batch = Counter(cells[number] for number in plan.batch(0, step).tolist())
            for cell, size in sizes.items():
                natural = 32 * size / sum(sizes[cell[0], view] for view in ("PA", "AP"))
                ideal = natural if shares == "natural" else 16
                assert math.floor(ideal) <= batch[cell] <= math.ceil(ideal)


def test_all_sets_of_findings_are_classes(table: Table) -> None:
    with timed("label_set plan"):
        plan = BalancedPlan.from_labels(
            table.findings, balance={"name": "power", "strata": "label_set"}, global_batch_size=256
        )
    sets = Counter("|".join(sorted(names)) for names in table.findings)
    assert plan.sizes == sets
    weights = {name: math.sqrt(size) for name, size in sets.items()}
    scale = plan.num_steps(0) * 256 / sum(weights.values())
    drawn = Counter[str]()
    with timed("exposure of an epoch"):
        exposure = plan.exposure(1, 0).tolist()
    for names, times in zip(table.findings, exposure, strict=True):
        drawn["|".join(sorted(names))] += times
    batch = plan.batch(0, 5).tolist()
    found = Counter("|".join(sorted(table.findings[number])) for number in batch)
    assert plan.quotas(0, 5).tolist() == [found[name] for name in plan.classes]
    assert all(
        math.floor(weights[name] * scale - 1e-6) <= drawn[name] <= math.ceil(weights[name] * scale)
        for name in sets
    )


def test_no_patient_is_in_two_splits_and_every_finding_has_its_share(table: Table) -> None:
    rarity = Counter(name for names in table.findings for name in names)
    labels = [min(names, key=rarity.__getitem__) for names in table.findings]
    with timed("splits by the rarest finding"):
        by_label = split_patients(table.patients, labels, fractions=FRACTIONS, seed=3)
    held: dict[str, set[str]] = {}
    owners: dict[str, set[str]] = {}
    for patient, names in zip(table.patients, table.findings, strict=True):
        held.setdefault(patient, set()).update(names)
        for name in names:
            owners.setdefault(name, set()).add(patient)
    with timed("splits by all findings"):
        by_finding = divide_by_findings(held, fractions=FRACTIONS, seed=3)
    for assigned in (by_label, by_finding):
        assert set(assigned) == set(table.patients)
        check_patients_apart(table.patients, [assigned[patient] for patient in table.patients])
        sizes = Counter(assigned.values())
        for split, fraction in FRACTIONS.items():
            assert abs(sizes[split] - fraction * len(assigned)) < 0.01 * len(assigned)
            mine = sum(assigned[patient] == split for patient in owners["Hernia"])
            assert abs(mine - fraction * len(owners["Hernia"])) <= 2
    for patients in owners.values():
        for split, fraction in FRACTIONS.items():
            got = sum(by_finding[patient] == split for patient in patients)
            assert abs(got - fraction * len(patients)) < 0.05 * fraction * len(patients) + 2
