"""Repeating a stream's rare classes to target shares, without losing a sample.

The class that is most frequent for its target goes on once per sample, every other class as often
as it takes. The copies of a sample are spread through a bounded buffer, so that none of them
follows another as long as the buffer holds a second sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from typing import Any, ClassVar

from streaming_balance.errors import ConfigError
from streaming_balance.plan.keys import stream_key
from streaming_balance.stream.copies import CopyQueue, Pending
from streaming_balance.stream.diffusion import ErrorDiffusion, whole_rate
from streaming_balance.stream.draws import KeyedWords
from streaming_balance.stream.frequencies import (
    DEFAULT_WINDOW,
    ClassFrequencies,
    checked_frequencies,
    checked_pseudo_counts,
    checked_target,
    checked_window,
    exact_shares_of,
)
from streaming_balance.stream.stages import (
    Item,
    Stage,
    StageRun,
    checked_bytes,
    checked_unknown,
    held_bytes,
)

DEFAULT_MOST_COPIES = 10_000


@dataclass(frozen=True, slots=True)
class Repeat(Stage):
    """Let samples of class c go on r_c / min r times, r = target share / frequency.

    Every sample goes on at least once. Over all passes the copies of a class number within 1 of the
    sum of its rates: an error is carried over, nothing is drawn. Copies stay in the buffer until it
    is full; whoever went on least recently goes on next, give or take half of the buffer by key. A
    sample larger than the buffer goes on at once with all its copies, and is counted.

    A class that appears while others were counted already goes on once per sample until the next
    window border: one sample says nothing about how rare it is.

    Raises:
        ConfigError: a setting that makes no sense, by its name; a class with a target share of 0.

    Examples:
        Four high-grade patients come for every low-grade one; both are wanted equally often:

        >>> from streaming_balance.stream.stages import BareItem
        >>> labels = ["HGG", "HGG", "HGG", "HGG", "LGG"] * 20
        >>> stream = [BareItem(f"P{number}", label) for number, label in enumerate(labels)]
        >>> repeat = Repeat({"HGG": 1, "LGG": 1}, buffer_bytes=1 << 20,
        ...     frequencies={"HGG": 4, "LGG": 1})
        >>> went_on = [item.label for item in repeat.begin(seed=1).over(stream)]
        >>> len(stream), went_on.count("HGG"), went_on.count("LGG")
        (100, 80, 80)
    """

    name: ClassVar[str] = "repeat"

    target: Mapping[str, float]
    """Label -> share of what goes on, above 0."""
    _: KW_ONLY
    buffer_bytes: int
    """Bytes that held samples may take, 1 KiB for each one's objects included; copies take none."""
    frequencies: Mapping[str, float] | None = None
    """Label -> count or share in the stream; None: counted while streaming."""
    window: int = DEFAULT_WINDOW
    """Samples read between two changes of the rates, where frequencies are counted."""
    pseudo_counts: float | Mapping[str, float] = 1.0
    """Added to every count, for all classes or for each."""
    most_copies: int = DEFAULT_MOST_COPIES
    """How often a sample goes on at most: declared frequencies that ask for more are refused, and
    counted ones are cut to it, which the stats say."""
    unknown: str = "error"
    """What becomes of labels that target does not name: `error`, or `drop` (left out, counted)."""

    def __post_init__(self) -> None:
        """Check every setting and freeze it."""
        target = checked_target(self.name, self.target)
        _check_no_zero(target)
        declared = checked_frequencies(self.name, self.frequencies, target)
        added = checked_pseudo_counts(self.name, self.pseudo_counts, target)
        most = checked_window(self.name, self.most_copies, setting="most_copies")
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "buffer_bytes", checked_bytes(self.name, self.buffer_bytes))
        object.__setattr__(self, "frequencies", declared)
        object.__setattr__(self, "window", checked_window(self.name, self.window))
        object.__setattr__(self, "pseudo_counts", added)
        object.__setattr__(self, "most_copies", most)
        checked_unknown(self.name, self.unknown)

    def begin(self, *, seed: int = 0) -> RepeatRun[Any]:
        """Give a fresh run; see `Stage.begin`.

        Raises:
            ConfigError: declared frequencies ask for more than `most_copies`.
        """
        return RepeatRun(self, seed=seed)


