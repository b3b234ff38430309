"""Error diffusion: whole numbers that add up to what the fractions add up to.

A class whose rate is 0.4 gives 0, 0, 1, 0, 1, ...: what could not be given is carried over, so
after any number of samples the count is within 1 of the sum of the rates. Coin flips would be off
by the square root of that number.
"""

from __future__ import annotations

from fractions import Fraction

# A rate of 1, in the whole numbers that are added up: 52 binary digits are what a float in [1, 2)
# has, and sums of them stay exact for ever.
RATE_BITS = 52
ONE = 1 << RATE_BITS
_FRACTION = ONE - 1


def whole_rate(rate: Fraction) -> int:
    """Give a rate in units of 2**-52, rounded to the nearest.

    Examples:
        >>> whole_rate(Fraction(1)) == ONE, whole_rate(Fraction(1, 3)) * 3 == ONE - 1
        (True, True)
    """
    return round(rate * ONE)


class ErrorDiffusion:
    """Turns a series of rates into counts, each the floor or the ceiling of its rate.

    Every pass starts at another keyed phase, so that another pass picks other samples. The phase
    is chosen among those that keep the count within 1 of the sum at every prefix, over all passes.

    Examples:
        >>> thirds = ErrorDiffusion(word=0)
        >>> [thirds.take(ONE // 2) for _ in range(4)], thirds.given
        ([0, 1, 0, 1], 2)
        >>> thirds.begin_pass(word=2**63)
        >>> [thirds.take(ONE // 2) for _ in range(4)], thirds.given, thirds.ideal
        ([1, 0, 1, 0], 4, 4.0)
    """

    __slots__ = ("_carry", "_lead", "given")

    def __init__(self, *, word: int) -> None:
        """Begin the first pass; `word` in [0, 2**64) chooses its phase."""
        self.given = 0
        """What all counts so far add up to."""
        # In units of 2**-52: what the next count starts with, and how far that was ahead of the
        # running sum when the pass began.
        self._carry = self._lead = 0
        self.begin_pass(word=word)

    def take(self, rate: int) -> int:
        """Give the count for the next sample, whose rate is given in units of 2**-52."""
        carry = self._carry + rate
        count = carry >> RATE_BITS
        self._carry = carry & _FRACTION
        self.given += count
        return count

    def begin_pass(self, *, word: int) -> None:
        """Choose the phase of a new pass by a word in [0, 2**64)."""
        # With an error e (count less sum) before the pass and phase u, prefixes have the errors
        # e + (u - 1, u]: all lie in (-1, 1) for any u in [-e, 1 - e).
        error = self._lead - self._carry
        least, most = max(0, -error), min(ONE, ONE - error)
        self._carry = least + ((word * (most - least)) >> 64)
        self._lead = error + self._carry

    @property
    def ideal(self) -> float:
        """The sum of all rates so far."""
        return float(self.given - Fraction(self._lead - self._carry, ONE))

    def state(self) -> list[int]:
        """Give where it stands, as integers."""
        return [self.given, self._carry, self._lead]

    def load(self, state: list[int]) -> None:
        """Go on where `state` was taken."""
        self.given, self._carry, self._lead = map(int, state)
