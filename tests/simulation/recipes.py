"""Strategies of every kind with options of every kind, drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

KINDS = (
    "instance_balanced",
    "class_balanced",
    "power",
    "effective_number",
    "manual_weights",
    "target",
    "upsample",
    "downsample",
    "progressively_balanced",
    "deferred",
    "repeat_factor",
    "p_k",
    "sample_weights",
)
# They count samples or take classes in turn: length, strata and independent draws are not theirs.
_WITHOUT_SHARES = ("repeat_factor", "p_k", "sample_weights")


def draw_balance(
    random: np.random.Generator, classes: Sequence[str], *, unit: str | None = None
) -> dict[str, Any]:
    """Draw a strategy and its options; not every combination makes a plan.

    Args:
        random: where choices come from.
        classes: labels.
        unit: what classes must cycle over; None: anything.
    """
    kind = str(random.choice(KINDS))
    balance: dict[str, Any] = {"name": kind, **_own_options(random, kind, classes)}
    balance["unit"] = unit if unit is not None else [None, "patient", "sample"][random.integers(3)]
    balance["last"] = str(random.choice(["full", "short", "drop"]))
    if kind not in _WITHOUT_SHARES:
        balance |= _options_of_shares(random)
    return {name: value for name, value in balance.items() if value is not None}


def _own_options(random: np.random.Generator, kind: str, classes: Sequence[str]) -> dict[str, Any]:
    """Draw the options that only one kind has."""
    ratio = float(random.choice([0.25, 0.5, 1.0]))
    by_class = dict(zip(classes, random.integers(1, 7, len(classes)).tolist(), strict=True))
    options: dict[str, dict[str, Any]] = {
        "power": {"alpha": float(random.choice([0, 0.25, 0.5, 1]))},
        "effective_number": {"beta": float(random.choice([0, 0.9, 0.999]))},
        "manual_weights": {"weights": by_class},
        "target": {"shares": by_class},
        "upsample": {"target_ratio": ratio},
        "downsample": {"target_ratio": ratio, "rotate": bool(random.integers(2))},
        "progressively_balanced": {"num_epochs": int(random.integers(1, 8))},
        "deferred": {
            "start_epoch": int(random.integers(0, 5)),
            "then": str(random.choice(["class_balanced", "power", "upsample"])),
        },
        "repeat_factor": {"threshold": float(random.choice([0.05, 0.3, 1]))},
        "p_k": {
            "P": int(random.integers(1, len(classes) + 1)),
            "M": int(random.integers(1, 6)),
        },
        "sample_weights": {"weights": "weight"},
    }
    return options.get(kind, {})


def _options_of_shares(random: np.random.Generator) -> dict[str, Any]:
    """Draw the options of strategies that give classes a share."""
    options: dict[str, Any] = {}
    if random.random() < 0.25:
        lengths = ["dataset", "oversample", "undersample", int(random.integers(1, 60))]
        options["num_samples"] = lengths[random.integers(4)]
    if random.random() < 0.25:
        options["strata"] = ["label", "site"]
        options["strata_shares"] = str(random.choice(["natural", "uniform"]))
    how = random.random()
    if how < 0.12:
        options["draw"] = "iid"
    elif how < 0.24:
        options["replacement"] = False
    return options
