"""Every strategy by name, and how a user's words become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.plan.options import (
    check_number,
    exact_decimal,
    is_number,
    listed,
    matched,
    named_numbers,
)
from streaming_balance.plan.schedules import Deferred, ProgressivelyBalanced
from streaming_balance.plan.strategy import Sizes, Strategy
from streaming_balance.plan.unit_strategies import ClassesBySamples, RepeatFactor, SampleWeights
from streaming_balance.plan.weights import check_beta, effective_numbers

# Guards floor(ratio * n_max) where a ratio has no short decimal, such as 75 / 210.
FLOOR_GUARD = Fraction(1, 10**9)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceBalanced(Strategy):
    """Natural shares n_c / N, but exact in every batch."""

    name: ClassVar[str] = "instance_balanced"
    default_unit: ClassVar[str] = "sample"

    def _weights(self, sizes: Sizes) -> dict[str, Fraction]:
        """Weigh by size."""
        return {label: Fraction(count) for label, count in sizes.items()}

    def _check_empty(self, sizes: Sizes) -> None:
        """Let empty classes be: they are owed nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassBalanced(Strategy):
    """The same share 1 / K for every class."""

    name: ClassVar[str] = "class_balanced"

    def _weights(self, sizes: Sizes) -> dict[str, Fraction]:
        """Weigh all alike."""
        return {label: Fraction(1) for label, count in sizes.items() if count}


