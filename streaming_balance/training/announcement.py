"""What a training loader says when it starts: strategies in force, classes before and after."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from streaming_balance.config import BalanceSettings
from streaming_balance.plan.distribution import distribution_sentence
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.loss_weights import (
    double_correction,
    expected_draws,
    plan_loss_weights,
)
from streaming_balance.training.pairing import Mixing

logger = logging.getLogger(__name__)

CLASSES_SAID = 20


def announcement(
    plan: BalancedPlan, settings: BalanceSettings, *, num_ranks: int, classes_declared: bool
) -> list[tuple[int, str]]:
    """Say the active strategies, the class distribution before and after, and what to look at.

    Args:
        plan: the plan that the loader follows.
        settings: what the user asked for.
        num_ranks: data-parallel ranks.
        classes_declared: whether somebody declared the class order.

    Returns:
        Level of `logging` and sentence, in the order to log them.

    Raises:
        ConfigError: `class_weights` does not fit the classes.

    Examples:
        >>> from streaming_balance.config import read_settings
        >>> labels = ["LGG"] * 75 + ["HGG"] * 210
        >>> settings = read_settings({"weighted_sampler": {"enabled": True}})
        >>> plan = BalancedPlan.from_labels(labels, global_batch_size=8, balance=settings.strategy)
        >>> for _, said in announcement(plan, settings, num_ranks=1, classes_declared=False):
        ...     print(said)
        balancing with class_balanced (weighted_sampler); seed 0
        classes before: HGG: 210 samples (73.7%), LGG: 75 samples (26.3%); largest to smallest 2.800
        classes after: HGG: 144 draws (50.0%), LGG: 144 draws (50.0%); largest to smallest 1.000
    """
    name, (sampling, *others) = plan.strategy.name, settings.active
    strategy = name if sampling == name else f"{name} ({sampling})"
    return [
        (logging.INFO, f"balancing with {', '.join([strategy, *others])}; seed {plan.seed}"),
        *_about_classes(plan),
        *_about_weights(plan, settings, classes_declared=classes_declared),
        *((logging.WARNING, warning) for warning in plan.warnings),
        *_about_ranks(plan, num_ranks),
    ]


def announce(messages: list[tuple[int, str]]) -> None:
    """Log what `announcement` gave."""
    for level, said in messages:
        logger.log(level, "%s", said)


def about_mixing(mixing: Mixing | None) -> list[tuple[int, str]]:
    """Say how batches are mixed, if they are.

    Returns:
        Level of `logging` and sentence.

    Examples:
        >>> about_mixing(Mixing(name="mixup", alpha=0.4))
        [(20, 'mixing with mixup: alpha 0.4, probability 1.0')]
    """
    if mixing is None:
        return []
    said = f"alpha {mixing.alpha}, probability {mixing.probability}"
    return [(logging.INFO, f"mixing with {mixing.name}: {said}")]


def _about_classes(plan: BalancedPlan) -> Iterator[tuple[int, str]]:
    """Say the class distribution before and after; of a schedule, where it starts and ends."""
    # Samples with several labels, or none: percentages are of the samples, not of the labels.
    is_multi_label = abs(sum(plan.shares.values()) - 1) > 1e-9
    total = plan.num_samples if is_multi_label else None
    said = distribution_sentence(plan.sizes, noun=f"{plan.unit}s", total=total)
    yield logging.INFO, f"classes before: {said}"
    for epoch in dict.fromkeys((0, plan.strategy.settled_epoch)):
        when = f" in epoch {epoch}" if plan.strategy.settled_epoch else ""
        draws = expected_draws(plan, epoch)
        last = plan.num_steps(epoch) - 1
        total = last * plan.global_batch_size + plan.batch_size(epoch, last)
        said = distribution_sentence(draws, noun="draws", total=total)
        yield logging.INFO, f"classes after{when}: {said}"


def _about_weights(
    plan: BalancedPlan, settings: BalanceSettings, *, classes_declared: bool
) -> Iterator[tuple[int, str]]:
    """Say the weights of the loss, which no loader applies, and where they are too much."""
    if not settings.class_weights.enabled:
        return
    weights = plan_loss_weights(plan, settings.class_weights, is_ordered=classes_declared)
    said = [f"{label}: {weight:.4f}" for label, weight in weights.items()]
    more = ", ..." if len(said) > CLASSES_SAID else ""
    yield logging.INFO, f"class weights for the loss: {', '.join(said[:CLASSES_SAID])}{more}"
    warning = double_correction(plan, weights)
    if warning is not None:
        yield logging.WARNING, warning


def _about_ranks(plan: BalancedPlan, num_ranks: int) -> Iterator[tuple[int, str]]:
    """Say that ranks get different numbers of samples."""
    fewest, rest = divmod(plan.global_batch_size, num_ranks)
    if rest:
        yield (
            logging.WARNING,
            f"{num_ranks} ranks do not divide a global batch of {plan.global_batch_size}: ranks "
            f"get {fewest} or {fewest + 1} samples. Multiply the rank's mean loss by "
            f"batch['loss_scale'], or use global_batch_size={(fewest + 1) * num_ranks}.",
        )
