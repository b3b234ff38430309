"""Balance streams that nobody indexed, in every way people do, and compare what comes out.

    python tools/benchmark_streams.py --volumes 64 --samples 20000 --rounds 5

Two sets of shards: many small samples, 89 of 100 of one class, in blocks, on which shares, waste
and coverage are counted; and volumes of 4 x side^3 int16 on which bytes per second are measured,
decoded, in one process, with a warm page cache. All ask for 50/50 and get samples from webdataset
unless they are of this package. Everybody delivers in turn in every round; MB/s are medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

from streaming_balance.stream.pipeline import Stream, stream

Sample = dict[str, Any]
TARGET = {"0": 1, "1": 1}
RARE_PER_HUNDRED = 11
SAMPLES_PER_BLOCK = 50
BATCH_SIZE = 8
# How much tf.data trusts its guess of the class frequencies before it saw any sample: as if it had
# seen this many of each class.
SMOOTHING = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """One set of samples, as mixed tars and as tars per class."""

    folder: Path
    """Where they lie."""
    labels: tuple[int, ...]
    """Class of every sample, in the order of the stream."""

    @property
    def mixed(self) -> str:
        """Pattern of the tars with both classes."""
        return str(self.folder / "mixed-*.tar")

    @property
    def piped(self) -> list[str]:
        """The same tars as the output of a program."""
        return [f"pipe:cat {path}" for path in sorted(self.folder.glob("mixed-*.tar"))]

    def of_class(self, label: int) -> str:
        """Pattern of the tars of one class."""
        return str(self.folder / f"class{label}-*.tar")

    @property
    def counts(self) -> dict[str, int]:
        """Samples per class."""
        return {str(label): count for label, count in Counter(self.labels).items()}

    @property
    def num_even(self) -> int:
        """Samples of an even half of each class: what one pass is worth to everybody."""
        return 2 * min(self.counts.values())


class Reads:
    """Counts the samples that came out of tars."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, sample: Sample) -> Sample:
        """Count one."""
        self.count += 1
        return sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one contender gave."""

    labels: list[int]
    """Class of every sample, in order."""
    keys: list[str]
    """Its key, in order."""
    num_read: int
    """Samples that came out of tars for it."""
    num_bytes: int
    """Bytes of the arrays."""
    seconds: float
    """How long it took."""


def blocked_labels(count: int) -> tuple[int, ...]:
    """Give labels in blocks, as hospitals deliver them; blocks in random order, by a fixed seed."""
    rare = count * RARE_PER_HUNDRED // 100
    labels = [1] * rare + [0] * (count - rare)
    blocks = [labels[at : at + SAMPLES_PER_BLOCK] for at in range(0, count, SAMPLES_PER_BLOCK)]
    random.Random(1).shuffle(blocks)
    return tuple(label for block in blocks for label in block)


def prepare(folder: Path, labels: tuple[int, ...], shape: tuple[int, ...]) -> Shards:
    """Write the shards with webdataset."""
    folder.mkdir(parents=True)
    made = np.random.default_rng(0).integers(-900, 900, shape, dtype=np.int16)
    limits: dict[str, Any] = {"maxsize": 1 << 29, "maxcount": max(1, len(labels) // 8)}
    writers = {
        name: wds.ShardWriter(str(folder / f"{name}-%04d.tar"), verbose=0, **limits)
        for name in ("mixed", "class0", "class1")
    }
    for number, label in enumerate(labels):
        sample = {"__key__": f"P{number:06d}", "cls": label, "npy": made}
        for name in ("mixed", f"class{label}"):
            writers[name].write(sample)
    for writer in writers.values():
        writer.close()
    return Shards(folder=folder, labels=labels)


def ours(
    chain: Callable[[Stream, dict[str, int]], Stream], shards: Shards, reads: Reads
) -> Iterator[Any]:
    """Deliver one pass of a chain of this package."""
    with chain(stream(shards.mixed, seed=1), shards.counts).decode() as chained:
        yield from chained
        reads.count = chained.stats()["totals"]["read"]


def theirs(pattern: str, reads: Reads) -> Any:  # noqa: ANN401 - webdataset has no types
    """Read with webdataset, decoded only once a sample was chosen."""
    urls = sorted(str(path) for path in Path(pattern).parent.glob(Path(pattern).name))
    return wds.WebDataset(urls, shardshuffle=False, empty_check=False).map(reads)


def random_mix(shards: Shards, reads: Reads) -> Iterator[Any]:
    """Mix two endless streams, one of each class, by coin."""
    random.seed(1)
    streams = [theirs(shards.of_class(label), reads).repeat().decode() for label in (0, 1)]
    return islice(iter(wds.RandomMix(streams, [0.5, 0.5])), shards.num_even)


def select(shards: Shards, reads: Reads) -> Iterator[Any]:
    """Keep samples by coin; the frequencies are known."""
    coin, counts = random.Random(1), shards.counts
    least = min(counts.values())

    def is_kept(sample: Sample) -> bool:
        return coin.random() < least / counts[sample["cls"].decode()]

    return iter(theirs(shards.mixed, reads).select(is_kept).decode())


def tensorflow_style(shards: Shards, reads: Reads) -> Iterator[Any]:
    """Keep by coin at target / frequency; frequencies are smoothed counts of what came so far."""
    coin, counts = random.Random(1), dict.fromkeys(TARGET, SMOOTHING)

    def is_kept(sample: Sample) -> bool:
        label = sample["cls"].decode()
        counts[label] += 1
        return coin.random() < min(counts.values()) / counts[label]

    return iter(theirs(shards.mixed, reads).select(is_kept).decode())


def running_rejection(shards: Shards, reads: Reads) -> Iterator[Any]:
    """Under-sample by coin at target / frequency of what came so far, without any smoothing."""
    coin, counts = random.Random(1), Counter[str]()

    def is_kept(sample: Sample) -> bool:
        label = sample["cls"].decode()
        counts[label] += 1
        return coin.random() < min(counts.values()) / counts[label]

    return iter(theirs(shards.mixed, reads).select(is_kept).decode())


def poisson_copies(shards: Shards, reads: Reads) -> Iterator[Any]:
    """Over-sample: each sample comes Poisson(target / frequency) times, by running counts."""
    dice, counts = np.random.default_rng(1), Counter[str]()

    def copied(samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            label = sample["cls"].decode()
            counts[label] += 1
            rate = max(counts.values()) / counts[label]
            for _ in range(int(dice.poisson(rate))):
                yield dict(sample)

    return iter(theirs(shards.mixed, reads).compose(copied).decode())


def as_they_come(shards: Shards, reads: Reads) -> Iterator[Any]:
    """Deliver every sample once with webdataset."""
    return iter(theirs(shards.mixed, reads).decode())


def ours_from_pipes(shards: Shards, reads: Reads) -> Iterator[Any]:
    """Deliver every sample once with this package, from programs."""
    with stream(shards.piped, allow_pipe=True).decode() as chained:
        yield from chained
        reads.count = chained.stats()["totals"]["read"]


def theirs_from_pipes(shards: Shards, reads: Reads) -> Iterator[Any]:
    """Deliver every sample once with webdataset, from programs."""
    plain = wds.WebDataset(shards.piped, shardshuffle=False, empty_check=False)
    return iter(plain.map(reads).decode())


CONTENDERS: dict[str, Callable[[Shards, Reads], Iterator[Any]]] = {
    "this package, as they come": partial(ours, lambda plain, _: plain),
    "webdataset, as they come": as_they_come,
    "this package, as they come through `cat`": ours_from_pipes,
    "webdataset, as they come through `cat`": theirs_from_pipes,
    "this package, `accept`, frequencies known": partial(
        ours, lambda plain, counts: plain.accept(TARGET, frequencies=counts)
    ),
    "this package, `accept`, counted": partial(ours, lambda plain, _: plain.accept(TARGET)),
    "this package, `repeat`, frequencies known": partial(
        ours, lambda plain, counts: plain.repeat(TARGET, frequencies=counts)
    ),
    "this package, `replay`": partial(
        ours,
        lambda plain, _: plain.replay(TARGET, batch_size=BATCH_SIZE, wait_for_classes=True),
    ),
    "this package, `reservoir`, ratio 1": partial(
        ours, lambda plain, counts: plain.reservoir(min(counts.values()), ratio=1.0)
    ),
    "webdataset, RandomMix of shards per class": random_mix,
    "webdataset, rejection by `.select`, frequencies known": select,
    "rejection as in tf.data, counted": tensorflow_style,
    "rejection as in pytorch-resample, counted": running_rejection,
    "Poisson copies as in pytorch-resample, counted": poisson_copies,
}


def delivered(make: Callable[[Shards, Reads], Iterator[Any]], shards: Shards) -> Outcome:
    """Let one contender deliver a pass, and write down what came."""
    reads, labels, keys, num_bytes = Reads(), list[int](), list[str](), 0
    started = time.perf_counter()
    for item in make(shards, reads):
        is_batch = isinstance(item["__key__"], list)
        labels += item["cls"].tolist() if is_batch else [item["cls"]]
        keys += item["__key__"] if is_batch else [item["__key__"]]
        num_bytes += item["npy"].nbytes
    return Outcome(
        labels=labels,
        keys=keys,
        num_read=reads.count,
        num_bytes=num_bytes,
        seconds=time.perf_counter() - started,
    )


def measure(small: Shards, volumes: Shards, rounds: int) -> dict[str, tuple[Outcome, list[float]]]:
    """Let everybody deliver in turn.

    Returns:
        Name -> what came of the small samples, and MB/s of volumes in each round.
    """
    found: dict[str, tuple[Outcome, list[float]]] = {}
    for number in range(rounds + 1):
        for name, make in CONTENDERS.items():
            if not number:
                found[name] = (delivered(make, small), [])
            outcome = delivered(make, volumes)
            rate = outcome.num_bytes / outcome.seconds / 1e6
            # The first round fills the page cache.
            if number:
                found[name][1].append(rate)
            print(f"round {number} of {rounds}: {name}: {rate:.0f} MB/s", file=sys.stderr)
    return found


def table(small: Shards, found: dict[str, tuple[Outcome, list[float]]]) -> str:
    """Write the figures as a Markdown table."""
    lines = [
        "| | class error, points | worst batch | read per delivered | patients seen | MB/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, (outcome, rates) in found.items():
        labels = outcome.labels
        error = abs(sum(labels) / len(labels) - 0.5) * 100
        batches = [labels[at : at + BATCH_SIZE] for at in range(0, len(labels), BATCH_SIZE)]
        worst = max(abs(sum(batch) / len(batch) - 0.5) for batch in batches) * 100
        read = outcome.num_read / len(labels)
        seen = len(set(outcome.keys)) / len(small.labels) * 100
        rate = statistics.median(rates)
        lines.append(
            f"| {name} | {error:.2f} | {worst:.0f} | {read:.2f} | {seen:.0f} % | {rate:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prepare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000, help="small samples, for shares")
    parser.add_argument("--volumes", type=int, default=64, help="volumes, for speed")
    parser.add_argument("--side", type=int, default=96, help="voxels along each axis")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary)
        small = prepare(folder / "small", blocked_labels(options.samples), (4,))
        side = (4, options.side, options.side, options.side)
        labels = tuple(int(number % 4 == 0) for number in range(options.volumes))
        volumes = prepare(folder / "volumes", labels, side)
        print(table(small, measure(small, volumes, options.rounds)))


if __name__ == "__main__":
    main()
