"""Epoch totals: whole numbers of draws per class and epoch whose fractions carry over.

A share of 142.5 draws per epoch becomes 143, 142, 143, ... With more than two classes, rounding
running sums class by class goes wrong (sums miss, totals jump by two), so the fractional draws
are scheduled as a real-time system schedules tasks: an epoch has as many seats as fractions add
up to, a class claims its i-th seat inside a window that keeps its running total within 1 of the
ideal, and the seats go to the most urgent claims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from streaming_balance.errors import ConfigError
from streaming_balance.plan.quotas import apportion

# Shares that do not repeat within so many epochs are rounded to this denominator first: an error
# of one draw in a million epochs, and every intermediate product stays small.
ROUNDED_DENOMINATOR = 1 << 32
# Shares that never repeat are scheduled one epoch after the other: seconds at this many epochs.
MAX_WALKED_EPOCHS = 1 << 20
CHECKPOINT_EPOCHS = 64


class EpochTotals:
    """Draws per class in every epoch of a run whose shares stay the same.

    Every total is the floor or the ceiling of its ideal, every epoch sums to `sum(ideal)`, and no
    class's running total is ever 1 or more away from the ideal.

    Args:
        ideal: `(K,)` exact draws per epoch; their sum is an integer.
        tie_order: `(K,)` rank of each class among equally urgent ones.

    Source:
        Baruah, Cohen, Plaxton and Varvel, "Proportionate progress", Algorithmica 1996; the
        priorities are those of PD2, Anderson and Srinivasan, "Mixed Pfair/ERfair scheduling of
        asynchronous periodic tasks", JCSS 2004.

    Examples:
        >>> totals = EpochTotals([Fraction(285, 2)] * 2, tie_order=[0, 1])
        >>> totals.of(0), totals.of(1), totals.before(2)
        ((143, 142), (142, 143), (285, 285))
    """

    __slots__ = (
        "_checkpoints",
        "_denominator",
        "_rates",
        "_seats",
        "_tie_order",
        "_whole",
        "ideal",
    )

    def __init__(self, ideal: Sequence[Fraction], *, tie_order: Sequence[int]) -> None:
        self.ideal = tuple(ideal)
        self._whole = tuple(math.floor(draws) for draws in ideal)
        fractions = [draws - math.floor(draws) for draws in ideal]
        self._seats = int(sum(fractions, Fraction(0)))
        self._denominator = math.lcm(*(part.denominator for part in fractions), 1)
        if self._denominator > ROUNDED_DENOMINATOR:
            self._denominator = ROUNDED_DENOMINATOR
            rates = apportion(fractions, self._seats * ROUNDED_DENOMINATOR)
            self._rates = tuple(rates.tolist())
        else:
            self._rates = tuple(int(part * self._denominator) for part in fractions)
        self._tie_order = tuple(tie_order)
        self._checkpoints: list[tuple[int, ...]] = [tuple(0 for _ in ideal)]

    @property
    def is_constant(self) -> bool:
        """Whether every epoch has the same totals."""
        return self._seats == 0

    def of(self, epoch: int) -> tuple[int, ...]:
        """Give the `(K,)` draws per class in `epoch`."""
        if self.is_constant:
            return self._whole
        before, after = self._extra(epoch), self._extra(epoch + 1)
        return tuple(
            whole + late - early
            for whole, late, early in zip(self._whole, after, before, strict=True)
        )

    def before(self, epoch: int) -> tuple[int, ...]:
        """Give the `(K,)` draws per class in all epochs before `epoch`.

        Raises:
            ConfigError: shares that never repeat, at an epoch beyond 2**20.
        """
        extra = self._extra(epoch)
        return tuple(whole * epoch + more for whole, more in zip(self._whole, extra, strict=True))

    def _extra(self, epoch: int) -> tuple[int, ...]:
        """Count the fractional seats each class took before `epoch`."""
        if self.is_constant:
            return self._checkpoints[0]
        # After a full period every class has had exactly its share and the schedule repeats.
        periods, walked = divmod(epoch, self._denominator)
        if walked > MAX_WALKED_EPOCHS:
            raise ConfigError(
                f"epoch {epoch} is too far: with these shares the totals do not repeat, and at "
                f"most {MAX_WALKED_EPOCHS} epochs are supported. Use target shares with small "
                f"denominators, such as 0.25."
            )
        taken = self._walk(walked)
        return tuple(periods * rate + count for rate, count in zip(self._rates, taken, strict=True))

    def _walk(self, epoch: int) -> tuple[int, ...]:
        """Schedule epoch after epoch from the nearest checkpoint."""
        checkpoints = self._checkpoints
        while len(checkpoints) <= epoch // CHECKPOINT_EPOCHS:
            start = (len(checkpoints) - 1) * CHECKPOINT_EPOCHS
            checkpoints = [*checkpoints, self._advance(checkpoints[-1], start, CHECKPOINT_EPOCHS)]
        self._checkpoints = checkpoints
        number, rest = divmod(epoch, CHECKPOINT_EPOCHS)
        return self._advance(checkpoints[number], number * CHECKPOINT_EPOCHS, rest)

    def _advance(self, taken: tuple[int, ...], start: int, epochs: int) -> tuple[int, ...]:
        """Hand out the seats of `epochs` epochs from `start` on."""
        counts = list(taken)
        for epoch in range(start, start + epochs):
            claims = [
                (self._urgency(number, counts[number] + 1), number)
                for number, rate in enumerate(self._rates)
                if rate and counts[number] * self._denominator // rate <= epoch
            ]
            for _, number in sorted(claims)[: self._seats]:
                counts[number] += 1
        return tuple(counts)

    def _urgency(self, number: int, claim: int) -> tuple[int, int, int, int]:
        """Order claims by deadline, overlap with the next window and group deadline."""
        rate, unit = self._rates[number], self._denominator
        deadline = _ceil_div(claim * unit, rate)
        overlaps = 0 if claim * unit % rate == 0 else 1
        group_deadline = 0
        if 2 * rate >= unit and rate < unit:
            slack = unit - rate
            group_deadline = _ceil_div(_ceil_div(deadline * slack, unit) * unit, slack)
        return deadline, -overlaps, -group_deadline, self._tie_order[number]


def _ceil_div(dividend: int, divisor: int) -> int:
    """Divide and round up, in integers."""
    return -(-dividend // divisor)
