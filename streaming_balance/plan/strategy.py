"""What a strategy is: options, and a rule that turns class sizes into shares and a length.

A strategy is a frozen value. It never sees a sample: `target` turns the sizes of the classes into
exact shares and a number of draws, and the plan does the rest the same way for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, ClassVar

from streaming_balance.errors import ConfigError
from streaming_balance.plan.frozen import plain
from streaming_balance.plan.options import (
    CHOICES,
    check_choice,
    check_length,
    checked_strata,
    listed,
)
from streaming_balance.plan.quotas import exact_shares

# Label -> number of units (patients or samples), in class order.
Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a strategy asks of one epoch."""

    shares: tuple[Fraction, ...]
    """`(K,)` exact target shares in class order; they sum to 1."""
    num_draws: int
    """Epoch length L in units (patients or samples), before it is fitted to whole batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy(ABC):
    """Options every strategy has. `Strategy` itself is abstract: use one of its kinds."""

    name: ClassVar[str] = ""
    default_unit: ClassVar[str] = "patient"
    draws_units: ClassVar[bool] = False
    """Whether samples are weighed one by one, rather than classes given a share."""

    unit: str | None = None
    """What a class cycles over: `patient`, `sample`, or None for the strategy's default."""
    last: str = "full"
    """The last batch of an epoch: `full`, `short` or `drop`."""
    num_samples: int | str | None = None
    """Draws per epoch: a number, `dataset` N, `oversample` K n_max, or `undersample` K n_min."""
    draw: str = "quota"
    """`quota` for exact batches, `iid` for literal independent weighted draws."""
    replacement: bool = True
    """False: balanced without repeating anybody within an epoch."""
    empty_class: str = "error"
    """A declared class without training samples: `error`, or `renormalize` over the others."""
    unknown: str = "error"
    """A sample without a label: `error`, `drop`, or `own_class`."""
    on_exceeded: str = "warn"
    """A target ratio that is reached already: `warn`, or `error`."""
    strata: tuple[str, ...] | None = None
    """Columns balanced jointly with the label, such as `[label, site]`; `label_set` makes every
    set of labels a class."""
    strata_shares: str = "natural"
    """Shares of the strata within a class: `natural` or `uniform`."""
    target_label: str | None = None
    """With several labels per sample: the one that samples have or have not."""

    def __post_init__(self) -> None:
        """Refuse values no strategy can have."""
        for option in CHOICES:
            check_choice(self.name, option, getattr(self, option))
        if not isinstance(self.replacement, bool):
            raise ConfigError(
                f"{self.name}: replacement is {self.replacement!r}; use true or false."
            )
        check_length(self.name, self.num_samples)
        object.__setattr__(self, "strata", checked_strata(self.name, self.strata))
        if self.last == "short" and not self.replacement:
            raise ConfigError(
                f"{self.name}: replacement: false keeps full batches only; drop last: short, or "
                f"allow replacement."
            )
        if self.draw == "iid" and not self.replacement:
            raise ConfigError(
                f"{self.name}: draw: iid draws with replacement; drop replacement: false, or use "
                f"draw: quota."
            )

    @property
    def settled_epoch(self) -> int:
        """From this epoch on every epoch asks for the same."""
        return 0

    @property
    def settled(self) -> Strategy:
        """The strategy of the epochs from `settled_epoch` on."""
        return self

    def target(self, sizes: Sizes, epoch: int = 0) -> Target:  # noqa: ARG002 - for schedules
        """Give shares and length for classes of these sizes.

        Args:
            sizes: label -> number of units (patients or samples), in class order.
            epoch: at least 0; matters to schedules alone.

        Returns:
            Exact shares in the same order, and the epoch length.

        Raises:
            ConfigError: a class that should get a share has no samples, or the length is
                impossible.
        """
        counts = self._checked_counts(sizes)
        weights = self._weights(sizes)
        shares = exact_shares([weights.get(label, Fraction(0)) for label in sizes])
        return Target(shares=shares, num_draws=self._num_draws(sizes, counts, shares))

    def settings(self) -> dict[str, Any]:
        """Give the options that differ from their defaults, as plain values with the name.

        Examples:
            >>> from streaming_balance.plan.strategies import Power
            >>> Power(alpha=0.25).settings()
            {'name': 'power', 'alpha': 0.25}
        """
        chosen = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                chosen[field.name] = plain(value)
        return {"name": self.name, **chosen}

    @abstractmethod
    def _weights(self, sizes: Sizes) -> dict[str, Fraction]:
        """Weigh the classes that have samples; shares are these weights over their sum."""

    def _checked_counts(self, sizes: Sizes) -> list[int]:
        """Give the class sizes once there is something to draw from."""
        if not any(sizes.values()):
            raise ConfigError("there is no training sample in any class; nothing can be planned.")
        self._check_empty(sizes)
        return list(sizes.values())

    def _check_empty(self, sizes: Sizes) -> None:
        """Refuse a declared class that is owed a share and has no samples."""
        empty = [label for label, count in sizes.items() if not count]
        if empty and self.empty_class == "error":
            raise ConfigError(
                f"{self.name}: class {empty[0]!r} is declared but has no training sample; classes "
                f"with samples: {listed([c for c in sizes if sizes[c]])}. Add samples, leave the "
                f"class out, or set empty_class: renormalize."
            )

    def _default_draws(self, counts: Sequence[int]) -> int:
        """Give the epoch length where the user named none."""
        return sum(counts)

    def _num_draws(self, sizes: Sizes, counts: Sequence[int], shares: Sequence[Fraction]) -> int:
        """Give the epoch length L."""
        present = [count for count in counts if count]
        named = {
            "dataset": sum(counts),
            "oversample": len(present) * max(present),
            "undersample": len(present) * min(present),
        }
        length = self.num_samples
        if isinstance(length, str):
            draws = named[length]
        else:
            draws = self._default_draws(counts) if length is None else int(length)
        if self.replacement:
            return draws
        return self._without_repeats(sizes, shares, draws if length is not None else None)

    def _without_repeats(self, sizes: Sizes, shares: Sequence[Fraction], wanted: int | None) -> int:
        """Give the longest balanced epoch that repeats nobody, or check the one asked for."""
        bounds = {
            label: int(count / share)
            for (label, count), share in zip(sizes.items(), shares, strict=True)
            if share
        }
        scarcest = min(bounds, key=lambda label: bounds[label])
        if wanted is not None and wanted > bounds[scarcest]:
            raise ConfigError(
                f"{self.name}: num_samples is {wanted} with replacement: false, but class "
                f"{scarcest!r} has only {sizes[scarcest]}; at most {bounds[scarcest]} draws keep "
                f"the shares without repeating anybody. Lower num_samples or allow replacement."
            )
        return bounds[scarcest] if wanted is None else wanted
