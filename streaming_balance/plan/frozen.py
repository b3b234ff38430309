"""Values that cannot change once they are built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self, TypeVar

Value = TypeVar("Value")


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


class FrozenMapping(Mapping[str, Value]):
    """A mapping that cannot change, can be hashed, and can be sent to another process.

    Args:
        entries: what it holds; copied.

    Examples:
        >>> weights = FrozenMapping({"LGG": 2.8})
        >>> weights["LGG"], weights == {"LGG": 2.8}, hash(weights) == hash(FrozenMapping(weights))
        (2.8, True, True)
    """

    __slots__ = ("_entries",)

    _entries: dict[str, Value]

    def __init__(self, entries: Mapping[str, Value]) -> None:
        object.__setattr__(self, "_entries", dict(entries))

    def __getitem__(self, name: str) -> Value:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse every change."""
        raise AttributeError(f"{name} cannot be set: this mapping is frozen; build another one.")

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __reduce__(self) -> tuple[type[FrozenMapping[Any]], tuple[dict[str, Value]]]:
        """Travel as the plain mapping."""
        return FrozenMapping, (dict(self._entries),)

    def __repr__(self) -> str:
        return repr(self._entries)


def frozen(value: object) -> object:
    """Freeze mappings and lists all the way down.

    Examples:
        >>> frozen({"strata": ["label", "site"]})
        {'strata': ('label', 'site')}
    """
    if isinstance(value, Mapping):
        return FrozenMapping({str(name): frozen(entry) for name, entry in value.items()})
    if isinstance(value, list | tuple):
        return tuple(frozen(entry) for entry in value)
    return value


def plain(value: object) -> Any:  # noqa: ANN401 - whatever the value is made of
    """Give a frozen value as JSON has it: mappings as dicts, tuples as lists.

    Examples:
        >>> plain(frozen({"strata": ["label", "site"]}))
        {'strata': ['label', 'site']}
    """
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value
