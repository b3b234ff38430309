"""Records of samples that stood in for damaged ones, and whose records a state holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Substitution:
    """One sample that was delivered in the place of a damaged one."""

    epoch: int
    """Epoch of the batch."""
    step: int
    """Step of the batch in its epoch."""
    slot: int
    """Position in the global batch."""
    sample: int
    """Sample number of the damaged one, which the plan asked for."""
    substitute: int
    """Sample number of the one that was delivered."""
    reason: str
    """What was wrong with the damaged one."""

    def to_dict(self) -> dict[str, Any]:
        """Give the record as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Substitution:
        """Read a record.

        Raises:
            KeyError: an entry is missing.
            ValueError: an entry is of another type.

        Examples:
            >>> record = Substitution(epoch=0, step=1, slot=2, sample=3, substitute=4, reason="cut")
            >>> Substitution.from_dict(record.to_dict()) == record
            True
        """
        numbers = {name: record[name] for name in ("epoch", "step", "slot", "sample", "substitute")}
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"{name} of a substitution is {number!r}, no whole number from 0")
        if not isinstance(record["reason"], str):
            raise ValueError(f"the reason of a substitution is {record['reason']!r}, no text")
        return cls(reason=record["reason"], **numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorders:
    """Whose substitutions a state holds, where it does not hold those of all ranks."""

    num_ranks: int
    """Ranks that delivered since the state before was loaded."""
    ranks: tuple[int, ...]
    """Those of them whose records are here, in ascending order."""

    @classmethod
    def of(cls, ranks: Iterable[int], *, num_ranks: int) -> Recorders | None:
        """Give whose records there are; None where that is everybody."""
        mine = tuple(sorted(set(ranks)))
        return None if len(mine) == num_ranks else cls(num_ranks=num_ranks, ranks=mine)

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain values."""
        return {"num_ranks": self.num_ranks, "ranks": list(self.ranks)}

    @classmethod
    def from_dict(cls, recorders: Mapping[str, Any]) -> Recorders:
        """Read whose records a state holds.

        Raises:
            KeyError: an entry is missing.
            ValueError: they are no ranks.
        """
        num_ranks, ranks = recorders["num_ranks"], list(recorders["ranks"])
        for number in (num_ranks, *ranks):
            if isinstance(number, bool) or not isinstance(number, int):
                raise ValueError(f"recorders has {number!r}, which is no rank")
        if ranks != sorted(set(ranks)) or not all(0 <= rank < num_ranks for rank in ranks):
            raise ValueError(f"recorders has ranks {ranks} of {num_ranks}")
        return cls(num_ranks=num_ranks, ranks=tuple(ranks))


def united(records: Iterable[Iterable[Substitution]]) -> tuple[Substitution, ...]:
    """Unite the records of several ranks.

    What all of them loaded is counted once. A batch that was delivered twice, because `set_epoch`
    went back, has its records twice on the one rank that delivered it.

    Examples:
        >>> earlier = Substitution(epoch=0, step=0, slot=1, sample=5, substitute=6, reason="cut")
        >>> mine = Substitution(epoch=0, step=4, slot=0, sample=5, substitute=7, reason="cut")
        >>> len(united([[earlier], [earlier, mine]]))
        2
    """
    most: Counter[Substitution] = Counter()
    for rank in records:
        most |= Counter(rank)
    return tuple(sorted(most.elements()))
