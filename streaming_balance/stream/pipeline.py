"""Balancing what passes by once: a stream of samples, and a chain of stages over it.

>>> import streaming_balance as sb
>>> stream = sb.stream("shards/demo/train-*.tar").accept({"0": 1, "1": 1}).decode()
>>> sample = next(iter(stream))
>>> sample["image.npb"].shape
(4, 24, 24, 24)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from streaming_balance.errors import BalanceError, ConfigError, ResumeError
from streaming_balance.plan.options import whole_number
from streaming_balance.stream.chain import ChainRun
from streaming_balance.stream.dicts import DictChain, DictItem
from streaming_balance.stream.finishing import Fields, collated, finished
from streaming_balance.stream.names import KeyRule
from streaming_balance.stream.recipe import Recipe
from streaming_balance.stream.rules import OnError, TarRules, UniqueKeys
from streaming_balance.stream.running import StreamRun
from streaming_balance.stream.sources import Urls, expand
from streaming_balance.stream.steps import Steps

if TYPE_CHECKING:
    from streaming_balance.stream.nodes import StreamDataset, StreamLoader, StreamNode

STATE_VERSION = 1


class Stream(Steps):
    """A chain over some shards. Every method that adds to it gives a new one; build with `stream`.

    Iterating gives one pass; iterating again gives the next one, or, where a pass was left by
    `break` or resumed, its rest. What stages learned and hold goes on from pass to pass.

    Args:
        recipe: what to read, and what to do with it.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._run = StreamRun(recipe)
        # Counts how often the place was moved, so that iterators from before do not go on.
        self._moves = 0
        # Stages at work on samples of others, while nobody applies them.
        self._idle_chain: DictChain | None = None
        # Those of the last call, for the counts.
        self._last_chain: DictChain | None = None

    @property
    def epoch(self) -> int:
        """The pass that is under way, or comes next."""
        return self._run.epoch

    def set_epoch(self, epoch: int) -> None:
        """Say which pass comes next; the one under way keeps its place.

        Args:
            epoch: at least 0. Another one than the current begins anew there: what stages hold
                and learned is gone.
        """
        number = whole_number(epoch)
        if number is None or number < 0:
            raise ConfigError(f"epoch is {epoch!r}; it must be a whole number from 0.")
        if number != self._run.epoch:
            self._move_to(self._run.successor(number))

    def __iter__(self) -> Iterator[Fields]:
        """Go on with the pass under way, or with the next one.

        Raises:
            ConfigError: there are no shards, or they passed by and cannot be read again.
            ShardError: while iterating: a shard is damaged.
        """
        if not self.recipe.sources:
            raise ConfigError("this chain has no shards; call it with samples, or name urls.")
        return self._rest_of_pass(self._moves)

    def __call__(self, samples: Iterable[Mapping[str, Any]]) -> Iterator[Fields]:
        """Apply the chain to samples of webdataset's, or of anything that gives dicts.

        Every call is a pass. What stages learned and hold goes on to the next call, unless a pass
        was left early or two of them run side by side: those begin anew.

        Args:
            samples: dicts with `__key__` and the field that `label` names, decoded or not.

        Returns:
            What goes on, for `webdataset.WebDataset(...).compose(chain)`.
        """
        chain, self._idle_chain = self._idle_chain, None
        if chain is None:
            chain = DictChain(ChainRun(self.recipe.begin_stages(0)), self.recipe.label)
        self._last_chain = chain
        going: list[DictItem] = []
        for item in chain.over(samples):
            going += item if isinstance(item, list) else [item]
            if len(going) >= (self.recipe.batch_size or 1):
                chain.num_delivered += len(going)
                yield _finished(self.recipe, going)
                going = []
        if going:
            chain.num_delivered += len(going)
            yield _finished(self.recipe, going)
        self._idle_chain = chain

    def state_dict(self) -> dict[str, Any]:
        """Give the state: plain values, to be saved with a checkpoint.

        Samples that stages hold are kept by their place where the source can seek, and are read
        again; whole otherwise.

        Raises:
            ConfigError: the chain has no shards, and therefore no place.
        """
        if not self.recipe.sources:
            raise ConfigError(
                "this chain has no shards, so nothing says where it stands in the samples of "
                "others, and no state could go on there. To resume, stream the shards themselves: "
                "streaming_balance.stream(urls)."
            )
        return {**self._identity(), "run": self._run.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state says: what follows is what would have followed there.

        Tars on disk are walked again, header by header, up to the place of the state. Of what
        passes by, a new copy is needed from its beginning; it is read past what was read before.

        Raises:
            ResumeError: it belongs to another stream, or is damaged; names what differs.
            ShardError: a sample that was held cannot be read again.
        """
        self._check_continues(state)
        run = self._run.successor(_first_epoch(state))
        run.load_state_dict(state["run"])
        self._move_to(run)

    def stats(self) -> dict[str, Any]:
        """Give what was read, and what every stage read, delivered, rejected and holds.

        Returns:
            `epoch`; `read`, the counts of the shards (see `StreamCounts`); `totals`, in which
            read + copies = delivered + rejected + buffered samples, and the shards delivered
            read + unlabelled + left_to_others; and `stages` in the order of the chain. Of a chain
            without shards, `totals` and `stages` are those of the last call in this process.
        """
        found = self._run.stats()
        if self._last_chain is not None and not self.recipe.sources:
            found |= self._last_chain.stats()
        return found

    def to_dataset(
        self, *, rank: int | None = None, num_ranks: int | None = None, steps: int | None = None
    ) -> StreamDataset:
        """Give a `torch.utils.data.IterableDataset`: see `nodes.StreamDataset`."""
        from streaming_balance.stream.nodes import StreamDataset

        return StreamDataset(self, rank=rank, num_ranks=num_ranks, steps=steps)

    def to_node(self) -> StreamNode:
        """Give a `torchdata.nodes.BaseNode`: see `nodes.StreamNode`."""
        from streaming_balance.stream.nodes import StreamNode

        return StreamNode(self)

    def to_loader(
        self,
        batch_size: int | None = None,
        *,
        num_workers: int = 0,
        rank: int | None = None,
        num_ranks: int | None = None,
        steps: int | None = None,
        prefetch_factor: int | None = None,
        pin_memory: bool = False,
        snapshot_every_n_steps: int = 1,
    ) -> StreamLoader:
        """Give a StatefulDataLoader over the stream: see `nodes.stream_loader`."""
        from streaming_balance.stream.nodes import stream_loader

        return stream_loader(
            self,
            batch_size,
            num_workers=num_workers,
            rank=rank,
            num_ranks=num_ranks,
            steps=steps,
            prefetch_factor=prefetch_factor,
            pin_memory=pin_memory,
            snapshot_every_n_steps=snapshot_every_n_steps,
        )

    def close(self) -> None:
        """Close the shards. Iterating on is an error then."""
        self._run.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Travel to a worker process without open files, to the pass that comes next."""
        return {"recipe": self.recipe, "epoch": self._run.epoch}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Arrive in a worker process, before that pass."""
        Stream.__init__(self, state["recipe"])
        self.set_epoch(state["epoch"])

    def _rest_of_pass(self, moves: int) -> Iterator[Fields]:
        """Give the outputs up to the end of the pass."""
        epoch = self._run.epoch
        while True:
            if self._moves != moves:
                raise BalanceError(
                    "set_epoch or load_state_dict moved this stream while it was iterated; leave "
                    "the loop first."
                )
            # Another iterator may have ended the pass; the next one is not this iterator's.
            if self._run.epoch != epoch and not self.recipe.endless:
                return
            output = self._run.next_output()
            if output is None:
                return
            yield output

    def _move_to(self, run: StreamRun) -> None:
        """Go on with another run."""
        self._run.files.close()
        self._run, self._moves = run, self._moves + 1

    def _identity(self) -> dict[str, Any]:
        """Give what of this stream a state must agree with."""
        recipe = self.recipe
        return {
            "version": STATE_VERSION,
            "seed": recipe.seed,
            "part": [recipe.part.number, recipe.part.count],
            "shards": [source.shown for source in recipe.sources],
            "shuffled_shards": recipe.shuffled_shards,
            "label": recipe.label,
            "rules": [recipe.rules.on_error, recipe.rules.keys, recipe.rules.unique_keys],
            "stages": [stage.name for stage in recipe.stages],
        }

    def _check_continues(self, state: object) -> None:
        """Refuse a state of another stream."""
        if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
            raise ResumeError(
                f"this is no state of a stream of version {STATE_VERSION}; it must be what "
                f"state_dict() gave."
            )
        differences = [
            f"{name}: state has {state.get(name)!r}, stream has {mine!r}"
            for name, mine in self._identity().items()
            if state.get(name) != mine
        ]
        if differences:
            raise ResumeError(
                f"the state belongs to another stream. {'; '.join(differences)}. Build the stream "
                f"with the state's values, or start anew."
            )


def stream(
    urls: Urls,
    *,
    label: str | None = "cls",
    seed: int = 0,
    on_error: OnError = "raise",
    keys: KeyRule = "webdataset",
    unique_keys: UniqueKeys = "stream",
    allow_pipe: bool = False,
) -> Stream:
    """Stream samples out of tars that nobody indexed: files, programs, web servers, standard input.

    Args:
        urls: paths, brace and glob patterns, http(s) URLs, `-`, file objects, `pipe:` commands, or
            a list of these; an empty list for a chain that is applied to samples of others.
        label: field that holds the class (`cls`), or `json:FIELD`; None where no stage asks.
        seed: integer in [0, 2**64 - 1]; keys every choice.
        on_error: `raise` at the first damage, or `skip` it, counted and reported.
        keys: where names are cut into key and field: `webdataset` at the first dot of the base
            name, `last_dot` at the last one.
        unique_keys: where a key may come only once: in the whole `stream`, or in each `shard`.
        allow_pipe: whether `pipe:` may start programs.

    Returns:
        A stream of dicts; add stages with its methods.

    Raises:
        ConfigError: a setting is wrong, or nothing is named.

    Examples:
        >>> import streaming_balance as sb
        >>> two_to_one = sb.stream("shards/demo/train-*.tar").reservoir({"0": 4, "1": 2})
        >>> [sample["__label__"] for sample in two_to_one].count("0")
        4
    """
    is_nothing = isinstance(urls, list | tuple) and not urls
    rules = TarRules(on_error=on_error, keys=keys, unique_keys=unique_keys)
    sources = () if is_nothing else expand(urls, allow_pipe=allow_pipe)
    return Stream(Recipe(sources=sources, label=label, seed=seed, rules=rules))


def _finished(recipe: Recipe, going: list[DictItem]) -> Fields:
    """Give one output of some samples."""
    samples = (finished(item, recipe.finishers) for item in going)
    return collated(samples, len(going)) if recipe.gives_batches else next(samples)


def _first_epoch(state: Mapping[str, Any]) -> int:
    """Give the pass with which the run of a state began."""
    run = state.get("run")
    number = whole_number(run.get("first_epoch")) if isinstance(run, Mapping) else None
    if number is None or number < 0:
        raise ResumeError(
            "the state of the stream is damaged: it does not say how its run began. Use an "
            "earlier checkpoint."
        )
    return number
