"""Where the class of a streamed sample stands: in a `cls` member, or in a field of its JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from streaming_balance.errors import ConfigError, ShardError, did_you_mean
from streaming_balance.stream.samples import StreamSample

_JSON = "json:"


def check_label(label: object) -> None:
    """Refuse a label that says nothing.

    Raises:
        ConfigError: it is neither a field nor `json:FIELD`.
    """
    is_field = isinstance(label, str) and label != "" and ":" not in label
    if is_field or (isinstance(label, str) and label.startswith(_JSON) and label != _JSON):
        return
    raise ConfigError(
        f"label is {label!r}; it must be a field, such as 'cls', or 'json:FIELD', an entry of the "
        f"sample's json. Tables of labels ('csv:FILE') are read by streaming-balance index alone."
    )


def label_field(label: str) -> str:
    """Give the field that holds the class: `json` of `json:grade`."""
    return "json" if label.startswith(_JSON) else label


def text_in_json(document: object, path: str) -> str | None:
    """Give an entry of a JSON document as text: a class, or a patient.

    Streams and indexes both ask here, so that a class has one name whoever reads it.

    Args:
        document: the document.
        path: name of the entry; `a.b` is an entry of that very name, else `b` within `a`.

    Returns:
        The text; None where the entry is absent, empty, null, a list, a dict, or no finite number.

    Raises:
        ValueError: the text holds half a character, and no file could hold it.

    Examples:
        >>> text_in_json({"a": {"grade": 3.0}, "old": True}, "a.grade")
        '3'
        >>> text_in_json({"a": {"grade": 3.0}, "old": True}, "old")
        'true'
    """
    if isinstance(document, dict) and path in document:
        value: object = document[path]
    else:
        value = document
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, str):
        value.encode()  # half a surrogate pair is refused here, not where a table is written
        return value.strip() or None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # Data frames write NaN where nothing is known: it is no class, and no patient.
        if not math.isfinite(value):
            return None
        # 1 rather than 1.0: tables that have gaps write whole numbers as floats.
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, int) else None


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
    if label.startswith(_JSON):
        document = json.loads(value) if isinstance(value, bytes) else value
        found = text_in_json(document, label.removeprefix(_JSON))
        if found is None:
            wanted = label.removeprefix(_JSON)
            raise ValueError(f"no text, number or truth value stands at {wanted!r}")
        return found
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    if isinstance(value, dict | list) or value is None:
        raise ValueError(f"it is {type(value).__name__}, which is no class")
    text = str(value).strip()
    if not text:
        raise ValueError("it is empty")
    return text
