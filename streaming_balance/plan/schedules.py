"""Strategies whose shares change from epoch to epoch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, ClassVar

from streaming_balance.errors import ConfigError
from streaming_balance.plan.options import whole_number
from streaming_balance.plan.quotas import exact_shares
from streaming_balance.plan.strategy import Sizes, Strategy, Target
from streaming_balance.plan.unit_strategies import ClassesBySamples

# A schedule is walked epoch by epoch; so many take a few seconds.
MOST_EPOCHS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressivelyBalanced(Strategy):
    """Natural shares in the first epoch, equal ones in the last, and a straight line between.

    Source:
        Kang et al., "Decoupling representation and classifier for long-tailed recognition",
        ICLR 2020; lambda = e / (E - 1) as in the authors' code.
    """

    name: ClassVar[str] = "progressively_balanced"

    num_epochs: int | None = None
    """Epochs E from natural to balanced, at least 1; afterwards shares stay balanced."""

    def __post_init__(self) -> None:
        """Refuse a number of epochs that is none."""
        super(ProgressivelyBalanced, self).__post_init__()
        _check_epochs(self.name, "num_epochs", self.num_epochs, least=1, needed=True)

    @property
    def settled_epoch(self) -> int:
        """The last epoch of the line: shares stay as they are there."""
        return max(1, int(self.num_epochs or 1) - 1)

    def target(self, sizes: Sizes, epoch: int = 0) -> Target:
        """Give an epoch's shares: (1 - l) n_c / N + l / K with l = e / (E - 1)."""
        counts = self._checked_counts(sizes)
        present, total = sum(1 for count in counts if count), sum(counts)
        balanced = Fraction(min(epoch, self.settled_epoch), self.settled_epoch)
        weights = [
            (1 - balanced) * Fraction(count, total) + (balanced / present if count else 0)
            for count in counts
        ]
        shares = exact_shares(weights)
        return Target(shares=shares, num_draws=self._num_draws(sizes, counts, shares))

    def _weights(self, sizes: Sizes) -> dict[str, Fraction]:
        """Weigh as where the line ends."""
        return {label: Fraction(1) for label, count in sizes.items() if count}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deferred(Strategy):
    """Natural shares first, another strategy for the epochs that are left.

    Source:
        Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss",
        NeurIPS 2019 (deferred re-balancing).
    """

    name: ClassVar[str] = "deferred"

    num_epochs: int | None = None
    """Epochs E of the run; the change comes at floor(0.8 E)."""
    start_epoch: int | None = None
    """Epoch of the change, at least 0; instead of `num_epochs`."""
    then: Strategy | None = None
    """The strategy from there on; None means `class_balanced`."""

    def __post_init__(self) -> None:
        """Refuse a change that never comes, and options in the wrong place."""
        super(Deferred, self).__post_init__()
        if (self.num_epochs is None) == (self.start_epoch is None):
            raise ConfigError(
                "deferred needs one of num_epochs (the change comes at floor(0.8 num_epochs)) and "
                f"start_epoch; given: num_epochs {self.num_epochs!r}, start_epoch "
                f"{self.start_epoch!r}."
            )
        _check_epochs(self.name, "num_epochs", self.num_epochs, least=1)
        _check_epochs(self.name, "start_epoch", self.start_epoch, least=0)
        self._check_then()

    @property
    def settled_epoch(self) -> int:
        """The epoch of the change."""
        if self.start_epoch is not None:
            return int(self.start_epoch)
        return int(self.num_epochs or 0) * 4 // 5

    @property
    def settled(self) -> Strategy:
        """What holds from the change on: `then`, with the options written beside it."""
        if self.then is None:
            return self
        shared = {option.name: getattr(self, option.name) for option in fields(Strategy)}
        if self.then.num_samples is not None:
            shared["num_samples"] = self.then.num_samples
        return replace(self.then, **shared)

    def target(self, sizes: Sizes, epoch: int = 0) -> Target:
        """Give natural shares before the change, the other strategy's afterwards."""
        if epoch >= self.settled_epoch and self.then is not None:
            return self.settled.target(sizes)
        counts = self._checked_counts(sizes)
        weights = [
            Fraction(count) if epoch < self.settled_epoch else Fraction(bool(count))
            for count in counts
        ]
        shares = exact_shares(weights)
        return Target(shares=shares, num_draws=self._num_draws(sizes, counts, shares))

    def settings(self) -> dict[str, Any]:
        """Give the options that differ from their defaults; `then` as its own settings."""
        chosen = super(Deferred, self).settings()
        return chosen if self.then is None else chosen | {"then": self.then.settings()}

    def _weights(self, sizes: Sizes) -> dict[str, Fraction]:
        """Weigh as after the change."""
        return {label: Fraction(1) for label, count in sizes.items() if count}

    def _check_empty(self, sizes: Sizes) -> None:
        """Owe empty classes nothing before the change; `then` checks what it owes them."""
        if self.then is None:
            super(Deferred, self)._check_empty(sizes)

    def _check_then(self) -> None:
        """Refuse a second strategy that is a schedule, draws by sample, or repeats our options."""
        then = self.then
        if then is None:
            return
        without_shares = ProgressivelyBalanced | Deferred | ClassesBySamples
        if not isinstance(then, Strategy) or isinstance(then, without_shares) or then.draws_units:
            found = then.name if isinstance(then, Strategy) else repr(then)
            raise ConfigError(
                f"deferred: then is {found}; it must be a strategy that gives every class one "
                f"share for all epochs, such as class_balanced, power or upsample."
            )
        if not getattr(then, "rotate", True):
            raise ConfigError(
                f"deferred: then is {then.name} with rotate: false, but the epochs before draw "
                f"from everybody; leave rotate out."
            )
        for option in fields(Strategy):
            if option.name != "num_samples" and getattr(then, option.name) != option.default:
                raise ConfigError(
                    f"deferred: then sets {option.name}, which holds for the whole run; write it "
                    f"beside then."
                )


def _check_epochs(
    strategy: str, option: str, epochs: object, *, least: int, needed: bool = False
) -> None:
    """Refuse a number of epochs that is no whole number within reach."""
    if epochs is None and not needed:
        return
    number = whole_number(epochs)
    if number is None or not least <= number <= MOST_EPOCHS:
        raise ConfigError(
            f"{strategy}: {option} is {epochs!r}; it must be an integer from {least} to "
            f"{MOST_EPOCHS}, such as 100."
        )
