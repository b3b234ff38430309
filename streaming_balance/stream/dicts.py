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


def _num_bytes(value: object) -> int:
    """Count the bytes of a field: of bytes and arrays what they hold, else the object's own."""
    found = getattr(value, "nbytes", None)
    if isinstance(found, int):
        return found
    return len(value) if isinstance(value, bytes | str) else sys.getsizeof(value)
