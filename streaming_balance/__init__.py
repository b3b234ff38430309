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
    from streaming_balance.ingest.index import index_shards
    from streaming_balance.ingest.pack import write_shards
    from streaming_balance.plan.distribution import get_class_distribution
    from streaming_balance.plan.epoch import BalancedPlan
    from streaming_balance.storage.codecs import decode_member as decode
    from streaming_balance.storage.shards import ShardSet, open_shards, open_table
    from streaming_balance.stream.pipeline import stream
    from streaming_balance.tabular import smote
    from streaming_balance.training.class_weights import (
        compute_class_weights,
        compute_effective_num_weights,
        compute_weights_from_config,
    )
    from streaming_balance.training.datasets import (
        downsample_dataset,
        get_balanced_dataloader,
        upsample_dataset,
    )
    from streaming_balance.training.evaluation import EvalLoader, eval_loader
    from streaming_balance.training.loader import BalancedLoader, train_loader
    from streaming_balance.training.losses import (
        ClassWeightedCrossEntropyLoss,
        ClassWeightedMSELoss,
    )
    from streaming_balance.training.merging import merge_states
    from streaming_balance.training.micro_batches import micro_batches
    from streaming_balance.training.mixing import cutmix, mixup
    from streaming_balance.training.samplers import BalancedBatchSampler, BalancedSampler
    from streaming_balance.training.shard_dataset import ShardDataset
    from streaming_balance.training.stopping import StopTogether
    from streaming_balance.training.weighted import create_weighted_sampler, get_weighted_sampler

__version__ = "0.1.0"

__all__ = [
    "BalanceError",
    "BalancedBatchSampler",
    "BalancedLoader",
    "BalancedPlan",
    "BalancedSampler",
    "ClassWeightedCrossEntropyLoss",
    "ClassWeightedMSELoss",
    "ConfigError",
    "EvalLoader",
    "ResumeError",
    "ShardDataset",
    "ShardError",
    "ShardSet",
    "SplitError",
    "StopTogether",
    "compute_class_weights",
    "compute_effective_num_weights",
    "compute_weights_from_config",
    "create_weighted_sampler",
    "cutmix",
    "decode",
    "downsample_dataset",
    "eval_loader",
    "get_balanced_dataloader",
    "get_class_distribution",
    "get_weighted_sampler",
    "index_shards",
    "load_config",
    "merge_states",
    "micro_batches",
    "mixup",
    "open_shards",
    "open_table",
    "smote",
    "stream",
    "train_loader",
    "upsample_dataset",
    "write_shards",
]

# Public name -> where it lives, and what it is called there.
_HOMES = {
    "BalanceError": ("streaming_balance.errors", "BalanceError"),
    "BalancedBatchSampler": ("streaming_balance.training.samplers", "BalancedBatchSampler"),
    "BalancedLoader": ("streaming_balance.training.loader", "BalancedLoader"),
    "BalancedPlan": ("streaming_balance.plan.epoch", "BalancedPlan"),
    "BalancedSampler": ("streaming_balance.training.samplers", "BalancedSampler"),
    "ClassWeightedCrossEntropyLoss": (
        "streaming_balance.training.losses",
        "ClassWeightedCrossEntropyLoss",
    ),
    "ClassWeightedMSELoss": ("streaming_balance.training.losses", "ClassWeightedMSELoss"),
    "ConfigError": ("streaming_balance.errors", "ConfigError"),
    "EvalLoader": ("streaming_balance.training.evaluation", "EvalLoader"),
    "ResumeError": ("streaming_balance.errors", "ResumeError"),
    "ShardDataset": ("streaming_balance.training.shard_dataset", "ShardDataset"),
    "ShardError": ("streaming_balance.errors", "ShardError"),
    "ShardSet": ("streaming_balance.storage.shards", "ShardSet"),
    "SplitError": ("streaming_balance.errors", "SplitError"),
    "StopTogether": ("streaming_balance.training.stopping", "StopTogether"),
    "compute_class_weights": ("streaming_balance.training.class_weights", "compute_class_weights"),
    "compute_effective_num_weights": (
        "streaming_balance.training.class_weights",
        "compute_effective_num_weights",
    ),
    "compute_weights_from_config": (
        "streaming_balance.training.class_weights",
        "compute_weights_from_config",
    ),
    "create_weighted_sampler": ("streaming_balance.training.weighted", "create_weighted_sampler"),
    "cutmix": ("streaming_balance.training.mixing", "cutmix"),
    "decode": ("streaming_balance.storage.codecs", "decode_member"),
    "downsample_dataset": ("streaming_balance.training.datasets", "downsample_dataset"),
    "eval_loader": ("streaming_balance.training.evaluation", "eval_loader"),
    "get_balanced_dataloader": ("streaming_balance.training.datasets", "get_balanced_dataloader"),
    "get_class_distribution": ("streaming_balance.plan.distribution", "get_class_distribution"),
    "get_weighted_sampler": ("streaming_balance.training.weighted", "get_weighted_sampler"),
    "index_shards": ("streaming_balance.ingest.index", "index_shards"),
    "load_config": ("streaming_balance.config", "load_config"),
    "merge_states": ("streaming_balance.training.merging", "merge_states"),
    "micro_batches": ("streaming_balance.training.micro_batches", "micro_batches"),
    "mixup": ("streaming_balance.training.mixing", "mixup"),
    "open_shards": ("streaming_balance.storage.shards", "open_shards"),
    "open_table": ("streaming_balance.storage.shards", "open_table"),
    "smote": ("streaming_balance.tabular", "smote"),
    "stream": ("streaming_balance.stream", "stream"),
    "train_loader": ("streaming_balance.training.loader", "train_loader"),
    "upsample_dataset": ("streaming_balance.training.datasets", "upsample_dataset"),
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
