"""Who is mixed with whom, by how much and where: a pure function of seed, epoch, step and slot.

Batches are mixed or not as whole global batches, and in a mixed one every sample is the partner of
exactly one other of its rank's part. So in mixed batches everybody has been a partner as often as
delivered, however many ranks shared them: this is how an audit knows it from the state alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.keys import stream_key, words
from streaming_balance.plan.options import check_number, listed
from streaming_balance.plan.tables import LabelledSplits
from streaming_balance.training.beta import (
    UNIFORMS_PER_DRAW,
    exponential_less_1,
    logarithm,
    symmetric_beta,
    unit_interval,
)

MIXINGS = ("mixup", "cutmix")
# Two Philox blocks of four words belong to a slot: four for lambda, three for the centre of the
# box, one for the order of partners.
WORDS_PER_SLOT = 8
BLOCKS_PER_SLOT = 2
WORDS_PER_BLOCK = 4
MAX_AXES = 3
# Reading a stream on past slots that are not asked for is cheaper than opening it at each.
SLOTS_READ_PER_SLOT_USED = 64
LARGEST_ALPHA = 1e9
# A side that is whole in exact arithmetic must not lose a voxel to rounding.
SIDE_SLACK = 1e-9
_PROBABILITY_SHIFT = np.uint64(11)
_PROBABILITY_STEPS = 2**53
_HALF_WORD = np.uint64(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """How batches are mixed: a checked `mixing=` of the loader.

    Raises:
        ConfigError: names the value that is wrong.

    Examples:
        >>> Mixing(name="cutmix").settings()
        {'name': 'cutmix', 'alpha': 1.0, 'probability': 1.0}
    """

    name: str
    """`mixup` blends whole images; `cutmix` pastes a box of one image into another."""
    alpha: float = 1.0
    """Lambda is drawn from Beta(alpha, alpha); above 0, and 1 is uniform."""
    probability: float = 1.0
    """Part of the global batches that are mixed, in [0, 1]."""

    def __post_init__(self) -> None:
        if self.name not in MIXINGS:
            raise ConfigError(
                f"mixing: name is {self.name!r}; allowed: {listed(MIXINGS)}."
                + did_you_mean(str(self.name), MIXINGS)
            )
        alpha = check_number(
            self.alpha, setting=f"{self.name}: alpha", least=0, most=LARGEST_ALPHA, open_below=True
        )
        probability = check_number(
            self.probability, setting=f"{self.name}: probability", least=0, most=1
        )
        # Plain floats, so that states compare and are written alike: 1 is 1.0.
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "probability", probability)

    def settings(self) -> dict[str, Any]:
        """Give the settings as plain values."""
        return asdict(self)


def parse_mixing(mixing: object) -> Mixing | None:
    """Read the `mixing=` of a loader.

    Args:
        mixing: None, or a mapping with `name` and perhaps `alpha` and `probability`.

    Raises:
        ConfigError: not a mapping, without a name, with an unknown key or a wrong value.

    Examples:
        >>> parse_mixing({"name": "mixup", "alpha": 0.2}).alpha
        0.2
    """
    if mixing is None:
        return None
    known = [field.name for field in fields(Mixing)]
    if not isinstance(mixing, Mapping):
        raise ConfigError(
            f"mixing is {mixing!r}; it must be None or a mapping such as "
            f"{{'name': 'cutmix', 'alpha': 1.0}}."
        )
    for key in mixing:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ConfigError(f"mixing has the key {key!r}; allowed: {listed(known)}.{hint}")
    if "name" not in mixing:
        raise ConfigError(f"mixing is {dict(mixing)!r}, without a name; use {listed(MIXINGS)}.")
    return Mixing(**mixing)


def check_can_mix(
    plan: BalancedPlan, shards: LabelledSplits, *, split: str, num_ranks: int
) -> None:
    """Refuse to mix where somebody would have no partner, and what is not for training.

    Args:
        plan: which samples make each global batch.
        shards: the data set.
        split: name of the split.
        num_ranks: number of data-parallel ranks.

    Raises:
        ConfigError: names what is too small or not for training, and the way out.
    """
    if split not in shards.train_splits:
        raise ConfigError(
            f"mixing is asked for on split {split!r}, which is not for training (those that are: "
            f"{listed(shards.train_splits)}). Leave mixing out to evaluate on patients as they are."
        )
    least = plan.batch_size(0, plan.num_steps(0) - 1)
    if least // num_ranks < 2:
        raise ConfigError(
            f"mixing needs two samples on every rank, but the smallest global batch has {least} "
            f"for {num_ranks} ranks. Use global_batch_size >= {2 * num_ranks} (and last: full), "
            f"fewer ranks, or no mixing."
        )


def mixed_steps(mixing: Mixing, *, seed: int, epoch: int, first: int, stop: int) -> NDArray[Any]:
    """Say which global batches of an epoch are mixed.

    Args:
        mixing: with the probability of it.
        seed: the run's seed.
        epoch: number of the epoch.
        first: first step asked for.
        stop: step after the last one asked for.

    Returns:
        `(stop - first,)` bools.

    Examples:
        >>> half = Mixing(name="mixup", probability=0.5)
        >>> mixed_steps(half, seed=1, epoch=0, first=0, stop=8).tolist()
        [False, True, True, False, False, False, False, False]
    """
    block, skipped = divmod(first, WORDS_PER_BLOCK)
    key = stream_key(seed, "mixing step", epoch)
    drawn = words(key, skipped + stop - first, first_block=block)[skipped:]
    threshold = np.uint64(int(mixing.probability * _PROBABILITY_STEPS))
    return np.asarray((drawn >> _PROBABILITY_SHIFT) < threshold)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """What the rows of a rank batch are mixed with."""

    partner: NDArray[np.int64]
    """`(b,)` row of the batch that each row is mixed with; every row is a partner once."""
    weight: NDArray[np.float64]
    """`(b,)` lambda as drawn, in [0, 1]: the part of its own that a row keeps."""
    places: NDArray[np.uint64]
    """`(b, 3)` raw words that say where boxes have their centres."""

    @property
    def is_identity(self) -> bool:
        """Whether every row keeps all of its own."""
        return bool((self.weight == 1).all())


def unmixed(num_rows: int) -> Pairs:
    """Pair every row with itself."""
    return Pairs(
        partner=np.arange(num_rows, dtype=np.int64),
        weight=np.ones(num_rows),
        places=np.zeros((num_rows, MAX_AXES), dtype=np.uint64),
    )


def draw_pairs(mixing: Mixing, *, seed: int, epoch: int, step: int, slots: Sequence[int]) -> Pairs:
    """Draw partners, lambdas and centres for the rows of a rank batch.

    The rows stand in a circle in a keyed order, and each has the next one as its partner: nobody
    is mixed with itself where there are two.

    Args:
        mixing: what is mixed, and how lambda is distributed.
        seed: the run's seed.
        epoch: of the global batch.
        step: of the global batch.
        slots: `(b,)` positions in the global batch. Lambda and centre of a row depend on its slot
            alone; its partner is one of these rows, so it depends on which rows are together.

    Examples:
        >>> pairs = draw_pairs(Mixing(name="mixup"), seed=1, epoch=0, step=0, slots=[0, 1, 2, 3])
        >>> sorted(pairs.partner.tolist()), any(pairs.partner == np.arange(4))
        ([0, 1, 2, 3], False)
    """
    raw = _words_of_slots(stream_key(seed, "mixing", mixing.name, epoch, step), slots)
    order = np.argsort(raw[:, -1], kind="stable")
    partner = np.empty(len(order), dtype=np.int64)
    partner[order] = np.roll(order, -1)
    uniforms = unit_interval(raw[:, :UNIFORMS_PER_DRAW])
    return Pairs(
        partner=partner,
        weight=symmetric_beta(mixing.alpha, uniforms),
        places=raw[:, UNIFORMS_PER_DRAW : UNIFORMS_PER_DRAW + MAX_AXES],
    )


def _words_of_slots(key: int, slots: Sequence[int]) -> NDArray[np.uint64]:
    """Read the `(b, 8)` words that belong to slots of a stream."""
    first, count = min(slots), max(slots) - min(slots) + 1
    if count > SLOTS_READ_PER_SLOT_USED * len(slots):
        blocks = (BLOCKS_PER_SLOT * slot for slot in slots)
        return np.stack([words(key, WORDS_PER_SLOT, first_block=block) for block in blocks])
    stream = words(key, WORDS_PER_SLOT * count, first_block=BLOCKS_PER_SLOT * first)
    return np.asarray(stream.reshape(count, WORDS_PER_SLOT)[np.asarray(slots) - first])


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """One box of voxels per row, clipped at the border."""

    low: NDArray[np.int64]
    """`(b, ndim)` first voxel of the box along each axis."""
    high: NDArray[np.int64]
    """`(b, ndim)` voxel after the last one along each axis."""
    kept: NDArray[np.float64]
    """`(b,)` part of the voxels outside the box, in [0, 1]."""


def box_centres(places: NDArray[np.uint64], space: tuple[int, ...]) -> NDArray[np.int64]:
    """Turn raw words into voxels, each of the space as likely as any other.

    Args:
        places: `(b, 3)` raw words.
        space: (D, H, W) or (H, W).

    Returns:
        `(b, ndim)` voxels.

    Examples:
        >>> box_centres(np.array([[0, 2**63, 2**64 - 1]], dtype=np.uint64), (8, 8, 8)).tolist()
        [[0, 4, 7]]
    """
    sides = np.array(space, dtype=np.uint64)
    return np.asarray(
        ((places[:, : len(space)] >> _HALF_WORD) * sides) >> _HALF_WORD, dtype=np.int64
    )


def cut_boxes(
    weight: NDArray[np.float64], centres: NDArray[np.int64], space: tuple[int, ...]
) -> Boxes:
    """Give the boxes whose unclipped volume is 1 - lambda of the space.

    Args:
        weight: `(b,)` lambda as drawn, in [0, 1].
        centres: `(b, ndim)` voxels.
        space: (D, H, W) or (H, W).

    Returns:
        Boxes of side floor(S (1 - lambda)^(1 / ndim)) along an axis of S voxels, clipped, and the
        part of the voxels that lies outside each.

    Source:
        Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
        Features", ICCV 2019, for images; the root is that of the number of axes, so that the box
        of a volume has the volume it should, and lambda is what the clipped box leaves.

    Examples:
        >>> boxes = cut_boxes(np.array([0.875]), np.array([[4, 4, 4]]), (8, 8, 8))
        >>> boxes.low.tolist(), boxes.high.tolist(), boxes.kept.tolist()
        ([[2, 2, 2]], [[6, 6, 6]], [0.875])
    """
    sides = np.array(space, dtype=np.int64)
    scale = _root(1 - weight, len(space))
    lengths = np.floor(scale[:, None] * sides + SIDE_SLACK).astype(np.int64)
    begin = centres - lengths // 2
    low, high = np.maximum(begin, 0), np.minimum(begin + lengths, sides)
    return Boxes(low=low, high=high, kept=1 - (high - low).prod(axis=1) / sides.prod())


def _root(values: NDArray[np.float64], degree: int) -> NDArray[np.float64]:
    """Give the root of numbers in [0, 1], the same bits on every machine."""
    if degree == 2:
        return np.asarray(np.sqrt(values))
    # Below this nothing is cut from any image, and its logarithm ends.
    positive = np.maximum(values, np.finfo(np.float64).tiny)
    return np.asarray(1 + exponential_less_1(logarithm(positive) / degree))
