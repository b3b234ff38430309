"""Streaming Balance: exact, fair, resumable class balancing for streams of medical volumes.

>>> import streaming_balance as sb
>>> plan = sb.BalancedPlan.from_labels(["LGG"] * 75 + ["HGG"] * 210, global_batch_size=8)
>>> plan.quotas(0, 0).tolist()
[4, 4]

Importing this package costs nothing: a name's module, and with it torch or pyarrow, is loaded when
the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streaming_balance.config import load_config
    from streaming_balance.errors import (
        BalanceError,
        ConfigError,
        ResumeError,
        ShardError,
        SplitError,
    )
    from streaming_balance.ingest.pack import write_shards
    from streaming_balance.plan.distribution import get_class_distribution
    from streaming_balance.plan.epoch import BalancedPlan
    from streaming_balance.storage.codecs import decode_member as decode
    from streaming_balance.storage.shards import ShardSet, open_shards
    from streaming_balance.tabular import smote
    from streaming_balance.training.class_weights import (
        compute_class_weights,
        compute_effective_num_weights,
        compute_weights_from_config,
    )
    from streaming_balance.training.evaluation import EvalLoader, eval_loader
    from streaming_balance.training.loader import BalancedLoader, train_loader
    from streaming_balance.training.losses import (
        ClassWeightedCrossEntropyLoss,
        ClassWeightedMSELoss,
    )

__version__ = "0.1.0"

__all__ = [
    "BalanceError",
    "BalancedLoader",
    "BalancedPlan",
    "ClassWeightedCrossEntropyLoss",
    "ClassWeightedMSELoss",
    "ConfigError",
    "EvalLoader",
    "ResumeError",
    "ShardError",
    "ShardSet",
    "SplitError",
    "compute_class_weights",
    "compute_effective_num_weights",
    "compute_weights_from_config",
    "decode",
    "eval_loader",
    "get_class_distribution",
    "load_config",
    "open_shards",
    "smote",
    "train_loader",
    "write_shards",
]

# Public name -> where it lives, and what it is called there.
_HOMES = {
    "BalanceError": ("streaming_balance.errors", "BalanceError"),
    "BalancedLoader": ("streaming_balance.training.loader", "BalancedLoader"),
    "BalancedPlan": ("streaming_balance.plan.epoch", "BalancedPlan"),
    "ClassWeightedCrossEntropyLoss": (
        "streaming_balance.training.losses",
        "ClassWeightedCrossEntropyLoss",
    ),
    "ClassWeightedMSELoss": ("streaming_balance.training.losses", "ClassWeightedMSELoss"),
    "ConfigError": ("streaming_balance.errors", "ConfigError"),
    "EvalLoader": ("streaming_balance.training.evaluation", "EvalLoader"),
    "ResumeError": ("streaming_balance.errors", "ResumeError"),
    "ShardError": ("streaming_balance.errors", "ShardError"),
    "ShardSet": ("streaming_balance.storage.shards", "ShardSet"),
    "SplitError": ("streaming_balance.errors", "SplitError"),
    "compute_class_weights": ("streaming_balance.training.class_weights", "compute_class_weights"),
    "compute_effective_num_weights": (
        "streaming_balance.training.class_weights",
        "compute_effective_num_weights",
    ),
    "compute_weights_from_config": (
        "streaming_balance.training.class_weights",
        "compute_weights_from_config",
    ),
    "decode": ("streaming_balance.storage.codecs", "decode_member"),
    "eval_loader": ("streaming_balance.training.evaluation", "eval_loader"),
    "get_class_distribution": ("streaming_balance.plan.distribution", "get_class_distribution"),
    "load_config": ("streaming_balance.config", "load_config"),
    "open_shards": ("streaming_balance.storage.shards", "open_shards"),
    "smote": ("streaming_balance.tabular", "smote"),
    "train_loader": ("streaming_balance.training.loader", "train_loader"),
    "write_shards": ("streaming_balance.ingest.pack", "write_shards"),
}


def __getattr__(name: str) -> object:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*globals(), *__all__])
