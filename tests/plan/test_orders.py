"""Every epoch and every seed has an order of its own, whatever the strategy and its options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.strategies import KINDS

BRATS = np.repeat([0, 1], [210, 75])
MODES: dict[str, dict[str, Any]] = {
    "instance_balanced": {},
    "class_balanced": {},
    "power": {"alpha": 0.3},
    "effective_number": {"beta": 0.99},
    "manual_weights": {"weights": {"0": 1.0, "1": 2.8}},
    "target": {"shares": {"0": 0.3, "1": 0.7}},
    "upsample": {"target_ratio": 0.7},
    "downsample": {"target_ratio": 0.5},
    "progressively_balanced": {"num_epochs": 5},
    "deferred": {"start_epoch": 1, "then": {"name": "upsample"}},
    "repeat_factor": {"threshold": 0.4},
    "sample_weights": {"weights": (1 + np.arange(285) % 5).tolist()},
    "p_k": {"P": 2, "M": 4},
}
DRAWS = {
    **{name: {"name": name, **options} for name, options in MODES.items()},
    "iid": {"name": "class_balanced", "draw": "iid"},
    "fixed subset": {"name": "downsample", "rotate": False},
    "nobody twice": {"name": "class_balanced", "replacement": False},
    "short": {"name": "instance_balanced", "last": "short"},
    "dropped": {"name": "instance_balanced", "last": "drop"},
}


def test_every_strategy_is_among_the_modes() -> None:
    assert set(MODES) == set(KINDS)


@pytest.mark.parametrize("mode", DRAWS)
def test_every_epoch_and_every_seed_has_an_order_of_its_own_in_every_mode(mode: str) -> None:
    orders = []
    for seed in (42, 43, 42):
        plan = BalancedPlan.from_labels(BRATS, global_batch_size=8, balance=DRAWS[mode], seed=seed)
        for epoch in (0, 1, 2, 1000):
            steps = range(min(12, plan.num_steps(epoch)))
            orders.append(tuple(tuple(plan.batch(epoch, step).tolist()) for step in steps))
    assert len(set(orders[:8])) == 8
    assert orders[8:] == orders[:4]
