"""The plan: for any epoch and step, which samples make the global batch."""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan import promises
from streaming_balance.plan.draws import make_draws
from streaming_balance.plan.keys import check_seed, stream_key
from streaming_balance.plan.members import ClassTable, sized_table
from streaming_balance.plan.options import check_number
from streaming_balance.plan.ranks import check_ranks, rank_slots
from streaming_balance.plan.section import parse_balance
from streaming_balance.plan.shape import check_batch_size
from streaming_balance.plan.strategy import Strategy
from streaming_balance.plan.tables import (
    LabelledSplits,
    check_patients_known,
    labels_table,
    named_by_class,
    names_left_out,
    split_table,
    weights_column,
)
from streaming_balance.plan.unit_weights import unit_weights

PLAN_VERSION = 1

Balance = str | Mapping[str, Any] | Strategy | None


class BalancedPlan:
    """Which samples make each global batch: a frozen value, a pure function of (epoch, step).

    Build one with `from_labels`, `for_shards` or `from_class_sizes`. A plan holds no position and
    no generator; asking for any batch, in any order, from any thread, gives the same members.

    Examples:
        Two classes of BraTS 2018 size; every batch of 8 holds 4 and 4.

        >>> labels = ["LGG"] * 75 + ["HGG"] * 210
        >>> plan = BalancedPlan.from_labels(labels, global_batch_size=8, seed=42)
        >>> plan.classes, plan.num_steps(0), plan.quotas(0, 17).tolist()
        (['HGG', 'LGG'], 36, [4, 4])
        >>> len(plan.batch(0, 0)), len(plan.rank_batch(0, 0, rank=1, num_ranks=3))
        (8, 3)
    """

    __slots__ = (
        "_draws",
        "_origin",
        "_settings",
        "_table",
        "_weights",
        "classes",
        "digest",
        "global_batch_size",
        "guarantees",
        "num_samples",
        "seed",
        "sizes",
        "strategy",
        "unit",
        "warnings",
    )

    classes: list[Any]
    """Labels in class order."""
    digest: str
    """Hash of samples, patients, labels and settings; equal digests mean equal batches."""
    global_batch_size: int
    """Samples in a full global batch, over all ranks."""
    guarantees: Mapping[str, bool]
    """Which promises this plan keeps."""
    num_samples: int
    """Samples in the split, N."""
    seed: int
    """The run's seed."""
    sizes: Mapping[Any, int]
    """Label -> number of units, in class order."""
    strategy: Strategy
    """What shares are asked for."""
    unit: str
    """What a class cycles over: `patient` or `sample`."""
    warnings: tuple[str, ...]
    """What works as asked and is probably not meant, in sentences."""

    def __init__(
        self,
        table: ClassTable,
        *,
        strategy: Strategy,
        seed: int,
        global_batch_size: int,
        settings: Mapping[str, Any],
        weights: NDArray[np.float64] | None = None,
    ) -> None:
        self._table, self._weights = table, weights
        self.strategy, self.seed = strategy, check_seed(seed)
        self.global_batch_size = check_batch_size(global_batch_size)
        self.classes, self.num_samples = list(table.classes), table.num_samples
        self.sizes = MappingProxyType(dict(zip(table.classes, table.sizes.values(), strict=True)))
        self.unit = "patient" if table.by_patient else "sample"
        self._draws = make_draws(
            table,
            strategy,
            seed=self.seed,
            global_batch_size=self.global_batch_size,
            weights=weights,
        )
        self.guarantees = MappingProxyType(promises.guarantees(strategy, table))
        self.warnings = promises.warnings(
            strategy, table, self._class_shares(0), global_batch_size=self.global_batch_size
        )
        self._origin = dict(settings)
        self._settings = {
            "version": PLAN_VERSION,
            "balance": strategy.settings(),
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            **self._origin,
        }
        text = json.dumps([self._settings, table.digest], sort_keys=True)
        self.digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @classmethod
    def from_labels(
        cls,
        labels: ArrayLike,
        *,
        global_batch_size: int,
        balance: Balance = "class_balanced",
        seed: int = 0,
        patients: ArrayLike | None = None,
        strata: ArrayLike | Mapping[str, ArrayLike] | None = None,
    ) -> BalancedPlan:
        """Plan over a list of labels; sample numbers are positions in it.

        Args:
            labels: `(N,)` one label per sample, numbers or text; or several per sample: a list
                of labels for each, or `(N, K)` zeros and ones.
            global_batch_size: samples in a global batch, over all ranks, at least 1.
            balance: a strategy's name, a mapping with `name` and options, a `data.balancing`
                section, a strategy value, or None for the natural order.
            seed: integer in [0, 2**64 - 1].
            patients: `(N,)` patient of every sample; a class then cycles over patients.
            strata: `(N,)` or `(N, S)` values, or name -> `(N,)`: what to balance jointly with
                the label.

        Raises:
            ConfigError: a value above is out of its range, or does not fit the labels.

        Examples:
            >>> plan = BalancedPlan.from_labels([0, 0, 0, 1], global_batch_size=2)
            >>> plan.quotas(0, 0).tolist()
            [1, 1]
        """
        strategy = parse_balance(balance)
        return cls(
            labels_table(labels, patients, strategy=strategy, strata=strata),
            strategy=strategy,
            seed=seed,
            global_batch_size=global_batch_size,
            settings={},
        )

    @classmethod
    def for_shards(
        cls,
        shards: LabelledSplits,
        *,
        global_batch_size: int,
        balance: Balance = "class_balanced",
        seed: int = 0,
        split: str = "train",
        exclude: Iterable[str] = (),
    ) -> BalancedPlan:
        """Plan over a split of a packed data set; sample numbers are rows of its sample table.

        Args:
            shards: an opened data set.
            global_batch_size: samples in a global batch, over all ranks, at least 1.
            balance: as in `from_labels`.
            seed: integer in [0, 2**64 - 1].
            split: name of the split; only a training split may be balanced.
            exclude: sample keys or patient ids to leave out; the others keep their order.

        Raises:
            ConfigError: a value above is out of its range, does not fit the data, or asks to
                balance a split that is not for training.
        """
        strategy = named_by_class(parse_balance(balance), shards)
        left_out = names_left_out(exclude)
        return cls(
            split_table(shards, split, left_out=left_out, strategy=strategy),
            strategy=strategy,
            seed=seed,
            global_batch_size=global_batch_size,
            settings={"split": split, "exclude": left_out},
            weights=weights_column(shards, split, strategy),
        )

    @classmethod
    def from_class_sizes(
        cls,
        sizes: Mapping[Any, int],
        *,
        global_batch_size: int,
        balance: Balance = "class_balanced",
        seed: int = 0,
    ) -> BalancedPlan:
        """Plan over classes known by their sizes alone, however large.

        Args:
            sizes: label -> number of samples; sample numbers run through the classes in this order.
            global_batch_size: samples in a global batch, over all ranks, at least 1.
            balance: as in `from_labels`.
            seed: integer in [0, 2**64 - 1].

        Raises:
            ConfigError: a value above is out of its range.

        Examples:
            >>> sizes = {"common": 900_000_000, "rare": 99_000_000, "rarest": 1_000_000}
            >>> plan = BalancedPlan.from_class_sizes(sizes, global_batch_size=6)
            >>> plan.quotas(3, 123_456).tolist()
            [2, 2, 2]
        """
        strategy = parse_balance(balance)
        check_patients_known(strategy, are_known=False)
        return cls(
            sized_table(sizes),
            strategy=strategy,
            seed=seed,
            global_batch_size=global_batch_size,
            settings={},
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The plan's settings in clear, as plain values: enough to build it again."""
        settings: dict[str, Any] = json.loads(json.dumps(self._settings))
        return settings

    @property
    def shares(self) -> dict[Any, float]:
        """Label -> share of the draws, in class order; of a schedule, once it has settled."""
        return self.shares_in(self.strategy.settled_epoch)

    def shares_in(self, epoch: int) -> dict[Any, float]:
        """Give the share of the draws that each class should have in an epoch.

        Returns:
            Label -> share in [0, 1], in class order. They sum to 1 unless samples have several
            labels: then each says how many of the draws have the label.
        """
        shares = self._class_shares(_check_epoch(epoch)).values()
        return dict(zip(self.classes, shares, strict=True))

    def num_steps(self, epoch: int) -> int:
        """Count the global batches of an epoch."""
        return self._draws.shape(_check_epoch(epoch)).num_steps

    def batch_size(self, epoch: int, step: int) -> int:
        """Count the samples of a global batch; only a short last batch differs."""
        epoch, step = self._check_step(epoch, step)
        return self._draws.shape(epoch).size_of(step)

    def quotas(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Count the samples of each class in a global batch.

        Returns:
            `(K,)` counts in class order; a sample with several labels counts for each of them.

        Raises:
            IndexError: the epoch has no such step.
        """
        epoch, step = self._check_step(epoch, step)
        if self._table.membership is not None:
            return self._table.class_counts(self._draws.members_of(epoch, step))
        return self._table.class_sums(self._draws.quotas(epoch, step))

    def strata_quotas(self, epoch: int, step: int) -> dict[tuple[str, ...], int]:
        """Count the samples of each stratum in a global batch.

        Returns:
            (label, value of each strata column) -> count; (label,) alone without strata.

        Raises:
            IndexError: the epoch has no such step.
        """
        counts = self._draws.quotas(*self._check_step(epoch, step)).tolist()
        return dict(zip(self._table.names, counts, strict=True))

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """List the members of a global batch, class by class in a keyed order.

        Args:
            epoch: at least 0.
            step: in [0, num_steps(epoch)).

        Returns:
            `(B,)` sample numbers; the position of a sample here is its slot.

        Raises:
            IndexError: the epoch has no such step.
        """
        epoch, step = self._check_step(epoch, step)
        drawn = self._draws.members_of(epoch, step)
        # The strata of a class stay together: dealing in turn is then fair to both.
        keys = [
            [stream_key(self.seed, "dealing", epoch, *part) for part in {name[:1]: 0, name: 0}]
            for name in self._table.names
        ]
        order = sorted(range(len(drawn)), key=keys.__getitem__)
        return np.concatenate([drawn[number] for number in order])

    def rank_slots(self, epoch: int, step: int, *, rank: int, num_ranks: int) -> NDArray[np.int64]:
        """List the slots of a global batch that fall to one rank, in delivery order.

        Raises:
            IndexError: the epoch has no such step.
            ConfigError: no such rank, or more ranks than samples.
        """
        epoch, step = self._check_step(epoch, step)
        rank, num_ranks = check_ranks(rank, num_ranks, global_batch_size=self.global_batch_size)
        size = self._draws.shape(epoch).size_of(step)
        if size < num_ranks:
            raise ConfigError(
                f"last: short leaves {size} samples for the last batch of an epoch, fewer than "
                f"{num_ranks} ranks. Use last: full or last: drop, or at most {size} ranks."
            )
        key = stream_key(self.seed, "ranks", epoch, step)
        return rank_slots(size, rank=rank, num_ranks=num_ranks, key=key)

    def rank_batch(self, epoch: int, step: int, *, rank: int, num_ranks: int) -> NDArray[np.int64]:
        """List one rank's part of a global batch.

        Args:
            epoch: at least 0.
            step: in [0, num_steps(epoch)).
            rank: data-parallel rank in [0, num_ranks).
            num_ranks: number of data-parallel ranks, at most the global batch size.

        Returns:
            `(b,)` sample numbers; the parts of all ranks together are `batch(epoch, step)`.

        Raises:
            IndexError: the epoch has no such step.
            ConfigError: no such rank, or more ranks than samples.
        """
        slots = self.rank_slots(epoch, step, rank=rank, num_ranks=num_ranks)
        return self.batch(epoch, step)[slots]

    def exposure(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Count how often each sample was delivered from the start of the run to a step.

        Args:
            epoch: at least 0.
            step: in [0, num_steps(epoch)]; that step's own batch is not counted.

        Returns:
            `(N,)` deliveries per sample number.

        Raises:
            IndexError: the epoch has no such step.
        """
        epoch, step = self._check_step(epoch, step, past_the_last=1)
        return self._draws.exposure(epoch, step)

    def prior_shift(self, epoch: int | None = None) -> dict[Any, float]:
        """Give the factor from training prior back to natural prior, per class.

        Multiply predicted probabilities by it and normalise to undo what balancing did to them.

        Args:
            epoch: whose training prior; None: of a schedule, once it has settled.

        Returns:
            Label -> natural share / training share; classes that are never drawn are left out.

        Source:
            Saerens, Latinne and Decaestecker, Neural Computation 2002.

        Examples:
            A score of 0.5 for LGG after balanced training means 0.263 in the clinic:

            >>> labels = ["LGG"] * 75 + ["HGG"] * 210
            >>> shift = BalancedPlan.from_labels(labels, global_batch_size=8).prior_shift()
            >>> round(0.5 * shift["LGG"] / (0.5 * shift["LGG"] + 0.5 * shift["HGG"]), 3)
            0.263
        """
        drawn = sum(group.size for group in self._table.members)
        return {
            label: self.sizes[label] / drawn / share for label, share in self._prior(epoch).items()
        }

    def logit_adjustment(self, tau: float = 1.0, epoch: int | None = None) -> dict[Any, float]:
        """Give what to add to each class's logit in the loss, or to take off it afterwards.

        Args:
            tau: strength, a finite number; 1 is exact for calibrated scores.
            epoch: whose training prior; None: of a schedule, once it has settled.

        Returns:
            Label -> tau * ln(training share); classes that are never drawn are left out.

        Raises:
            ConfigError: `tau` is no finite number.

        Source:
            Menon et al., "Long-tail learning via logit adjustment", ICLR 2021; with the *sampled*
            prior, which is what the model sees.

        Examples:
            >>> labels = ["LGG"] * 75 + ["HGG"] * 210
            >>> plan = BalancedPlan.from_labels(labels, global_batch_size=8, balance=None)
            >>> {label: round(shift, 3) for label, shift in plan.logit_adjustment().items()}
            {'HGG': -0.305, 'LGG': -1.335}
        """
        strength = check_number(tau, setting="tau", least=-1e9, most=1e9)
        return {label: strength * math.log(share) for label, share in self._prior(epoch).items()}

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse every change once the plan is built; its digest is set last."""
        if hasattr(self, "digest"):
            raise AttributeError(f"a plan is frozen: {name} cannot be set; build another plan.")
        object.__setattr__(self, name, value)

    def __copy__(self) -> Self:
        """Give the plan itself: it cannot change."""
        return self

    def __deepcopy__(self, memo: Mapping[int, object]) -> Self:
        """Give the plan itself, all the way down."""
        return self

    def __reduce__(self) -> tuple[partial[BalancedPlan], tuple[ClassTable]]:
        """Let another process build this plan again from what it was built from."""
        build = partial(
            BalancedPlan,
            strategy=self.strategy,
            seed=self.seed,
            global_batch_size=self.global_batch_size,
            settings=self._origin,
            weights=self._weights,
        )
        return build, (self._table,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BalancedPlan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{label}: {size}" for label, size in self.sizes.items())
        return (
            f"BalancedPlan({self.strategy.name}, {{{sizes}}}, "
            f"global_batch_size={self.global_batch_size}, seed={self.seed})"
        )

    def _prior(self, epoch: int | None) -> dict[Any, float]:
        """Give the share of the draws of every class that is drawn."""
        shares = self.shares if epoch is None else self.shares_in(epoch)
        return {label: share for label, share in shares.items() if share}

    def _class_shares(self, epoch: int) -> dict[str, float]:
        """Give the share of an epoch's draws by label as text."""
        table, shares = self._table, self._draws.shares(epoch)
        if table.membership is not None:
            weights = np.ones(table.num_samples)
            if self.strategy.draws_units:
                weights = unit_weights(table, self.strategy, self._weights)
            group = table.members[0]
            drawn = group.pick_first(np.arange(group.size, dtype=np.int64))
            expected = weights[drawn] @ table.membership[drawn] / weights[drawn].sum()
            return dict(zip(table.sizes, expected.tolist(), strict=True))
        sums = dict.fromkeys(table.sizes, 0.0)
        for number, share in zip(table.groups, shares, strict=True):
            sums[str(table.classes[number])] += share
        return sums

    def _check_step(self, epoch: int, step: int, *, past_the_last: int = 0) -> tuple[int, int]:
        """Give `epoch` and `step` as plain integers if the epoch has that step."""
        number, steps = int(operator.index(step)), self.num_steps(epoch)
        if not 0 <= number < steps + past_the_last:
            raise IndexError(f"epoch {epoch} has steps 0 to {steps - 1}; step {number} is none.")
        return _check_epoch(epoch), number


def _check_epoch(epoch: int) -> int:
    """Give `epoch` as a plain integer of at least 0."""
    number = int(operator.index(epoch))
    if number < 0:
        raise IndexError(f"epoch is {number}; epochs count from 0.")
    return number