@dataclass(frozen=True, slots=True, kw_only=True)
class Power(Strategy):
    """Shares proportional to (n_c / N)^alpha: 1 is natural, 1/2 square root, 0 balanced."""

    name: ClassVar[str] = "power"

    alpha: float = 0.5
    """Exponent, in [0, 1]; 1 / temperature."""

    def __post_init__(self) -> None:
        """Refuse an exponent outside [0, 1]."""
        super(Power, self).__post_init__()
        check_number(self.alpha, setting="power: alpha", least=0, most=1)

    def _weights(self, sizes: Sizes) -> dict[str, Fraction]:
        """Weigh by a power of the natural share."""
        total = sum(sizes.values())
        present = {label: count for label, count in sizes.items() if count}
        if self.alpha in (0, 1):
            return {label: Fraction(count if self.alpha else 1) for label, count in present.items()}
        return {label: Fraction((count / total) ** self.alpha) for label, count in present.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectiveNumber(Strategy):
    """Every sample weighs 1 / E_n, with E_n the effective number of samples of its class."""

    name: ClassVar[str] = "effective_number"

    beta: float = 0.999
    """How much samples overlap, in [0, 1)."""

    def __post_init__(self) -> None:
        """Refuse an overlap outside [0, 1)."""
        super(EffectiveNumber, self).__post_init__()
        check_beta(self.beta, setting="effective_number: beta")

    def _weights(self, sizes: Sizes) -> dict[str, Fraction]:
        """Weigh by size over effective number."""
        present = {label: count for label, count in sizes.items() if count}
        counts = np.array(list(present.values()), dtype=np.int64)
        weights = counts / effective_numbers(counts, beta=float(self.beta))
        return dict(zip(present, map(Fraction, weights.tolist()), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class ManualWeights(Strategy):
    """A weight per sample of each class, as torch's WeightedRandomSampler takes them."""

    name: ClassVar[str] = "manual_weights"

    weights: Mapping[str, float] | Sequence[float] | None = None
    """Label -> weight, or a list in class order where that order is unmistakable."""

    def __post_init__(self) -> None:
        """Refuse weights that are not positive numbers."""
        super(ManualWeights, self).__post_init__()
        checked = named_numbers("manual_weights: weights", self.weights, zero=False)
        object.__setattr__(self, "weights", checked)

    def _check_empty(self, sizes: Sizes) -> None:
        """Leave the check to the match of names."""

    def _by_name(self, sizes: Sizes) -> Mapping[str, float]:
        """Give the weights by label; a list only where its order is unmistakable."""
        if isinstance(self.weights, Mapping):
            return self.weights
        weights = list(self.weights or ())
        example = "{" + ", ".join(f"{label}: 1.0" for label in sizes) + "}"
        if len(weights) != len(sizes):
            raise ConfigError(
                f"manual_weights: weights has {len(weights)} entries for {len(sizes)} classes "
                f"{listed(sizes)}. Write a mapping: {example}."
            )
        if not all(is_number(label) for label in sizes):
            # Labels sort as text: [3.0, 1.0] may give the large weight to the majority.
            raise ConfigError(
                "manual_weights: weights is a list, but the labels are text and a swapped list "
                f"would boost the majority in silence. Write a mapping: {example}."
            )
        return dict(zip(sizes, weights, strict=True))

    def _weights(self, sizes: Sizes) -> dict[str, Fraction]:
        """Weigh by size times the weight of a sample."""
        named = matched(
            "manual_weights: weights", self._by_name(sizes), sizes, empty_class=self.empty_class
        )
        return {label: sizes[label] * exact_decimal(weight) for label, weight in named.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetShares(Strategy):
    """Shares as given, normalised."""

    name: ClassVar[str] = "target"

    shares: Mapping[str, float] | None = None
    """Label -> share; a label left out gets none."""

    def __post_init__(self) -> None:
        """Refuse shares that are not non-negative numbers."""
        super(TargetShares, self).__post_init__()
        if not isinstance(self.shares, Mapping):
            raise ConfigError(
                f"target: shares is {self.shares!r}; it must map labels to shares, such as "
                f"{{LGG: 0.5, HGG: 0.5}}."
            )
        object.__setattr__(self, "shares", named_numbers("target: shares", self.shares, zero=True))

    def _check_empty(self, sizes: Sizes) -> None:
        """Leave the check to the match of names."""

    def _weights(self, sizes: Sizes) -> dict[str, Fraction]:
        """Weigh as told; a class that is not named gets no share."""
        everyone = dict.fromkeys(sizes, 0.0) | dict(self.shares or {})
        named = matched("target: shares", everyone, sizes, empty_class=self.empty_class)
        return {label: exact_decimal(share) for label, share in named.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Upsample(Strategy):
    """Small classes are repeated until they reach a ratio to the largest."""

    name: ClassVar[str] = "upsample"

    target_ratio: float = 1.0
    """Wanted class : largest class, in (0, 1]."""

    def __post_init__(self) -> None:
        """Refuse a ratio outside (0, 1]."""
        super(Upsample, self).__post_init__()
        _check_ratio("upsample: target_ratio", self.target_ratio)

    def resampled(self, sizes: Sizes) -> dict[str, int]:
        """Give the epoch counts max(n_c, floor(r n_max)) of the classes that have samples.

        Examples:
            >>> Upsample(target_ratio=0.5).resampled({"LGG": 75, "HGG": 210})
            {'LGG': 105, 'HGG': 210}
        """
        floor = int(exact_decimal(self.target_ratio) * max(sizes.values()) + FLOOR_GUARD)
        return {label: max(count, floor) for label, count in sizes.items() if count}

    def _weights(self, sizes: Sizes) -> dict[str, Fraction]:
        """Weigh by the resampled counts."""
        return {label: Fraction(count) for label, count in self.resampled(sizes).items()}

    def _default_draws(self, counts: Sequence[int]) -> int:
        """Add up the resampled counts."""
        return sum(self.resampled({str(c): count for c, count in enumerate(counts)}).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Downsample(Strategy):
    """Large classes are thinned until the smallest has a ratio to them."""

    name: ClassVar[str] = "downsample"

    target_ratio: float = 1.0
    """Wanted smallest class : class, in (0, 1]."""
    rotate: bool = True
    """True: each epoch takes the next slice of the pass. False: one fixed subset for the run."""

    def __post_init__(self) -> None:
        """Refuse a ratio outside (0, 1]."""
        super(Downsample, self).__post_init__()
        _check_ratio("downsample: target_ratio", self.target_ratio)
        if not isinstance(self.rotate, bool):
            raise ConfigError(f"downsample: rotate is {self.rotate!r}; use true or false.")

    def resampled(self, sizes: Sizes) -> dict[str, int]:
        """Give the epoch counts min(n_c, floor(n_min / r)) of the classes that have samples.

        Examples:
            >>> Downsample(target_ratio=0.5).resampled({"LGG": 75, "HGG": 210})
            {'LGG': 75, 'HGG': 150}
        """
        smallest = min((count for count in sizes.values() if count), default=0)
        ceiling = int(smallest / exact_decimal(self.target_ratio) + FLOOR_GUARD)
        return {label: min(count, ceiling) for label, count in sizes.items() if count}

    def _weights(self, sizes: Sizes) -> dict[str, Fraction]:
        """Weigh by the resampled counts."""
        return {label: Fraction(count) for label, count in self.resampled(sizes).items()}

    def _default_draws(self, counts: Sequence[int]) -> int:
        """Add up the resampled counts."""
        return sum(self.resampled({str(c): count for c, count in enumerate(counts)}).values())


KINDS: dict[str, type[Strategy]] = {
    kind.name: kind
    for kind in (
        InstanceBalanced,
        ClassBalanced,
        Power,
        EffectiveNumber,
        ManualWeights,
        TargetShares,
        Upsample,
        Downsample,
        ProgressivelyBalanced,
        Deferred,
        RepeatFactor,
        ClassesBySamples,
        SampleWeights,
    )
}
ALIASES = {
    "none": "instance_balanced",
    "natural": "instance_balanced",
    "stratified": "instance_balanced",
    "uniform": "class_balanced",
    "inverse_frequency": "class_balanced",
    "inverse_freq": "class_balanced",
    "square_root": "power",
    "effective_num": "effective_number",
    "manual": "manual_weights",
    "random_oversample": "upsample",
    "random_undersample": "downsample",
}


def parse_strategy(balance: str | Mapping[str, Any] | Strategy | None) -> Strategy:
    """Give the strategy a user means.

    Args:
        balance: a name, a mapping with `name` and options, a strategy value, or None for the
            natural order.

    Raises:
        ConfigError: an unknown name or option, with the nearest known one.

    Examples:
        >>> parse_strategy({"name": "power", "temperature": 4}).settings()
        {'name': 'power', 'alpha': 0.25}
        >>> parse_strategy(None).name
        'instance_balanced'
        >>> parse_strategy({"name": "deferred", "num_epochs": 100, "then": "power"}).settled_epoch
        80
    """
    if balance is None:
        return InstanceBalanced()
    if isinstance(balance, Strategy):
        return balance
    if isinstance(balance, str):
        return _kind(balance)()
    if not isinstance(balance, Mapping) or "name" not in balance:
        raise ConfigError(
            f"balance is {balance!r}; use a name ({', '.join(KINDS)}), a mapping with a name and "
            f"options, or None for the natural order."
        )
    options = {str(option): value for option, value in balance.items() if option != "name"}
    kind = _kind(balance["name"])
    if kind is Power and "temperature" in options:
        options["alpha"] = 1 / check_number(
            options.pop("temperature"), setting="power: temperature", least=1, most=1e9
        )
    if kind.name == "repeat_factor" and "t" in options and "threshold" not in options:
        options["threshold"] = options.pop("t")  # as the papers write it
    if kind is Deferred and options.get("then") is not None:
        options["then"] = parse_strategy(options["then"])
    _check_options(kind, options)
    return kind(**options)


def in_declared_order(strategy: Strategy, classes: Sequence[str]) -> Strategy:
    """Name the weights of a list by a class order that somebody declared.

    Args:
        strategy: any strategy; only manual weights given as a list change.
        classes: labels in declared order.

    Examples:
        >>> in_declared_order(ManualWeights(weights=[2.8, 1]), ["LGG", "HGG"]).settings()["weights"]
        {'LGG': 2.8, 'HGG': 1.0}
    """
    if isinstance(strategy, Deferred) and strategy.then is not None:
        return replace(strategy, then=in_declared_order(strategy.then, classes))
    if not isinstance(strategy, ManualWeights) or isinstance(strategy.weights, Mapping):
        return strategy
    weights = list(strategy.weights or ())
    # A list of another length is refused where class sizes are known, with the mapping to write.
    if len(weights) != len(classes):
        return strategy
    return replace(strategy, weights=dict(zip(classes, weights, strict=True)))


def _kind(name: object) -> type[Strategy]:
    """Find a strategy by name or alias."""
    kind = KINDS.get(ALIASES.get(str(name), str(name)))
    if kind is None:
        hint = did_you_mean(str(name), [*KINDS, *ALIASES])
        raise ConfigError(f"balance names {name!r}; strategies are {', '.join(KINDS)}.{hint}")
    return kind


def _check_options(kind: type[Strategy], options: Mapping[str, Any]) -> None:
    """Refuse options the strategy does not have, and required ones left out."""
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{kind.name} has no option {option!r}; it has {', '.join(known)}."
                + did_you_mean(option, known)
            )


def _check_ratio(setting: str, ratio: object) -> None:
    """Refuse a ratio of minority to majority outside (0, 1]."""
    check_number(ratio, setting=setting, least=0, most=1, open_below=True)
