"""How frequent each class is in a stream: declared, or counted while it flows by.

Counts are frozen per window, so that rates change at window borders only and a run can be checked
by hand. A class that was not met yet has no frequency to divide by: the others share its part
until it appears.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.plan.frozen import FrozenMapping
from streaming_balance.plan.options import (
    exact_decimal,
    listed,
    named_numbers,
    real_number,
    whole_number,
)

DEFAULT_WINDOW = 1000
"""Samples read between two looks at the counts, once a stream has been read for so long."""


def checked_target(stage: str, target: object) -> FrozenMapping[float]:
    """Check target shares and freeze them.

    Args:
        stage: the stage's name, for messages.
        target: label -> share; shares need not sum to 1, and 0 leaves a class out.

    Raises:
        ConfigError: not a mapping, a value that is no share, or all of them 0.

    Examples:
        >>> checked_target("accept", {"HGG": 1, "LGG": 1})
        {'HGG': 1.0, 'LGG': 1.0}
    """
    checked = named_numbers(f"{stage}: target", target, zero=True)  # type: ignore[arg-type]
    if not isinstance(checked, FrozenMapping):
        raise ConfigError(
            f"{stage}: target is {target!r}; it must map labels to shares, such as "
            f"{{'LGG': 0.5, 'HGG': 0.5}}: without names a swapped list goes unnoticed."
        )
    return checked


def exact_shares_of(numbers: Mapping[str, float]) -> dict[str, Fraction]:
    """Give shares that sum to exactly 1, each number read as the decimal that was written.

    Examples:
        >>> exact_shares_of({"HGG": 0.7, "LGG": 0.7})
        {'HGG': Fraction(1, 2), 'LGG': Fraction(1, 2)}
    """
    exact = {label: exact_decimal(number) for label, number in numbers.items()}
    total = sum(exact.values(), Fraction(0))
    return {label: number / total for label, number in exact.items()}


def checked_frequencies(
    stage: str, frequencies: object, target: Mapping[str, float]
) -> FrozenMapping[float] | None:
    """Check declared counts or shares of the classes in the stream and freeze them.

    Args:
        stage: the stage's name, for messages.
        frequencies: label -> count or share; None: counted while streaming.
        target: the checked target; it must name every class of the stream.

    Raises:
        ConfigError: a class named in one and not in the other, or wanted and said to be absent.
    """
    if frequencies is None:
        return None
    setting = f"{stage}: frequencies"
    checked = named_numbers(setting, frequencies, zero=True)  # type: ignore[arg-type]
    if not isinstance(checked, FrozenMapping):
        raise ConfigError(f"{setting} is {frequencies!r}; it must map labels to counts or shares.")
    for label in checked:
        if label not in target:
            raise ConfigError(
                f"{setting} names {label!r}, but target does not. Target names {listed(target)}."
                f"{did_you_mean(label, target)} Give it a share there, 0 to leave it out."
            )
    for label, share in target.items():
        if share and not checked.get(label):
            raise ConfigError(
                f"{setting} gives class {label!r} {checked.get(label)!r}, but target gives it "
                f"{share:g}. Declare how frequent it is, or leave frequencies out to count."
            )
    return checked


def checked_window(stage: str, window: object, *, setting: str = "window") -> int:
    """Check a number of samples, at least 1.

    Raises:
        ConfigError: not a positive integer.
    """
    number = whole_number(window)
    if number is None or number < 1:
        raise ConfigError(f"{stage}: {setting} is {window!r}; it must be an integer of at least 1.")
    return number


def checked_pseudo_counts(
    stage: str, pseudo_counts: object, target: Mapping[str, float]
) -> float | FrozenMapping[float]:
    """Check what is added to every count: one number for all classes, or one for each.

    Raises:
        ConfigError: not above 0, or a class left out or unknown.
    """
    setting = f"{stage}: pseudo_counts"
    if isinstance(pseudo_counts, Mapping):
        checked = named_numbers(setting, pseudo_counts, zero=False)
        assert isinstance(checked, FrozenMapping)
        if set(checked) != set(target):
            raise ConfigError(
                f"{setting} names {listed(checked)}, but target names {listed(target)}; give one "
                f"number for all classes, or one for each of them."
            )
        return checked
    number = real_number(pseudo_counts)
    if number is None or number <= 0:
        raise ConfigError(
            f"{setting} is {pseudo_counts!r}; it must be a number above 0, or map labels to such."
        )
    return number


class ClassFrequencies:
    """How frequent the classes of one run are, as known at the last window border.

    The first windows are short - borders lie after 1, 2, 4, 8, ... samples - until they have
    `window` samples: a short stream is balanced, too, and a long one settles soon.

    Args:
        labels: the declared classes.
        declared: label -> count or share; None: counted while streaming.
        window: samples per window.
        pseudo_counts: added to every count, so that a class met once is not taken for certain.

    Examples:
        >>> frequencies = ClassFrequencies(["HGG", "LGG"], declared=None, window=4, pseudo_counts=1)
        >>> for label in ["HGG", "HGG", "LGG", "HGG"]:
        ...     if not frequencies.left:
        ...         frequencies.freeze()
        ...     frequencies.left -= 1
        ...     frequencies.counts[label] += 1
        >>> frequencies.freeze()
        >>> frequencies.sizes
        {'HGG': Fraction(4, 1), 'LGG': Fraction(2, 1)}
    """

    __slots__ = ("_declared", "_frozen", "_pseudo_counts", "_window", "counts", "left")

    def __init__(
        self,
        labels: Iterable[str],
        *,
        declared: Mapping[str, float] | None,
        window: int,
        pseudo_counts: float | Mapping[str, float],
    ) -> None:
        self._declared, self._window = declared, window
        self._pseudo_counts = pseudo_counts
        self.counts = dict.fromkeys(labels, 0)
        """Label -> samples read so far, this window's included. The run counts them in."""
        self._frozen = dict(self.counts)
        # Declared frequencies never change: their only border is the start.
        self.left = -1 if declared is not None else 1
        """Samples until the next window border, where `freeze` is due; the run counts down."""

    def freeze(self) -> None:
        """Begin another window: what was counted up to here holds until its end."""
        self._frozen = dict(self.counts)
        self.left = min(self._window, max(1, sum(self._frozen.values())))

    @property
    def sizes(self) -> dict[str, Fraction]:
        """Label -> frequency, in any unit: declared, or counts and pseudo-counts."""
        if self._declared is not None:
            return {label: exact_decimal(self._declared.get(label, 0.0)) for label in self.counts}
        return {
            label: count + exact_decimal(self._added(label))
            for label, count in self._frozen.items()
        }

    @property
    def met(self) -> frozenset[str]:
        """The classes that are known to be in the stream."""
        if self._declared is not None:
            return frozenset(label for label, size in self._declared.items() if size)
        return frozenset(label for label, count in self._frozen.items() if count)

    def share(self, label: str) -> float:
        """Give the share of a class among the classes met, as it is taken to be now."""
        met, sizes = self.met, self.sizes
        total = sum((sizes[name] for name in met), Fraction(0))
        return float(sizes[label] / total) if label in met else 0.0

    def state(self) -> dict[str, Any]:
        """Give the counts as plain values."""
        return {"counts": dict(self.counts), "frozen": dict(self._frozen), "left": self.left}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.counts = {label: int(state["counts"][label]) for label in self.counts}
        self._frozen = {label: int(state["frozen"][label]) for label in self.counts}
        self.left = int(state["left"])

    def _added(self, label: str) -> float:
        """Give the pseudo-count of a class."""
        if isinstance(self._pseudo_counts, Mapping):
            return self._pseudo_counts[label]
        return self._pseudo_counts