def repeat_rates(
    shares: Mapping[str, Fraction],
    sizes: Mapping[str, Fraction],
    met: frozenset[str],
) -> dict[str, Fraction]:
    """Give how often a sample of each class goes on, on average.

    Args:
        shares: label -> target share, above 0.
        sizes: label -> frequency in any unit, above 0.
        met: the classes known to be in the stream: one of them has the rate 1, and a class that is
            not among them, too. Where there are none, all classes count as met.

    Returns:
        label -> rate of at least 1.

    Examples:
        >>> half = Fraction(1, 2)
        >>> repeat_rates({"LGG": half, "HGG": half}, {"LGG": Fraction(75), "HGG": Fraction(210)},
        ...     frozenset(["LGG", "HGG"]))
        {'LGG': Fraction(14, 5), 'HGG': Fraction(1, 1)}
    """
    ratios = {label: share / sizes[label] for label, share in shares.items()}
    among = met or frozenset(ratios)
    least = min(ratios[label] for label in among)
    return {
        label: ratio / least if label in among else Fraction(1) for label, ratio in ratios.items()
    }


def _check_no_zero(target: Mapping[str, float]) -> None:
    """Refuse to lose a class: that is what accept is for."""
    for label, share in target.items():
        if not share:
            raise ConfigError(
                f"repeat: target gives class {label!r} 0, but repeat loses no sample. Give it a "
                f"share above 0, or leave it out with accept first."
            )


