"""What happens to samples that go on: decoded, changed by the user's functions, put in batches.

Nothing of this is kept in a state: samples are held as they were stored, and finished when they
leave the stream.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from streaming_balance.errors import ShardError
from streaming_balance.storage.codecs import checked_header, decode_member
from streaming_balance.stream.dicts import DictItem
from streaming_balance.stream.samples import Payload, StreamSample

Fields = dict[str, Any]
Finisher = Callable[[Fields], Fields]


def decoded(fields: Fields) -> Fields:
    """Decode what is known by its name: arrays, classes, JSON and text; other bytes stay.

    Args:
        fields: a sample as webdataset gives it.

    Returns:
        The same with arrays for `npb` and `npy`, a number or text for `cls`, values for `json` and
        text for `txt`.

    Raises:
        ShardError: bytes are not what the name says.

    Examples:
        >>> decoded({"__key__": "P1", "cls": b"1", "json": b'{"age": 61}'})
        {'__key__': 'P1', 'cls': 1, 'json': {'age': 61}}
    """
    try:
        return {
            name: _decoded_member(name, value) if isinstance(value, bytes) else value
            for name, value in fields.items()
        }
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{_place_of(fields)} cannot be decoded: {error}.") from error
    except ShardError as error:
        error.add_note(f"in {_place_of(fields)}")
        raise


def finished(sample: StreamSample | DictItem, finishers: tuple[Finisher, ...]) -> Fields:
    """Read a sample that goes on, and do to it what was asked for.

    Args:
        sample: one that leaves the stages.
        finishers: what to do, in order.

    Returns:
        Its fields, with `__label__` where its class was asked for.
    """
    fields: Fields
    if isinstance(sample, StreamSample) and finishers[:1] == (decoded,):
        fields = _read_in_place(sample)
    else:
        fields = dict(sample.to_dict())
    if sample.label is not None:
        fields["__label__"] = sample.label
    for finisher in finishers:
        fields = finisher(fields)
    return fields


def collated(samples: Iterable[Fields], count: int) -> Fields:
    """Put samples together, name by name.

    Args:
        samples: at least one. Each is copied into the batch before the next is asked for, so that
            arrays of one sample at a time are in memory beside it.
        count: how many there are.

    Returns:
        A stacked array where all samples have arrays of one shape, an array of numbers where all
        are numbers, a list otherwise; None in it where a sample has no such field.

    Examples:
        >>> batch = collated([{"cls": 1, "__key__": "P1"}, {"cls": 0, "__key__": "P2"}], 2)
        >>> batch["cls"].tolist(), batch["__key__"]
        ([1, 0], ['P1', 'P2'])
    """
    columns: dict[str, _Column] = {}
    for number, sample in enumerate(samples):
        for name, value in sample.items():
            if name not in columns:
                columns[name] = _Column(count)
            columns[name].put(number, value)
    return {name: column.together() for name, column in columns.items()}


class _Column:
    """One field of the samples of a batch.

    Args:
        count: samples in the batch.
    """

    def __init__(self, count: int) -> None:
        self._values: list[Any] = [None] * count
        self._dtype: np.dtype[Any] | None = None
        self._stacked: np.ndarray[Any, Any] | None = None
        self._num_stacked = 0

    def put(self, number: int, value: Any) -> None:  # noqa: ANN401 - whatever the field holds
        """Take in a sample's value; arrays of one shape are copied at once."""
        if isinstance(value, np.ndarray) and number == self._num_stacked:
            if number == 0:
                self._dtype = value.dtype
                # As `numpy.stack` does: in the byte order of this machine.
                dtype = np.result_type(value.dtype)
                self._stacked = np.empty((len(self._values), *value.shape), dtype)
            stacked = self._stacked
            assert stacked is not None
            if (value.shape, value.dtype) == (stacked.shape[1:], self._dtype):
                stacked[number] = value
                self._num_stacked += 1
                return
        self._values[number] = value

    def together(self) -> Any:  # noqa: ANN401 - an array or a list
        """Give one array of arrays of one shape, or of numbers; a list of anything else."""
        values, stacked = self._values, self._stacked
        if stacked is not None:
            if self._num_stacked == len(values):
                return stacked
            # One is another shape: each gets memory of its own.
            values[: self._num_stacked] = [row.copy() for row in stacked[: self._num_stacked]]
            return values
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            return np.array(values)
        return values


def _read_in_place(sample: StreamSample) -> Fields:
    """Read a sample that will be decoded, plain arrays straight into the memory they keep."""
    fields: Fields = {"__key__": sample.key, "__url__": sample.url}
    for name, payload in sample.members.items():
        is_plain = name.rpartition(".")[2] == "npy" and not payload.is_held
        fields[name] = _array_in_place(payload, fields) if is_plain else payload.read()
    return fields


def _array_in_place(payload: Payload, fields: Fields) -> np.ndarray[Any, Any]:
    """Read a member into new memory, and give the array in it."""
    stored = np.empty(payload.size, dtype=np.uint8)
    payload.read_into(stored.data)
    try:
        header = checked_header(stored.data, "npy")
    except ShardError as error:
        error.add_note(f"in {_place_of(fields)}")
        raise
    values = stored[header.header_bytes :]
    # Others than numpy write headers of any length, and torch takes no unaligned array.
    values = values if header.header_bytes % header.dtype.itemsize == 0 else values.copy()
    return values.view(header.dtype).reshape(header.shape)


def _decoded_member(name: str, stored: bytes) -> Any:  # noqa: ANN401 - whatever the member holds
    """Decode one member by its name."""
    array = decode_member("." + name, stored)
    if array is not None:
        return array
    kind = name.rpartition(".")[2]
    if kind == "json":
        return json.loads(stored)
    if kind == "cls":
        text = stored.decode().strip()
        return int(text) if text.removeprefix("-").isdecimal() else text
    return stored.decode() if kind == "txt" else stored


def _place_of(fields: Fields) -> str:
    """Say which sample this is."""
    return f"{fields.get('__url__', 'a sample given')}: sample {fields.get('__key__')!r}"
