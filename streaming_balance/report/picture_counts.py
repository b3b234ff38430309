"""The numbers behind the pictures of a plan: counted per class, before and after balancing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.keys import stream_key
from streaming_balance.plan.labels import read_labels
from streaming_balance.plan.options import listed
from streaming_balance.plan.permutation import FeistelPermutation

# Independent draws stray hardly farther than this many standard deviations from their mean.
DEVIATIONS_SHOWN = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSamples:
    """Which classes every sample has: one each, or any number of them."""

    classes: tuple[str, ...]
    """`(K,)` names in class order."""
    labels: NDArray[Any]
    """`(N,)` class numbers, -1 for none, or `(N, K)` with 1 where the sample has the class."""

    def count(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the classes among some samples: `(K,)`."""
        mine = self.labels[samples]
        if mine.ndim == 1:
            return np.bincount(mine[mine >= 0], minlength=len(self.classes)).astype(np.int64)
        return np.asarray(mine.sum(axis=0), dtype=np.int64)

    def weigh(self, times: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the classes where sample i counts `times[i]` times: `(K,)`."""
        if self.labels.ndim == 2:
            return np.asarray(times @ self.labels.astype(np.int64), dtype=np.int64)
        counts = np.zeros(len(self.classes), dtype=np.int64)
        labelled = self.labels >= 0
        np.add.at(counts, self.labels[labelled], times[labelled])
        return counts

    def having(self, number: int) -> NDArray[np.int64]:
        """List the samples that have a class: `(n,)` sample numbers."""
        column = self.labels == number if self.labels.ndim == 1 else self.labels[:, number] > 0
        return np.flatnonzero(column).astype(np.int64)


def labelled_samples(
    plan: BalancedPlan, labels: ArrayLike, classes: Sequence[Any] | None = None
) -> LabelledSamples:
    """Say which classes the samples of a plan have.

    Args:
        plan: the plan; it may leave out some of the samples.
        labels: as given to the plan; or, where `classes` names the classes, `(N,)` class numbers
            or names, or `(N, K)` with 1 where a sample has a class.
        classes: `(K,)` names in class order; found in the labels if None.

    Raises:
        ConfigError: labels that fit neither the plan nor the classes.

    Examples:
        >>> plan = BalancedPlan.from_labels(["HGG", "HGG", "LGG"], global_batch_size=2)
        >>> found = labelled_samples(plan, ["HGG", "HGG", "LGG"])
        >>> found.classes, found.labels.tolist()
        (('HGG', 'LGG'), [0, 0, 1])
    """
    if classes is None:
        read = read_labels(labels, unknown=plan.strategy.unknown)
        names = tuple(map(str, read.classes))
        array = read.codes if read.membership is None else read.membership
    else:
        names = tuple(map(str, classes))
        array = _numbered(np.asarray(labels), names)
    if len(array) != plan.num_samples:
        raise ConfigError(
            f"there are {len(array)} labels for a plan over {plan.num_samples} samples; give the "
            f"labels it was made from."
        )
    return LabelledSamples(classes=names, labels=array)


def _numbered(labels: NDArray[Any], classes: tuple[str, ...]) -> NDArray[Any]:
    """Give class numbers, from numbers or from names; columns of 0 and 1 are left as they are."""
    if labels.ndim == 2 and labels.shape[1] == len(classes) and np.isin(labels, (0, 1)).all():
        return labels
    if labels.ndim != 1:
        raise ConfigError(
            f"labels have shape {labels.shape} for {len(classes)} classes; give (N,) class "
            f"numbers or names, or (N, {len(classes)}) with 0 and 1."
        )
    if labels.dtype.kind in "iu":
        if labels.size and not 0 <= labels.min() <= labels.max() < len(classes):
            raise ConfigError(
                f"labels run from {labels.min()} to {labels.max()}, but classes names "
                f"{len(classes)}: class numbers run from 0 to {len(classes) - 1}."
            )
        return labels.astype(np.int64)
    names, places = np.unique(labels.astype(np.str_), return_inverse=True)
    unknown = [name for name in names.tolist() if name not in classes]
    if unknown:
        raise ConfigError(
            f"labels hold {unknown[0]!r}, which is none of the classes {listed(classes[:20])}."
            f"{did_you_mean(unknown[0], classes)}"
        )
    numbers = np.array([classes.index(name) for name in names.tolist()], dtype=np.int64)
    return numbers[places]


def times_in_epoch(plan: BalancedPlan, *, epoch: int) -> NDArray[np.int64]:
    """Count how often every sample is delivered in one epoch: `(N,)`.

    Examples:
        >>> plan = BalancedPlan.from_labels(["HGG"] * 3 + ["LGG"], global_batch_size=6)
        >>> times_in_epoch(plan, epoch=5).tolist()
        [1, 1, 1, 3]
    """
    return plan.exposure(epoch + 1, 0) - plan.exposure(epoch, 0)


def planned_batches(
    plan: BalancedPlan, samples: LabelledSamples, *, epoch: int, num_batches: int
) -> NDArray[np.int64]:
    """Count the classes in the first global batches of an epoch: `(T, K)`, T at most its steps."""
    steps = min(num_batches, plan.num_steps(epoch))
    return np.stack([samples.count(plan.batch(epoch, step)) for step in range(steps)])


def shuffled_batches(
    plan: BalancedPlan, samples: LabelledSamples, *, num_batches: int
) -> NDArray[np.int64]:
    """Count the classes in batches of plain shuffling, as `DataLoader(shuffle=True)` makes them.

    Every sample comes once before any comes twice, in a keyed order, in full batches only.

    Args:
        plan: gives seed, global batch size and number of samples.
        samples: their classes.
        num_batches: how many batches, T, over as many passes as it takes.

    Returns:
        `(T, K)` counts.
    """
    size = min(plan.global_batch_size, plan.num_samples)
    steps = plan.num_samples // size
    counts = []
    for number in range(num_batches):
        pass_number, step = divmod(number, steps)
        key = stream_key(plan.seed, "plain shuffling", pass_number)
        places = np.arange(step * size, (step + 1) * size, dtype=np.int64)
        counts.append(samples.count(FeistelPermutation(plan.num_samples, key=key)(places)))
    return np.stack(counts)


def times_seen(
    exposure: NDArray[np.int64], members: NDArray[np.int64], owners: NDArray[np.intp] | None
) -> NDArray[np.int64]:
    """Give how often each patient of a class was seen with it, or each sample without patients.

    Args:
        exposure: `(N,)` deliveries of every sample.
        members: `(n,)` sample numbers of the class.
        owners: `(N,)` patient number of every sample, or None.

    Returns:
        `(m,)` deliveries, one per patient (or sample) of the class.
    """
    if owners is None:
        return exposure[members]
    _, places = np.unique(owners[members], return_inverse=True)
    times = np.zeros(int(places.max(initial=-1)) + 1, dtype=np.int64)
    np.add.at(times, places, exposure[members])
    return times


@dataclass(frozen=True, slots=True, kw_only=True)
class ExposureHistogram:
    """How many patients (or samples) of a class were seen how often."""

    first: int
    """Times seen that the first bar begins with."""
    width: int
    """Whole numbers of times that one bar covers."""
    counted: NDArray[np.int64]
    """`(bars,)` patients (or samples)."""
    expected: NDArray[np.float64] | None
    """`(bars,)` mean number under independent draws with the same shares; None if not known."""

    @property
    def centres(self) -> NDArray[np.float64]:
        """`(bars,)` middle of the times that each bar covers."""
        starts = self.first + self.width * np.arange(len(self.counted))
        return np.asarray(starts + (self.width - 1) / 2, dtype=np.float64)


def exposure_histogram(
    times: NDArray[np.int64], *, total: int, compare: bool, max_bars: int
) -> ExposureHistogram:
    """Count how often is how frequent, beside what independent draws would give.

    Args:
        times: `(n,)` deliveries of each patient (or sample) of a class, n at least 1.
        total: deliveries of all classes.
        compare: whether every member of the class had the same chance, so that independent draws
            can be said to be binomial.
        max_bars: from here on a bar covers several numbers of times.

    Returns:
        The histogram, wide enough for both.

    Examples:
        >>> found = exposure_histogram(np.array([1, 1, 2]), total=4, compare=True, max_bars=40)
        >>> found.first, found.counted.tolist(), found.expected.round(3).tolist()
        (0, [0, 2, 1, 0, 0], [0.593, 1.185, 0.889, 0.296, 0.037])
    """
    mean = float(times.mean())
    stray = DEVIATIONS_SHOWN * math.sqrt(mean) if compare else 0.0
    first = min(int(times.min()), max(0, math.floor(mean - stray)))
    last = max(int(times.max()), min(total, math.ceil(mean + stray)))
    width = -(-(last - first + 1) // max_bars)
    bars = -(-(last - first + 1) // width)
    counted = np.bincount((times - first) // width, minlength=bars)
    expected = None
    if compare:
        chances = _binomial(first, first + bars * width, trials=total, mean=mean)
        expected = len(times) * chances.reshape(bars, width).sum(axis=1)
    return ExposureHistogram(first=first, width=width, counted=counted, expected=expected)


def _binomial(first: int, stop: int, *, trials: int, mean: float) -> NDArray[np.float64]:
    """Give the chances of `first` to `stop - 1` successes in independent trials."""
    chance = mean / trials if trials else 0.0
    successes = range(first, stop)
    if not 0 < chance < 1:
        return np.array([float(count == round(mean)) for count in successes])
    hit, miss, whole = math.log(chance), math.log1p(-chance), math.lgamma(trials + 1)
    return np.array(
        [
            math.exp(
                whole
                - math.lgamma(count + 1)
                - math.lgamma(trials - count + 1)
                + count * hit
                + (trials - count) * miss
            )
            if count <= trials
            else 0.0
            for count in successes
        ]
    )
