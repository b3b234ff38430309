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
from itertools import combinations

from streaming_balance.errors import ConfigError
from streaming_balance.plan.quotas import apportion

# Shares that do not repeat within so many epochs are rounded to this denominator first: an error
# of one draw in a million epochs, and every intermediate product stays small.
ROUNDED_DENOMINATOR = 1 << 32
CHECKPOINT_EPOCHS = 64
# Scheduled one after the other from a checkpoint; farther epochs are deduced.
WALKED_CHECKPOINTS = 16
# Where nothing can be deduced every epoch before is scheduled: many seconds at this many.
MAX_WALKED_EPOCHS = 1 << 20
# So many epochs before the one asked for, deduction begins; hardly any shares need the second.
LOOKBACKS = (512, 8192)
# Deduction gives up beyond these: about 0.3 s each.
MAX_POSSIBILITIES = 1 << 14
MAX_ADVANCES = 1 << 16


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
        "_recent",
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
        self._checkpoints: dict[int, tuple[int, ...]] = {0: tuple(0 for _ in ideal)}
        # The epoch asked for last: whoever asks for the next one walks.
        self._recent = (0, self._checkpoints[0])

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
            ConfigError: an epoch beyond 2**20 for which nothing can be deduced; see `_deduced`.
        """
        extra = self._extra(epoch)
        return tuple(whole * epoch + more for whole, more in zip(self._whole, extra, strict=True))

    def _extra(self, epoch: int) -> tuple[int, ...]:
        """Count the fractional seats each class took before `epoch`."""
        if self.is_constant:
            return self._checkpoints[0]
        # After a full period every class has had exactly its share and the schedule repeats.
        periods, walked = divmod(epoch, self._denominator)
        taken = self._walk(walked)
        return tuple(periods * rate + count for rate, count in zip(self._rates, taken, strict=True))

    def _walk(self, epoch: int) -> tuple[int, ...]:
        """Schedule epoch after epoch from the checkpoint before."""
        number = epoch // CHECKPOINT_EPOCHS
        start, taken = self._recent
        if not number * CHECKPOINT_EPOCHS <= start <= epoch:
            start, taken = number * CHECKPOINT_EPOCHS, self._checkpoint(number)
        taken = self._advance(taken, start, epoch - start)
        # Replaced as a whole: threads may ask at the same time.
        self._recent = (epoch, taken)
        return taken

    def _checkpoint(self, number: int) -> tuple[int, ...]:
        """Give the seats taken at a checkpoint: known, walked to from near by, or deduced."""
        known = self._checkpoints
        if number in known:
            return known[number]
        nearest = max(place for place in list(known) if place <= number)
        if number - nearest > WALKED_CHECKPOINTS:
            epoch = number * CHECKPOINT_EPOCHS
            deduced = self._deduced(epoch)
            if deduced is not None:
                nearest = number
                known[number] = deduced
            elif epoch > MAX_WALKED_EPOCHS:
                raise ConfigError(
                    f"epoch {epoch} is too far: with these shares the totals do not repeat, and "
                    f"at most {MAX_WALKED_EPOCHS} epochs are supported. Use target shares with "
                    f"small denominators, such as 0.25."
                )
        taken = known[nearest]
        for place in range(nearest, number):
            taken = self._advance(taken, place * CHECKPOINT_EPOCHS, CHECKPOINT_EPOCHS)
            known[place + 1] = taken
        return taken

    def _deduced(self, epoch: int) -> tuple[int, ...] | None:
        """Find the seats taken before `epoch` without scheduling all epochs before it.

        Some epochs earlier every class stood at the floor or the ceiling of its ideal. All ways to
        do so are scheduled from there; what leaves that band was no schedule's state, and what is
        left soon runs into one and the same state, which is then the one walking would find.

        Returns:
            `(K,)` seats; None where there are too many ways, or several are left.
        """
        for lookback in LOOKBACKS:
            start, advances = epoch - lookback, 0
            states = self._possible(start) if start > 0 else set()
            for passed in range(start, epoch):
                if len(states) < 2 or advances > MAX_ADVANCES:
                    break
                advances += len(states)
                following = {self._advance(state, passed, 1) for state in states}
                states = {state for state in following if self._is_within_one(state, passed + 1)}
                start = passed + 1
            if len(states) == 1:
                return self._advance(states.pop(), start, epoch - start)
        return None

    def _possible(self, epoch: int) -> set[tuple[int, ...]]:
        """List every way in which the classes can stand before `epoch`; none if too many."""
        unit = self._denominator
        least = [rate * epoch // unit for rate in self._rates]
        between = [number for number, rate in enumerate(self._rates) if rate * epoch % unit]
        above = self._seats * epoch - sum(least)
        if math.comb(len(between), above) > MAX_POSSIBILITIES:
            return set()
        return {
            tuple(count + (number in chosen) for number, count in enumerate(least))
            for chosen in combinations(between, above)
        }

    def _is_within_one(self, taken: tuple[int, ...], epoch: int) -> bool:
        """Say whether seats taken before `epoch` are those of a schedule that keeps its promise."""
        unit = self._denominator
        return sum(taken) == self._seats * epoch and all(
            abs(count * unit - rate * epoch) < unit
            for count, rate in zip(taken, self._rates, strict=True)
        )

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
