"""The plan: for any epoch and step, which samples make the global batch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streaming_balance.plan import promises
from streaming_balance.plan.draws import make_draws
from streaming_balance.plan.keys import check_seed
from streaming_balance.plan.members import ClassTable, sized_table
from streaming_balance.plan.options import check_number
from streaming_balance.plan.priors import class_shares
from streaming_balance.plan.section import parse_balance
from streaming_balance.plan.shape import check_batch_size
from streaming_balance.plan.steps import PlannedSteps, check_epoch
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


class BalancedPlan(PlannedSteps):
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
        "_origin",
        "_settings",
        "_weights",
        "classes",
        "guarantees",
        "num_samples",
        "sizes",
        "strategy",
        "unit",
        "warnings",
    )

    classes: list[Any]
    """Labels in class order."""
    guarantees: Mapping[str, bool]
    """Which promises this plan keeps."""
    num_samples: int
    """Samples in the split, N."""
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
        by_group = self._draws.shares(check_epoch(epoch))
        shares = class_shares(self._table, self.strategy, by_group, weights=self._weights)
        return dict(zip(self.classes, shares.values(), strict=True))

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
