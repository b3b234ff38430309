"""Samplers inside frameworks that replace or shard samplers: everyone gets each batch once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from streaming_balance.training.samplers import BalancedBatchSampler, BalancedSampler
from tests.training.sampler_cases import BATCH, LABELS, Numbers, plain

KINDS = ("sampler", "batch_sampler")
# Frameworks warn of this and that about their surroundings; none of it is ours.
pytestmark = pytest.mark.filterwarnings("ignore")


def planned(epochs: int, size: int = BATCH) -> list[list[int]]:
    """What the sampler alone hands out."""
    sampler = BalancedBatchSampler(LABELS, batch_size=size, seed=3, num_replicas=1, rank=0)
    return [*itertools.chain(*itertools.repeat(sampler, epochs))]


def options(kind: str, size: int = BATCH) -> dict[str, Any]:
    """Give the arguments of a loader that has the sampler in one place or the other."""
    given: dict[str, Any] = {"batch_size": size, "seed": 3, "num_replicas": 1, "rank": 0}
    if kind == "sampler":
        return {"batch_size": size, "sampler": BalancedSampler(LABELS, **given)}
    return {"batch_sampler": BalancedBatchSampler(LABELS, **given)}


@pytest.mark.parametrize("kind", KINDS)
def test_monai_s_loader_delivers_the_plan_s_batches(kind: str) -> None:
    data = pytest.importorskip("monai.data", reason="MONAI is not installed here")
    loader = data.DataLoader(data.Dataset(list(range(len(LABELS)))), **options(kind))
    assert plain(loader) + plain(loader) == planned(2)


@pytest.mark.parametrize("kind", KINDS)
def test_lightning_trains_on_the_plan_s_batches_epoch_after_epoch(kind: str) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed here")
    received: list[list[int]] = []

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        """Writes down what it is trained on."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            received.append(batch.tolist())
            return torch.as_tensor(self.layer(batch[:, None].float()).mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(Numbers(), **options(kind)))
    assert received == planned(3)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_deals_whole_batches_of_a_sampler_of_one_replica(kind: str) -> None:
    loading = pytest.importorskip("accelerate.data_loader", reason="Accelerate is not installed")
    parts = [
        plain(
            loading.prepare_data_loader(
                DataLoader(Numbers(), **options(kind, size=3)),
                num_processes=2,
                process_index=rank,
                put_on_device=False,
            )
        )
        for rank in range(2)
    ]
    dealt = [batch for step in zip(*parts, strict=True) for batch in step]
    assert dealt == planned(1, size=3)
