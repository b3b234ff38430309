"""Thinning a stream to target shares: which samples to keep, decided on the label alone.

A class that is as rare as its target allows is kept whole; every other class is thinned until it
stands to that one as the target says. Nothing is decoded to decide, nothing is held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from typing import Any, ClassVar

from streaming_balance.plan.keys import stream_key
from streaming_balance.stream.diffusion import ErrorDiffusion, whole_rate
from streaming_balance.stream.frequencies import (
    DEFAULT_WINDOW,
    ClassFrequencies,
    checked_frequencies,
    checked_pseudo_counts,
    checked_target,
    checked_window,
    exact_shares_of,
)
from streaming_balance.stream.stages import Item, Stage, StageRun, checked_unknown


@dataclass(frozen=True, slots=True)
class Accept(Stage):
    """Keep samples of class c at the rate r_c / max r, r = target share / frequency.

    At every prefix of the stream, and over all passes, the samples kept of a class number within 1
    of the sum of its rates: an error is carried over, no coin is flipped. With true frequencies
    max r samples are read for every one kept. Samples of a class are kept at equal distances: put a
    shuffle before it where a stream repeats a pattern. Nothing is buffered.

    Raises:
        ConfigError: a setting that makes no sense, by its name.

    Examples:
        Four high-grade patients come for every low-grade one; both are wanted equally often:

        >>> from streaming_balance.stream.stages import BareItem
        >>> labels = ["HGG", "HGG", "HGG", "HGG", "LGG"] * 20
        >>> stream = [BareItem(f"P{number}", label) for number, label in enumerate(labels)]
        >>> run = Accept({"HGG": 0.5, "LGG": 0.5}, frequencies={"HGG": 4, "LGG": 1}).begin(seed=1)
        >>> kept = [item.label for item in run.over(stream)]
        >>> len(stream), kept.count("HGG"), kept.count("LGG")
        (100, 20, 20)
    """

    name: ClassVar[str] = "accept"

    target: Mapping[str, float]
    """Label -> share of the samples that go on; 0 leaves a class out."""
    _: KW_ONLY
    frequencies: Mapping[str, float] | None = None
    """Label -> count or share in the stream; None: counted while streaming."""
    window: int = DEFAULT_WINDOW
    """Samples read between two changes of the rates, where frequencies are counted."""
    pseudo_counts: float | Mapping[str, float] = 1.0
    """Added to every count, for all classes or for each."""
    unknown: str = "error"
    """What becomes of labels that target does not name: `error`, or `drop` (left out, counted)."""

    def __post_init__(self) -> None:
        """Check every setting and freeze it."""
        target = checked_target(self.name, self.target)
        declared = checked_frequencies(self.name, self.frequencies, target)
        added = checked_pseudo_counts(self.name, self.pseudo_counts, target)
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "frequencies", declared)
        object.__setattr__(self, "window", checked_window(self.name, self.window))
        object.__setattr__(self, "pseudo_counts", added)
        checked_unknown(self.name, self.unknown)

    def begin(self, *, seed: int = 0) -> AcceptRun[Any]:
        """Give a fresh run; see `Stage.begin`."""
        return AcceptRun(self, seed=seed)


def accept_rates(
    shares: Mapping[str, Fraction],
    sizes: Mapping[str, Fraction],
    met: frozenset[str],
) -> dict[str, Fraction]:
    """Give the rate at which each class is kept.

    Args:
        shares: label -> target share.
        sizes: label -> frequency in any unit; above 0 wherever the share is.
        met: the classes known to be in the stream: one of them is kept whole. A class that appears
            only now is kept at the rate its pseudo-count gives it, at most 1.

    Returns:
        label -> rate in [0, 1].

    Examples:
        75 LGG stand against 210 HGG, both wanted equally often:

        >>> half = Fraction(1, 2)
        >>> accept_rates({"LGG": half, "HGG": half}, {"LGG": Fraction(75), "HGG": Fraction(210)},
        ...     frozenset(["LGG", "HGG"]))
        {'LGG': Fraction(1, 1), 'HGG': Fraction(5, 14)}
    """
    ratios = {label: share / sizes[label] for label, share in shares.items() if share}
    most = max([ratios[label] for label in met if label in ratios] or ratios.values())
    return {
        label: min(ratios[label] / most, Fraction(1)) if share else Fraction(0)
        for label, share in shares.items()
    }


class AcceptRun(StageRun[Item, Item]):
    """A run of `Accept`."""

    def __init__(self, stage: Accept, *, seed: int) -> None:
        super().__init__(stage, seed=seed, labels=stage.target, unknown=stage.unknown)
        self._shares = exact_shares_of(stage.target)
        self._frequencies = ClassFrequencies(
            stage.target,
            declared=stage.frequencies,
            window=stage.window,
            pseudo_counts=stage.pseudo_counts,
        )
        self._diffusions = {label: ErrorDiffusion(word=self._word(label)) for label in stage.target}
        self._new_rates()

    def feed(self, item: Item) -> list[Item]:
        """Give the sample if it is kept."""
        label = item.label
        tally = self._by_class.get(label)
        if tally is None or label is None:
            self._turn_away(item)
            return []
        frequencies = self._frequencies
        if not frequencies.left:
            frequencies.freeze()
            self._new_rates()
        frequencies.left -= 1
        frequencies.counts[label] += 1
        tally.read += 1
        if self._diffusions[label].take(self._rates[label]):
            tally.delivered += 1
            return [item]
        tally.rejected += 1
        return []

    def finish(self) -> list[Item]:
        """Give nothing, and pick other samples in the next pass."""
        self.passes += 1
        for label, diffusion in self._diffusions.items():
            diffusion.begin_pass(word=self._word(label))
        return []

    def _word(self, label: str) -> int:
        """Give the word that chooses a class's phase in this pass."""
        return stream_key(self.seed, "accept", label, self.passes) >> 64

    def _new_rates(self) -> None:
        """Compute the rates that hold until the next window border."""
        rates = accept_rates(self._shares, self._frequencies.sizes, self._frequencies.met)
        self._rates = {label: whole_rate(rate) for label, rate in rates.items()}
        self._exact_rates = rates

    def _wanted_share(self, label: str) -> float:
        """Give the target share."""
        return float(self._shares[label])

    def _class_stats(self, label: str) -> dict[str, Any]:
        """Give frequency and rate now, and what all rates so far promised."""
        return {
            "frequency": self._frequencies.share(label),
            "rate": float(self._exact_rates[label]),
            "promised": self._diffusions[label].ideal,
        }

    def _own_state(self, save: Callable[[Item], Any]) -> dict[str, Any]:  # noqa: ARG002 - no item is held
        """Give counts and what is carried over."""
        return {
            "frequencies": self._frequencies.state(),
            "diffusions": {label: line.state() for label, line in self._diffusions.items()},
        }

    def _load_own(self, state: Mapping[str, Any], restore: Callable[[Any], Item]) -> None:  # noqa: ARG002
        """Take over counts and what is carried over."""
        self._frequencies.load(state["frequencies"])
        for label, line in self._diffusions.items():
            line.load(state["diffusions"][label])
        self._new_rates()
