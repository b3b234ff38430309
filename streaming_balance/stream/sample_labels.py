"""Where the class of a streamed sample stands: in a `cls` member, or in a field of its JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from streaming_balance.errors import ConfigError, ShardError, did_you_mean
from streaming_balance.stream.samples import StreamSample

LabelOf = Callable[[StreamSample], str]


def label_reader(label: str) -> LabelOf:
    """Give the function that finds the class of a sample, before anything else is read.

    Args:
        label: a field that holds the class as text or number, such as `cls`; or `json:FIELD`, an
            entry of the member `json`, with dots for entries inside entries.

    Raises:
        ConfigError: it names nothing.
    """
    if not isinstance(label, str) or not label or label == "json:":
        raise ConfigError(
            f"label is {label!r}; it must be a field, such as 'cls', or 'json:FIELD', an entry of "
            f"the sample's json."
        )
    if label.startswith("json:"):
        return lambda sample: _from_json(sample, label[5:])
    return lambda sample: _as_text(sample, label, sample.field_bytes(label))


def label_of_fields(fields: Mapping[str, Any], label: str) -> str:
    """Find the class in a sample of webdataset's, whose fields may be decoded already.

    Examples:
        >>> label_of_fields({"__key__": "P1", "cls": b"1"}, "cls")
        '1'
        >>> label_of_fields({"__key__": "P1", "json": {"grade": "LGG"}}, "json:grade")
        'LGG'
    """
    name, _, path = label.partition(":")
    if name not in fields:
        raise ConfigError(
            f"sample {fields.get('__key__')!r} has no field {name!r}; fields there: "
            f"{', '.join(sorted(fields))}." + did_you_mean(name, fields)
        )
    value = fields[name]
    if isinstance(value, bytes):
        value = json.loads(value) if path else value.decode().strip()
    for part in path.split(".") if path else ():
        value = value[part]
    return str(value)


def _as_text(sample: StreamSample, name: str, stored: bytes) -> str:
    """Read a class as text."""
    try:
        text = stored.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ShardError(
            f"{sample.url}: sample {sample.key!r} at byte {sample.offset}: {name} is no text "
            f"({error}). Name the field that holds the class with label=."
        ) from error
    if not text:
        raise ShardError(
            f"{sample.url}: sample {sample.key!r} at byte {sample.offset}: {name} is empty."
        )
    return text


def _from_json(sample: StreamSample, path: str) -> str:
    """Read a class from an entry of the sample's JSON."""
    try:
        value = json.loads(sample.field_bytes("json"))
        for part in path.split("."):
            value = value[part]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ShardError(
            f"{sample.url}: sample {sample.key!r} at byte {sample.offset}: its json has no entry "
            f"{path!r} ({type(error).__name__}: {error}). Name the entry that holds the class with "
            f"label='json:FIELD'."
        ) from error
    if isinstance(value, dict | list) or value is None:
        raise ShardError(
            f"{sample.url}: sample {sample.key!r} at byte {sample.offset}: entry {path!r} of its "
            f"json is {value!r}, which is no class."
        )
    return str(value)
