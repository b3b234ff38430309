"""How many samples of each class should go on when a pass ends, and what was short of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streaming_balance.errors import ConfigError
from streaming_balance.plan.frozen import FrozenMapping
from streaming_balance.stream.frequencies import checked_window

# Guards floor(n / ratio) against a ratio such as 0.7, which no float is.
RATIO_SLACK = 1e-9


def checked_size(size: object) -> int | FrozenMapping[int]:
    """Check numbers of samples: one for every class, or one for each.

    Raises:
        ConfigError: one of them is no integer of at least 1, or no class is named.

    Examples:
        >>> checked_size({0: 5, 1: 10})
        {'0': 5, '1': 10}
    """
    if not isinstance(size, Mapping):
        return checked_window("reservoir", size, setting="size")
    if not size:
        raise ConfigError("reservoir: size is {}; name at least one class, such as {'LGG': 75}.")
    return FrozenMapping(
        {
            str(label): checked_window("reservoir", count, setting=f"size of class {label!r}")
            for label, count in size.items()
        }
    )


def downsampled(seen: Mapping[str, int], ratio: float) -> dict[str, int]:
    """Give what downsampling leaves of each class.

    Args:
        seen: label -> samples; classes without any do not count.
        ratio: smallest class : largest class, in (0, 1].

    Returns:
        label -> min(n_c, floor(n_min / ratio)).

    Examples:
        >>> downsampled({"HGG": 210, "LGG": 75}, 0.5)
        {'HGG': 150, 'LGG': 75}
    """
    there = {label: count for label, count in seen.items() if count}
    if not there:
        return {}
    most = math.floor(min(there.values()) / ratio + RATIO_SLACK)
    return {label: min(count, most) for label, count in there.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Emission:
    """What went on at the end of a pass or window, and what was asked for."""

    asked: Mapping[str, int]
    """Label -> samples asked for; empty where nothing in particular was."""
    went_on: Mapping[str, int]
    """Label -> samples that went on."""

    @property
    def short(self) -> dict[str, dict[str, int]]:
        """Label -> what was asked for and what went on, where that is less."""
        return {
            label: {"asked": count, "went_on": self.went_on.get(label, 0)}
            for label, count in self.asked.items()
            if self.went_on.get(label, 0) < count
        }

    @property
    def ratio(self) -> float | None:
        """Smallest class : largest class that went on; None if nothing did."""
        most = max(self.went_on.values(), default=0)
        return min(self.went_on.values()) / most if most else None

    def check_met(self, seen: Mapping[str, int]) -> None:
        """Refuse to go on with less than was asked for.

        Args:
            seen: label -> samples read.

        Raises:
            ConfigError: names a class, what it should have and what it has.
        """
        for label, counts in self.short.items():
            raise ConfigError(
                f"reservoir: {counts['asked']} samples of class {label!r} are asked for, but of "
                f"{seen.get(label, 0)} that were read {counts['went_on']} are kept. Use a size, "
                f"and class_bytes, that hold {counts['asked']}, ask for less by ratio or target, "
                f"or set on_short='report'."
            )

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain values."""
        return {
            "asked": dict(self.asked),
            "went_on": dict(self.went_on),
            "short": self.short,
            "ratio": self.ratio,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Emission:
        """Read what `to_dict` gave."""
        return cls(asked=dict(saved["asked"]), went_on=dict(saved["went_on"]))
