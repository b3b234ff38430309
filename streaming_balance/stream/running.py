"""A stream at work, pass after pass: pulled output by output, and saved at any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streaming_balance.errors import BalanceError, ConfigError, ResumeError, ShardError
from streaming_balance.stream.chain import ChainRun
from streaming_balance.stream.counts import Skip, StreamCounts
from streaming_balance.stream.finishing import Fields, collated, finished
from streaming_balance.stream.held import HeldSamples, restorer
from streaming_balance.stream.local import ShardFiles
from streaming_balance.stream.reading import Reading
from streaming_balance.stream.recipe import Recipe
from streaming_balance.stream.sample_labels import label_of_sample
from streaming_balance.stream.samples import StreamSample

# A pass may be worth less than one batch, and the next one goes on from there; but whoever gives
# nothing for this long never will.
MOST_EMPTY_PASSES = 100


class StreamRun:
    """Goes through a recipe.

    Args:
        recipe: what to read, and what to do with it.
        first_epoch: the pass to begin with.
    """

    def __init__(self, recipe: Recipe, *, first_epoch: int = 0) -> None:
        self.recipe, self.first_epoch = recipe, first_epoch
        self.epoch = first_epoch
        """The pass that is under way, or comes next."""
        self.files = ShardFiles()
        """Opens the shards."""
        self.counts = StreamCounts()
        """What was read of the shards, in all passes."""
        self.num_taken = 0
        """Samples that were this reader's, in all passes."""
        self.num_unlabelled = 0
        """Samples left out because their class cannot be read."""
        self.num_delivered = 0
        """Samples that went out."""
        self._chain = ChainRun(recipe.begin_stages(first_epoch))
        self.spent: set[int] = set()
        """Shards that passed by and cannot be opened again."""
        self._reading: Reading | None = None
        # On its way out: what fails while it is finished comes again.
        self._going: list[StreamSample] = []
        # Read, and perhaps without a class that can be read: it comes again, too.
        self._arrived: StreamSample | None = None
        self._observer = recipe.observer
        self._is_observed = False

    def successor(self, first_epoch: int) -> StreamRun:
        """Give a fresh run in place of this one.

        Args:
            first_epoch: the pass to begin with.
        """
        run = StreamRun(self.recipe, first_epoch=first_epoch)
        # What passed by is gone, and an observer that saw a beginning must not see another.
        run.spent |= self.spent
        if self._reading is not None:
            run._observer = None
        else:
            run._observer = self._observer
        return run

    def next_output(self) -> Fields | None:
        """Give the next sample or batch; None once at the end of every pass.

        Raises:
            ConfigError: the shards passed by and cannot be read again, or give nothing for ever.
            ShardError: a shard is damaged.
        """
        size = self.recipe.batch_size or 1
        empty_passes = 0
        while len(self._going) < size:
            item = self._chain.pull(self._read)
            if item is not None:
                self._going += item if isinstance(item, list) else [item]
                empty_passes = 0
                continue
            if not self.recipe.endless and self._going:
                break
            read_none = self._end_pass()
            if not self.recipe.endless:
                return None
            empty_passes += 1
            if read_none or empty_passes > MOST_EMPTY_PASSES:
                raise self._gives_nothing(read_none=read_none)
        samples = (finished(sample, self.recipe.finishers) for sample in self._going)
        gives_batches = self.recipe.gives_batches
        output = collated(samples, len(self._going)) if gives_batches else next(samples)
        self.num_delivered += len(self._going)
        self._going = []
        return output

    def state_dict(self) -> dict[str, Any]:
        """Give everything needed to go on after what was given last."""
        held = HeldSamples()
        return {
            "epoch": self.epoch,
            "first_epoch": self.first_epoch,
            "reading": None if self._reading is None else self._reading.state(),
            "counts": self.counts.to_dict(),
            "taken": self.num_taken,
            "unlabelled": self.num_unlabelled,
            "delivered": self.num_delivered,
            "chain": self._chain.state(held.save),
            "going": [held.save(sample) for sample in self._going],
            "arrived": None if self._arrived is None else held.save(self._arrived),
            "samples": held.saved,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state says; the run must be fresh, and of the state's `first_epoch`.

        Raises:
            ResumeError: it is damaged, or of other stages.
            ShardError: a sample that was held cannot be read again.
        """
        try:
            self._load(state)
        except BalanceError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ResumeError(
                f"the state of the stream is damaged ({type(error).__name__}: {error}); it must "
                f"be what state_dict() gave. Use an earlier checkpoint."
            ) from error

    def stats(self) -> dict[str, Any]:
        """Give the counts of the shards, of the whole chain, and of every stage, over all passes.

        Returns:
            `epoch`; `read`, the counts of the shards (see `StreamCounts`); `totals`, in which
            read + copies = delivered + rejected + buffered samples, and the shards delivered
            read + unlabelled + left_to_others; and `stages` in the order of the chain.
        """
        stages = self._chain.stats()
        copies, rejected, buffered = (
            sum(stage[name] for stage in stages) for name in ("copies", "rejected", "buffered")
        )
        on_its_way = self._chain.num_waiting + len(self._going) + (self._arrived is not None)
        return {
            "epoch": self.epoch,
            "read": self.counts.to_dict(),
            "totals": {
                "read": self.num_taken - self.num_unlabelled,
                "copies": copies,
                "delivered": self.num_delivered,
                "rejected": rejected,
                "buffered": buffered + on_its_way,
                "unlabelled": self.num_unlabelled,
                "left_to_others": self.counts.samples_delivered - self.num_taken,
            },
            "stages": stages,
        }

    def _read(self) -> StreamSample | None:
        """Read the next sample of the pass that can be used, with its label."""
        if self._reading is None:
            if self._observer is not None:
                self._observer.begin([source.address for source in self.recipe.sources])
            self._reading = Reading(
                self.recipe,
                epoch=self.epoch,
                files=self.files,
                counts=self.counts,
                spent=self.spent,
            )
        while (sample := self._arrived or self._reading.read()) is not None:
            if self._arrived is None:
                self._arrived, self.num_taken = sample, self.num_taken + 1
                self._is_observed = False
            if self._observer is not None and not self._is_observed:
                self._observer.add(sample)
                self._is_observed = True
            is_usable = self._label(sample)
            self._arrived = None
            if is_usable:
                return sample
        if self._observer is not None:
            self._observer.finish()
            self._observer = None
        return None

    def _label(self, sample: StreamSample) -> bool:
        """Find the class of a sample; say whether the sample can be used."""
        recipe = self.recipe
        if recipe.label is None:
            return True
        try:
            sample.label = label_of_sample(sample, recipe.label, required=recipe.needs_labels)
        except ShardError as error:
            if recipe.rules.on_error == "raise":
                raise
            self.num_unlabelled += 1
            self.counts.report(_without_class(sample, error))
            return False
        return True

    def _end_pass(self) -> bool:
        """Stand before the next pass; say whether this one had no sample at all."""
        read_none = self._reading is None or self._reading.num_taken == 0
        self._chain.begin_pass()
        self._reading = None
        self.epoch += 1
        return read_none

    def _gives_nothing(self, *, read_none: bool) -> ConfigError:
        """Give the error for a stream that would read for ever without giving anything."""
        part = self.recipe.part
        if read_none:
            return ConfigError(
                f"reader {part.number} of {part.count} (ranks x workers) found no sample in pass "
                f"{self.epoch - 1}. Use fewer readers, or shards with more samples."
            )
        return ConfigError(
            f"{MOST_EMPTY_PASSES} passes were read and nothing went on. Check the target and the "
            f"labels; stats() says what became of the samples."
        )

    def _load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        if state["reading"] is not None and self._observer is not None:
            raise ResumeError(
                "tee: the state stands within a pass whose beginning this observer has not seen. "
                "Start the pass again, or resume without tee."
            )
        recipe = self.recipe
        restore = restorer(
            state["samples"], recipe.sources, self.files, recipe.tar_rules, recipe.label
        )
        self.epoch = int(state["epoch"])
        self.counts = StreamCounts.from_dict(state["counts"])
        self.num_taken, self.num_unlabelled = int(state["taken"]), int(state["unlabelled"])
        self.num_delivered = int(state["delivered"])
        self._chain.load(state["chain"], restore)
        self._going = [restore(number) for number in state["going"]]
        if state["arrived"] is not None:
            self._arrived = restore(state["arrived"])
        if state["reading"] is not None:
            self._reading = Reading(
                recipe, epoch=self.epoch, files=self.files, counts=self.counts, spent=self.spent
            )
            self._reading.load(state["reading"])


def _without_class(sample: StreamSample, error: ShardError) -> Skip:
    """Make the record of a sample that is whole, but says no class."""
    return Skip(
        url=sample.url,
        shard=sample.shard,
        offset=sample.offset,
        stop=sample.stop,
        key=sample.key,
        rest_of_shard=False,
        reason=str(error),
    )
