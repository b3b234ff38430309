"""What a stage counts: every sample it read is delivered, rejected or still buffered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Labels that nobody declared are all counted, but only so many are named.
NAMED_STRANGERS = 8
# Where classes are not declared, more labels than these are no classes but a mistake: samples of
# further ones are counted with those without a label, or their names would fill the memory.
MOST_CLASSES = 1000


class ClassTally:
    """What became of the samples of one class."""

    __slots__ = ("copies", "delivered", "read", "rejected")

    def __init__(self) -> None:
        self.read = 0
        """Samples that came in."""
        self.delivered = 0
        """Samples that went on, counted once however often they did."""
        self.copies = 0
        """How often samples went on beyond their first time."""
        self.rejected = 0
        """Samples that were let go without going on."""

    def numbers(self) -> list[int]:
        """Give what was read, delivered, copied and rejected."""
        return [self.read, self.delivered, self.copies, self.rejected]

    def add(self, other: ClassTally) -> None:
        """Count what another run counted, too."""
        self.read += other.read
        self.delivered += other.delivered
        self.copies += other.copies
        self.rejected += other.rejected


class Held:
    """The samples in memory: how many, how many bytes, and how many at most so far."""

    __slots__ = ("items", "most_size", "size")

    def __init__(self) -> None:
        self.items = 0
        """Samples held."""
        self.size = 0
        """Bytes they take."""
        self.most_size = 0
        """The most bytes that were held after a sample was dealt with."""

    def add(self, size: int) -> None:
        """Count a sample of `size` bytes in."""
        self.items += 1
        self.size += size

    def remove(self, size: int) -> None:
        """Count a sample of `size` bytes out."""
        self.items -= 1
        self.size -= size

    def settle(self) -> None:
        """Note the most bytes held, now that a sample has been dealt with."""
        self.most_size = max(self.most_size, self.size)


class Tallies:
    """The counts of one run of a stage.

    Args:
        labels: classes that were declared; None where every label is welcome.
    """

    __slots__ = ("by_class", "held", "is_open", "stranger_names", "strangers")

    def __init__(self, labels: Iterable[str] | None) -> None:
        self.is_open = labels is None
        """Whether a label that is met for the first time becomes a class of its own."""
        self.by_class: dict[str | None, ClassTally] = {
            label: ClassTally() for label in labels or ()
        }
        """Label -> counts; None stands for samples without a label where these are welcome."""
        self.strangers = 0
        """Samples of labels that were not declared, all rejected."""
        self.stranger_names: list[str] = []
        """The first few of those labels."""
        self.held = Held()
        """What is in memory."""

    def of(self, label: str | None) -> ClassTally:
        """Give the tally of a class, a new one where every label is welcome."""
        tally = self.by_class.get(label)
        if tally is None and len(self.by_class) >= MOST_CLASSES:
            label = None
            tally = self.by_class.get(None)
        if tally is None:
            tally = self.by_class[label] = ClassTally()
        return tally

    def count_stranger(self, label: str | None) -> None:
        """Count a sample that belongs to no declared class as read and rejected."""
        self.strangers += 1
        name = "" if label is None else label
        if name not in self.stranger_names and len(self.stranger_names) < NAMED_STRANGERS:
            self.stranger_names.append(name)

    def totals(self) -> dict[str, int]:
        """Give the counts over all classes."""
        numbers = [tally.numbers() for tally in self.by_class.values()]
        read, delivered, copies, rejected = (
            sum(column) for column in zip([0, 0, 0, 0], *numbers, strict=True)
        )
        return {
            "read": read + self.strangers,
            "delivered": delivered,
            "copies": copies,
            "rejected": rejected + self.strangers,
        }

    def add(self, other: Tallies) -> None:
        """Count what another run counted, too; what is held is the merging run's business."""
        for label, tally in other.by_class.items():
            self.of(label).add(tally)
        self.strangers += other.strangers
        names = dict.fromkeys([*self.stranger_names, *other.stranger_names])
        self.stranger_names = sorted(names)[:NAMED_STRANGERS]
        self.held.most_size = max(self.held.most_size, other.held.most_size)

    def state(self) -> dict[str, Any]:
        """Give the counts as plain values."""
        return {
            "classes": [[label, *tally.numbers()] for label, tally in self.by_class.items()],
            "strangers": self.strangers,
            "stranger_names": list(self.stranger_names),
            "most_buffered_bytes": self.held.most_size,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over counts that `state` gave; what is held is counted in again by the run."""
        if self.is_open:
            self.by_class.clear()
        for label, *numbers in state["classes"]:
            tally = self.of(label)
            tally.read, tally.delivered, tally.copies, tally.rejected = map(int, numbers)
        self.strangers = int(state["strangers"])
        self.stranger_names = [str(name) for name in state["stranger_names"]]
        self.held = Held()
        self.held.most_size = int(state["most_buffered_bytes"])
