"""Samples as webdataset and others pass them: plain dicts, seen by stages as stream items."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from streaming_balance.errors import ConfigError
from streaming_balance.stream.sample_labels import label_of_fields


class DictItem:
    """A dict with `__key__`, as a stage sees it.

    Args:
        fields: the sample; kept as it is.
        label: where its class stands, or None.
    """

    def __init__(self, fields: Mapping[str, Any], label: str | None) -> None:
        if "__key__" not in fields:
            raise ConfigError(
                f"a sample has no '__key__', only {', '.join(map(str, fields))}. Give samples as "
                f"webdataset does."
            )
        self.fields, self._label = fields, label

    @property
    def key(self) -> str:
        """Name of the sample."""
        return str(self.fields["__key__"])

    @cached_property
    def label(self) -> str | None:
        """Class of the sample."""
        return None if self._label is None else label_of_fields(self.fields, self._label)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of everything it holds, as far as can be told."""
        return sum(_num_bytes(value) for value in self.fields.values())


def fields_of(item: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - an item, or a list of them
    """Give the dicts of what a stage gave."""
    items = item if isinstance(item, list) else [item]
    return [dict(one.fields) for one in items]


def _num_bytes(value: object) -> int:
    """Count the bytes of a field: of bytes and arrays what they hold, else the object's own."""
    found = getattr(value, "nbytes", None)
    if isinstance(found, int):
        return found
    return len(value) if isinstance(value, bytes | str) else sys.getsizeof(value)
