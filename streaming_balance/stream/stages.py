"""What every stage of a stream is: frozen settings, and runs of them that can be saved anywhere.

A stage is a value; `begin` gives a run of it. A run is fed one sample at a time, says what goes on
at once, and gives the rest when the pass ends. It reads nothing and knows no clock, and every
choice it makes is keyed by seed, stage, class and pass. Every sample that it read was delivered,
rejected, or is buffered: the counts say which, at any time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from streaming_balance.errors import BalanceError, ConfigError, ResumeError, did_you_mean
from streaming_balance.plan.frozen import plain
from streaming_balance.plan.keys import check_seed
from streaming_balance.plan.options import listed, whole_number
from streaming_balance.stream.tallies import Tallies

STATE_VERSION = 1
# A held sample takes room beyond its bytes: its objects, names and place in the buffer. Counted
# in, a buffer of samples without a byte is bounded, too.
ITEM_BYTES = 1024
UNKNOWN_RULES = ("error", "drop")


class StreamItem(Protocol):
    """What a stage asks of a sample; what it holds is nobody's business here."""

    @property
    def key(self) -> str:
        """Name of the sample, its own in the whole stream."""

    @property
    def label(self) -> str | None:
        """Class of the sample; None where nobody looked."""

    @property
    def num_bytes(self) -> int:
        """Bytes of everything the sample holds."""


@dataclass(frozen=True, slots=True)
class BareItem:
    """A sample of which nothing but this is known: enough to try a stage out.

    Examples:
        >>> BareItem("P1", "LGG").num_bytes
        0
    """

    key: str
    """Name of the sample."""
    label: str | None
    """Its class."""
    num_bytes: int = 0
    """Bytes it would hold."""


Item = TypeVar("Item", bound=StreamItem)
Output = TypeVar("Output")


def held_bytes(item: StreamItem) -> int:
    """Give the bytes that a sample counts for while it is held: its own and `ITEM_BYTES`."""
    return item.num_bytes + ITEM_BYTES


def checked_bytes(stage: str, value: object, *, setting: str = "buffer_bytes") -> int:
    """Check a bound on memory: a whole number of bytes that holds at least one empty sample.

    Raises:
        ConfigError: not an integer, or too small for any sample.

    Examples:
        >>> checked_bytes("shuffle", 1 << 20)
        1048576
    """
    number = whole_number(value)
    if number is None or number <= ITEM_BYTES:
        raise ConfigError(
            f"{stage}: {setting} is {value!r}; it must be a number of bytes above {ITEM_BYTES}, "
            f"which every held sample takes beside its own."
        )
    return number


def checked_unknown(stage: str, unknown: object) -> None:
    """Refuse a rule for undeclared labels that does not exist.

    Raises:
        ConfigError: names the value and the rules there are.
    """
    if unknown not in UNKNOWN_RULES:
        hint = did_you_mean(str(unknown), UNKNOWN_RULES)
        raise ConfigError(
            f"{stage}: unknown is {unknown!r}; allowed: {listed(UNKNOWN_RULES)}.{hint}"
        )


