"""The chain of a stream: what each of its steps asks for, in the words of its users."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

from streaming_balance.errors import ConfigError
from streaming_balance.plan.options import whole_number
from streaming_balance.stream.accept import Accept
from streaming_balance.stream.finishing import Fields, decoded
from streaming_balance.stream.frequencies import DEFAULT_WINDOW
from streaming_balance.stream.recipe import Observer, Recipe
from streaming_balance.stream.repeat import Repeat
from streaming_balance.stream.replay import Replay
from streaming_balance.stream.reservoir import Reservoir
from streaming_balance.stream.shuffle import Shuffle

DEFAULT_BUFFER_BYTES = 256 << 20


class Steps:
    """The steps a stream can be made of. Each gives a new stream and leaves this one as it is.

    Args:
        recipe: what to read, and what to do with it.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        """What this stream reads, and what it does with it."""

    def accept(
        self,
        target: Mapping[Any, float],
        *,
        frequencies: Mapping[Any, float] | None = None,
        window: int = DEFAULT_WINDOW,
        pseudo_counts: float | Mapping[Any, float] = 1.0,
        unknown: str = "error",
    ) -> Self:
        """Thin out classes there are too many of: see `Accept`. Decided before anything is decoded.

        Args:
            target: label -> share of what goes on.
            frequencies: label -> count or share in the stream; None: counted while streaming.
            window: samples read between two changes of the rates, where they are counted.
            pseudo_counts: added to every count, for all classes or for each.
            unknown: what becomes of other labels: `error` or `drop`.
        """
        stage = Accept(
            _by_text(target),
            frequencies=_by_text(frequencies),
            window=window,
            pseudo_counts=_by_text(pseudo_counts),
            unknown=unknown,
        )
        return self._with(self.recipe.with_stage(stage))

    def repeat(
        self,
        target: Mapping[Any, float],
        *,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        frequencies: Mapping[Any, float] | None = None,
        window: int = DEFAULT_WINDOW,
        pseudo_counts: float | Mapping[Any, float] = 1.0,
        unknown: str = "error",
    ) -> Self:
        """Repeat samples of rare classes, copies spread apart: see `Repeat`. None is lost.

        Args:
            target: label -> share of what goes on.
            buffer_bytes: most bytes that samples waiting for their copies may take.
            frequencies: label -> count or share in the stream; None: counted while streaming.
            window: samples read between two changes of the rates, where they are counted.
            pseudo_counts: added to every count, for all classes or for each.
            unknown: what becomes of other labels: `error` or `drop`.
        """
        stage = Repeat(
            _by_text(target),
            buffer_bytes=buffer_bytes,
            frequencies=_by_text(frequencies),
            window=window,
            pseudo_counts=_by_text(pseudo_counts),
            unknown=unknown,
        )
        return self._with(self.recipe.with_stage(stage))

    def replay(
        self,
        target: Mapping[Any, float],
        *,
        batch_size: int,
        buffer_bytes: int = 2 * DEFAULT_BUFFER_BYTES,
        per_read: float = 1.0,
        wait_for_classes: bool = False,
        unknown: str = "error",
    ) -> Self:
        """Give batches of exact quotas from a bounded buffer per class: see `Replay`.

        Args:
            target: label -> share of every batch.
            batch_size: samples in a batch.
            buffer_bytes: most bytes of all buffers.
            per_read: samples that go on per sample read.
            wait_for_classes: whether nothing goes on before every class appeared.
            unknown: what becomes of other labels: `error` or `drop`.
        """
        stage = Replay(
            _by_text(target),
            batch_size=batch_size,
            buffer_bytes=buffer_bytes,
            per_read=per_read,
            wait_for_classes=wait_for_classes,
            unknown=unknown,
        )
        return self._with(self.recipe.with_stage(stage))

    def reservoir(
        self,
        size: int | Mapping[Any, int],
        *,
        target: Mapping[Any, float] | None = None,
        ratio: float | None = None,
        weights: Callable[[Any], float] | Mapping[str, float] | None = None,
        window: int | None = None,
        class_bytes: int | None = None,
        rotate: bool = False,
        on_short: str = "report",
        unknown: str = "error",
    ) -> Self:
        """Keep up to `size` samples of every class, chosen by key: see `Reservoir`.

        Every reader that shares the stream keeps as many of its own part. Where the reservoir is
        the only stage and no ratio, class_bytes or window is set, what all of them give, in any
        order, goes through a chain without shards for what one reader would have kept:
        `sb.stream([], label=..., seed=...).reservoir(size)(samples)` with the same settings.

        Args:
            size: samples to keep of every class, or label -> of this class.
            target: label -> share of `size`.
            ratio: smallest class : largest class that should go on.
            weights: weight of a sample, by a function of it or by its key.
            window: samples read after which what is kept goes on; None: at the end of the pass.
            class_bytes: most bytes of one class.
            rotate: whether every pass keeps other samples.
            on_short: `report` or `raise` where ratio or target cannot be met.
            unknown: what becomes of other labels: `error` or `drop`.
        """
        stage = Reservoir(
            _by_text(size),
            target=_by_text(target),
            ratio=ratio,
            weights=weights,
            window=window,
            class_bytes=class_bytes,
            rotate=rotate,
            on_short=on_short,
            unknown=unknown,
        )
        return self._with(self.recipe.with_stage(stage))

    def shuffle(self, buffer_bytes: int = DEFAULT_BUFFER_BYTES, *, shards: bool = True) -> Self:
        """Shuffle by key within a bounded buffer: see `Shuffle`; every pass has another order.

        Args:
            buffer_bytes: most bytes of the buffer.
            shards: whether shards are read in another order in every pass, too.
        """
        changed = self.recipe.with_stage(Shuffle(buffer_bytes))
        return self._with(replace(changed, shuffled_shards=changed.shuffled_shards or shards))

    def decode(self) -> Self:
        """Decode arrays, classes, JSON and text by their names; other members stay bytes."""
        return self.map(decoded)

    def map(self, function: Callable[[Fields], Fields]) -> Self:
        """Change every sample that goes on; it is a dict with `__key__`, `__url__` and fields.

        Args:
            function: gives the changed sample. Where it raises, the sample comes again. States do
                not hold what it did: it is called again.
        """
        if self.recipe.batch_size is not None:
            raise ConfigError("map and decode change samples; put them before batch.")
        if not callable(function):
            raise ConfigError(f"map: {function!r} is no function of a sample.")
        return self._with(replace(self.recipe, finishers=(*self.recipe.finishers, function)))

    def batch(self, batch_size: int) -> Self:
        """Put samples together; the last batch of a pass may be smaller.

        Args:
            batch_size: at least 1.
        """
        size = whole_number(batch_size)
        if size is None or size < 1:
            raise ConfigError(f"batch_size is {batch_size!r}; it must be an integer of at least 1.")
        if self.recipe.gives_batches:
            raise ConfigError("this stream gives batches already; name batch_size once.")
        return self._with(replace(self.recipe, batch_size=size))

    def share(self, number: int, count: int) -> Self:
        """Give the part of one of several readers that share the shards, in all passes.

        Shards are dealt in the order of the pass; where there are fewer than readers, the samples
        of all shards are, and every reader walks all headers. No volume is read twice.

        Args:
            number: this reader, in [0, count).
            count: readers in all: ranks x workers.
        """
        part = self.recipe.part.of(number, count)
        part.deals_samples(self.recipe.sources)
        return self._with(replace(self.recipe, part=part))

    def tee(self, observer: Observer) -> Self:
        """Show every sample of the first pass to somebody else, too: the builder of an index.

        Args:
            observer: its `begin` takes the shards as they were named, `add` every sample read,
                before any stage; `finish` is called once all shards were read. A pass that is left
                early is never finished.

        Raises:
            ConfigError: it could not see all samples, or nobody could find them again.
        """
        return self._with(replace(self.recipe, observer=observer))

    def endless(self) -> Self:
        """Let pass follow pass without end, batches filled across the border: all are full."""
        return self._with(replace(self.recipe, endless=True))

    def _with(self, recipe: Recipe) -> Self:
        """Give the chain of another recipe, before its first pass."""
        return type(self)(recipe)


def _by_text(values: Any) -> Any:  # noqa: ANN401 - numbers and None stay
    """Name classes by text, as shards do: 1 and "1" are the same."""
    if not isinstance(values, Mapping):
        return values
    named = {str(name): value for name, value in values.items()}
    if len(named) < len(values):
        twice = [name for name in values if not isinstance(name, str) and str(name) in values]
        raise ConfigError(
            f"class {str(twice[0])!r} is named twice, as text and as {twice[0]!r}; keep one."
            if twice
            else f"of {list(values)} two name the same class; keep one."
        )
    return named
