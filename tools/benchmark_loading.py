"""Measure how fast balanced batches arrive, against other ways to load the same volumes.

    python tools/benchmark_loading.py --volumes 96 --rounds 5

Makes volumes of 4 x 128 x 128 x 128 int16 with a brain-like foreground (16 %), stores them in every
form the contenders read, and lets each deliver 50/50 batches of float32 in turn, round after round.
The page cache is warm. Every figure is a median over rounds; ratios are taken within a round and
then their median, so that a machine that slows down for a while slows both sides of a ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from streaming_balance.storage.encoded import EncodedSample
from streaming_balance.storage.shards import open_shards
from streaming_balance.storage.writer import PackWriter, encode_array
from streaming_balance.training.loader import train_loader

MODALITIES = ("t1", "t1ce", "t2", "flair")
CLASSES = ("HGG", "LGG")
# 2.8 high-grade for each low-grade patient, as in BraTS 2018.
LGG_EVERY = 4
FOREGROUND_RADIUS = 0.68
LIMIT = "preadv into warm buffer"
# More than anybody reads ahead, so that what is measured is made while it is measured.
WARM_UP_BATCHES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured."""

    folder: Path
    """Where the volumes lie in all their forms."""
    volumes: int
    """How many there are."""
    side: int
    """Voxels along each axis of space."""
    batch_size: int
    """Volumes in a batch."""
    threads: int
    """Reader threads, and worker processes of the others."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a volume."""
        return (len(MODALITIES), self.side, self.side, self.side)

    @property
    def float_bytes(self) -> int:
        """Bytes of a volume in a batch."""
        return int(np.prod(self.shape)) * 4

    def label(self, number: int) -> str:
        """Give the class of a volume."""
        return CLASSES[number % LGG_EVERY == 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to get balanced batches."""

    name: str
    """What it is called in the table."""
    batches: Callable[[], Iterator[Any]]
    """Starts delivering, for as long as it is asked."""
    volumes: int
    """Volumes it delivers in a round: fewer for slow ones."""
    warm_up: int
    """Volumes it delivers before: enough to warm buffers, workers and, for ours, checksums."""


def make_volume(setup: Setup, number: int) -> NDArray[np.int16]:
    """Make a volume whose noise compresses like that of a skull-stripped scan."""
    axis = np.linspace(-1, 1, setup.side)
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None] ** 2)
    noise = np.random.default_rng(number).normal(600, 120, size=setup.shape)
    return np.where(radius < FOREGROUND_RADIUS, noise, 0).astype(np.int16)


def prepare(setup: Setup) -> None:
    """Store the volumes in every form, once."""
    done = setup.folder / "prepared"
    if done.exists():
        return
    for name in ("nifti", "npy", "wds"):
        (setup.folder / name).mkdir(parents=True, exist_ok=True)
    forms = {
        ("int16", "blosc"): "blosc-int16",
        ("int16", "npy"): "npy-int16",
        ("float32", "npy"): "npy-float32",
    }
    with contextlib.ExitStack() as stack:
        writers = {
            form: stack.enter_context(_writer(setup, name, codec=form[1]))
            for form, name in forms.items()
        }
        tars = {
            label: stack.enter_context(wds.TarWriter(str(setup.folder / "wds" / f"{label}.tar")))
            for label in CLASSES
        }
        for number in range(setup.volumes):
            _store(setup, number, writers, tars)
            _say(f"\rprepared {number + 1} of {setup.volumes}", end="")
        for writer in writers.values():
            writer.finish(found=setup.volumes, rejected=[])
    _say("")
    done.touch()


def _store(
    setup: Setup,
    number: int,
    writers: dict[tuple[str, str], PackWriter],
    tars: dict[str, wds.TarWriter],
) -> None:
    """Store one volume in every form."""
    volume = make_volume(setup, number)
    key = f"P{number:04d}"
    np.save(setup.folder / "npy" / f"{key}.npy", volume)
    for modality, values in zip(MODALITIES, volume, strict=True):
        image = nib.nifti1.Nifti1Image(values, np.eye(4))  # type: ignore[no-untyped-call]
        image.to_filename(setup.folder / "nifti" / f"{key}_{modality}.nii.gz")
    tars[setup.label(number)].write({"__key__": key, "image.npy": volume})
    for (dtype, codec), writer in writers.items():
        writer.add(_sample(setup, number, volume.astype(dtype), codec))


def _writer(setup: Setup, name: str, *, codec: str) -> PackWriter:
    """Start a data set of one form."""
    return PackWriter(
        setup.folder / name,
        classes=CLASSES,
        splits=["train"],
        train_splits=["train"],
        codec=codec,
        columns=[],
        shard_bytes=1 << 29,
        settings={"form": name},
        overwrite=True,
    )


def _sample(setup: Setup, number: int, volume: NDArray[Any], codec: str) -> EncodedSample:
    """Encode one volume for the shards."""
    key = f"P{number:04d}"
    return EncodedSample(
        key=key,
        patient=key,
        label=setup.label(number),
        split="train",
        columns={},
        arrays=(encode_array("image", volume, axes="CDHW", codec=codec),),
        details={},
    )


class FileVolumes(Dataset[tuple[torch.Tensor, int]]):
    """The usual map-style dataset over files."""

    def __init__(self, setup: Setup, read: Callable[[Path, str], NDArray[np.float32]]) -> None:
        self._setup, self._read = setup, read

    def __len__(self) -> int:
        return self._setup.volumes

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        volume = self._read(self._setup.folder, f"P{number:04d}")
        return torch.from_numpy(volume), CLASSES.index(self._setup.label(number))


def read_nifti(folder: Path, key: str) -> NDArray[np.float32]:
    """Read four modalities with nibabel."""
    images = [
        np.asarray(
            nib.Nifti1Image.from_filename(folder / "nifti" / f"{key}_{modality}.nii.gz").dataobj
        )
        for modality in MODALITIES
    ]
    return np.stack(images).astype(np.float32)


def read_npy(folder: Path, key: str) -> NDArray[np.float32]:
    """Read one array file."""
    volume: NDArray[np.float32] = np.load(folder / "npy" / f"{key}.npy").astype(np.float32)
    return volume


def weighted_torch(setup: Setup, read: Callable[[Path, str], NDArray[np.float32]]) -> Iterator[Any]:
    """Deliver from torch's DataLoader with its WeightedRandomSampler."""
    labels = [CLASSES.index(setup.label(number)) for number in range(setup.volumes)]
    counts = np.bincount(labels)
    sampler = WeightedRandomSampler([1 / counts[label] for label in labels], 10**6)
    return iter(
        DataLoader(
            FileVolumes(setup, read),
            batch_size=setup.batch_size,
            sampler=sampler,
            num_workers=setup.threads,
        )
    )


def random_mix(setup: Setup) -> Iterator[Any]:
    """Deliver from webdataset's RandomMix over a tar per class."""
    streams = [
        wds.WebDataset(
            str(setup.folder / "wds" / f"{label}.tar"), shardshuffle=False, empty_check=False
        )
        .repeat()
        .decode()
        .to_tuple("image.npy")
        .map(_as_float)
        for label in CLASSES
    ]
    mixed = wds.RandomMix(streams, [0.5, 0.5])
    return iter(DataLoader(mixed, batch_size=setup.batch_size, num_workers=setup.threads))


def _as_float(sample: tuple[NDArray[Any], ...]) -> torch.Tensor:
    """Cast what webdataset decoded."""
    return torch.from_numpy(sample[0].astype(np.float32))


def ours(setup: Setup, form: str) -> Iterator[Any]:
    """Deliver from this package, epoch after epoch, with its defaults."""
    loader = train_loader(
        open_shards(setup.folder / form),
        global_batch_size=setup.batch_size,
        balance="class_balanced",
        num_threads=setup.threads,
    )
    with loader:
        while True:
            yield from loader


def preadv_limit(setup: Setup) -> Iterator[Any]:
    """Deliver nothing but bytes: float32 volumes from the page cache into buffers used before."""
    shards = sorted((setup.folder / "npy-float32").glob("*.tar"))
    files = [os.open(path, os.O_RDONLY) for path in shards]
    places = [
        (file, start)
        for file in files
        for start in range(0, os.fstat(file).st_size - setup.float_bytes, setup.float_bytes)
    ]
    buffers = [np.zeros((setup.batch_size, setup.float_bytes), np.uint8) for _ in range(3)]

    def begin(step: int) -> list[Future[None]]:
        rows = buffers[step % len(buffers)]
        first = step * setup.batch_size
        chosen = [places[(first + row) % len(places)] for row in range(setup.batch_size)]
        return [
            crew.submit(_read_row, row, *place) for row, place in zip(rows, chosen, strict=True)
        ]

    try:
        with ThreadPoolExecutor(setup.threads) as crew:
            under_way = [begin(0), begin(1)]
            for step in itertools.count(2):
                for read in under_way.pop(0):
                    read.result()
                yield buffers[step % len(buffers)]
                under_way.append(begin(step))
    finally:
        for file in files:
            os.close(file)


def _read_row(row: NDArray[np.uint8], file: int, start: int) -> None:
    """Read one volume whole."""
    done = 0
    while done < row.nbytes:
        done += os.preadv(file, [row.data[done:]], start + done)


def contenders(setup: Setup) -> list[Contender]:
    """List everybody who competes, the limit first."""
    whole, few = setup.volumes, max(4 * setup.batch_size, setup.volumes // 3)
    some = WARM_UP_BATCHES * setup.batch_size
    # Half of the draws go to three quarters of the volumes: one and a half epochs show them all,
    # after which every checksum has been compared once.
    fast = [
        ("npy float32", "npy-float32"),
        ("npy int16", "npy-int16"),
        ("blosc int16 (default)", "blosc-int16"),
    ]
    slow = [
        ("DataLoader + WeightedRandomSampler, .npy", lambda: weighted_torch(setup, read_npy)),
        ("webdataset RandomMix, .npy", lambda: random_mix(setup)),
        ("DataLoader + WeightedRandomSampler, .nii.gz", lambda: weighted_torch(setup, read_nifti)),
    ]
    return [
        Contender(name=LIMIT, batches=lambda: preadv_limit(setup), volumes=whole, warm_up=whole),
        *(
            Contender(
                name=f"this loader, {name}",
                batches=partial(ours, setup, form),
                volumes=whole,
                warm_up=whole + whole // 2 + some,
            )
            for name, form in fast
        ),
        *(
            Contender(name=name, batches=batches, volumes=few, warm_up=some)
            for name, batches in slow
        ),
    ]


def measure(setup: Setup, *, rounds: int) -> dict[str, list[float]]:
    """Let everybody deliver in turn.

    Returns:
        Name -> volumes per second in each round.
    """
    crowd = contenders(setup)
    rates: dict[str, list[float]] = {contender.name: [] for contender in crowd}
    for number in range(rounds + 1):
        for contender in crowd:
            rate = _rate(contender, setup.batch_size)
            # The first round fills the page cache.
            if number:
                rates[contender.name].append(rate)
            _say(f"round {number} of {rounds}: {contender.name}: {rate:.1f}/s")
    return rates


def _rate(contender: Contender, batch_size: int) -> float:
    """Start one contender alone, let it warm up, and give its volumes per second.

    Whoever is not measured is not running: worker processes that read ahead for a later round would
    slow down everybody else.
    """
    stream = contender.batches()
    for _ in range(contender.warm_up // batch_size):
        next(stream)
    count = contender.volumes // batch_size
    started = time.perf_counter()
    for _ in range(count):
        next(stream)
    seconds = time.perf_counter() - started
    close = getattr(stream, "close", None)
    if close is not None:
        close()
    return count * batch_size / seconds


def table(setup: Setup, rates: dict[str, list[float]]) -> str:
    """Write the figures as a Markdown table."""
    lines = [
        "| | volumes/s | GB/s of float32 | of the limit |",
        "|---|---:|---:|---:|",
    ]
    for name, values in rates.items():
        rate = statistics.median(values)
        ratio = statistics.median(v / w for v, w in zip(values, rates[LIMIT], strict=True))
        gigabytes = rate * setup.float_bytes / 1e9
        lines.append(f"| {name} | {rate:.1f} | {gigabytes:.2f} | {ratio:.2f} |")
    return "\n".join(lines)


def _say(text: str, end: str = "\n") -> None:
    """Report progress beside the table."""
    print(text, end=end, file=sys.stderr, flush=True)


def main() -> None:
    """Prepare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=int, default=96)
    parser.add_argument("--side", type=int, default=128, help="voxels along each axis")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2, help="threads, and worker processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the volumes here for another run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setup = Setup(
            folder=options.folder or Path(temporary),
            volumes=options.volumes,
            side=options.side,
            batch_size=options.batch_size,
            threads=options.threads,
        )
        prepare(setup)
        print(table(setup, measure(setup, rounds=options.rounds)))


if __name__ == "__main__":
    main()
