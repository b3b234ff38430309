"""Samples as webdataset and others pass them: plain dicts, seen by stages as stream items."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from streaming_balance.errors import ConfigError
from streaming_balance.stream.chain import ChainRun
from streaming_balance.stream.sample_labels import label_of_fields


class DictItem:
    """A dict with `__key__`, as a stage sees it.

    Args:
        fields: the sample; kept as it is.
        label: where its class stands, or None.

    Raises:
        ConfigError: it has no key.
    """

    def __init__(self, fields: Mapping[str, Any], label: str | None) -> None:
        if not isinstance(fields, Mapping) or "__key__" not in fields:
            raise ConfigError(
                f"a stream takes samples as webdataset gives them, dicts with '__key__', not a "
                f"{type(fields).__name__}. Put the chain before to_tuple and batched."
            )
        self._fields, self._label = fields, label

    @property
    def key(self) -> str:
        """Name of the sample."""
        return str(self._fields["__key__"])

    @cached_property
    def label(self) -> str | None:
        """Class of the sample."""
        return None if self._label is None else label_of_fields(self._fields, self._label)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of everything it holds, as far as can be told."""
        return sum(_num_bytes(value) for value in self._fields.values())

    def to_dict(self) -> dict[str, Any]:
        """Give the sample as it came, in a dict of its own."""
        return dict(self._fields)


class DictChain:
    """Stages at work on dicts, and counts of what went through them, call after call.

    Args:
        chain: the stages.
        label: where the class of a sample stands, or None.
    """

    def __init__(self, chain: ChainRun, label: str | None) -> None:
        self._chain, self._label = chain, label
        self._num_taken = self._num_let_go = 0
        self.num_delivered = 0

    def over(self, samples: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
        """Give all that goes out in one pass: items, or batches of them."""
        for item in self._chain.over(self._items(samples)):
            self._num_let_go += len(item) if isinstance(item, list) else 1
            yield item

    def stats(self) -> dict[str, Any]:
        """Give `totals` and `stages` as `Stream.stats` does."""
        stages = self._chain.stats()
        copies, rejected, buffered = (
            sum(stage[name] for stage in stages) for name in ("copies", "rejected", "buffered")
        )
        on_its_way = self._chain.num_waiting + self._num_let_go - self.num_delivered
        totals = {
            "read": self._num_taken,
            "copies": copies,
            "delivered": self.num_delivered,
            "rejected": rejected,
            "buffered": buffered + on_its_way,
            "unlabelled": 0,
            "left_to_others": 0,
        }
        return {"totals": totals, "stages": stages}

    def _items(self, samples: Iterable[Mapping[str, Any]]) -> Iterator[DictItem]:
        """Count what comes in."""
        for fields in samples:
            item = DictItem(fields, self._label)
            self._num_taken += 1
            yield item


def _num_bytes(value: object) -> int:
    """Count the bytes of a field: of bytes and arrays what they hold, else the object's own."""
    found = getattr(value, "nbytes", None)
    if isinstance(found, int):
        return found
    return len(value) if isinstance(value, bytes | str) else sys.getsizeof(value)
