"""Strategies that look at units (patients or samples) one by one, or choose classes per batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.options import check_number, whole_number
from streaming_balance.plan.strategy import Sizes, Strategy

DIGEST_START = "blake2b:"


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatFactor(Strategy):
    """Samples of rare classes repeat r = max(1, (t / f_c)^power) times, in the long run exactly.

    With several labels a sample repeats as its rarest label asks. The copies of an epoch are the
    floor or the ceiling of r, and their mean over epochs is r: no bias as from always rounding up.

    Source:
        Gupta, Dollar and Girshick, "LVIS", CVPR 2019, appendix B.2.
    """

    name: ClassVar[str] = "repeat_factor"
    default_unit: ClassVar[str] = "sample"
    draws_units: ClassVar[bool] = True

    threshold: float = 0.001
    """Frequency t below which a class is repeated, in (0, 1]."""
    power: float = 0.5
    """Exponent in [0, 1]: 1/2 repeats by the square root."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super(RepeatFactor, self).__post_init__()
        check_number(
            self.threshold, setting="repeat_factor: threshold", least=0, most=1, open_below=True
        )
        check_number(self.power, setting="repeat_factor: power", least=0, most=1)
        _refuse(self, "num_samples", "the repeats say how long an epoch is; change threshold")
        _refuse_what_needs_shares(self)

    def factors(self, frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
        """Give the repeat factor of each class.

        Args:
            frequencies: `(K,)` samples that have the class, over all samples; 0 for empty classes.

        Returns:
            `(K,)` factors of at least 1.

        Examples:
            >>> RepeatFactor(threshold=0.01).factors(np.array([0.0025, 0.5])).tolist()
            [2.0, 1.0]
        """
        present = np.where(frequencies > 0, frequencies, 1.0)
        return np.maximum(1.0, (self.threshold / present) ** self.power)

    def _weights(self, sizes: Sizes) -> dict[str, Fraction]:
        """Weigh by what a class of one-label samples is repeated."""
        total = sum(sizes.values())
        counts = np.array([count for count in sizes.values() if count], dtype=np.float64)
        repeated = (counts * self.factors(counts / total)).tolist()
        return dict(
            zip([c for c, count in sizes.items() if count], map(Fraction, repeated), strict=True)
        )

    def _check_empty(self, sizes: Sizes) -> None:
        """Let empty classes be: no sample asks for repeats of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleWeights(Strategy):
    """Any weight per sample: each comes the floor or the ceiling of its expectation per epoch.

    Source:
        Madow, "On the theory of systematic sampling", Annals of Mathematical Statistics 1949.
    """

    name: ClassVar[str] = "sample_weights"
    default_unit: ClassVar[str] = "sample"
    draws_units: ClassVar[bool] = True

    weights: Any = None
    """`(N,)` weights of at least 0 in sample order, or the name of a numeric column."""

    def __post_init__(self) -> None:
        """Refuse weights that are no finite numbers of at least 0."""
        super(SampleWeights, self).__post_init__()
        _refuse_what_needs_shares(self)
        if isinstance(self.weights, str) and self.weights.startswith(DIGEST_START):
            raise ConfigError(
                f"sample_weights: weights is {self.weights!r}, the digest of an array that a state "
                f"or plan was made with; the numbers are not kept. Pack the weights as a column "
                f"and name it, so that a saved state says all."
            )
        if isinstance(self.weights, str) and self.weights:
            return
        object.__setattr__(self, "weights", _checked_weights(self.weights))

    def settings(self) -> dict[str, Any]:
        """Give the options as plain values; an array of weights by its digest."""
        if isinstance(self.weights, str):
            return super(SampleWeights, self).settings()
        digest = hashlib.blake2b(self.weights.astype("<f8").tobytes(), digest_size=16)
        named = super(SampleWeights, replace(self, weights="weights")).settings()
        return named | {"weights": DIGEST_START + digest.hexdigest()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SampleWeights) and self.settings() == other.settings()

    def __hash__(self) -> int:
        return hash(str(self.settings()))

    def _weights(self, sizes: Sizes) -> dict[str, Fraction]:
        """Weigh by size: what classes get is known where samples are."""
        return {label: Fraction(count) for label, count in sizes.items() if count}

    def _check_empty(self, sizes: Sizes) -> None:
        """Let empty classes be: weights are per sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassesBySamples(Strategy):
    """Every batch holds P classes and M units of each, as metric learning wants them.

    Source:
        Hermans, Beyer and Leibe, "In defense of the triplet loss for person re-identification",
        2017 (PK batches).
    """

    name: ClassVar[str] = "p_k"

    P: int | None = None
    """Classes in a batch, at least 1."""
    M: int | None = None
    """Units of each class in a batch, at least 1."""

    def __post_init__(self) -> None:
        """Refuse numbers that make no batch."""
        super(ClassesBySamples, self).__post_init__()
        for option in ("P", "M"):
            value = whole_number(getattr(self, option))
            if value is None or value < 1:
                raise ConfigError(
                    f"p_k: {option} is {getattr(self, option)!r}; it must be an integer of at "
                    f"least 1: a batch holds P classes and M units of each."
                )
        if self.last == "short":
            raise ConfigError(
                "p_k: last is 'short', but a batch of fewer than P x M is none; use full or drop."
            )
        _refuse_what_needs_shares(self)

    @property
    def batch_size(self) -> int:
        """Units in a batch: P x M."""
        return int(self.P or 0) * int(self.M or 0)

    def _weights(self, sizes: Sizes) -> dict[str, Fraction]:
        """Weigh all classes alike: they take turns."""
        return {label: Fraction(1) for label, count in sizes.items() if count}


def _checked_weights(weights: object) -> NDArray[np.float64]:
    """Give weights as a read-only array of finite numbers of at least 0."""
    if weights is None or isinstance(weights, Mapping | str | bytes):
        raise ConfigError(
            f"sample_weights: weights is {weights!r}; give one number per sample, (N,), or the "
            f"name of a numeric column. For a weight per class use manual_weights."
        )
    try:
        array = np.array(weights, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sample_weights: weights are no numbers ({error}).") from error
    if array.ndim != 1 or not len(array):
        raise ConfigError(
            f"sample_weights: weights have shape {array.shape}; give one per sample, (N,)."
        )
    wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if wrong.size:
        raise ConfigError(
            f"sample_weights: {wrong.size} weights are no finite numbers >= 0, the first at sample "
            f"{wrong[0]}: {array[wrong[0]]!r}."
        )
    if array.max() > np.finfo(np.float64).max / len(array):
        raise ConfigError(
            f"sample_weights: weights up to {array.max():g} add up to more than a float holds; "
            f"divide all of them by the largest."
        )
    if not array.any():
        raise ConfigError("sample_weights: all weights are 0; nothing could be drawn.")
    array.flags.writeable = False
    return array


def _refuse(strategy: Strategy, option: str, reason: str) -> None:
    """Refuse an option that a strategy leaves no room for."""
    value = getattr(strategy, option)
    if value is not None:
        raise ConfigError(f"{strategy.name}: {option} is {value!r}, but {reason}.")


def _refuse_what_needs_shares(strategy: Strategy) -> None:
    """Refuse options that make sense for shares of classes only."""
    if strategy.draws_units and strategy.unit == "patient":
        raise ConfigError(
            f"{strategy.name}: unit is 'patient', but it counts samples; leave unit out."
        )
    if strategy.draw == "iid" or not strategy.replacement:
        found = "draw: iid" if strategy.draw == "iid" else "replacement: false"
        raise ConfigError(
            f"{strategy.name}: {found} is for strategies that give classes a share, such as "
            f"class_balanced; leave it out."
        )
    _refuse(strategy, "strata", "it plans by sample or by class, not by strata; leave strata out")
