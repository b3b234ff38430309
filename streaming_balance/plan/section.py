"""The section `data.balancing` of a configuration, checked, and the strategy it asks for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.plan.frozen import frozen
from streaming_balance.plan.options import check_number, listed, named_numbers
from streaming_balance.plan.strategies import parse_strategy
from streaming_balance.plan.strategy import Strategy
from streaming_balance.plan.weights import check_beta

logger = logging.getLogger(__name__)

YAML_ENDINGS = (".yaml", ".yml")
METHODS = ("inverse_frequency", "effective_num", "manual")
BASES = ("natural", "sampled")

# By label, or in class order.
ManualWeights = Mapping[str, float] | tuple[float, ...]
Section = TypeVar("Section")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedSampler:
    """`weighted_sampler`: shares that follow from a weight per sample."""

    enabled: bool = False
    """Whether this section decides the sampling."""
    method: str = "inverse_frequency"
    """`inverse_frequency` (equal shares), `effective_num` or `manual`."""
    beta: float = 0.999
    """Overlap of samples for `effective_num`, in [0, 1)."""
    manual_weights: ManualWeights | None = None
    """Weight per sample for `manual`."""
    replacement: bool = True
    """False: balanced without repeating anybody within an epoch."""
    num_samples: int | None = None
    """Draws per epoch over all ranks, at least 1; None: as many as there are samples."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _check_flags(self, "enabled", "replacement")
        _check_weighting(self)
        length = self.num_samples
        if length is not None and (
            isinstance(length, bool) or not isinstance(length, int) or length < 1
        ):
            raise ConfigError(f"num_samples is {length!r}; use null or an integer of at least 1.")

    def settings(self) -> dict[str, Any]:
        """Say this section as settings of the strategy that gives the same shares, exactly."""
        by_method: dict[str, dict[str, Any]] = {
            "inverse_frequency": {"name": "class_balanced"},
            "effective_num": {"name": "effective_number", "beta": self.beta},
            "manual": {"name": "manual_weights", "weights": self.manual_weights},
        }
        length = {} if self.num_samples is None else {"num_samples": self.num_samples}
        return by_method[self.method] | {"replacement": self.replacement} | length


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampling:
    """`downsampling` and `upsampling`: class sizes brought to a ratio."""

    enabled: bool = False
    """Whether this section decides the sampling."""
    target_ratio: float = 1.0
    """Wanted minority : majority, in (0, 1]."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _check_flags(self, "enabled")
        check_number(self.target_ratio, setting="target_ratio", least=0, most=1, open_below=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassWeights:
    """`class_weights`: weights for a loss, beside any sampling."""

    enabled: bool = False
    """Whether the loss is weighted."""
    method: str = "inverse_frequency"
    """`inverse_frequency`, `effective_num` or `manual`."""
    beta: float = 0.999
    """Overlap of samples for `effective_num`, in [0, 1)."""
    manual_weights: ManualWeights | None = None
    """Weight per class for `manual`."""
    normalize: bool = True
    """Scale the weights to sum to the number of present classes."""
    basis: str = "natural"
    """What is counted: `natural`, the samples there are, or `sampled`, what the plan delivers."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _check_flags(self, "enabled", "normalize")
        _check_weighting(self)
        if self.basis not in BASES:
            hint = did_you_mean(str(self.basis), BASES)
            raise ConfigError(f"basis is {self.basis!r}; allowed: {listed(BASES)}.{hint}")
        if self.basis == "sampled" and self.method == "manual":
            raise ConfigError(
                "basis is 'sampled', but method: manual takes the weights as they are written; "
                "leave basis out, or use method: inverse_frequency."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Balancing:
    """A whole `data.balancing` section."""

    weighted_sampler: WeightedSampler = field(default_factory=WeightedSampler)
    """Weights per sample; wins over the two below."""
    downsampling: Resampling = field(default_factory=Resampling)
    """Thin large classes; wins over `upsampling`."""
    upsampling: Resampling = field(default_factory=Resampling)
    """Repeat small classes."""
    class_weights: ClassWeights = field(default_factory=ClassWeights)
    """Weights for the loss; go with any sampling."""
    strategy: Mapping[str, Any] | str | None = None
    """Any strategy, by name or with its options; wins over the sections above."""
    strict: bool = False
    """Refuse two samplings at once instead of warning."""

    def __post_init__(self) -> None:
        """Refuse what could not become a strategy."""
        _check_flags(self, "strict")
        if self.strategy is not None:
            try:
                parse_strategy(self.strategy)
            except ConfigError as error:
                raise ConfigError(f"strategy: {error}") from error
            object.__setattr__(self, "strategy", frozen(self.strategy))

    @property
    def is_idle(self) -> bool:
        """Whether nothing is enabled: samples come as they are, and the loss has no weights."""
        return not self.class_weights.enabled and not dict(self._samplings())

    @property
    def active(self) -> tuple[str, ...]:
        """What is in force, in words: the sampling that decides, and the weights of the loss.

        Examples:
            >>> parse_balancing({"upsampling": {"enabled": True},
            ...     "class_weights": {"enabled": True}}).active
            ('upsampling', 'class_weights (inverse_frequency, basis natural)')
        """
        sampling = next(iter(dict(self._samplings())), "no sampling")
        weights = self.class_weights
        if not weights.enabled:
            return (sampling,)
        return sampling, f"class_weights ({weights.method}, basis {weights.basis})"

    def to_strategy(self) -> Strategy:
        """Give the strategy these settings ask for; nothing enabled means natural order.

        Raises:
            ConfigError: two samplings are enabled under `strict: true`, or the strategy's own
                options are wrong.

        Examples:
            >>> Balancing(upsampling=Resampling(enabled=True)).to_strategy().name
            'upsample'
        """
        asked = dict(self._samplings())
        if len(asked) > 1:
            self._say_which_wins(list(asked))
        return parse_strategy(next(iter(asked.values()), None))

    def _samplings(self) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
        """Every sampling asked for, as settings of a strategy, the winner first."""
        if self.strategy is not None:
            yield "strategy", self.strategy
        if self.weighted_sampler.enabled:
            yield "weighted_sampler", self.weighted_sampler.settings()
        for section, name in (("downsampling", "downsample"), ("upsampling", "upsample")):
            resampling: Resampling = getattr(self, section)
            if resampling.enabled:
                yield section, {"name": name, "target_ratio": resampling.target_ratio}

    def _say_which_wins(self, asked: list[str]) -> None:
        """Warn, or refuse under `strict`, when several samplings are asked for."""
        if self.strict:
            raise ConfigError(
                f"data.balancing enables {' and '.join(asked)} under strict: true; one sampling "
                f"decides. Enable one of them."
            )
        logger.warning(
            "data.balancing enables %s; %s decides, the others are ignored. Enable one of them.",
            " and ".join(asked),
            asked[0],
        )


def parse_balancing(section: object, *, setting: str = "data.balancing") -> Balancing:
    """Check a `data.balancing` section and fill in its defaults.

    Args:
        section: the mapping under `data.balancing`; None is an empty one.
        setting: how to call it in messages.

    Raises:
        ConfigError: an unknown key, a wrong type, or a value out of range.

    Examples:
        >>> parse_balancing({"weighted_sampler": {"enabled": True}}).weighted_sampler.method
        'inverse_frequency'
    """
    kinds: dict[str, type] = {
        "weighted_sampler": WeightedSampler,
        "downsampling": Resampling,
        "upsampling": Resampling,
        "class_weights": ClassWeights,
    }
    given = _checked_keys(section, Balancing, setting)
    parts: dict[str, Any] = {
        name: _build(kind, given.pop(name), f"{setting}.{name}")
        for name, kind in kinds.items()
        if name in given
    }
    return _build(Balancing, given | parts, setting)


def parse_balance(balance: str | Mapping[str, Any] | Strategy | None) -> Strategy:
    """Give the strategy meant by `balance=`.

    Args:
        balance: a strategy's name; a mapping with `name` and options; another mapping, taken for a
            `data.balancing` section; a strategy value; None for the natural order.

    Raises:
        ConfigError: none of these, or the settings are wrong.

    Examples:
        >>> parse_balance({"downsampling": {"enabled": True}}).name
        'downsample'
    """
    if isinstance(balance, Mapping) and "name" not in balance:
        return parse_balancing(balance, setting="balance").to_strategy()
    if isinstance(balance, str) and balance.lower().endswith(YAML_ENDINGS):
        raise ConfigError(
            f"balance is {balance!r}, a file, and a plan reads none. Give train_loader the path, "
            f"or a plan the strategy in it: load_config({balance!r}).balancing.to_strategy()."
        )
    return parse_strategy(balance)


def _build(kind: type[Section], section: object, setting: str) -> Section:
    """Build a section from a mapping; messages name the section."""
    values = _checked_keys(section, kind, setting)
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{setting}.{error}") from error


def _checked_keys(section: object, kind: type, setting: str) -> dict[str, Any]:
    """Give a section's entries once every key is one that `kind` has."""
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{setting} is {section!r}; it must be a mapping.")
    known = [entry.name for entry in fields(kind)]
    if "strata" in section:
        raise ConfigError(
            f"{setting} has no key 'strata'; joint balancing is an option of a strategy: write "
            f"strategy: {{name: class_balanced, strata: {section['strata']!r}}}."
        )
    for key in section:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ConfigError(f"{setting} has no key {key!r}; it has {', '.join(known)}.{hint}")
    return dict(section)


def _check_flags(section: object, *names: str) -> None:
    """Refuse anything but true and false."""
    for name in names:
        value = getattr(section, name)
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}; use true or false.")


def _check_weighting(section: WeightedSampler | ClassWeights) -> None:
    """Check what sampling weights and loss weights share, and freeze the manual ones."""
    if section.method not in METHODS:
        hint = did_you_mean(str(section.method), METHODS)
        raise ConfigError(f"method is {section.method!r}; allowed: {listed(METHODS)}.{hint}")
    check_beta(section.beta)
    if section.manual_weights is None:
        if section.enabled and section.method == "manual":
            raise ConfigError(
                "manual_weights is null, but method: manual needs them, such as {LGG: 2.8, HGG: 1}."
            )
        return
    if not isinstance(section.manual_weights, Mapping | list | tuple):
        raise ConfigError(
            f"manual_weights is {section.manual_weights!r}; use a mapping such as "
            f"{{LGG: 2.8, HGG: 1}}, or a list in class order."
        )
    frozen = named_numbers("manual_weights", section.manual_weights, zero=False)
    object.__setattr__(section, "manual_weights", frozen)
