"""What the options of `streaming-balance resample` ask for, and which of them go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from streaming_balance.errors import ConfigError

if TYPE_CHECKING:
    from streaming_balance.stream.pipeline import Stream

UNIFORM, COUNT = "uniform", "count"
STAGES = ("accept", "repeat", "reservoir")
# Options that mean something to some stages only.
_STAGES_OF = {
    "frequencies": ("accept", "repeat"),
    "size": ("reservoir",),
    "ratio": ("reservoir",),
    "shuffle": ("accept", "repeat"),
}
_WORTH_RECORDING = {
    "accept": ("frequencies", "window"),
    "repeat": ("frequencies", "window", "buffer_bytes"),
    "reservoir": ("size", "ratio"),
}

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What is to become of the classes.

    Raises:
        ConfigError: an option is missing, or means nothing to this stage.
    """

    stage: str
    """`accept`, `repeat` or `reservoir`."""
    target: Mapping[str, float] | str | None = None
    """Label -> share; `uniform`: all alike, whatever their names."""
    frequencies: Mapping[str, float] | str | None = None
    """Label -> count or share; `count`: from a pass over the labels; None: counted on the way."""
    size: int | Mapping[str, int] | None = None
    """Samples the reservoir keeps: of every class, or by label; of all with a target."""
    ratio: float | None = None
    """Smallest class : largest class the reservoir gives."""
    shuffle: bool = False
    """Whether shards and samples are shuffled before the choice."""
    window: int
    """Samples between two looks at estimated frequencies."""
    buffer_bytes: int
    """Most bytes that repeat, and shuffle, hold."""
    unknown: str = "error"
    """What becomes of classes that the target lacks: `error` or `drop`."""

    def __post_init__(self) -> None:
        """Check what goes together."""
        for option, stages in _STAGES_OF.items():
            if getattr(self, option) not in (None, False) and self.stage not in stages:
                raise ConfigError(
                    f"--{option} goes with {' and '.join(f'--{name}' for name in stages)}, not "
                    f"with --{self.stage}; leave it out."
                )
        if self.stage == "reservoir" and self.size is None:
            raise ConfigError("--reservoir keeps --size samples of every class; give it.")
        if self.stage != "reservoir" and self.target is None:
            raise ConfigError(
                f"--{self.stage} needs --target: the shares of the classes, such as LGG=1,HGG=1, "
                f"or uniform."
            )

    @property
    def needs_counts(self) -> bool:
        """Whether the classes must be counted before anything is chosen."""
        named = isinstance(self.frequencies, Mapping)
        return self.frequencies == COUNT or (self.target == UNIFORM and not named)

    def with_counts(self, counts: Mapping[str, float]) -> Wishes:
        """Put in names and frequencies of the classes.

        Args:
            counts: label -> samples.

        Returns:
            The same wishes by name. Counts that were needed for names are used as frequencies, too.
        """
        declared = self.frequencies if isinstance(self.frequencies, Mapping) else counts
        target = dict.fromkeys(declared, 1.0) if self.target == UNIFORM else self.target
        if self.stage == "reservoir":
            return replace(self, target=target)
        if isinstance(target, Mapping) and self.unknown == "drop":
            declared = {name: count for name, count in declared.items() if name in target}
        return replace(self, target=target, frequencies=declared)

    @property
    def record(self) -> dict[str, Any]:
        """The same for `resample.json`; what means nothing to this stage is left out."""
        names = ["stage", "target", "unknown", *_WORTH_RECORDING[self.stage], "shuffle"]
        if self.shuffle and "buffer_bytes" not in names:
            names.append("buffer_bytes")
        return {name: getattr(self, name) for name in names}

    def chain(self, stream: Stream) -> Stream:
        """Add the stages to a stream; names of classes must be put in."""
        target, frequencies = self.target, self.frequencies
        assert not isinstance(target, str)
        assert not isinstance(frequencies, str)
        if self.shuffle:
            stream = stream.shuffle(self.buffer_bytes)
        if self.stage == "reservoir":
            assert self.size is not None
            return stream.reservoir(
                self.size, target=target, ratio=self.ratio, unknown=self.unknown
            )
        assert target is not None
        if self.stage == "accept":
            return stream.accept(
                target, frequencies=frequencies, window=self.window, unknown=self.unknown
            )
        return stream.repeat(
            target,
            frequencies=frequencies,
            window=self.window,
            buffer_bytes=self.buffer_bytes,
            unknown=self.unknown,
        )


def one_stage(**asked: bool) -> str:
    """Give the one stage that was asked for.

    Raises:
        ConfigError: none, or several.

    Examples:
        >>> one_stage(accept=False, repeat=True, reservoir=False)
        'repeat'
    """
    chosen = [name for name, is_asked in asked.items() if is_asked]
    if len(chosen) != 1:
        given = " and ".join(f"--{name}" for name in chosen) or "none"
        raise ConfigError(f"give one of --accept, --repeat and --reservoir, not {given}.")
    return chosen[0]


def read_shares(option: str, text: str | None, word: str) -> dict[str, float] | str | None:
    """Read `CLASS=NUMBER,...`, or the one word that stands for it.

    Raises:
        ConfigError: neither.

    Examples:
        >>> read_shares("--target", "LGG=1,HGG=0.5", "uniform")
        {'LGG': 1.0, 'HGG': 0.5}
    """
    if text is None or text.strip() == word:
        return None if text is None else word
    return _read_by_class(option, text, float, f"LGG=1,HGG=2, or {word}")


def read_size(text: str | None) -> int | dict[str, int] | None:
    """Read a whole number, or one by class.

    Raises:
        ConfigError: neither.

    Examples:
        >>> read_size("100"), read_size("LGG=100,HGG=50")
        (100, {'LGG': 100, 'HGG': 50})
    """
    if text is None:
        return None
    if text.strip().isascii() and text.strip().isdigit():
        return int(text)
    return _read_by_class("--size", text, int, "100, or LGG=100,HGG=50")


def _read_by_class(
    option: str, text: str, number: Callable[[str], Number], allowed: str
) -> dict[str, Number]:
    """Read `CLASS=NUMBER,...`; a class may itself hold `=`."""
    values: dict[str, Number] = {}
    for part in text.split(","):
        name, equals, written = part.strip().rpartition("=")
        try:
            value = number(written)
        except ValueError:
            equals = ""
            value = number("0")
        if not equals or not name or not math.isfinite(value) or value < 0:
            raise ConfigError(f"{option} has {part.strip()!r}; write {allowed}.")
        if name in values:
            raise ConfigError(f"{option} names {name!r} twice; name it once.")
        values[name] = value
    return values
