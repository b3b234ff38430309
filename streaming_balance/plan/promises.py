"""What a plan promises, and what a user should know before training on it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from streaming_balance.errors import ConfigError
from streaming_balance.plan.members import ClassTable
from streaming_balance.plan.options import listed
from streaming_balance.plan.strategies import Downsample, Upsample
from streaming_balance.plan.strategy import Strategy
from streaming_balance.plan.unit_strategies import ClassesBySamples


def guarantees(strategy: Strategy, table: ClassTable) -> dict[str, bool]:
    """Say which promises a strategy keeps on these classes.

    Args:
        strategy: how samples are drawn.
        table: who belongs to which class.

    Returns:
        Promise -> whether it is kept.
    """
    in_turn = strategy.name == "p_k"
    exact = strategy.draw == "quota" and not strategy.draws_units and not in_turn
    fair = (exact or in_turn) and (table.by_patient or table.one_sample_each)
    return {
        "exact_quotas": exact,
        "fair_exposure": fair,
        "no_twin_in_a_batch": fair,
        "elastic": True,
        "resumable": True,
        "auditable": True,
    }


def warnings(
    strategy: Strategy,
    table: ClassTable,
    shares: Mapping[str, float],
    *,
    global_batch_size: int,
) -> tuple[str, ...]:
    """Say what works as asked and is probably not meant.

    Args:
        strategy: how samples are drawn.
        table: who belongs to which class.
        shares: label -> target share, of a schedule once it has settled.
        global_batch_size: samples in a global batch.

    Returns:
        One sentence per finding, with the numbers behind it.

    Raises:
        ConfigError: a target ratio is reached already, under `on_exceeded: error`.

    Examples:
        >>> from streaming_balance.plan.members import sized_table
        >>> from streaming_balance.plan.strategies import ClassBalanced
        >>> for line in warnings(ClassBalanced(), sized_table({"HGG": 210, "LGG": 1}),
        ...     {"HGG": 0.5, "LGG": 0.5}, global_batch_size=8):
        ...     print(line)
        class 'LGG' has 1, fewer than the 4 that a batch of 8 asks for: the same ones come up to 4
            times in one batch.
    """
    found = []
    if table.membership is None and not strategy.draws_units:
        found += _about_batches(strategy, table.sizes, shares, global_batch_size)
    settled = strategy.settled
    if isinstance(settled, Upsample | Downsample):
        exceeded = _exceeded(settled, table.sizes)
        if exceeded and strategy.on_exceeded == "error":
            raise ConfigError(f"{exceeded[0]} Lower target_ratio, or set on_exceeded: warn.")
        found += exceeded
    return tuple(found)


def _about_batches(
    strategy: Strategy,
    sizes: Mapping[str, int],
    shares: Mapping[str, float],
    global_batch_size: int,
) -> list[str]:
    """Say where classes and batches hardly go together."""
    found = []
    drawn = [label for label, share in shares.items() if share]
    if len(drawn) == 1:
        found.append(f"there is one class only, {drawn[0]!r}: balancing changes nothing.")
    in_turn = isinstance(strategy, ClassesBySamples)
    if len(drawn) > global_batch_size and not in_turn:
        found.append(
            f"a batch of {global_batch_size} cannot hold all {len(drawn)} classes: each appears in "
            f"some batches only. Use global_batch_size >= {len(drawn)} to see every class in each."
        )
    for label in drawn if len(drawn) > 1 else []:
        # Rounding must not ask for one more than the share does.
        asked = math.ceil(shares[label] * global_batch_size - 1e-9)
        if isinstance(strategy, ClassesBySamples):
            asked = int(strategy.M or 0)
        if 0 < sizes[label] < asked:
            times = -(-asked // sizes[label])
            found.append(
                f"class {label!r} has {sizes[label]}, fewer than the {asked} that a batch of "
                f"{global_batch_size} asks for: the same ones come up to {times} times in one "
                f"batch."
            )
    return found


def _exceeded(strategy: Upsample | Downsample, sizes: Mapping[str, int]) -> list[str]:
    """Say that a target ratio is reached already, so that nothing is resampled."""
    present = {label: size for label, size in sizes.items() if size}
    if len(present) < 2 or strategy.resampled(sizes) != present:
        return []
    natural = min(present.values()) / max(present.values())
    return [
        f"{strategy.name}: target_ratio is {strategy.target_ratio:g}, but smallest to largest is "
        f"{natural:.3f} already among {listed(present)}: nothing is resampled."
    ]