class RepeatRun(StageRun[Item, Item]):
    """A run of `Repeat`."""

    def __init__(self, stage: Repeat, *, seed: int) -> None:
        super().__init__(stage, seed=seed, labels=stage.target, unknown=stage.unknown)
        self._buffer_bytes, self._most_copies = stage.buffer_bytes, stage.most_copies
        self._shares = exact_shares_of(stage.target)
        self._frequencies = ClassFrequencies(
            stage.target,
            declared=stage.frequencies,
            window=stage.window,
            pseudo_counts=stage.pseudo_counts,
        )
        self._diffusions = {label: ErrorDiffusion(word=self._word(label)) for label in stage.target}
        self._queue: CopyQueue[Item] = CopyQueue(self._words_of_pass())
        self._passed_through = self._cut = 0
        self._new_rates()
        self._check_declared(stage)

    def feed(self, item: Item) -> list[Item]:
        """Take the sample in, and give as many copies as have to go on to make room."""
        label = item.label
        tally = self._by_class.get(label)
        if tally is None or label is None:
            self._turn_away(item)
            return []
        pending = Pending(item, self._copies(label))
        tally.read += 1
        held = self._tallies.held
        size = held_bytes(item)
        if size > self._buffer_bytes:
            return self._pass_through(pending)
        self._queue.append(pending)
        held.add(size)
        gone = []
        while held.size > self._buffer_bytes:
            gone.append(self._gone(self._queue.next()))
        held.settle()
        return gone

    def finish(self) -> list[Item]:
        """Give all copies that are left, those of each sample evenly spread."""
        gone = [self._gone(pending) for pending in self._queue.rest()]
        self.passes += 1
        self._queue.words = self._words_of_pass()
        for label, diffusion in self._diffusions.items():
            diffusion.begin_pass(word=self._word(label))
        return gone

    def _copies(self, label: str) -> int:
        """Say how often this sample goes on, and count it in."""
        frequencies = self._frequencies
        if not frequencies.left:
            frequencies.freeze()
            self._new_rates()
        frequencies.left -= 1
        frequencies.counts[label] += 1
        if label in self._too_rare:
            self._cut += 1
        return self._diffusions[label].take(self._rates[label])

    def _new_rates(self) -> None:
        """Compute the rates that hold until the next window border."""
        exact = repeat_rates(self._shares, self._frequencies.sizes, self._frequencies.met)
        self._too_rare = {label for label, rate in exact.items() if rate > self._most_copies}
        self._exact_rates = {
            label: min(rate, Fraction(self._most_copies)) for label, rate in exact.items()
        }
        self._rates = {label: whole_rate(rate) for label, rate in self._exact_rates.items()}

    def _check_declared(self, stage: Repeat) -> None:
        """Refuse declared frequencies that cannot be met."""
        if stage.frequencies is not None and self._too_rare:
            label = min(self._too_rare)
            rates = repeat_rates(self._shares, self._frequencies.sizes, self._frequencies.met)
            raise ConfigError(
                f"repeat: to reach its target share, every sample of class {label!r} has to go on "
                f"{float(rates[label]):g} times, but most_copies is {self._most_copies}. Raise "
                f"most_copies, ask for a smaller share, or thin the other classes with accept."
            )

    def _gone(self, pending: Pending[Item]) -> Item:
        """Count a copy that has gone on, and the room its sample leaves with the last one."""
        item = pending.item
        tally = self._tallies.of(item.label)
        if pending.has_gone:
            tally.copies += 1
        else:
            tally.delivered += 1
            pending.has_gone = True
        if not pending.left:
            self._tallies.held.remove(held_bytes(item))
        return item

    def _pass_through(self, pending: Pending[Item]) -> list[Item]:
        """Let a sample go on at once that no buffer can hold, with all its copies."""
        tally = self._tallies.of(pending.item.label)
        tally.delivered += 1
        tally.copies += pending.left - 1
        self._passed_through += 1
        self._queue.last_key = pending.item.key
        return [pending.item] * pending.left

    def _num_buffered(self) -> int:
        """Count the held samples of which no copy has gone on."""
        return sum(not pending.has_gone for pending in self._queue)

    def _word(self, label: str) -> int:
        """Give the word that chooses a class's phase in this pass."""
        return stream_key(self.seed, "repeat", label, self.passes) >> 64

    def _words_of_pass(self, *, taken: int = 0) -> KeyedWords:
        """Give the choices of this pass."""
        return KeyedWords(stream_key(self.seed, "repeat order", self.passes), taken=taken)

    def _wanted_share(self, label: str) -> float:
        """Give the target share."""
        return float(self._shares[label])

    def _class_stats(self, label: str) -> dict[str, Any]:
        """Give frequency and rate now, what all rates so far promised, and what was given out."""
        return {
            "frequency": self._frequencies.share(label),
            "rate": float(self._exact_rates[label]),
            "promised": self._diffusions[label].ideal,
            "given": self._diffusions[label].given,
        }

    def _own_stats(self) -> dict[str, Any]:
        """Give what is still to go on, and which samples got less than they should."""
        return {
            "pending_copies": sum(pending.left for pending in self._queue),
            "passed_through": self._passed_through,
            "cut_to_most_copies": self._cut,
        }

    def _own_state(self, save: Callable[[Item], Any]) -> dict[str, Any]:
        """Give counts, what is carried over, and what is held in its order."""
        return {
            "frequencies": self._frequencies.state(),
            "diffusions": {label: line.state() for label, line in self._diffusions.items()},
            "taken": self._queue.words.taken,
            "last_key": self._queue.last_key,
            "passed_through": self._passed_through,
            "cut": self._cut,
            "queue": [
                {"item": save(pending.item), "left": pending.left, "has_gone": pending.has_gone}
                for pending in self._queue
            ],
        }

    def _load_own(self, state: Mapping[str, Any], restore: Callable[[Any], Item]) -> None:
        """Take over counts and what is carried over, and hold again what was held."""
        self._frequencies.load(state["frequencies"])
        for label, line in self._diffusions.items():
            line.load(state["diffusions"][label])
        self._new_rates()
        self._passed_through, self._cut = int(state["passed_through"]), int(state["cut"])
        self._queue = CopyQueue(self._words_of_pass(taken=int(state["taken"])))
        self._queue.last_key = state["last_key"]
        for saved in state["queue"]:
            item = restore(saved["item"])
            has_gone = bool(saved["has_gone"])
            self._queue.append(Pending(item, int(saved["left"]), has_gone=has_gone))
            self._tallies.held.add(held_bytes(item))
