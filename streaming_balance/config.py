"""Balancing options from a user's YAML file, and every other way to say `balance=`.

Only two places of a file are read, `data.balancing` and `compute.seed`; the rest is the user's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import TypeAlias

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import Balance
from streaming_balance.plan.keys import check_seed
from streaming_balance.plan.section import (
    YAML_ENDINGS,
    Balancing,
    ClassWeights,
    parse_balance,
    parse_balancing,
)
from streaming_balance.plan.strategy import Strategy
from streaming_balance.safe_yaml import read_yaml_file

logger = logging.getLogger(__name__)

# From this likeness on a key may be meant for another: the bound of `did_you_mean`.
LIKENESS = 0.6
# Each of these, beside or inside `data`, means samples that must be judged as they come.
VALIDATION_NAMES = frozenset({"val", "valid", "validation", "eval", "evaluation", "test"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What a configuration file says about balancing."""

    path: Path
    """The file it was read from."""
    seed: int | None
    """`compute.seed`, in [0, 2**64 - 1]; None when the file has none."""
    balancing: Balancing | None
    """`data.balancing`; None when the file has no such section."""
    lookalike: str | None = None
    """Another key that may be meant for `data.balancing`, such as `balancing` at top level."""


def load_config(path: str | Path) -> Config:
    """Read `data.balancing` and `compute.seed` of a YAML file.

    Args:
        path: a YAML file of at most 1 MiB. Everything but these two places is left alone.

    Returns:
        The checked settings; defaults for every key that is not there.

    Raises:
        ConfigError: the file is missing or no safe YAML, a key inside `data.balancing` is unknown,
            a value is out of range, or validation data is given a balancing section.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "brats.yaml"
        >>> _ = file.write_text("data: {balancing: {upsampling: {enabled: true}}}")
        >>> load_config(file).balancing.upsampling
        Resampling(enabled=True, target_ratio=1.0)
    """
    place = Path(path)
    document = read_yaml_file(place)
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigError(
            f"{place} holds {document!r:.60}; a configuration is a mapping of sections, "
            f"with the balancing options under data.balancing."
        )
    try:
        return _read_config(document, place)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


# Every way to say `balance=`.
BalanceSetting: TypeAlias = Balance | Path | Config | Balancing


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceSettings:
    """What any way to say `balance=` comes to."""

    strategy: Strategy
    """How samples are drawn."""
    seed: int | None
    """`compute.seed`, when a file gave one."""
    class_weights: ClassWeights
    """Weights for the loss; not enabled unless a `data.balancing` section enables them."""
    active: tuple[str, ...]
    """What is in force, in words for a log."""


def resolve_balance(balance: object) -> tuple[Strategy, int | None]:
    """Turn any way to say `balance=` into a strategy and the seed that came with it.

    Args:
        balance: a strategy's name; a mapping with `name` and the strategy's options; another
            mapping, taken for a `data.balancing` section; the path of a YAML file; a `Config`, or
            its `balancing`; a strategy value; or None for natural order.

    Returns:
        The strategy, and `compute.seed` when a file gave one, else None.

    Raises:
        ConfigError: none of these, or the settings are wrong.

    Examples:
        >>> resolve_balance("class_balanced")[0].name
        'class_balanced'
        >>> resolve_balance({"downsampling": {"enabled": True}})[0].name
        'downsample'
    """
    settings = read_settings(balance)
    return settings.strategy, settings.seed


def read_settings(balance: object) -> BalanceSettings:
    """Read any way to say `balance=`, the weights of the loss included.

    Args:
        balance: as in `resolve_balance`.

    Raises:
        ConfigError: none of these, or the settings are wrong.

    Examples:
        >>> read_settings({"class_weights": {"enabled": True}}).active
        ('no sampling', 'class_weights (inverse_frequency, basis natural)')
    """
    seed = None
    if isinstance(balance, Path) or _names_a_file(balance):
        balance = load_config(str(balance))
    if isinstance(balance, Config):
        _warn_of_no_balance(balance)
        seed, balance = balance.seed, balance.balancing or Balancing()
    if isinstance(balance, Mapping) and "name" not in balance:
        balance = parse_balancing(balance, setting="balance")
    if isinstance(balance, Balancing):
        return BalanceSettings(
            strategy=balance.to_strategy(),
            seed=seed,
            class_weights=balance.class_weights,
            active=balance.active,
        )
    if balance is None or isinstance(balance, str | Mapping | Strategy):
        strategy = parse_balance(balance)
        return BalanceSettings(
            strategy=strategy, seed=None, class_weights=ClassWeights(), active=(strategy.name,)
        )
    raise ConfigError(
        f"balance is {balance!r}; it must be a strategy's name, a mapping with a name, a "
        f"data.balancing section, the path of a YAML file, or None."
    )


def _read_config(document: Mapping[object, object], place: Path) -> Config:
    """Pick the two places that concern balancing out of a whole configuration."""
    data, compute = document.get("data"), document.get("compute")
    _refuse_balanced_validation(document, prefix="")
    _refuse_balanced_validation(data, prefix="data.")
    section = data.get("balancing") if isinstance(data, dict) else None
    seed = compute.get("seed") if isinstance(compute, dict) else None
    return Config(
        path=place,
        seed=None if seed is None else check_seed(seed, setting="compute.seed"),
        balancing=None if section is None else parse_balancing(section),
        lookalike=_lookalike(document),
    )


def _lookalike(document: Mapping[object, object]) -> str | None:
    """Find the key, at top level or one below, that may be a misplaced `data.balancing`."""
    likeness = {}
    for name, content in document.items():
        likeness[str(name)] = _likeness(name)
        for key in content if isinstance(content, dict) else ():
            # Another key of `data`, or a `balancing` under another section.
            if (name == "data") != (key == "balancing"):
                likeness[f"{name}.{key}"] = _likeness(key)
    found = max(likeness, key=likeness.__getitem__, default=None)
    return found if found is not None and likeness[found] >= LIKENESS else None


def _likeness(key: object) -> float:
    """Say how much a key looks like `balancing`, from 0 to 1."""
    return SequenceMatcher(None, str(key).lower(), "balancing").ratio()


def _warn_of_no_balance(config: Config) -> None:
    """Say that a file somebody gave in order to balance asks for nothing."""
    if config.balancing is not None and config.balancing.is_idle:
        logger.warning(
            "%s enables nothing in data.balancing: samples come in their natural order. Enable a "
            "section there, or leave the file out.",
            config.path,
        )
    elif config.balancing is None:
        found = config.lookalike
        hint = f" It has {found}: put its options under data.balancing." if found else ""
        logger.warning(
            "%s has no data.balancing.%s Samples come in their natural order.",
            config.path,
            hint,
        )


def _refuse_balanced_validation(section: object, *, prefix: str) -> None:
    """Refuse a section `balancing` under a name that means validation."""
    for name, content in section.items() if isinstance(section, dict) else ():
        is_validation = str(name).lower() in VALIDATION_NAMES
        if is_validation and isinstance(content, dict) and "balancing" in content:
            raise ConfigError(
                f"{prefix}{name}.balancing asks to balance validation data, which is never done: a "
                f"score on a balanced set says nothing about patients as they come. Remove that "
                f"section; data.balancing concerns training alone."
            )


def _names_a_file(balance: object) -> bool:
    """Tell a path from a strategy's name by its ending."""
    return isinstance(balance, str) and balance.lower().endswith(YAML_ENDINGS)
