"""Values that cannot change once they are built, and that a digest stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self


class Frozen:
    """Base of a value that is complete, and frozen, as soon as its digest is set."""

    __slots__ = ("digest",)

    digest: str
    """Hash of all that shapes the value; equal digests mean equal behaviour."""

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

    def __eq__(self, other: object) -> bool:
        """Compare digests: equal ones mean equal behaviour."""
        return isinstance(other, Frozen) and self.digest == other.digest

    def __hash__(self) -> int:
        """Hash the digest."""
        return hash(self.digest)
