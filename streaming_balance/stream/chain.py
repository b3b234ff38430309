"""Stages one after another: each takes what the one before it lets go on, one sample at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from streaming_balance.stream.stages import StageRun, StreamItem

Save = Callable[[Any], Any]
Restore = Callable[[Any], Any]


class ChainRun:
    """Some stages at work, pass after pass.

    A sample that a stage refuses with an error stays where it is and comes again.

    Args:
        runs: the stages at work, in order.
    """

    def __init__(self, runs: Sequence[StageRun[Any, Any]]) -> None:
        self.runs = tuple(runs)
        # Who waits for each stage; in the last one, what goes out.
        self._queues: list[deque[Any]] = [deque() for _ in range(len(runs) + 1)]
        self._num_finished = 0

    def pull(self, read: Callable[[], StreamItem | None]) -> Any:  # noqa: ANN401 - sample, batch or None
        """Give what goes out next, reading no more than that takes.

        Args:
            read: gives the next sample of the pass, None at its end and ever after.

        Returns:
            A sample, or a list of them; None at the end of the pass.
        """
        queues, out = self._queues, self._queues[-1]
        while not out:
            level = self._deepest_waiting()
            if level is not None:
                gone = self.runs[level].feed(queues[level][0])
                queues[level].popleft()
                queues[level + 1].extend(gone)
            elif self._num_finished == 0 and (item := read()) is not None:
                queues[0].append(item)
            elif self._num_finished < len(self.runs):
                queues[self._num_finished + 1].extend(self.runs[self._num_finished].finish())
                self._num_finished += 1
            else:
                return None
        return out.popleft()

    def over(self, items: Iterator[StreamItem]) -> Iterator[Any]:
        """Give all that goes out in one pass over `items`."""
        while (item := self.pull(lambda: next(items, None))) is not None:
            yield item
        self.begin_pass()

    def begin_pass(self) -> None:
        """Make ready for the next pass."""
        self._num_finished = 0

    @property
    def num_waiting(self) -> int:
        """Samples between two stages, or on their way out."""
        return sum(
            len(item) if isinstance(item, list) else 1 for queue in self._queues for item in queue
        )

    def stats(self) -> list[dict[str, Any]]:
        """Give the counts of every stage."""
        return [run.stats() for run in self.runs]

    def state(self, save: Save) -> dict[str, Any]:
        """Give everything needed to go on."""
        return {
            "finished": self._num_finished,
            "queues": [[_each(save, item) for item in queue] for queue in self._queues],
            "stages": [run.state_dict(save) for run in self.runs],
        }

    def load(self, state: Mapping[str, Any], restore: Restore) -> None:
        """Go on where a state says.

        Raises:
            ResumeError: it is of other stages, or damaged.
        """
        self._num_finished = int(state["finished"])
        for queue, saved in zip(self._queues, state["queues"], strict=True):
            queue.clear()
            queue.extend(_each(restore, item) for item in saved)
        for run, saved in zip(self.runs, state["stages"], strict=True):
            run.load_state_dict(saved, restore)

    def _deepest_waiting(self) -> int | None:
        """Give the last stage for which a sample waits."""
        for level in range(len(self.runs) - 1, -1, -1):
            if self._queues[level]:
                return level
        return None


def _each(change: Callable[[Any], Any], item: Any) -> Any:  # noqa: ANN401 - a sample, or a batch
    """Apply a function to a sample, or to every sample of a batch."""
    return [change(sample) for sample in item] if isinstance(item, list) else change(item)
