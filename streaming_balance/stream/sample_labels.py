"""Where the class of a streamed sample stands: in a `cls` member, or in a field of its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from streaming_balance.errors import ConfigError, ShardError, did_you_mean
from streaming_balance.stream.samples import StreamSample


def check_label(label: object) -> None:
    """Refuse a label that says nothing.

    Raises:
        ConfigError: it is neither a field nor `json:FIELD`.
    """
    is_field = isinstance(label, str) and label != "" and ":" not in label
    if is_field or (isinstance(label, str) and label.startswith("json:") and label != "json:"):
        return
    raise ConfigError(
        f"label is {label!r}; it must be a field, such as 'cls', or 'json:FIELD', an entry of the "
        f"sample's json. Tables of labels ('csv:FILE') are read by streaming-balance index alone."
    )


def label_field(label: str) -> str:
    """Give the field that holds the class: `json` of `json:grade`."""
    return "json" if label.startswith("json:") else label


def label_of_sample(sample: StreamSample, label: str, *, required: bool) -> str | None:
    """Find the class of a sample, reading no other member of it.

    Args:
        sample: any sample.
        label: where the class stands: a field, or `json:FIELD` with dots between nested entries.
        required: whether a sample without that field is an error rather than of no class.

    Raises:
        ConfigError: the field is missing.
        ShardError: there is no class in it.
    """
    name = label_field(label)
    if not required and name not in sample.members:
        return None
    stored = sample.field_bytes(name)
    try:
        return _label_in(stored, label)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ShardError(
            f"{sample.url}: sample {sample.key!r} at byte {sample.offset}: there is no class in "
            f"its {name} ({type(error).__name__}: {error}). Say where it is: label='cls' or "
            f"label='json:FIELD'."
        ) from error


def label_of_fields(fields: Mapping[str, Any], label: str) -> str:
    """Find the class in a sample of webdataset's, whose fields may be decoded already.

    Raises:
        ConfigError: the field is missing, or holds no class.

    Examples:
        >>> label_of_fields({"__key__": "P1", "cls": b"1"}, "cls")
        '1'
        >>> label_of_fields({"__key__": "P1", "json": {"grade": "LGG"}}, "json:grade")
        'LGG'
    """
    name = label_field(label)
    if name not in fields:
        raise ConfigError(
            f"sample {fields.get('__key__')!r} has no field {name!r}; fields there: "
            f"{', '.join(sorted(fields))}." + did_you_mean(name, fields)
        )
    try:
        return _label_in(fields[name], label)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ConfigError(
            f"sample {fields.get('__key__')!r}: there is no class in its {name} "
            f"({type(error).__name__}: {error}). Say where it is: label='cls' or "
            f"label='json:FIELD'."
        ) from error


def _label_in(value: Any, label: str) -> str:  # noqa: ANN401 - bytes, or what they were decoded to
    """Give the class as text."""
    if label.startswith("json:"):
        if isinstance(value, bytes):
            value = json.loads(value)
        for part in label[5:].split("."):
            value = value[part]
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    if isinstance(value, dict | list) or value is None:
        raise ValueError(f"it is {type(value).__name__}, which is no class")
    text = str(value).strip()
    if not text:
        raise ValueError("it is empty")
    return text
