"""A sample of every class in one pass, the same whatever the order of the stream.

Each class keeps the members whose keyed hashes are smallest. Who is kept depends on who came and on
nothing else, so runs over parts of a stream can be merged, a run that stopped can go on, and a
smaller sample is part of a larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.plan.keys import key_family
from streaming_balance.plan.options import (
    check_number,
    listed,
    named_numbers,
    order_labels,
    real_number,
)
from streaming_balance.plan.quotas import apportion
from streaming_balance.stream.bottom_k import BottomK, Rank, uniform_rank, weighted_rank
from streaming_balance.stream.frequencies import checked_target, checked_window, exact_shares_of
from streaming_balance.stream.shortfall import Emission, checked_size, downsampled
from streaming_balance.stream.stages import (
    Item,
    Stage,
    StageRun,
    StreamItem,
    checked_bytes,
    checked_unknown,
    held_bytes,
    plain_settings,
)
from streaming_balance.stream.tallies import MOST_CLASSES

SHORT_RULES = ("report", "raise")


@dataclass(frozen=True, slots=True)
class Reservoir(Stage):
    """Keep up to k samples of every class; they go on when the pass ends, or a window does.

    Uniform: every k samples of a class are as likely as any others. Weighted: drawn one after the
    other, each with a chance in proportion to its weight among those left. The samples go on in
    keyed order, the same whatever order they came in. Only what is kept is held; what leaves is
    counted as rejected, and so is a key that is kept already and comes again.

    `ratio` is one-pass downsampling: when the pass ends, n samples in the smallest class leave
    min(n_c, floor(n / ratio)) of every class. It is exact as long as that fits `size`; beyond it,
    and where a class has fewer samples than `target` asks of it, `on_short` says what to do.

    Raises:
        ConfigError: a setting that makes no sense, by its name.

    Examples:
        >>> from streaming_balance.stream.stages import BareItem
        >>> labels = ["LGG"] * 20 + ["HGG"] * 70
        >>> stream = [BareItem(f"P{number}", label) for number, label in enumerate(labels)]
        >>> kept = [item.label for item in Reservoir(30, ratio=1.0).begin(seed=1).over(stream)]
        >>> kept.count("LGG"), kept.count("HGG")
        (20, 20)
    """

    name: ClassVar[str] = "reservoir"

    size: int | Mapping[str, int]
    """Samples to keep: of every class, or label -> of this class; of all classes with `target`."""
    _: KW_ONLY
    target: Mapping[str, float] | None = None
    """Label -> share of `size`, apportioned by largest remainder."""
    ratio: float | None = None
    """Smallest class : largest class, in (0, 1], that should go on."""
    weights: Callable[[Any], float] | Mapping[str, float] | None = None
    """Weight of a sample, by a function of it or by its key; 0 never goes on. None: all alike."""
    window: int | None = None
    """Samples read after which what is kept goes on; None: when the pass ends."""
    class_bytes: int | None = None
    """Bytes that the samples of one class may take; None: `size` alone bounds them."""
    rotate: bool = False
    """Whether every pass keeps other samples; otherwise all passes keep the same."""
    on_short: str = "report"
    """What to do where `ratio` or `target` cannot be met: `report` it in the stats, or `raise`."""
    unknown: str = "error"
    """What becomes of labels that are not declared: `error`, or `drop` (left out, counted)."""

    def __post_init__(self) -> None:
        """Check every setting and freeze it."""
        object.__setattr__(self, "size", checked_size(self.size))
        if self.target is not None:
            object.__setattr__(self, "target", checked_target(self.name, self.target))
        if self.ratio is not None:
            ratio = check_number(
                self.ratio, setting="reservoir: ratio", least=0, most=1, open_below=True
            )
            object.__setattr__(self, "ratio", ratio)
        if isinstance(self.weights, Mapping):
            weights = named_numbers("reservoir: weights", self.weights, zero=True)
            object.__setattr__(self, "weights", weights)
        elif self.weights is not None and not callable(self.weights):
            raise ConfigError(
                f"reservoir: weights is {self.weights!r}; give a function of a sample, a mapping "
                f"from sample keys, or None."
            )
        if self.window is not None:
            object.__setattr__(self, "window", checked_window(self.name, self.window))
        if self.class_bytes is not None:
            room = checked_bytes(self.name, self.class_bytes, setting="class_bytes")
            object.__setattr__(self, "class_bytes", room)
        if not isinstance(self.rotate, bool):
            raise ConfigError(f"reservoir: rotate is {self.rotate!r}; allowed: False, True.")
        if self.on_short not in SHORT_RULES:
            raise ConfigError(
                f"reservoir: on_short is {self.on_short!r}; allowed: {listed(SHORT_RULES)}."
                + did_you_mean(str(self.on_short), SHORT_RULES)
            )
        checked_unknown(self.name, self.unknown)
        self._check_together()

    @property
    def sizes(self) -> dict[str, int] | None:
        """Label -> samples to keep at most; None where every label is welcome and gets `size`."""
        if isinstance(self.size, Mapping):
            return dict(self.size)
        if self.target is None:
            return None
        labels = [str(label) for label in order_labels(self.target)]
        shares = exact_shares_of(self.target)
        counts = apportion([shares[label] for label in labels], self.size)
        return dict(zip(labels, counts.tolist(), strict=True))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as plain values; of weights only the kind, for a function has no value."""
        kind = "mapping" if isinstance(self.weights, Mapping) else "function"
        return {**plain_settings(self), "weights": None if self.weights is None else kind}

    def begin(self, *, seed: int = 0) -> ReservoirRun[Any]:
        """Give a fresh run; see `Stage.begin`."""
        return ReservoirRun(self, seed=seed)

    def weight_of(self, item: StreamItem) -> float:
        """Give the weight of a sample.

        Raises:
            ConfigError: there is none, or it is not a finite number of at least 0.
        """
        if isinstance(self.weights, Mapping):
            weight = self.weights.get(item.key)
        else:
            assert self.weights is not None
            weight = self.weights(item)
        number = real_number(weight)
        if number is None or number < 0:
            raise ConfigError(
                f"reservoir: the weight of sample {item.key!r} is {weight!r}; it must be a finite "
                f"number of at least 0. Correct weights; 0 leaves a sample out."
            )
        return number

    def _check_together(self) -> None:
        """Refuse settings that contradict each other."""
        if self.target is not None and isinstance(self.size, Mapping):
            raise ConfigError(
                "reservoir: size names samples per class and target shares of a total; give a "
                "number as size, or leave target out."
            )
        if self.target is not None and self.ratio is not None:
            raise ConfigError(
                "reservoir: target and ratio both say how many samples of a class go on; give one."
            )


