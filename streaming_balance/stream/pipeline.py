"""Balancing what passes by once: a stream of samples, and a chain of stages over it.

>>> import streaming_balance as sb
>>> stream = sb.stream("shards/demo/train-*.tar").accept({"0": 1, "1": 1}).decode()
>>> sample = next(iter(stream))
>>> sample["image.npb"].shape
(4, 24, 24, 24)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from streaming_balance.errors import BalanceError, ConfigError, ResumeError
from streaming_balance.plan.keys import check_seed, stream_key
from streaming_balance.plan.options import whole_number
from streaming_balance.stream.accept import Accept
from streaming_balance.stream.counts import StreamCounts
from streaming_balance.stream.dealing import Part
from streaming_balance.stream.dicts import DictItem, fields_of
from streaming_balance.stream.finishing import Fields, Finisher, collated, decoded
from streaming_balance.stream.frequencies import DEFAULT_WINDOW
from streaming_balance.stream.local import ShardFiles
from streaming_balance.stream.names import KeyRule
from streaming_balance.stream.repeat import Repeat
from streaming_balance.stream.replay import Replay
from streaming_balance.stream.reservoir import Reservoir
from streaming_balance.stream.rules import OnError, TarRules
from streaming_balance.stream.running import StreamRun, saved_sample
from streaming_balance.stream.sample_labels import label_reader
from streaming_balance.stream.shuffle import Shuffle
from streaming_balance.stream.sources import ShardSource, Urls, expand
from streaming_balance.stream.stages import Stage, StageRun

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader

    from streaming_balance.stream.nodes import StreamDataset, StreamNode

STATE_VERSION = 1


class Stream:
    """A chain over some shards. Every method that adds to it gives a new one; build with `stream`.

    Iterating gives one pass; iterating again gives the next one, or, where a pass was left by
    `break` or resumed, its rest. Stages keep what they hold from pass to pass.

    Args:
        sources: the shards; none where the chain is only applied to other iterables.
        label: where the class of a sample stands, or None.
        seed: keys every choice.
        rules: how strictly shards are read.
    """

    def __init__(
        self,
        sources: tuple[ShardSource, ...],
        *,
        label: str | None,
        seed: int,
        rules: TarRules,
    ) -> None:
        self.sources, self.rules = sources, rules
        self.seed = check_seed(seed)
        self.label = label
        self.label_of = None if label is None else label_reader(label)
        self.stages: tuple[Stage, ...] = ()
        self.finishers: tuple[Finisher, ...] = ()
        self.batch_size: int | None = None
        self.shuffled_shards = False
        self.part = Part()
        self._epoch = 0
        self._files = ShardFiles()
        self._run: StreamRun | None = None
        self._last_counts: StreamCounts | None = None
        self._runs: list[StageRun[Any, Any]] = []
        self._begin_anew()

    def accept(
        self,
        target: Mapping[Any, float],
        *,
        frequencies: Mapping[Any, float] | None = None,
        window: int = DEFAULT_WINDOW,
        unknown: str = "error",
    ) -> Stream:
        """Thin out classes there are too many of: see `Accept`. Decided before anything is decoded.

        Args:
            target: label -> share of what goes on.
            frequencies: label -> count or share in the stream; None: counted while streaming.
            window: samples read between two changes of the rates, where they are counted.
            unknown: what becomes of other labels: `error` or `drop`.
        """
        return self._with(
            Accept(
                _by_name(target), frequencies=_by_name(frequencies), window=window, unknown=unknown
            )
        )

    def repeat(
        self,
        target: Mapping[Any, float],
        *,
        buffer_bytes: int = 256 << 20,
        frequencies: Mapping[Any, float] | None = None,
        window: int = DEFAULT_WINDOW,
        unknown: str = "error",
    ) -> Stream:
        """Repeat samples of rare classes, copies spread apart: see `Repeat`. None is lost.

        Args:
            target: label -> share of what goes on.
            buffer_bytes: most bytes that samples waiting for their copies may take.
            frequencies: label -> count or share in the stream; None: counted while streaming.
            window: samples read between two changes of the rates, where they are counted.
            unknown: what becomes of other labels: `error` or `drop`.
        """
        return self._with(
            Repeat(
                _by_name(target),
                buffer_bytes=buffer_bytes,
                frequencies=_by_name(frequencies),
                window=window,
                unknown=unknown,
            )
        )

    def replay(
        self,
        target: Mapping[Any, float],
        *,
        batch_size: int,
        buffer_bytes: int = 512 << 20,
        per_read: float = 1.0,
        wait_for_classes: bool = False,
        unknown: str = "error",
    ) -> Stream:
        """Give batches of exact quotas from a bounded buffer per class: see `Replay`.

        Args:
            target: label -> share of every batch.
            batch_size: samples in a batch.
            buffer_bytes: most bytes of all buffers.
            per_read: samples that go on per sample read.
            wait_for_classes: whether nothing goes on before every class appeared.
            unknown: what becomes of other labels: `error` or `drop`.
        """
        return self._with(
            Replay(
                _by_name(target),
                batch_size=batch_size,
                buffer_bytes=buffer_bytes,
                per_read=per_read,
                wait_for_classes=wait_for_classes,
                unknown=unknown,
            )
        )

    def reservoir(
        self,
        size: int | Mapping[Any, int],
        *,
        target: Mapping[Any, float] | None = None,
        ratio: float | None = None,
        weights: Callable[[Any], float] | Mapping[str, float] | None = None,
        window: int | None = None,
        class_bytes: int | None = None,
        on_short: str = "report",
        unknown: str = "error",
    ) -> Stream:
        """Keep up to `size` samples of every class, chosen by key: see `Reservoir`.

        Args:
            size: samples to keep of every class, or label -> of this class.
            target: label -> share of `size`.
            ratio: smallest class : largest class that should go on.
            weights: weight of a sample, by a function of it or by its key.
            window: samples read after which what is kept goes on; None: at the end of the pass.
            class_bytes: most bytes of one class.
            on_short: `report` or `raise` where ratio or target cannot be met.
            unknown: what becomes of other labels: `error` or `drop`.
        """
        sizes = _by_name(size) if isinstance(size, Mapping) else size
        return self._with(
            Reservoir(
                sizes,
                target=_by_name(target),
                ratio=ratio,
                weights=weights,
                window=window,
                class_bytes=class_bytes,
                on_short=on_short,
                unknown=unknown,
            )
        )

    def shuffle(self, buffer_bytes: int = 256 << 20, *, shards: bool = True) -> Stream:
        """Shuffle by key within a bounded buffer: see `Shuffle`; every pass has another order.

        Args:
            buffer_bytes: most bytes of the buffer.
            shards: whether shards are read in another order in every pass, too.
        """
        changed = self._with(Shuffle(buffer_bytes))
        changed.shuffled_shards = self.shuffled_shards or shards
        return changed

    def decode(self) -> Stream:
        """Decode arrays, classes, JSON and text by their names; other members stay bytes."""
        return self.map(decoded)

    def map(self, function: Callable[[Fields], Fields]) -> Stream:
        """Change every sample that goes on; it is a dict with `__key__`, `__url__` and fields.

        Args:
            function: gives the changed sample. States do not hold what it did: it is called again.
        """
        if self.batch_size is not None:
            raise ConfigError("map and decode change samples; put them before batch.")
        changed = self._copy()
        changed.finishers = (*self.finishers, function)
        return changed

    def batch(self, batch_size: int) -> Stream:
        """Put samples together; the last batch of a pass may be smaller.

        Args:
            batch_size: at least 1.
        """
        size = whole_number(batch_size)
        if size is None or size < 1:
            raise ConfigError(f"batch_size is {batch_size!r}; it must be an integer of at least 1.")
        if self.gives_batches:
            raise ConfigError("this stream gives batches already; leave batch out.")
        changed = self._copy()
        changed.batch_size = size
        return changed

    @property
    def gives_batches(self) -> bool:
        """Whether batches go out rather than samples."""
        replays = bool(self.stages) and isinstance(self.stages[-1], Replay)
        return self.batch_size is not None or replays

    @property
    def epoch(self) -> int:
        """The pass that is under way, or comes next."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Say which pass comes next; the one under way keeps its place.

        Args:
            epoch: at least 0.
        """
        number = whole_number(epoch)
        if number is None or number < 0:
            raise ConfigError(f"epoch is {epoch!r}; it must be a whole number from 0.")
        if number != self._epoch:
            self._epoch, self._run = number, None

    @property
    def is_under_way(self) -> bool:
        """Whether a pass was begun and not ended."""
        return self._run is not None

    def share(self, number: int, count: int) -> Stream:
        """Give the part of one of several readers that share the shards.

        Shards are dealt, in the order of the pass; where there are fewer than readers, the samples
        of all shards are. Nothing is read twice.

        Args:
            number: this reader, in [0, count).
            count: readers in all: ranks x workers.
        """
        changed = self._copy()
        changed.part = Part(number=number, count=count)
        changed.part.deals_samples(self.sources)
        changed._begin_anew()
        return changed

    def __iter__(self) -> Iterator[Any]:
        """Go on with the pass under way, or with the next one.

        Raises:
            ConfigError: there are no shards, or they passed by and cannot be read again.
            ShardError: while iterating: a shard is damaged.
        """
        while True:
            run = self._running()
            for item in run:
                yield item
                if self._run is not run:
                    raise BalanceError(
                        "set_epoch or load_state_dict moved this stream while it was iterated; "
                        "leave the loop first."
                    )
            self._last_counts = run.counts
            self._epoch, self._run = self._epoch + 1, None
            return

    def __call__(self, samples: Iterable[Mapping[str, Any]]) -> Iterator[Fields]:
        """Apply the chain to samples of webdataset's, or of anything that gives dicts.

        Args:
            samples: dicts with `__key__` and the field that `label` names, decoded or not.

        Returns:
            What goes on, for `webdataset.WebDataset(...).compose(chain)`.
        """
        going: list[Fields] = []
        for item in self._through(samples):
            going += fields_of(item)
            if self.batch_size is None or len(going) == self.batch_size:
                yield from self._out(going)
                going = []
        if going:
            yield from self._out(going)

    def state_dict(self) -> dict[str, Any]:
        """Give the state: plain values, to be saved with a checkpoint.

        Samples that stages hold are kept by their place where the source can seek, and are read
        again; whole otherwise.
        """
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "part": [self.part.number, self.part.count],
            "shards": [source.shown for source in self.sources],
            "stages": [stage.name for stage in self.stages],
            "epoch": self._epoch,
            "run": None if self._run is None else self._run.state_dict(),
            "between": None if self._run is not None else self._between_passes(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state says: what follows is what would have followed there.

        Raises:
            ResumeError: it belongs to another stream, or is damaged; names what differs.
            ShardError: a sample that was held cannot be read again.
        """
        self._check_continues(state)
        self._begin_anew()
        self._epoch = int(state["epoch"])
        if state["run"] is not None:
            self._running().load_state_dict(state["run"])
        else:
            # Some stages hold samples from pass to pass.
            resting = StreamRun(self, epoch=self._epoch, files=self._files, runs=self._runs)
            for run, saved in zip(self._runs, state["between"], strict=True):
                run.load_state_dict(saved, resting.restored)

    def stats(self) -> dict[str, Any]:
        """Give what was read, and what every stage read, delivered, rejected and holds.

        Returns:
            `epoch`, `read` (counts of the pass under way, or of the last one) and `stages`, a list
            in the order of the chain.
        """
        counts = self._last_counts if self._run is None else self._run.counts
        return {
            "epoch": self._epoch,
            "read": None if counts is None else counts.to_dict(),
            "stages": [run.stats() for run in self._runs],
        }

    def to_dataset(self) -> StreamDataset:
        """Give a `torch.utils.data.IterableDataset`: right under ranks and workers."""
        from streaming_balance.stream.nodes import StreamDataset

        return StreamDataset(self)

    def to_node(self) -> StreamNode:
        """Give a `torchdata.nodes.BaseNode`."""
        from streaming_balance.stream.nodes import StreamNode

        return StreamNode(self)

    def to_loader(
        self,
        *,
        batch_size: int | None = None,
        num_workers: int = 0,
        rank: int | None = None,
        num_ranks: int | None = None,
        steps: int | None = None,
    ) -> StatefulDataLoader[Any]:
        """Give a StatefulDataLoader over the stream: see `nodes.stream_loader`.

        Args:
            batch_size: samples in a batch; None where the stream gives batches, or for samples.
            num_workers: worker processes.
            rank: data-parallel rank; None has it looked up.
            num_ranks: number of data-parallel ranks; None has it looked up.
            steps: batches of an epoch on each rank; needed on several ranks.
        """
        from streaming_balance.stream.nodes import stream_loader

        return stream_loader(
            self,
            batch_size=batch_size,
            num_workers=num_workers,
            rank=rank,
            num_ranks=num_ranks,
            steps=steps,
        )

    def close(self) -> None:
        """Close the shards. What was given before can still read its payloads no more."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Travel to a worker process without open files."""
        state = self.__dict__.copy()
        for name in ("_files", "_run", "_runs", "label_of", "_last_counts"):
            state.pop(name)
        return state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Arrive in a worker process, at the start of the pass."""
        self.__dict__.update(state)
        self.label_of = None if self.label is None else label_reader(self.label)
        epoch = self._epoch
        self._begin_anew()
        self._epoch = epoch

    def _with(self, stage: Stage) -> Stream:
        """Give the chain with one more stage."""
        if self.finishers or self.batch_size is not None:
            raise ConfigError(
                f"{stage.name} decides about samples as they are stored; put it before decode, map "
                f"and batch, so that what it holds can be saved."
            )
        if self.gives_batches:
            raise ConfigError(f"replay gives batches; put {stage.name} before it.")
        if self.label_of is None and stage.name != "shuffle":
            raise ConfigError(
                f"{stage.name} asks for labels; name their field: stream(..., label=)."
            )
        changed = self._copy()
        changed.stages = (*self.stages, stage)
        changed._begin_anew()
        return changed

    def _copy(self) -> Stream:
        """Give an equal chain that has read nothing."""
        changed = copy.copy(self)
        changed._begin_anew()
        return changed

    def _begin_anew(self) -> None:
        """Stand before the first pass."""
        self._epoch, self._run, self._last_counts = 0, None, None
        self._files = ShardFiles()
        self._runs = [
            stage.begin(seed=self._stage_seed(number, stage))
            for number, stage in enumerate(self.stages)
        ]

    def _stage_seed(self, number: int, stage: Stage) -> int:
        """Key a stage of this reader; reservoirs of all readers are alike, so that they merge."""
        part = 0 if isinstance(stage, Reservoir) else self.part.number
        return stream_key(self.seed, "stage", number, stage.name, part) >> 64

    def _running(self) -> StreamRun:
        """Give the pass under way, begun where there is none."""
        if not self.sources:
            raise ConfigError("this chain has no shards; call it with samples, or name urls.")
        if self._run is None:
            if self._last_counts is not None:
                for source in self.sources:
                    if not source.can_repeat:
                        raise ConfigError(
                            f"{source.shown} passed by once and cannot be read again. Open it anew "
                            f"and build another stream, or name a file."
                        )
            self._run = StreamRun(self, epoch=self._epoch, files=self._files, runs=self._runs)
        return self._run

    def _between_passes(self) -> list[dict[str, Any]]:
        """Give the stages' states where no pass is under way."""
        return [run.state_dict(saved_sample) for run in self._runs]

    def _check_continues(self, state: object) -> None:
        """Refuse a state of another stream."""
        if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
            raise ResumeError(
                f"this is no state of a stream of version {STATE_VERSION}; it must be what "
                f"state_dict() gave."
            )
        mine = self.state_dict()
        differences = [
            f"{name}: state has {state.get(name)!r}, stream has {mine[name]!r}"
            for name in ("seed", "part", "shards", "stages")
            if state.get(name) != mine[name]
        ]
        if differences:
            raise ResumeError(
                f"the state belongs to another stream. {'; '.join(differences)}. Build the stream "
                f"with the state's values, or start anew."
            )

    def _through(self, samples: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
        """Push dicts through all stages."""
        items: Iterator[Any] = (DictItem(fields, self.label) for fields in samples)
        for run in self._runs:
            items = run.over(items)
        return items

    def _out(self, going: list[Fields]) -> Iterator[Fields]:
        """Finish dicts that leave the chain."""
        for finisher in self.finishers:
            going = [finisher(fields) for fields in going]
        if self.gives_batches:
            yield collated(going)
        else:
            yield from going


def stream(
    urls: Urls,
    *,
    label: str | None = "cls",
    seed: int = 0,
    on_error: OnError = "raise",
    keys: KeyRule = "webdataset",
    allow_pipe: bool = False,
) -> Stream:
    """Stream samples out of tars that nobody indexed: files, programs, web servers, standard input.

    Args:
        urls: paths, brace and glob patterns, http(s) URLs, `-`, file objects, `pipe:` commands, or
            a list of these; an empty list for a chain that is applied to other iterables.
        label: field that holds the class (`cls`), or `json:FIELD`; None where no stage asks.
        seed: integer in [0, 2**64 - 1]; keys every choice.
        on_error: `raise` at the first damage, or `skip` it, counted and reported.
        keys: where names are cut into key and field: `webdataset` at the first dot of the base
            name, `last_dot` at the last one.
        allow_pipe: whether `pipe:` may start programs.

    Returns:
        A stream of dicts; add stages with its methods.

    Raises:
        ConfigError: a setting is wrong, or nothing is named.

    Examples:
        >>> import streaming_balance as sb
        >>> two_to_one = sb.stream("shards/demo/train-*.tar").reservoir({"0": 4, "1": 8})
        >>> [sample["__label__"] for sample in two_to_one].count("1")
        8
    """
    nothing = not isinstance(urls, str) and urls in ([], ())
    sources = () if nothing else expand(urls, allow_pipe=allow_pipe)
    return Stream(sources, label=label, seed=seed, rules=TarRules(on_error=on_error, keys=keys))


def _by_name(values: Mapping[Any, Any] | None) -> Any:  # noqa: ANN401 - None stays None
    """Name classes by text, as shards do: 1 and "1" are the same."""
    return None if values is None else {str(name): value for name, value in values.items()}