class Stage(ABC):
    """Settings of a stage, a frozen value that cannot be wrong."""

    __slots__ = ()

    name: ClassVar[str]
    """What the stage is called in messages, states and random streams."""

    @abstractmethod
    def begin(self, *, seed: int = 0) -> StageRun[Any, Any]:
        """Give a fresh run.

        Args:
            seed: integer in [0, 2**64 - 1] that keys all choices. Two stages of one kind in one
                chain choose alike unless their seeds differ.
        """

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as plain values: a state goes on only under equal ones."""
        return plain_settings(self)


def plain_settings(stage: Stage) -> dict[str, Any]:
    """Give the fields of a stage as plain values."""
    # A dataclass by contract; the abstract base cannot say so.
    names = [field.name for field in fields(stage)]  # type: ignore[arg-type]
    return {name: plain(getattr(stage, name)) for name in names}


class StageRun(ABC, Generic[Item, Output]):
    """A stage at work on a stream, pass after pass. Not to be shared between threads.

    Args:
        stage: what is asked for.
        seed: keys all choices.
        labels: the declared classes; None where every label is welcome.
        unknown: what to do with other labels: `error` or `drop`.
    """

    def __init__(
        self, stage: Stage, *, seed: int, labels: Iterable[str] | None, unknown: str = "error"
    ) -> None:
        self.stage = stage
        """The settings of this run."""
        self.seed = check_seed(seed)
        """What keys the choices of this run."""
        self.passes = 0
        """Passes that ended."""
        self._tallies = Tallies(labels)
        self._by_class = self._tallies.by_class
        self._unknown = unknown

    @abstractmethod
    def feed(self, item: Item) -> list[Output]:
        """Take one sample in and give what goes on now, in order.

        Raises:
            ConfigError: the sample cannot be dealt with under these settings. It is not counted,
                and the run is as it was before.
        """

    @abstractmethod
    def finish(self) -> list[Output]:
        """End the pass and give what goes on with its end; feeding goes on with the next pass."""

    def over(self, items: Iterable[Item]) -> Iterator[Output]:
        """Give everything that goes on in one pass over `items`."""
        for item in items:
            yield from self.feed(item)
        yield from self.finish()

    def state_dict(self, save: Callable[[Item], Any]) -> dict[str, Any]:
        """Give everything needed to go on from here, as plain values.

        Args:
            save: turns a held sample into plain values from which it can be had again.

        Returns:
            A dict for `json.dumps`, provided that `save` gives something for it.
        """
        return {
            "version": STATE_VERSION,
            "stage": self.stage.name,
            "settings": self.stage.settings,
            "seed": self.seed,
            "passes": self.passes,
            "counts": self._tallies.state(),
            "run": self._own_state(save),
        }

    def load_state_dict(self, state: Mapping[str, Any], restore: Callable[[Any], Item]) -> None:
        """Go on where `state` was taken: all that follows is what would have followed there.

        Args:
            state: what `state_dict` gave, perhaps after a trip through JSON.
            restore: gives the sample that `save` described.

        Raises:
            ResumeError: the state is of another stage, seed or settings, or damaged. After damage
                was found, begin another run.
        """
        self._check_continues(state)
        try:
            self.passes = int(state["passes"])
            self._tallies.load(state["counts"])
            self._load_own(state["run"], restore)
        except BalanceError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ResumeError(
                f"{self.stage.name}: the state is damaged ({type(error).__name__}: {error}); it "
                f"must be what state_dict() gave. Use an earlier checkpoint."
            ) from error

    def stats(self) -> dict[str, Any]:
        """Give what was read, delivered, rejected and is buffered, over all passes.

        Returns:
            `read` = `delivered` + `rejected` + `buffered` samples; what went on is `delivered` +
            `copies`. `held` samples in memory, delivered ones that will go on again included, take
            `buffered_bytes`, and took at most `most_buffered_bytes`. `classes` maps each label to
            the same counts, `wanted_share` (None: none was asked for) and `realised_share` of all
            that went on, both in [0, 1].
        """
        held = self._tallies.held
        totals = self._tallies.totals()
        went_on = totals["delivered"] + totals["copies"]
        return {
            "stage": self.stage.name,
            "passes": self.passes,
            **totals,
            "buffered": self._num_buffered(),
            "held": held.items,
            "buffered_bytes": held.size,
            "most_buffered_bytes": held.most_size,
            "unknown": self._tallies.strangers,
            "unknown_labels": list(self._tallies.stranger_names),
            "classes": {
                label: {
                    "read": tally.read,
                    "delivered": tally.delivered,
                    "copies": tally.copies,
                    "rejected": tally.rejected,
                    "wanted_share": self._wanted_share(label),
                    "realised_share": (tally.delivered + tally.copies) / max(went_on, 1),
                    **self._class_stats(label),
                }
                for label, tally in self._by_class.items()
                if label is not None
            },
            **self._own_stats(),
        }

    def _num_buffered(self) -> int:
        """Count the held samples that have not gone on yet."""
        return self._tallies.held.items

    def _wanted_share(self, label: str) -> float | None:  # noqa: ARG002 - of no class by default
        """Give the share of a class that was asked for, None where none was."""
        return None

    def _class_stats(self, label: str) -> dict[str, Any]:  # noqa: ARG002 - nothing by default
        """Give what else there is to say about a class."""
        return {}

    def _own_stats(self) -> dict[str, Any]:
        """Give what else there is to say about the run."""
        return {}

    @abstractmethod
    def _own_state(self, save: Callable[[Item], Any]) -> dict[str, Any]:
        """Give what this kind of run needs to go on."""

    @abstractmethod
    def _load_own(self, state: Mapping[str, Any], restore: Callable[[Any], Item]) -> None:
        """Take over what `_own_state` gave; counts and passes are loaded already."""

    def _turn_away(self, item: StreamItem) -> None:
        """Count a sample of no declared class, or refuse it."""
        if self._unknown == "drop":
            self._tallies.count_stranger(item.label)
            return
        declared = [label for label in self._by_class if label is not None]
        if item.label is None:
            found, hint = "has no label", ""
        else:
            found = f"has the label {item.label!r}, which was not declared"
            hint = did_you_mean(item.label, declared)
        raise ConfigError(
            f"{self.stage.name}: sample {item.key!r} {found}. Classes: {listed(declared)}.{hint} "
            f"Declare the class, or set unknown='drop' (--unknown drop) to leave such samples "
            f"out and count them."
        )

    def _check_continues(self, state: object) -> None:
        """Refuse the state of another stage, version, seed or settings."""
        name = self.stage.name
        if not isinstance(state, Mapping):
            raise ResumeError(
                f"{name}: the state is a {type(state).__name__}; it must be what state_dict() gave."
            )
        if state.get("version") != STATE_VERSION:
            raise ResumeError(
                f"{name}: the state has version {state.get('version')!r}; this release reads "
                f"version {STATE_VERSION}. Continue with the release that wrote it."
            )
        mine = {"stage": name, "seed": self.seed, **self.stage.settings}
        settings = state.get("settings")
        theirs = {"stage": state.get("stage"), "seed": state.get("seed")}
        theirs |= dict(settings) if isinstance(settings, Mapping) else {}
        differences = [
            f"{field}: state has {theirs.get(field)!r}, run has {mine.get(field)!r}"
            for field in sorted({*mine, *theirs})
            if mine.get(field) != theirs.get(field)
        ]
        if differences:
            raise ResumeError(
                f"{name}: the state belongs to another run. {'; '.join(differences)}. Begin with "
                f"the settings of the state, or start a new run."
            )
