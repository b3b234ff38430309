"""What some tars hold, read strictly and once: samples, members, classes, shapes, and damage."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from streaming_balance.errors import BalanceError, ShardError
from streaming_balance.storage.npy import parse_header
from streaming_balance.stream.counts import StreamCounts
from streaming_balance.stream.local import ShardFiles
from streaming_balance.stream.names import KeyRule
from streaming_balance.stream.rules import TarRules
from streaming_balance.stream.sample_labels import check_label, label_field, label_of_fields
from streaming_balance.stream.samples import Payload, StreamSample
from streaming_balance.stream.sources import Urls, expand
from streaming_balance.stream.tallies import MOST_CLASSES
from streaming_balance.stream.tarstream import SampleReader

# Of more fields, shapes or classes than these nobody wants a list, and memory stays bounded.
MOST_NAMES = MOST_CLASSES
OTHERS = "(others)"
# The .npy header of a plain array; a longer one belongs to no array that is read here.
_HEADER_BYTES = 12 << 10
_ARRAYS = ("npy", "npb")


@dataclass(slots=True, kw_only=True)
class FieldSummary:
    """The members of one field."""

    members: int = 0
    """How many samples have it."""
    bytes: int = 0
    """Bytes of their payloads."""
    shapes: Counter[str] = field(default_factory=Counter)
    """Of arrays: how many have which dtype and shape, such as `int16 4x24x24x24`."""
    unread_headers: int = 0
    """Arrays whose header is none of a plain array in C order: those are not decoded here."""


@dataclass(slots=True, kw_only=True)
class TarSummary:
    """What some tars hold."""

    counts: StreamCounts
    """What was read and left out; `skips` says where, and why."""
    fields: dict[str, FieldSummary] = field(default_factory=dict)
    """Field -> its members; beyond a thousand fields, the rest is one."""
    classes: Counter[str] = field(default_factory=Counter)
    """Label -> samples; beyond a thousand labels, the rest is one."""
    without_label: int = 0
    """Samples that have no such field, or no class in it."""

    @property
    def is_sound(self) -> bool:
        """Whether nothing was left out."""
        return not self.counts.skips

    def to_dict(self) -> dict[str, Any]:
        """Give everything as JSON-able values, classes and shapes by how often they come."""
        counts = self.counts.to_dict()
        return {
            "ok": self.is_sound,
            "samples": self.counts.samples_delivered,
            "bytes": self.counts.bytes_read,
            "fields": {
                name: {**asdict(found), "shapes": dict(found.shapes.most_common())}
                for name, found in sorted(self.fields.items())
            },
            "classes": dict(self.classes.most_common()),
            "without_label": self.without_label,
            "problems": counts.pop("skips"),
            "counts": counts,
        }

    def add(self, sample: StreamSample, label: str) -> None:
        """Count a sample in."""
        for name, payload in sample.members.items():
            is_new = name not in self.fields and len(self.fields) >= MOST_NAMES
            found = self.fields.setdefault(OTHERS if is_new else name, FieldSummary())
            found.members += 1
            found.bytes += payload.size
            if name.rpartition(".")[2] in _ARRAYS:
                _add_shape(found, payload)
        stored = sample.members.get(label_field(label))
        try:
            fields = {} if stored is None else {label_field(label): stored.read()}
            _count(self.classes, label_of_fields({"__key__": sample.key, **fields}, label))
        except BalanceError:
            self.without_label += 1


def inspect_tars(
    urls: Urls, *, label: str = "cls", keys: KeyRule = "webdataset", allow_pipe: bool = False
) -> TarSummary:
    """Read some tars strictly and say what they hold, going on after damage where that is possible.

    Of plain tars on disk, headers and labels are read and payloads passed over; of anything else,
    every byte passes by.

    Args:
        urls: the tars, as `stream` takes them.
        label: where the class of a sample stands: a field, or `json:FIELD`.
        keys: where names are cut into key and field.
        allow_pipe: whether `pipe:` may start programs.

    Returns:
        What they hold; `is_sound` says whether all of it could be read.

    Raises:
        ConfigError: the shards are none, or a choice is none of those allowed.

    Examples:
        >>> summary = inspect_tars("shards/demo/train-*.tar")
        >>> summary.is_sound, summary.classes["1"], summary.fields["image.npb"].shapes
        (True, 10, Counter({'int16 4x24x24x24': 14}))
    """
    check_label(label)
    summary = TarSummary(counts=StreamCounts())
    rules = TarRules(on_error="skip", keys=keys)
    with ShardFiles() as files:
        reader = SampleReader(
            expand(urls, allow_pipe=allow_pipe), rules=rules, counts=summary.counts, files=files
        )
        for sample in reader:
            summary.add(sample, label)
    return summary


def _add_shape(found: FieldSummary, payload: Payload) -> None:
    """Count the shape of an array, reading its header alone where the payload is not in memory."""
    try:
        header = parse_header(payload.start(_HEADER_BYTES))
    except ShardError:
        found.unread_headers += 1
        return
    _count(found.shapes, f"{header.dtype.name} {'x'.join(map(str, header.shape)) or 'scalar'}")


def _count(counter: Counter[str], name: str) -> None:
    """Count a name, as one of the others where there are too many."""
    is_new = name not in counter and len(counter) >= MOST_NAMES
    counter[OTHERS if is_new else name] += 1
