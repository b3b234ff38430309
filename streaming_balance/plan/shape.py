"""How long an epoch is, and how large each of its batches."""

from __future__ import annotations

from streaming_balance.errors import ConfigError
from streaming_balance.plan.options import whole_number
from streaming_balance.plan.strategy import Strategy, Target


class EpochShape:
    """How long an epoch is: draws, steps, and the size of each batch.

    Args:
        target: what the strategy asks for.
        strategy: gives the rule for the last batch.
        global_batch_size: samples in a global batch, B.

    Raises:
        ConfigError: dropping the last batch leaves none.
    """

    __slots__ = ("batch_size", "last_size", "num_draws", "num_steps")

    def __init__(self, target: Target, strategy: Strategy, *, global_batch_size: int) -> None:
        length, batch = target.num_draws, global_batch_size
        last = strategy.last if strategy.replacement else "drop"
        self._fit(length, batch, last)
        if not self.num_steps:
            reason = "last: drop" if strategy.replacement else "replacement: false"
            raise ConfigError(
                f"global_batch_size is {batch}, but an epoch has only {length} draws and {reason} "
                f"keeps full batches only. Use global_batch_size <= {length}."
            )

    @classmethod
    def of_draws(cls, draws: int, *, batch_size: int, last: str) -> EpochShape:
        """Fit a number of draws, at least 1, to batches.

        Examples:
            >>> shape = EpochShape.of_draws(17, batch_size=8, last="short")
            >>> shape.num_steps, shape.size_of(2)
            (3, 1)
        """
        shape = cls.__new__(cls)
        shape._fit(draws, batch_size, last)
        return shape

    def _fit(self, length: int, batch: int, last: str) -> None:
        """Count steps and draws by the rule for the last batch."""
        self.batch_size = batch
        self.num_steps = length // batch if last == "drop" else -(-length // batch)
        self.num_draws = length if last == "short" else self.num_steps * batch
        self.last_size = self.num_draws - (self.num_steps - 1) * batch

    def size_of(self, step: int) -> int:
        """Give the number of samples in the global batch of `step`."""
        return self.last_size if step == self.num_steps - 1 else self.batch_size

    @property
    def is_short(self) -> bool:
        """Whether the last batch is smaller than the others."""
        return self.last_size < self.batch_size

    def batch_shares(self, total: int) -> list[int]:
        """List the numbers of draws that a batch may ask of a class with `total` in the epoch."""
        if not self.is_short:
            return _floor_and_ceiling(total, self.num_steps)
        shares = []
        for last in _floor_and_ceiling(total * self.last_size, self.num_draws):
            shares += [last, *_floor_and_ceiling(total - last, max(1, self.num_steps - 1))]
        return shares


def _floor_and_ceiling(dividend: int, divisor: int) -> list[int]:
    """Divide both ways."""
    return [dividend // divisor, -(-dividend // divisor)]


def check_batch_size(size: int) -> int:
    """Give the global batch size as a plain integer of at least 1."""
    number = whole_number(size)
    if number is None or number < 1:
        raise ConfigError(f"global_batch_size is {size!r}; it must be an integer of at least 1.")
    return number
