"""Quota batches from any stream: a bounded ring per class, and every batch takes what it is due.

However a stream is sorted, its classes are held in rings, and each batch takes the floor or the
ceiling of every class's share out of them. What the stream does not bring in time comes again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from typing import Any, ClassVar

from streaming_balance.errors import ConfigError
from streaming_balance.plan.keys import stream_key
from streaming_balance.plan.options import check_number, exact_decimal, listed
from streaming_balance.plan.totals import EpochTotals
from streaming_balance.stream.draws import KeyedWords
from streaming_balance.stream.frequencies import checked_target, checked_window, exact_shares_of
from streaming_balance.stream.ring import Ring
from streaming_balance.stream.stages import (
    ITEM_BYTES,
    Item,
    Stage,
    StageRun,
    checked_bytes,
    checked_unknown,
    held_bytes,
)

MOST_PER_READ = 1024
# Quotas are counted anew after so many batches: from any earlier one a restored run finds the next,
# and what the quotas remember of the way stays small.
ERA_BATCHES = 1 << 20


@dataclass(frozen=True, slots=True)
class Replay(Stage):
    """Give batches that hold the floor or the ceiling of every class's share.

    Each class has a ring with its share of `buffer_bytes`, in which the newest sample replaces the
    oldest and all take turns. A batch goes on whenever as many samples were read as `per_read`
    says it is worth, so by default as many samples go on as came in; what is short of a batch
    counts for the next pass, and the rings are kept for it, too.

    A class that has not appeared yet is left out, and the others share its part; from then on,
    as long as the same classes are known, the samples of a class number within 1 of its share of
    all batches, a million batches at a time. With `wait_for_classes` no batch goes on before all
    classes appeared; what is read until then fills the rings and is worth nothing.

    A sample larger than its class's part of the buffer is an error: it could not be delivered.

    Raises:
        ConfigError: a setting that makes no sense, by its name.

    Examples:
        Sorted, and one to nine; once both classes are known every batch holds two of each:

        >>> from streaming_balance.stream.stages import BareItem
        >>> labels = ["LGG"] * 4 + ["HGG"] * 36
        >>> stream = [BareItem(f"P{number}", label) for number, label in enumerate(labels)]
        >>> run = Replay({"HGG": 1, "LGG": 1}, batch_size=4, buffer_bytes=1 << 20).begin(seed=1)
        >>> batches = [[item.label for item in batch] for batch in run.over(stream)]
        >>> len(batches), [batch.count("LGG") for batch in batches]
        (10, [4, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """

    name: ClassVar[str] = "replay"

    target: Mapping[str, float]
    """Label -> share of every batch; 0 leaves a class out."""
    _: KW_ONLY
    batch_size: int
    """Samples in a batch."""
    buffer_bytes: int
    """Bytes that all rings may take, 1 KiB for each sample's objects included."""
    per_read: float = 1.0
    """Samples that go on per sample read of a wanted class, in (0, 1024]."""
    wait_for_classes: bool = False
    """Whether nothing goes on before every wanted class appeared."""
    unknown: str = "error"
    """What becomes of labels that target does not name: `error`, or `drop` (left out, counted)."""

    def __post_init__(self) -> None:
        """Check every setting and freeze it."""
        target = checked_target(self.name, self.target)
        size = checked_window(self.name, self.batch_size, setting="batch_size")
        per_read = check_number(
            self.per_read, setting="replay: per_read", least=0, most=MOST_PER_READ, open_below=True
        )
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "batch_size", size)
        object.__setattr__(self, "buffer_bytes", checked_bytes(self.name, self.buffer_bytes))
        object.__setattr__(self, "per_read", per_read)
        if not isinstance(self.wait_for_classes, bool):
            raise ConfigError(
                f"replay: wait_for_classes is {self.wait_for_classes!r}; allowed: False, True."
            )
        checked_unknown(self.name, self.unknown)
        for label, budget in self.budgets.items():
            if budget <= ITEM_BYTES:
                raise ConfigError(
                    f"replay: buffer_bytes is {self.buffer_bytes}, of which class {label!r} gets "
                    f"{budget}; a sample takes {ITEM_BYTES} and its own bytes. Use a larger buffer."
                )

    @property
    def budgets(self) -> dict[str, int]:
        """Label -> bytes of its ring, for the classes with a share."""
        shares = exact_shares_of(self.target)
        return {
            label: math.floor(self.buffer_bytes * share) for label, share in shares.items() if share
        }

    def begin(self, *, seed: int = 0) -> ReplayRun[Any]:
        """Give a fresh run; see `Stage.begin`."""
        return ReplayRun(self, seed=seed)


class _Era:
    """A time in which the same classes are known, up to `ERA_BATCHES`: what its batches hold.

    Args:
        shares: label -> share, of the known classes; they sum to 1.
        batch_size: samples in a batch.
        seed: keys which of equally urgent classes comes first.
        batches: how many batches went on in it before.
    """

    __slots__ = ("_totals", "batches", "ideal")

    def __init__(
        self, shares: Mapping[str, Fraction], *, batch_size: int, seed: int, batches: int = 0
    ) -> None:
        self.ideal = {label: share * batch_size for label, share in shares.items()}
        """Label -> samples per batch, exactly."""
        self.batches = batches
        """Batches that went on in this era."""
        keys = [stream_key(seed, "replay class", label) for label in shares]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        ranks = [order.index(number) for number in range(len(keys))]
        self._totals = EpochTotals(list(self.ideal.values()), tie_order=ranks)

    def next_quotas(self) -> dict[str, int]:
        """Give label -> samples in the next batch."""
        counts = self._totals.of(self.batches)
        self.batches += 1
        return dict(zip(self.ideal, counts, strict=True))

    def state(self) -> dict[str, Any]:
        """Give which classes are known, and for how many batches they were."""
        return {"classes": list(self.ideal), "batches": self.batches}


class ReplayRun(StageRun[Item, list[Item]]):
    """A run of `Replay`."""

    def __init__(self, stage: Replay, *, seed: int) -> None:
        super().__init__(stage, seed=seed, labels=stage.target, unknown=stage.unknown)
        self._waits, self._batch_size = stage.wait_for_classes, stage.batch_size
        self._shares = exact_shares_of(stage.target)
        self._rings: dict[str, Ring[Item]] = {
            label: Ring(budget=budget) for label, budget in stage.budgets.items()
        }
        # A sample read earns the numerator, a batch costs the denominator for each of its samples.
        worth = exact_decimal(stage.per_read)
        self._earned, self._price = worth.numerator, worth.denominator * stage.batch_size
        self._credit = self._twins = 0
        self._eras: list[_Era] = []
        self._words = self._words_of_pass()

    def feed(self, item: Item) -> list[list[Item]]:
        """Take the sample in, and give the batches that are due.

        Raises:
            ConfigError: an unknown label, or a sample larger than its class's ring.
        """
        label = item.label
        tally = self._by_class.get(label)
        if tally is None or label is None:
            self._turn_away(item)
            return []
        ring = self._rings.get(label)
        if ring is None:
            tally.read += 1
            tally.rejected += 1
            return []
        self._check_fits(item, ring)
        tally.read += 1
        is_new_class = not len(ring)
        tally.rejected += self._put(item, ring)
        if is_new_class:
            self._begin_era()
        return self._due_batches()

    def finish(self) -> list[list[Item]]:
        """Give nothing: what is short of a batch counts for the next pass.

        Raises:
            ConfigError: the whole pass was spent waiting for classes that never came.
        """
        missing = self._unmet()
        if self._waits and missing and any(len(ring) for ring in self._rings.values()):
            met = [label for label, ring in self._rings.items() if len(ring)]
            raise ConfigError(
                f"replay: the pass ended without a sample of {listed(missing)}, and "
                f"wait_for_classes held back every batch until then; read were {listed(met)}. "
                f"Check the labels, leave the class out of target, or do not wait."
            )
        self.passes += 1
        self._words = self._words_of_pass()
        return []

    def _check_fits(self, item: Item, ring: Ring[Item]) -> None:
        """Refuse a sample that its class's ring could never hold."""
        size = held_bytes(item)
        if size > ring.budget:
            label = str(item.label)
            enough = math.ceil(size / self._shares[label])
            raise ConfigError(
                f"replay: sample {item.key!r} takes {size} bytes, but class {label!r} has "
                f"{ring.budget} of the buffer. Use buffer_bytes={enough} or more."
            )

    def _put(self, item: Item, ring: Ring[Item]) -> int:
        """Hold a sample; give how many left its ring that never went on."""
        items, size = len(ring), ring.size
        lost = ring.put(item)
        held = self._tallies.held
        held.items += len(ring) - items
        held.size += ring.size - size
        held.settle()
        return lost

    def _begin_era(self) -> None:
        """Share the batches out anew among the classes that are known now."""
        # In an order of their own: that in which target names them decides nothing.
        known = sorted(label for label, ring in self._rings.items() if len(ring))
        self._eras.append(self._era_of(known))

    def _era_of(self, known: list[str], *, batches: int = 0) -> _Era:
        """Give the era in which these classes are known."""
        whole = sum((self._shares[label] for label in known), Fraction(0))
        shares = {label: self._shares[label] / whole for label in known}
        return _Era(shares, batch_size=self._batch_size, seed=self.seed, batches=batches)

    def _due_batches(self) -> list[list[Item]]:
        """Give the batches that the samples read so far are worth."""
        if self._waits and self._unmet():
            return []
        self._credit += self._earned
        batches = []
        while self._credit >= self._price:
            self._credit -= self._price
            batches.append(self._next_batch())
        return batches

    def _next_batch(self) -> list[Item]:
        """Take every class's quota out of its ring, and put the batch in keyed order."""
        batch: list[Item] = []
        if self._eras[-1].batches >= ERA_BATCHES:
            self._begin_era()
        for label, quota in self._eras[-1].next_quotas().items():
            tally, ring = self._by_class[label], self._rings[label]
            for _ in range(quota):
                item, is_first = ring.take()
                tally.delivered += is_first
                tally.copies += not is_first
                batch.append(item)
        self._twins += len(batch) - len({item.key for item in batch})
        for place in range(len(batch) - 1, 0, -1):
            other = self._words.below(place + 1)
            batch[place], batch[other] = batch[other], batch[place]
        return batch

    def _unmet(self) -> list[str]:
        """Give the wanted classes that have not appeared."""
        return [label for label, ring in self._rings.items() if not len(ring)]

    def _words_of_pass(self, *, taken: int = 0) -> KeyedWords:
        """Give the choices of this pass."""
        return KeyedWords(stream_key(self.seed, "replay order", self.passes), taken=taken)

    def _num_buffered(self) -> int:
        """Count the held samples that have not gone on."""
        return sum(ring.num_waiting for ring in self._rings.values())

    def _wanted_share(self, label: str) -> float:
        """Give the target share."""
        return float(self._shares[label])

    def _class_stats(self, label: str) -> dict[str, Any]:
        """Give what is held of a class, and what all batches so far promised it."""
        ring = self._rings.get(label)
        promised = sum(era.ideal[label] * era.batches for era in self._eras if label in era.ideal)
        return {
            "held": len(ring) if ring is not None else 0,
            "held_bytes": ring.size if ring is not None else 0,
            "promised": float(promised),
        }

    def _own_stats(self) -> dict[str, Any]:
        """Give the batches, who is missing, and how often a sample was in a batch again."""
        return {
            "batches": sum(era.batches for era in self._eras),
            "eras": [era.state() for era in self._eras],
            "unmet": self._unmet(),
            "twins": self._twins,
        }

    def _own_state(self, save: Callable[[Item], Any]) -> dict[str, Any]:
        """Give the rings, the batches given, and what is short of the next one."""
        return {
            "rings": {label: ring.state(save) for label, ring in self._rings.items()},
            "eras": [era.state() for era in self._eras],
            "credit": self._credit,
            "twins": self._twins,
            "taken": self._words.taken,
        }

    def _load_own(self, state: Mapping[str, Any], restore: Callable[[Any], Item]) -> None:
        """Hold again what was held, and go on with the next batch."""
        held = self._tallies.held
        for label, ring in self._rings.items():
            ring.load(state["rings"][label], restore)
            held.items += len(ring)
            held.size += ring.size
        self._eras = [
            self._era_of([str(label) for label in era["classes"]], batches=int(era["batches"]))
            for era in state["eras"]
        ]
        self._credit, self._twins = int(state["credit"]), int(state["twins"])
        self._words = self._words_of_pass(taken=int(state["taken"]))
