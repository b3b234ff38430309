"""Where a sampler stands, and the iterators that move it on.

An iterator keeps a place of its own and tells the sampler of every batch it hands out. Data loaders
make iterators that they never ask (twice per epoch, before a state is loaded), so a new one takes
over from the last, and an overtaken one that is asked all the same says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from streaming_balance.errors import BalanceError, ResumeError
from streaming_balance.plan.options import whole_number
from streaming_balance.training.state import Position

Item = TypeVar("Item")
Jumps = tuple[tuple[Position, Position], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a sampler hands out next."""

    epoch: int
    """Number of the epoch, from 0."""
    step: int
    """Number of the batch in the epoch, from 0."""
    taken: int = 0
    """Samples of that batch, on this rank, that were handed out already."""


class SamplerPosition:
    """The place that the next iterator starts from, and the jumps on the way to it."""

    def __init__(self) -> None:
        self.next = Place(epoch=0, step=0)
        self.skipped: Jumps = ()
        self._newest = 0

    def claim(self) -> int:
        """Let a new iterator take over; gives its number."""
        self._newest += 1
        return self._newest

    def is_held_by(self, number: int) -> bool:
        """Say whether an iterator is still the one that moves the sampler on."""
        return number == self._newest

    def move(self, place: Place, skipped: Jumps) -> None:
        """Stand somewhere else, as a loaded state says."""
        self.claim()
        self.next, self.skipped = place, skipped

    def jump(self, epoch: int) -> None:
        """Go to the start of another epoch, and remember what that skips."""
        start, target = Position(self.next.epoch, self.next.step), Position(epoch, 0)
        jumps = self.skipped
        # Jumps without a batch between them are one.
        if jumps and jumps[-1][1] == start:
            start, jumps = jumps[-1][0], jumps[:-1]
        self.move(
            Place(epoch=epoch, step=0), jumps if start == target else (*jumps, (start, target))
        )


class RankBatches(Protocol):
    """What an iterator asks of its sampler."""

    def num_steps(self, epoch: int) -> int:
        """Count the batches of an epoch."""
        ...

    def rank_batch(self, epoch: int, step: int) -> list[int]:
        """List the samples of one batch of this rank."""
        ...


class Cursor(Iterator[Item], Generic[Item]):
    """One epoch's iterator, or that of the rest of one.

    Args:
        batches: the sampler.
        position: where the sampler stands; moved on with every item.
    """

    def __init__(self, batches: RankBatches, position: SamplerPosition) -> None:
        self._batches, self._position = batches, position
        self._number = position.claim()
        self._place = position.next

    def __iter__(self) -> Self:
        return self

    def state_dict(self) -> dict[str, int]:
        """Give this iterator's own place; unlike the sampler's, it may be the end of an epoch."""
        place = self._place
        return {"epoch": place.epoch, "step": place.step, "taken": place.taken}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go to the place that another iterator's state names.

        The sampler, which was loaded before, knows where the next iterator starts: at the end of
        an epoch this one has nothing left, while the next one has a whole epoch.

        Raises:
            ResumeError: the state is no place of this plan.
        """
        epoch, step, taken = (whole_number(state.get(key)) for key in ("epoch", "step", "taken"))
        if epoch is None or step is None or taken is None or min(epoch, step, taken) < 0:
            raise ResumeError(f"{dict(state)} is no place of a sampler; it is damaged.")
        if step > self._batches.num_steps(epoch):
            raise ResumeError(
                f"{dict(state)} lies beyond the {self._batches.num_steps(epoch)} steps of an "
                f"epoch; it is damaged. Use an earlier checkpoint."
            )
        self._place = Place(epoch=epoch, step=step, taken=taken)

    def _current(self) -> tuple[int, int]:
        """Give epoch and step of the batch at this place; end where the epoch has no more."""
        place = self._place
        if place.step >= self._batches.num_steps(place.epoch):
            raise StopIteration
        if not self._position.is_held_by(self._number):
            raise BalanceError(
                "this iterator of the sampler was overtaken: another one was started, set_epoch "
                "went to another epoch, or a state was loaded. Iterate anew, or build a second "
                "sampler."
            )
        return place.epoch, place.step

    def _move_to(self, step: int, taken: int = 0) -> None:
        """Go on within the epoch, and tell the sampler."""
        epoch = self._place.epoch
        self._place = place = Place(epoch=epoch, step=step, taken=taken)
        at_end = step >= self._batches.num_steps(epoch)
        self._position.next = Place(epoch=epoch + 1, step=0) if at_end else place


class BatchCursor(Cursor[list[int]]):
    """Hands out batches."""

    def __next__(self) -> list[int]:
        batch = self._batches.rank_batch(*self._current())[self._place.taken :]
        self._move_to(self._place.step + 1)
        return batch


class IndexCursor(Cursor[int]):
    """Hands out the indices of batches, one at a time."""

    def __init__(self, batches: RankBatches, position: SamplerPosition) -> None:
        super().__init__(batches, position)
        self._batch: list[int] = []
        self._batch_of: tuple[int, int] | None = None

    def __next__(self) -> int:
        current, place = self._current(), self._place
        if self._batch_of != current:
            self._batch, self._batch_of = self._batches.rank_batch(*current), current
        index = self._batch[place.taken]
        if place.taken + 1 < len(self._batch):
            self._move_to(place.step, place.taken + 1)
        else:
            self._move_to(place.step + 1)
        return index
