"""One pass of a stream at work: pulled sample by sample, and saved at any of them."""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from streaming_balance.errors import BalanceError, ResumeError
from streaming_balance.stream.counts import StreamCounts
from streaming_balance.stream.finishing import Fields, collated, finished
from streaming_balance.stream.local import ShardFiles
from streaming_balance.stream.samples import Payload, Place, StreamSample
from streaming_balance.stream.stages import StageRun
from streaming_balance.stream.tarstream import SampleReader, read_place

if TYPE_CHECKING:
    from streaming_balance.stream.pipeline import Stream


class StreamRun(Iterator[Any]):
    """Iterates over one pass of a stream.

    Args:
        stream: what to read, and what to do with it.
        epoch: number of the pass; keys the order of shards.
        files: opens shards; the caller closes them.
        runs: the stages at work; they go on from pass to pass.
    """

    def __init__(
        self, stream: Stream, *, epoch: int, files: ShardFiles, runs: Sequence[StageRun[Any, Any]]
    ) -> None:
        self._stream, self.epoch, self._files, self._runs = stream, epoch, files, runs
        self.counts = StreamCounts()
        """What was read of the shards in this pass."""
        self.delivered = 0
        """What this pass gave so far: samples, or batches."""
        self._order = stream.part.shards(
            stream.sources, seed=stream.seed, epoch=epoch, shuffled=stream.shuffled_shards
        )
        self._place, self._offset, self._ordinal = 0, 0, 0
        # What a stage gave and the next one has not taken yet; the last one is what goes out.
        self._queues: list[deque[Any]] = [deque() for _ in range(len(runs) + 1)]
        self._ended = [False] * (len(runs) + 1)
        # On its way out: what fails while it is finished comes again.
        self._going: list[StreamSample] = []
        self._source: Iterator[StreamSample] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:  # noqa: ANN401 - a sample or a batch
        size = self._stream.batch_size or 1
        while len(self._going) < size:
            item = self._pull(len(self._runs))
            if item is None:
                break
            self._going += item if isinstance(item, list) else [item]
        if not self._going:
            raise StopIteration
        output = self._finished(self._going)
        self._going = []
        self.delivered += 1
        return output

    def state_dict(self) -> dict[str, Any]:
        """Give everything needed to go on after what was given last."""
        return {
            "epoch": self.epoch,
            "delivered": self.delivered,
            "place": self._place,
            "offset": self._offset,
            "ordinal": self._ordinal,
            "counts": self.counts.to_dict(),
            "ended": list(self._ended),
            "queues": [[saved_sample(item) for item in queue] for queue in self._queues],
            "going": [saved_sample(sample) for sample in self._going],
            "stages": [run.state_dict(saved_sample) for run in self._runs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state says.

        Raises:
            ResumeError: it is damaged, or of other stages.
            ShardError: a sample that was held cannot be read again.
        """
        try:
            self.delivered, self._place = int(state["delivered"]), int(state["place"])
            self._offset, self._ordinal = int(state["offset"]), int(state["ordinal"])
            self.counts = StreamCounts.from_dict(state["counts"])
            self._ended = [bool(flag) for flag in state["ended"]]
            self._queues = [deque(map(self.restored, queue)) for queue in state["queues"]]
            self._going = [self.restored(sample) for sample in state["going"]]
            for run, saved in zip(self._runs, state["stages"], strict=True):
                run.load_state_dict(saved, self.restored)
        except BalanceError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ResumeError(
                f"the state of the stream is damaged ({type(error).__name__}: {error}); it must "
                f"be what state_dict() gave. Use an earlier checkpoint."
            ) from error

    def _finished(self, going: list[StreamSample]) -> Fields:
        """Decode, change and collate what goes out."""
        samples = [finished(sample, self._stream.finishers) for sample in going]
        return collated(samples) if self._stream.gives_batches else samples[0]

    def _pull(self, level: int) -> Any:  # noqa: ANN401 - what the stage below gives; None at the end
        """Give the next item that leaves the stages below `level`; None when the pass has ended."""
        queue = self._queues[level]
        while not queue:
            if self._ended[level]:
                return None
            if level == 0:
                sample = next(self._samples(), None)
                if sample is None:
                    self._ended[0] = True
                    return None
                return sample
            run = self._runs[level - 1]
            item = self._pull(level - 1)
            if item is None:
                queue.extend(run.finish())
                self._ended[level] = True
            else:
                queue.extend(run.feed(item))
        return queue.popleft()

    def _samples(self) -> Iterator[StreamSample]:
        """Give the iterator over what is read, made on first use."""
        if self._source is None:
            self._source = self._read()
        return self._source

    def _read(self) -> Iterator[StreamSample]:
        """Read this reader's samples from where it stands, each with its label."""
        stream = self._stream
        reader = SampleReader(
            stream.sources, rules=stream.rules, counts=self.counts, files=self._files
        )
        deals_samples = stream.part.deals_samples(stream.sources)
        while self._place < len(self._order):
            for sample in reader.shard(self._order[self._place], start=self._offset):
                ordinal, self._ordinal = self._ordinal, self._ordinal + 1
                self._offset = sample.stop
                if stream.part.takes(ordinal, deals_samples=deals_samples):
                    sample.label = None if stream.label_of is None else stream.label_of(sample)
                    yield sample
            self._place, self._offset = self._place + 1, 0

    def restored(self, saved: Any) -> Any:  # noqa: ANN401 - a sample, or a list of them
        """Give a held sample back: read again where it stands, or as it was kept."""
        if isinstance(saved, list):
            return [self.restored(sample) for sample in saved]
        if "members" in saved:
            sample = _unpacked(saved)
        else:
            place = Place(**{name: saved[name] for name in ("url", "shard", "offset", "stop")})
            sample = read_place(place, self._files, rules=self._stream.rules)
        if sample.key != saved["key"]:
            raise ResumeError(
                f"{saved['url']}: sample {saved['key']!r} stood at byte {saved['offset']}, and now "
                f"{sample.key!r} does. The shard was changed since: start again."
            )
        sample.label = saved["label"]
        return sample


def saved_sample(item: Any) -> Any:  # noqa: ANN401 - plain values
    """Turn a held sample into plain values from which it can be had again."""
    if isinstance(item, list):
        return [saved_sample(sample) for sample in item]
    saved = {
        "key": item.key,
        "url": item.url,
        "shard": item.shard,
        "offset": item.offset,
        "stop": item.stop,
        "label": item.label,
    }
    if item.place is None:
        saved["members"] = {
            field: [payload.name, base64.b64encode(payload.read()).decode("ascii")]
            for field, payload in item.members.items()
        }
    return saved


def _unpacked(saved: Mapping[str, Any]) -> StreamSample:
    """Make a sample of what was kept whole."""
    members = {}
    for field, (name, encoded) in saved["members"].items():
        held = base64.b64decode(encoded, validate=True)
        members[field] = Payload(name, len(held), held)
    return StreamSample(
        saved["key"],
        saved["url"],
        saved["shard"],
        saved["offset"],
        saved["stop"],
        members,
        False,
    )