class ReservoirRun(StageRun[Item, Item]):
    """A run of `Reservoir`."""

    stage: Reservoir

    def __init__(self, stage: Reservoir, *, seed: int) -> None:
        self._sizes = stage.sizes
        super().__init__(stage, seed=seed, labels=self._sizes, unknown=stage.unknown)
        self.kept: dict[str, BottomK[Item]] = {}
        """Label -> what is kept of the class since the last emission."""
        self.seen: dict[str, int] = {}
        """Label -> samples read since the last emission, those of weight 0 left out."""
        self.window_number = 0
        """Windows of this pass that ended."""
        self._left = stage.window or 0
        self._last: Emission | None = None
        self._words: dict[str, Callable[[str], int]] = {}

    def feed(self, item: Item) -> list[Item]:
        """Take the sample in if its rank is among the smallest; give what a full window kept.

        Raises:
            ConfigError: an unknown label, a sample larger than `class_bytes`, no weight; or the
                window would end short with this sample, where that was to raise.
        """
        label = item.label
        if label is None or not self._is_welcome(label, item.key):
            self._turn_away(item)
            return []
        rank = self._rank(label, item)
        self._check_fits(item)
        if self._left == 1 and self.stage.on_short == "raise":
            self._check_window(label, rank, item)
        tally = self._tallies.of(label)
        tally.read += 1
        self.seen[label] = self.seen.get(label, 0) + (rank is not None)
        if rank is None or not self._kept(label).is_wanted(rank):
            tally.rejected += 1
        else:
            tally.rejected += self._keep(label, rank, item)
        if self.stage.window is None:
            return []
        self._left -= 1
        return [] if self._left else self._emit()

    def finish(self) -> list[Item]:
        """Give what is kept, in keyed order.

        Raises:
            ConfigError: the ratio or the target is not met, where that was to raise.
        """
        went_on = self._emit() if self.seen or self.stage.window is None else []
        self.passes += 1
        self.window_number = 0
        if self.stage.rotate:
            self._words.clear()
        return went_on

    def absorb(self, other: ReservoirRun[Item]) -> None:
        """Take over what another run read and kept in the same pass; see `merging.merge_runs`."""
        self._tallies.add(other._tallies)
        for label, count in other.seen.items():
            self.seen[label] = self.seen.get(label, 0) + count
        for label, kept in other.kept.items():
            gone = self._kept(label).absorb(kept)
            self._tallies.of(label).rejected += len(gone)
        self._count_held()

    def _count_held(self) -> None:
        """Count anew what is held, of all classes."""
        held = self._tallies.held
        held.items = sum(len(kept) for kept in self.kept.values())
        held.size = sum(kept.num_bytes for kept in self.kept.values())
        held.settle()

    def _keep(self, label: str, rank: Rank, item: Item) -> int:
        """Hold a sample that is wanted; give how many had to leave for it, itself perhaps."""
        held = self._tallies.held
        kept = self._kept(label)
        size = kept.num_bytes
        gone = kept.offer(rank, item, held_bytes(item))
        held.items += 1 - len(gone)
        held.size += kept.num_bytes - size
        held.settle()
        return len(gone)

    def _is_welcome(self, label: str, key: str) -> bool:
        """Say whether a label is a class, declared or met first with this sample."""
        if label in self._by_class or self._sizes is not None:
            return label in self._by_class
        if len(self._by_class) >= MOST_CLASSES:
            raise ConfigError(
                f"reservoir: sample {key!r} has the label {label!r}, after {MOST_CLASSES} others. "
                f"Labels should be classes; name those to keep by giving size as a mapping."
            )
        return True

    def _kept(self, label: str) -> BottomK[Item]:
        """Give what is kept of a class."""
        kept = self.kept.get(label)
        if kept is None:
            kept = self.kept[label] = self._nothing(label)
        return kept

    def _nothing(self, label: str) -> BottomK[Item]:
        """Give what is kept of a class before its first sample."""
        size = self.stage.size if self._sizes is None else self._sizes[label]
        assert isinstance(size, int)
        return BottomK(size=size, most_bytes=self.stage.class_bytes)

    def _rank(self, label: str, item: Item) -> Rank | None:
        """Rank a sample by its key and class, and by its weight; None: weight 0."""
        words = self._words.get(label)
        if words is None:
            turn = (self.passes,) if self.stage.rotate else ()
            words = self._words[label] = key_family(self.seed, "reservoir", label, *turn)
        if self.stage.weights is None:
            return uniform_rank(words(item.key))
        weight = self.stage.weight_of(item)
        return weighted_rank(words(item.key), weight) if weight else None

    def _check_fits(self, item: Item) -> None:
        """Refuse a sample that its class could never hold."""
        room = self.stage.class_bytes
        if room is not None and held_bytes(item) > room:
            raise ConfigError(
                f"reservoir: sample {item.key!r} takes {held_bytes(item)} bytes, but class_bytes "
                f"is {room}. Use class_bytes={held_bytes(item)} or more."
            )

    def _check_window(self, label: str, rank: Rank | None, item: Item) -> None:
        """Refuse the last sample of a window that would end short, before anything changes."""
        seen = {**self.seen, label: self.seen.get(label, 0) + (rank is not None)}
        kept = self.kept[label].copy() if label in self.kept else self._nothing(label)
        if rank is not None:
            kept.offer(rank, item, held_bytes(item))
        asked = self._asked(seen)
        lengths = {name: len(others) for name, others in self.kept.items()} | {label: len(kept)}
        went_on = {name: min(asked.get(name, count), count) for name, count in lengths.items()}
        Emission(asked=asked, went_on=went_on).check_met(seen)

    def _emit(self) -> list[Item]:
        """Let go on what is kept, in keyed order, and begin anew."""
        went_on: list[Item] = []
        asked, counts = self._asked(self.seen), {}
        for label, kept in self.kept.items():
            items = [item for _, item, _ in kept.ranked()][: asked.get(label, len(kept))]
            counts[label] = len(items)
            went_on.extend(items)
        emission = Emission(asked=asked, went_on=counts)
        if self.stage.on_short == "raise":
            emission.check_met(self.seen)
        self._last = emission
        self._count_out(counts)
        word = key_family(self.seed, "reservoir order", self.passes, self.window_number)
        went_on.sort(key=lambda item: word(str(item.label), item.key))
        self.window_number += 1
        self._left = self.stage.window or 0
        return went_on

    def _asked(self, seen: Mapping[str, int]) -> dict[str, int]:
        """Give label -> samples that should go on; empty where as many as there are should."""
        if self.stage.ratio is not None:
            return downsampled(seen, self.stage.ratio)
        if self.stage.target is not None:
            assert self._sizes is not None
            return dict(self._sizes)
        return {}

    def _count_out(self, counts: Mapping[str, int]) -> None:
        """Count what went on and what did not, and hold nothing."""
        for label, kept in self.kept.items():
            tally = self._tallies.of(label)
            tally.delivered += counts[label]
            tally.rejected += len(kept) - counts[label]
        self.kept.clear()
        self.seen.clear()
        self._count_held()

    def _wanted_share(self, label: str) -> float | None:
        """Give the share that `target` or the sizes of all classes ask for."""
        if self._sizes is None or self.stage.ratio is not None:
            return None
        if self.stage.target is not None:
            return float(exact_shares_of(self.stage.target)[label])
        return self._sizes[label] / sum(self._sizes.values())

    def _class_stats(self, label: str) -> dict[str, Any]:
        """Give what is kept of a class now, and of how many."""
        kept = self.kept.get(label)
        return {
            "seen": self.seen.get(label, 0),
            "kept": len(kept) if kept is not None else 0,
            "kept_bytes": kept.num_bytes if kept is not None else 0,
        }

    def _own_stats(self) -> dict[str, Any]:
        """Give what went on last, and what was asked for."""
        return {"last_emission": None if self._last is None else self._last.to_dict()}

    def _own_state(self, save: Callable[[Item], Any]) -> dict[str, Any]:
        """Give what is kept, with its ranks, and what was seen."""
        return {
            "kept": {label: kept.state(save) for label, kept in self.kept.items()},
            "seen": dict(self.seen),
            "window_number": self.window_number,
            "left": self._left,
            "last": None if self._last is None else self._last.to_dict(),
        }

    def _load_own(self, state: Mapping[str, Any], restore: Callable[[Any], Item]) -> None:
        """Keep again what was kept."""
        self._words.clear()
        self.kept.clear()
        self.seen = {str(label): int(count) for label, count in state["seen"].items()}
        self.window_number, self._left = int(state["window_number"]), int(state["left"])
        self._last = None if state["last"] is None else Emission.from_dict(state["last"])
        for label, saved in state["kept"].items():
            self._kept(label).load(saved, restore)
        self._count_held()
