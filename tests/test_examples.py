"""The examples that need a packed cohort run, and say what they should."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from streaming_balance.demo.cohort import make_cohort
from streaming_balance.ingest.pack import write_shards
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.shards import open_shards

DEADLINE_SECONDS = 120


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 HGG and 4 LGG patients to train on."""
    folder = tmp_path_factory.mktemp("examples")
    make_cohort(folder / "patients", patients=19, shape=(12, 12, 12))
    write_shards(folder / "patients", folder / "cohort", split="train=0.8,val=0.2")
    return folder / "cohort"


def begin(
    example: str, *arguments: object, ranks: int | None = None, folder: Path
) -> subprocess.Popen[str]:
    """Start an example in a folder, under torchrun where it is to have several ranks."""
    program = str(Path(__file__).resolve().parents[1] / "examples" / example)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [sys.executable, *(launcher if ranks else []), program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )


def told(process: subprocess.Popen[str]) -> list[str]:
    """Wait for an example to end well, and give the lines that it printed of its progress."""
    output, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, errors[-3000:]
    return [line for line in output.splitlines() if re.match(r"(epoch|step|rank) \d+", line)]


def child_of_rank(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """Find the process of one rank that torchrun has started."""
    (child,) = (
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("RANK") == str(rank)
    )
    return child


def test_the_ddp_example_stops_when_a_rank_is_told_to_and_goes_on_on_three_ranks(
    cohort: Path, tmp_path: Path
) -> None:
    two = begin("train_ddp.py", cohort, "--epochs", 100_000, ranks=2, folder=tmp_path)
    assert two.stdout is not None
    first = two.stdout.readline()
    assert re.fullmatch(r"epoch 1 of 100000: loss [\d.]+, accuracy [\d.]+\n", first)
    child_of_rank(two, 1).send_signal(signal.SIGTERM)
    last = told(two)[-1]
    stopped = re.fullmatch(r"rank 1 was told to stop: saved in epoch (\d+)", last)
    assert stopped is not None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    epoch = saved["data"]["position"]["epoch"]
    assert epoch == int(stopped[1])

    options = ("--epochs", epoch + 2, "--micro-batches", 2)
    three = told(begin("train_ddp.py", cohort, *options, ranks=3, folder=tmp_path))
    assert [line.partition(":")[0] for line in three] == [
        f"epoch {number} of {epoch + 2}" for number in (epoch + 1, epoch + 2)
    ]
    ended = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["data"]
    assert ended == saved["data"] | {"position": {"epoch": epoch + 2, "step": 0}}


def test_the_accelerate_example_of_two_ranks_goes_on_on_one(cohort: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Accelerate is not installed here")
    lines = []
    for ranks, epochs in ((2, 1), (None, 3)):
        options = (cohort, "--epochs", epochs)
        lines += told(begin("accelerate_train.py", *options, ranks=ranks, folder=tmp_path))
    assert [line.partition(":")[0] for line in lines] == [
        *("epoch 1 of 1", "epoch 2 of 3", "epoch 3 of 3")
    ]


def test_the_lightning_example_goes_on_where_it_stopped(cohort: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed here")
    lines = []
    for steps in (3, 7):
        options = (cohort, "--max-steps", steps)
        lines += told(begin("lightning_module.py", *options, folder=tmp_path))
    # 15 patients in batches of 8: an epoch is two steps.
    assert lines == ["step 3: epoch 1, step 1", "step 7: epoch 3, step 1"]


@pytest.mark.filterwarnings("ignore")  # of Lightning's surroundings
def test_lightning_checkpoints_go_on_in_the_middle_of_an_epoch_exactly(
    cohort: Path, tmp_path: Path, project_root: Path
) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed here")
    place = project_root / "examples" / "lightning_module.py"
    specification = importlib.util.spec_from_file_location("lightning_example", place)
    assert specification is not None
    assert specification.loader is not None
    example: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)

    class Recorder(pl.Callback):  # type: ignore[misc, name-defined]
        """Writes down what steps were given, and saves after each of them."""

        def __init__(self) -> None:
            self.trained: list[list[int]] = []
            self.positions: list[tuple[int, int]] = []

        def on_train_batch_start(self, _t: Any, _m: Any, batch: Any, _i: int) -> None:
            self.trained.append(batch["sample"].tolist())

        def on_train_batch_end(self, trainer: Any, _m: Any, _o: Any, _b: Any, _i: int) -> None:
            path = tmp_path / f"{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            state = torch.load(path, weights_only=True)["BalancedData"]
            position = json.loads(json.dumps(state))["position"]
            self.positions.append((position["epoch"], position["step"]))

    def train(max_steps: int, going_on: Path | None = None) -> Recorder:
        recorder = Recorder()
        trainer = pl.Trainer(
            max_steps=max_steps,
            accelerator="cpu",
            use_distributed_sampler=False,
            callbacks=[recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model, data = example.Classifier(4, 2), example.BalancedData(cohort, global_batch_size=4)
        trainer.fit(model, datamodule=data, ckpt_path=going_on)
        return recorder

    shards = open_shards(cohort)
    plan = BalancedPlan.for_shards(shards, global_batch_size=4, balance="class_balanced", seed=42)
    # 15 patients in batches of 4: an epoch is four steps.
    places = list(itertools.product(range(3), range(4)))
    planned = [plan.batch(epoch, step).tolist() for epoch, step in places]
    straight = train(11)
    # Slots of one rank are permuted; the members are those of the plan.
    assert [sorted(batch) for batch in straight.trained] == [sorted(b) for b in planned[:11]]
    # The state counts what was trained on, and nothing fetched ahead of it.
    assert straight.positions == places[1:12]
    for done in (1, 3, 4, 6, 8):
        resumed = train(11, tmp_path / f"{done}.ckpt")
        assert straight.trained[:done] + resumed.trained == straight.trained, done
        assert resumed.positions == straight.positions[done:], done


def test_the_diffusion_example_learns_under_the_class_weights_of_its_file(
    cohort: Path, project_root: Path, tmp_path: Path
) -> None:
    answer = subprocess.run(
        [
            *(sys.executable, str(project_root / "examples" / "diffusion.py")),
            *(str(cohort), "--steps", "40"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    # Inverse frequency of 11 and 4, summing to 2: 2 * 4 / 15 and 2 * 11 / 15.
    assert "weights: HGG 0.5333, LGG 1.4667" in answer.stdout
    found = re.search(r"loss: ([\d.]+) at first, ([\d.]+) after 40 steps", answer.stdout)
    assert found is not None
    assert float(found[2]) < 0.8 * float(found[1])
    assert "class_weights (inverse_frequency, basis natural)" in answer.stderr
    assert "classes before: HGG: 11 samples (73.3%), LGG: 4 samples (26.7%)" in answer.stderr
