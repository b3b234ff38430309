"""Samples that a stream holds, in its state: by shard and byte, or whole where that cannot be."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streaming_balance.errors import ResumeError
from streaming_balance.stream.local import ShardFiles
from streaming_balance.stream.rules import TarRules
from streaming_balance.stream.sample_labels import label_of_sample
from streaming_balance.stream.samples import Payload, Place, StreamSample
from streaming_balance.stream.sources import ShardSource
from streaming_balance.stream.tarstream import read_place


class HeldSamples:
    """Collects the samples of a state, each once however often it is held."""

    def __init__(self) -> None:
        self.saved: list[dict[str, Any]] = []
        """What to put into the state."""
        self._numbers: dict[int, int] = {}
        # Kept alive, so that no other sample gets the identity of one that is gone.
        self._samples: list[StreamSample] = []

    def save(self, sample: StreamSample) -> int:
        """Give the number of a sample in `saved`."""
        number = self._numbers.get(id(sample))
        if number is None:
            number = self._numbers[id(sample)] = len(self.saved)
            self._samples.append(sample)
            self.saved.append(_saved(sample))
        return number


def restorer(
    saved: Sequence[Mapping[str, Any]],
    sources: Sequence[ShardSource],
    files: ShardFiles,
    rules: TarRules,
    label: str | None,
) -> Callable[[int], StreamSample]:
    """Give the function that turns numbers of `HeldSamples` into samples again.

    Args:
        saved: what `HeldSamples` collected, perhaps after a trip through JSON.
        sources: the shards of the stream, as they were.
        files: opens them.
        rules: how strictly to read.
        label: where the class of a sample stands, or None.

    Returns:
        A function that raises ResumeError where a sample is another one now, and ShardError where
        it cannot be read again.
    """
    samples: dict[int, StreamSample] = {}

    def restore(number: int) -> StreamSample:
        if number not in samples:
            samples[number] = sample = _restored(saved[number], sources, files, rules)
            _check_class(sample, saved[number]["label"], label)
        return samples[number]

    return restore


def _saved(sample: StreamSample) -> dict[str, Any]:
    """Turn a held sample into plain values from which it can be had again."""
    saved: dict[str, Any] = {
        "key": sample.key,
        "shard": sample.shard,
        "offset": sample.offset,
        "stop": sample.stop,
        "label": sample.label,
    }
    if not sample.can_seek:
        saved["members"] = {
            field: [payload.name, base64.b64encode(payload.read()).decode("ascii")]
            for field, payload in sample.members.items()
        }
    return saved


def _restored(
    saved: Mapping[str, Any], sources: Sequence[ShardSource], files: ShardFiles, rules: TarRules
) -> StreamSample:
    """Read a sample again where it stands, or take it as it was kept."""
    shard, offset, stop = int(saved["shard"]), int(saved["offset"]), int(saved["stop"])
    # The shard is named by the stream, not by the state: a state opens no file of its choice.
    url = sources[shard].shown
    if "members" in saved:
        members = {field: _payload(*kept) for field, kept in saved["members"].items()}
        sample = StreamSample(saved["key"], url, shard, offset, stop, members, can_seek=False)
    else:
        place = Place(url=url, shard=shard, offset=offset, stop=stop)
        sample = read_place(place, files, rules=rules, path=sources[shard].address)
    if sample.key != saved["key"]:
        raise ResumeError(
            f"{url}: sample {saved['key']!r} stood at byte {offset}, and now {sample.key!r} does. "
            f"The shard was changed since: start again."
        )
    return sample


def _check_class(sample: StreamSample, saved: str | None, label: str | None) -> None:
    """Give a sample the class it had, and refuse one that has another class now."""
    sample.label = saved
    if saved is None or label is None or not sample.can_seek:
        return
    found = label_of_sample(sample, label, required=True)
    if found != saved:
        raise ResumeError(
            f"{sample.url}: sample {sample.key!r} at byte {sample.offset} was of class {saved!r}, "
            f"and now is of {found!r}. The shard was changed since: start again."
        )


def _payload(name: str, encoded: str) -> Payload:
    """Take one member as it was kept."""
    held = base64.b64decode(encoded, validate=True)
    return Payload(name, len(held), held)
