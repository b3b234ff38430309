"""The plan: for any epoch and step, which samples make the global batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streaming_balance.errors import ResumeError
from streaming_balance.plan import promises
from streaming_balance.plan.carry import Side, carried_draws
from streaming_balance.plan.draws import make_draws
from streaming_balance.plan.keys import check_seed
from streaming_balance.plan.members import ClassTable, sized_table
from streaming_balance.plan.priors import PlannedPriors, class_shares
from streaming_balance.plan.section import parse_balance
from streaming_balance.plan.shape import check_batch_size
from streaming_balance.plan.strategy import Strategy
from streaming_balance.plan.tables import (
    LabelledSplits,
    check_sizes_suffice,
    labels_table,
    named_by_class,
    names_left_out,
    split_table,
    weights_column,
)

PLAN_VERSION = 1

Balance = str | Mapping[str, Any] | Strategy | None


class BalancedPlan(PlannedPriors):
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
        "_left",
        "_origin",
        "_settings",
        "guarantees",
        "num_samples",
        "unit",
        "warnings",
    )

    guarantees: Mapping[str, bool]
    """Which promises this plan keeps."""
    num_samples: int
    """Samples in the split, N."""
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
        left: tuple[BalancedPlan, int, int] | None = None,
    ) -> None:
        self._table, self._weights, self._left = table, weights, left
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
            strategy,
            table,
            class_shares(
                table, strategy, self._draws.shares(strategy.settled_epoch), weights=weights
            ),
            global_batch_size=self.global_batch_size,
        )
        self._origin = dict(settings)
        self._settings = {
            "version": PLAN_VERSION,
            "balance": strategy.settings(),
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            **self._origin,
        }
        self.first_epoch = 0
        if left is not None:
            self._go_on(*left)
        parts = [self._settings, table.digest]
        if weights is not None:
            # Settings have the name of a column; its numbers make the batches.
            parts.append(hashlib.blake2b(weights.astype("<f8").tobytes()).hexdigest())
        text = json.dumps(parts, sort_keys=True)
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
        check_sizes_suffice(strategy)
        return cls(
            sized_table(sizes),
            strategy=strategy,
            seed=seed,
            global_batch_size=global_batch_size,
            settings={},
        )

    def carried_from(self, old: BalancedPlan, *, epoch: int, step: int) -> BalancedPlan:
        """Give this plan as it goes on where a run under another plan was left.

        In every class, those who had no turn in the pass that the old plan began come first, in
        the old order, as far as they are still there; then this plan's own passes follow, which
        newcomers join. So the others of a class have been delivered equally often, give or take
        one, over both plans together. Where an old pass had just ended, nobody is owed a turn.
        Patients are found again by their ids; under `unit: sample`, samples by their keys, or by
        their numbers where they have none.

        Args:
            old: the plan before, which may itself have been carried over.
            epoch: where it was left; this plan begins with the first step of this epoch.
            step: where it was left: the first batch that was not delivered.

        Returns:
            A plan whose `exposure` counts from the change on. Asked for an epoch before it, it
            raises IndexError.

        Raises:
            ResumeError: the unit or somebody's class differs, one of the plans does not draw in
                passes, or this plan has been carried over already.
            IndexError: the old plan has no such step.

        Examples:
            After 30 batches of 4 + 4, 45 of 75 LGG patients have had their second turn.

            >>> labels = ["LGG"] * 75 + ["HGG"] * 210
            >>> old = BalancedPlan.from_labels(labels, global_batch_size=8)
            >>> new = BalancedPlan.from_labels(labels, global_batch_size=6, seed=1)
            >>> plan = new.carried_from(old, epoch=0, step=30)
            >>> turns = old.exposure(0, 30) + plan.exposure(1, 3)
            >>> sorted(set(turns[:75].tolist())), sorted(set(turns[75:].tolist()))
            ([3, 4], [1, 2])
        """
        if self._left is not None:
            raise ResumeError(
                f"this plan has been carried over at epoch {self._left[1]}, step {self._left[2]} "
                f"already, and a plan goes on from one plan only. Build it anew from its settings."
            )
        epoch, step = old._check_step(epoch, step)
        return self._builder((old, epoch, step))(self._table)

    @property
    def settings(self) -> dict[str, Any]:
        """The plan's settings in clear, as plain values: enough to build it again."""
        settings: dict[str, Any] = json.loads(json.dumps(self._settings))
        return settings

    def __reduce__(self) -> tuple[partial[BalancedPlan], tuple[ClassTable]]:
        """Let another process build this plan again from what it was built from."""
        return self._builder(self._left), (self._table,)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{label}: {size}" for label, size in self.sizes.items())
        return (
            f"BalancedPlan({self.strategy.name}, {{{sizes}}}, "
            f"global_batch_size={self.global_batch_size}, seed={self.seed})"
        )

    def _builder(self, left: tuple[BalancedPlan, int, int] | None) -> partial[BalancedPlan]:
        """Give what makes such a plan of a class table, going on from what was left."""
        return partial(
            BalancedPlan,
            strategy=self.strategy,
            seed=self.seed,
            global_batch_size=self.global_batch_size,
            settings=self._origin,
            weights=self._weights,
            left=left,
        )

    def _go_on(self, old: BalancedPlan, epoch: int, step: int) -> None:
        """Start at an epoch with those whom another plan owes a turn."""
        self._draws = carried_draws(old._side(), self._side(), epoch=epoch, step=step)
        self.first_epoch = epoch
        self._settings["carried_from"] = {
            "plan_digest": old.digest,
            "epoch": epoch,
            "step": step,
            "ordinals": old.ordinals(epoch, step),
        }

    def _side(self) -> Side:
        """Show what a change of plan needs to know."""
        keys = "sample keys" if "split" in self._origin else "sample numbers"
        return Side(
            draws=self._draws,
            table=self._table,
            strategy=self.strategy,
            named_by="patient ids" if self.unit == "patient" else keys,
        )
