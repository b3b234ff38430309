"""One YAML file drives the loader, the samplers, the losses and the command line alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streaming_balance.cli.app import run
from streaming_balance.storage.shards import open_shards
from streaming_balance.training.loader import train_loader
from streaming_balance.training.losses import ClassWeightedCrossEntropyLoss, ClassWeightedMSELoss
from streaming_balance.training.samplers import BalancedSampler
from tests.training.cohorts import cohort, packed

TEXT = """
compute: {seed: 7}
data:
  balancing:
    weighted_sampler: {enabled: true, method: effective_num, beta: 0.9}
    class_weights: {enabled: true, basis: sampled, method: inverse_frequency}
"""


def test_one_file_drives_loader_sampler_loss_and_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path = tmp_path / "cohort", tmp_path / "run.yaml"
    packed(folder, cohort())
    path.write_text(TEXT)
    shards = open_shards(folder)

    with train_loader(shards, global_batch_size=4, balance=path) as train:
        plan = train.plan
    labels = [shards.classes[number] for number in shards.labels("train")]
    sampler = BalancedSampler(labels, batch_size=4, balance=path, num_replicas=1, rank=0)
    squared = ClassWeightedMSELoss.from_config(path, plan)
    entropy = ClassWeightedCrossEntropyLoss.from_config(path, sampler.plan)
    capsys.readouterr()
    assert (
        run(["plan", str(folder), "--config", str(path), *("--global-batch-size", "4"), "--json"])
        == 0
    )
    document = json.loads(capsys.readouterr().out)

    assert document["digest"] == plan.digest
    assert plan.seed == sampler.plan.seed == document["settings"]["seed"] == 7
    assert plan.strategy == sampler.plan.strategy
    assert plan.shares == sampler.plan.shares
    # By hand: 9 HGG and 5 LGG patients, samples weigh 1 / E_n, and the loss evens out what is left.
    hgg, lgg = 9 / (1 - 0.9**9), 5 / (1 - 0.9**5)
    assert plan.shares == pytest.approx({"HGG": hgg / (hgg + lgg), "LGG": lgg / (hgg + lgg)})
    by_hand = [2 * lgg / (hgg + lgg), 2 * hgg / (hgg + lgg)]
    assert squared.class_weights.tolist() == pytest.approx(by_hand)
    assert entropy.class_weights.tolist() == pytest.approx(by_hand)
    assert list(document["class_weights"].values()) == pytest.approx(by_hand)
