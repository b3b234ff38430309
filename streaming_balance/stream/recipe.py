"""What a stream reads and does with it, as one value: a stream is a recipe and a place in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from streaming_balance.errors import ConfigError
from streaming_balance.plan.keys import check_seed, stream_key
from streaming_balance.stream.dealing import Part
from streaming_balance.stream.finishing import Finisher
from streaming_balance.stream.replay import Replay
from streaming_balance.stream.reservoir import Reservoir
from streaming_balance.stream.rules import TarRules
from streaming_balance.stream.sample_labels import check_label, label_field
from streaming_balance.stream.samples import StreamSample
from streaming_balance.stream.sources import ShardSource
from streaming_balance.stream.stages import Stage, StageRun


class Observer(Protocol):
    """Sees every sample of a pass as it is read: the builder of an index, for example."""

    def begin(self, shards: Sequence[str]) -> object:
        """Learn of all shards in the order they were named, whatever the order of the pass."""
        ...

    def add(self, sample: StreamSample) -> object:
        """Take in one sample."""
        ...

    def finish(self) -> object:
        """Know that the pass was read to its end."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides what a stream gives."""

    sources: tuple[ShardSource, ...]
    """The shards; none where a chain is only applied to samples of others."""
    label: str | None = None
    """Where the class of a sample stands: a field, or `json:FIELD`; None: nowhere."""
    seed: int = 0
    """Keys every choice."""
    rules: TarRules = field(default_factory=TarRules)
    """How strictly shards are read."""
    stages: tuple[Stage, ...] = ()
    """What decides which samples go on, in order."""
    finishers: tuple[Finisher, ...] = ()
    """What changes samples that go on, in order."""
    batch_size: int | None = None
    """Samples put together; None: none are."""
    shuffled_shards: bool = False
    """Whether every pass reads the shards in another order."""
    part: Part = field(default_factory=Part)
    """Which of the readers that share the shards this is."""
    endless: bool = False
    """Whether pass follows pass without a border, batches filled across it."""
    observer: Observer | None = None
    """Sees every sample of the first pass."""

    def __post_init__(self) -> None:
        """Check what was not checked where it was made."""
        check_seed(self.seed)
        if self.label is not None:
            check_label(self.label)
        if self.observer is not None:
            self._check_observed()

    @property
    def needs_labels(self) -> bool:
        """Whether a stage asks for the class of a sample."""
        return any(stage.name != "shuffle" for stage in self.stages)

    @property
    def tar_rules(self) -> TarRules:
        """How shards are read: where damage is skipped, so are samples without a label."""
        if not self.needs_labels or self.label is None or self.rules.on_error == "raise":
            return self.rules
        return replace(self.rules, wanted=self.rules.wanted | {label_field(self.label)})

    @property
    def gives_batches(self) -> bool:
        """Whether batches go out rather than samples."""
        replays = bool(self.stages) and isinstance(self.stages[-1], Replay)
        return self.batch_size is not None or replays

    def with_stage(self, stage: Stage) -> Recipe:
        """Give the recipe with one more stage.

        Raises:
            ConfigError: it comes too late in the chain, or asks for labels that nobody names.
        """
        if self.finishers or self.batch_size is not None:
            raise ConfigError(
                f"{stage.name} decides about samples as they are stored; put it before decode, map "
                f"and batch, so that what it holds can be saved."
            )
        if self.gives_batches:
            raise ConfigError(f"replay gives batches; put {stage.name} before it.")
        if self.label is None and stage.name != "shuffle":
            raise ConfigError(
                f"{stage.name} asks for labels; say where they are: stream(..., label='cls')."
            )
        return replace(self, stages=(*self.stages, stage))

    def begin_stages(self, first_epoch: int) -> list[StageRun[Any, Any]]:
        """Give fresh runs of all stages.

        Args:
            first_epoch: the pass they begin with. Whoever begins with a later one chooses
                otherwise than whoever began with the first.
        """
        return [
            stage.begin(seed=self._stage_seed(number, stage, first_epoch))
            for number, stage in enumerate(self.stages)
        ]

    def _check_observed(self) -> None:
        """Refuse an observer that could not see all samples, or not find them again."""
        if self.part.count > 1:
            raise ConfigError(
                f"tee: {self.part.count} readers share the stream, and none of them sees all "
                f"samples. Run the pass with tee in one process."
            )
        if self.rules.on_error == "skip":
            raise ConfigError(
                "tee: on_error='skip' leaves samples out before anybody sees them. Use "
                "on_error='raise', so that the index holds every sample of its shards."
            )
        for source in self.sources:
            if source.kind != "file":
                raise ConfigError(
                    f"tee: {source.shown} passes by, so nobody can find its samples again. Copy it "
                    f"to a plain tar first."
                )

    def _stage_seed(self, number: int, stage: Stage, first_epoch: int) -> int:
        """Give the seed of one stage: its own in the chain, in every part, from every start."""
        names: tuple[int | str, ...] = (number, stage.name)
        if not isinstance(stage, Reservoir):
            names += (self.part.number, first_epoch)
        elif stage.rotate:
            names += (first_epoch,)
        # A reservoir's choices must agree in all parts, or they could not be merged.
        return stream_key(self.seed, "stage", *names) >> 64
