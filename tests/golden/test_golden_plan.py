"""Frozen plans: the batches of version 1 must be the batches of version 1 for ever.

A run that was saved yesterday goes on tomorrow only if the plan still gives the same batches. If a
change alters them on purpose, raise `PLAN_VERSION` in `streaming_balance/plan/epoch.py` and write
the file of the new version, which never touches that of an older one:

    python tests/golden/test_golden_plan.py
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming_balance.plan.epoch import PLAN_VERSION, BalancedPlan

GOLDEN = Path(__file__).with_name(f"plan_v{PLAN_VERSION}.json")
GOLDEN_MORE = Path(__file__).with_name(f"plan_v{PLAN_VERSION}_more.json")
STRATEGIES: list[dict[str, Any]] = [
    {"name": "instance_balanced"},
    {"name": "class_balanced"},
    {"name": "power", "alpha": 0.3},
    {"name": "effective_number", "beta": 0.99},
    {"name": "manual_weights", "weights": {"a": 1.0, "b": 2.5, "c": 4.0}},
    {"name": "target", "shares": {"a": 0.2, "b": 0.3, "c": 0.5}},
    {"name": "upsample", "target_ratio": 0.7},
    {"name": "downsample", "target_ratio": 0.5},
]
SIZES = {"large": 2_500_000, "larger": 1_200_000, "small": 1000}
SINGLE: list[dict[str, Any]] = [
    {"kind": "patients", "balance": {"name": "class_balanced", "replacement": False}, "batch": 5},
    {"kind": "patients", "balance": {"name": "downsample", "rotate": False}, "batch": 5},
    {"kind": "patients", "balance": {"name": "class_balanced", "draw": "iid"}, "batch": 9},
    {"kind": "patients", "balance": {"name": "power", "num_samples": "oversample"}, "batch": 64},
    {"kind": "shards", "balance": {"name": "class_balanced"}, "batch": 7},
    {"kind": "shards", "balance": {"name": "class_balanced"}, "batch": 7, "exclude": ["P003"]},
    {"kind": "sizes", "balance": {"name": "class_balanced"}, "batch": 9, "seed": 2**64 - 1},
    {"kind": "sizes", "balance": {"name": "instance_balanced", "last": "short"}, "batch": 1000},
    {"kind": "sizes", "balance": {"name": "downsample", "target_ratio": 0.5}, "batch": 12},
    {"kind": "sizes", "balance": {"name": "class_balanced", "draw": "iid"}, "batch": 12},
    {"kind": "sizes", "balance": {"name": "class_balanced"}, "batch": 20_000, "shown": 24},
]
# What came to version 1 later: schedules, weights by sample, strata, several labels.
MORE: list[dict[str, Any]] = [
    {
        "kind": "patients",
        "balance": {"name": "progressively_balanced", "num_epochs": 5},
        "batch": 7,
    },
    {
        "kind": "patients",
        "balance": {"name": "deferred", "start_epoch": 3, "then": {"name": "upsample"}},
        "batch": 7,
    },
    {"kind": "patients", "balance": {"name": "repeat_factor", "threshold": 0.4}, "batch": 8},
    {
        "kind": "patients",
        "balance": {"name": "repeat_factor", "threshold": 0.4, "last": "short"},
        "batch": 8,
    },
    {"kind": "patients", "balance": {"name": "p_k", "P": 2, "M": 3}, "batch": 6},
    {"kind": "shards", "balance": {"name": "sample_weights", "weights": "hardness"}, "batch": 6},
    {
        "kind": "shards",
        "balance": {"name": "class_balanced", "strata": ["label", "site"]},
        "batch": 9,
    },
    {
        "kind": "shards",
        "balance": {"name": "power", "strata": ["site"], "strata_shares": "uniform"},
        "batch": 10,
    },
    {"kind": "findings", "balance": {"name": "repeat_factor", "threshold": 0.9}, "batch": 8},
    {
        "kind": "findings",
        "balance": {"name": "class_balanced", "strata": "label_set", "unit": "sample"},
        "batch": 8,
    },
    {
        # A patient has samples with and without c: classes take their patients in turn.
        "kind": "findings",
        "balance": {"name": "class_balanced", "target_label": "c", "unit": "sample"},
        "batch": 8,
    },
]


class Cohort:
    """44 patients of three classes with one to three samples each, in a mixed order."""

    classes = ["a", "b", "c"]  # noqa: RUF012
    train_splits = ("train",)

    def __init__(self) -> None:
        owned = [(owner, turn) for owner in range(44) for turn in range(owner % 3 + 1)]
        # 37 shares no factor with 87, so this visits every sample once.
        mixed = [owned[place * 37 % len(owned)] for place in range(len(owned))]
        self._patients = np.array([f"P{owner:03}" for owner, _ in mixed])
        self._keys = np.array([f"P{owner:03}__{turn}" for owner, turn in mixed])
        self._codes = np.array([(owner > 10) + (owner > 39) for owner, _ in mixed])
        self._columns = {
            "site": np.array(["xyz"[owner % 7 % 3] for owner, _ in mixed]),
            "hardness": np.array([str(1 + owner % 5) for owner, _ in mixed]),
        }
        self.findings = [
            [name for bit, name in enumerate("abc") if (owner + turn) * 5 % 11 >> bit & 1]
            for owner, turn in mixed
        ]

    def labels(self, split: str) -> NDArray[np.int64]:
        assert split == "train"
        return self._codes

    def patients(self, split: str) -> NDArray[np.str_]:
        assert split == "train"
        return self._patients

    def keys(self, split: str) -> NDArray[np.str_]:
        assert split == "train"
        return self._keys

    def column(self, split: str, name: str) -> NDArray[np.str_]:
        assert split == "train"
        return self._columns[name]


def described_cases() -> list[dict[str, Any]]:
    """Describe every frozen plan: strategies x last x unit, and a few of a kind."""
    crossed = [
        {"kind": "patients", "balance": {**strategy, "last": last, "unit": unit}, "batch": 7}
        for strategy, last, unit in itertools.product(
            STRATEGIES, ("full", "short", "drop"), ("patient", "sample")
        )
    ]
    return [{"seed": 42, **case} for case in [*crossed, *SINGLE]]


def built(case: dict[str, Any]) -> BalancedPlan:
    """Build the plan that a case describes."""
    options = {
        "global_batch_size": case["batch"],
        "balance": case["balance"],
        "seed": case["seed"],
    }
    if case["kind"] == "sizes":
        return BalancedPlan.from_class_sizes(SIZES, **options)
    cohort = Cohort()
    if case["kind"] == "shards":
        return BalancedPlan.for_shards(cohort, exclude=case.get("exclude", ()), **options)
    if case["kind"] == "findings":
        return BalancedPlan.from_labels(
            cohort.findings, patients=cohort.patients("train"), **options
        )
    labels = np.array(cohort.classes)[cohort.labels("train")]
    return BalancedPlan.from_labels(labels, patients=cohort.patients("train"), **options)


def recorded(case: dict[str, Any]) -> dict[str, Any]:
    """Ask a plan for what is frozen of it."""
    plan = built(case)
    steps, shown = plan.num_steps(0), case.get("shown", 48)
    batches = []
    for epoch, step in ((0, 0), (0, steps - 1), (1, 1 % steps), (3, steps // 2), (70, steps // 3)):
        batch = plan.batch(epoch, step)
        ranks = min(3, len(batch))
        parts = [plan.rank_batch(epoch, step, rank=r, num_ranks=ranks) for r in range(ranks)]
        batches.append(
            {
                "epoch": epoch,
                "step": step,
                "quotas": plan.quotas(epoch, step).tolist(),
                "batch": batch[:shown].tolist(),
                "rank_batches": [part[: shown // 3].tolist() for part in parts],
            }
        )
    return {"steps": steps, "digest": plan.digest, "batches": batches}


FILES = {GOLDEN: described_cases(), GOLDEN_MORE: [{"seed": 42, **case} for case in MORE]}


def frozen_plans(path: Path) -> list[dict[str, Any]]:
    """Read the frozen plans of one file."""
    frozen: list[dict[str, Any]] = json.loads(path.read_text())["plans"]
    return frozen


@pytest.mark.parametrize(
    ("path", "number"),
    [(path, number) for path, cases in FILES.items() for number in range(len(cases))],
    ids=lambda value: value.stem if isinstance(value, Path) else str(value),
)
def test_a_plan_gives_the_batches_it_gave_when_it_was_frozen(path: Path, number: int) -> None:
    frozen = frozen_plans(path)[number]
    assert frozen["case"] == json.loads(json.dumps(FILES[path][number]))
    assert recorded(frozen["case"]) == frozen["recorded"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_frozen_plan_is_left_out(path: Path) -> None:
    assert len(frozen_plans(path)) == len(FILES[path])
    assert json.loads(path.read_text())["version"] == PLAN_VERSION


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_frozen_plans_are_never_overwritten(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        write_golden(path)
    assert path.read_bytes() == before


def write_golden(path: Path) -> None:
    """Freeze the plans of a new version; an existing file is left alone and is an error."""
    lines = [
        json.dumps({"case": case, "recorded": recorded(case)}, separators=(",", ":"))
        for case in FILES[path]
    ]
    text = f'{{"version":{PLAN_VERSION},"plans":[\n' + ",\n".join(lines) + "\n]}\n"
    with path.open("x") as file:
        file.write(text)


if __name__ == "__main__":
    for missing in FILES:
        if not missing.exists():
            write_golden(missing)
