"""Weights for a loss from a plan: what `class_weights` asks for, and when it is too much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.section import ClassWeights
from streaming_balance.plan.weights import is_reversed, loss_shares, weigh_classes

# Shares of the loss are said for so many classes; a thousand would hide the sentence.
CLASSES_SAID = 20


def expected_draws(plan: BalancedPlan, epoch: int | None = None) -> dict[Any, float]:
    """Give how often an epoch of a plan draws each class, on average.

    Args:
        plan: the plan.
        epoch: at least 0; None: of a schedule, once it has settled.

    Returns:
        label -> draws of the epoch, in class order; a fraction where epochs take turns.

    Examples:
        >>> labels = ["LGG"] * 75 + ["HGG"] * 210
        >>> expected_draws(BalancedPlan.from_labels(labels, global_batch_size=8))
        {'HGG': 144.0, 'LGG': 144.0}
    """
    place = plan.strategy.settled_epoch if epoch is None else epoch
    last = plan.num_steps(place) - 1
    draws = last * plan.global_batch_size + plan.batch_size(place, last)
    return {label: share * draws for label, share in plan.shares_in(place).items()}


def plan_loss_weights(
    plan: BalancedPlan,
    settings: ClassWeights,
    *,
    is_ordered: bool = False,
    epoch: int | None = None,
) -> dict[Any, float]:
    """Give the loss weights that a `class_weights` section asks for under a plan.

    Args:
        plan: the plan that the training follows.
        settings: the section; all weights are 1 where it is not enabled.
        is_ordered: whether somebody declared the class order, so that a list of manual weights is
            plain.
        epoch: whose draws `basis: sampled` counts; None: of a schedule, once it has settled.

    Returns:
        label -> weight, in class order; 0 for a class without samples, or never drawn under
        `basis: sampled`.

    Raises:
        ConfigError: manual weights that do not fit the plan's classes.

    Examples:
        Balanced sampling leaves nothing to correct:

        >>> labels = ["LGG"] * 75 + ["HGG"] * 210
        >>> plan = BalancedPlan.from_labels(labels, global_batch_size=8)
        >>> plan_loss_weights(plan, ClassWeights(enabled=True, basis="sampled"))
        {'HGG': 1.0, 'LGG': 1.0}
    """
    if not settings.enabled:
        return dict.fromkeys(plan.classes, 1.0)
    sizes = expected_draws(plan, epoch) if settings.basis == "sampled" else dict(plan.sizes)
    try:
        return weigh_classes(
            settings.method,
            sizes,
            beta=settings.beta,
            manual_weights=settings.manual_weights,
            normalize=settings.normalize,
            is_ordered=is_ordered,
        )
    except ConfigError as error:
        raise ConfigError(f"class_weights: {error}") from error


def double_correction(plan: BalancedPlan, weights: dict[Any, float]) -> str | None:
    """Say when sampling and loss weights together favour a class over a more common one.

    Either alone evens the classes out; both turn the imbalance round.

    Args:
        plan: the plan that the training follows.
        weights: label -> weight in the loss.

    Returns:
        A sentence with the effective share of the loss per class, or None.

    Examples:
        >>> labels = ["LGG"] * 75 + ["HGG"] * 210
        >>> plan = BalancedPlan.from_labels(labels, global_batch_size=8)
        >>> weights = plan_loss_weights(plan, ClassWeights(enabled=True))
        >>> print(double_correction(plan, weights))
        class_weights come on top of class_balanced sampling: the loss gets 0.263 from HGG, 0.737
            from LGG, so that a rarer class outweighs a more common one. Set class_weights.basis:
            sampled to weigh what is delivered, or enable one of the two.
    """
    # Of samples with several labels the shares sum to more than 1, and the sizes to more than N.
    shares, natural = _summing_to_one(plan.shares), _summing_to_one(plan.sizes)
    is_resampled = any(abs(shares[label] - natural[label]) > 1e-9 for label in natural)
    if not is_resampled or not sum(shares[label] * weights[label] for label in shares):
        return None
    effective = loss_shares(shares, weights)
    if not is_reversed(plan.sizes, effective):
        return None
    said = [f"{share:.3f} from {label}" for label, share in effective.items()][:CLASSES_SAID]
    more = ", ..." if len(effective) > CLASSES_SAID else ""
    return (
        f"class_weights come on top of {plan.strategy.name} sampling: the loss gets "
        f"{', '.join(said)}{more}, so that a rarer class outweighs a more common one. "
        f"Set class_weights.basis: sampled to weigh what is delivered, or enable one of the two."
    )


def _summing_to_one(amounts: Mapping[Any, float]) -> dict[Any, float]:
    """Divide amounts by their sum."""
    total = sum(amounts.values())
    return {label: amount / total for label, amount in amounts.items()}
