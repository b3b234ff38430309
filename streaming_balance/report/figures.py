"""Figures of a plan: class sizes before and after, batches, and how often patients are seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.labels import complete_array
from streaming_balance.plan.options import whole_number
from streaming_balance.report.panels import (
    PANELS_IN_A_ROW,
    draw_batches,
    draw_grid,
    draw_pairs,
)
from streaming_balance.report.picture_counts import LabelledSamples, labelled_samples
from streaming_balance.report.style import new_figure, own_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES_WIDE = 10.5
# Per class in the first two pictures, per row of panels in the third, and around each.
INCHES_PER_PAIR, INCHES_PER_ROW, INCHES_PER_PANEL, INCHES_AROUND = 0.42, 0.3, 1.45, 0.9
LEAST_INCHES = 1.0
TITLE_SIZE = 11

BATCHES_DRAWN = 40
# More classes than this make a picture nobody reads: the commonest and the rarest are drawn.
MOST_CLASSES = 40


def draw_class_distribution(
    plan: BalancedPlan,
    labels: ArrayLike,
    *,
    classes: Sequence[Any] | None = None,
    epoch: int = 0,
) -> Figure:
    """Draw how many samples of each class there are, and how many an epoch delivers.

    Args:
        plan: the plan.
        labels: as given to the plan; or, where `classes` names the classes, `(N,)` class numbers
            or names, or `(N, K)` with 1 where a sample has a class.
        classes: `(K,)` names in class order; found in the labels if None.
        epoch: the epoch to draw, at least 0.

    Returns:
        The figure, to be changed or saved with `save_figure`; it is not registered with pyplot.

    Raises:
        ConfigError: the labels do not fit the plan.

    Examples:
        >>> labels = ["LGG"] * 75 + ["HGG"] * 210
        >>> plan = BalancedPlan.from_labels(labels, global_batch_size=8)
        >>> figure = draw_class_distribution(plan, labels)
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['HGG', 'LGG']
    """
    samples = labelled_samples(plan, labels, classes)
    shown = _shown(samples)
    with own_style():
        figure = new_figure(INCHES_WIDE, _pairs_height(shown))
        draw_pairs(figure, plan, samples, shown, epoch=epoch)
    return figure


def draw_batch_counts(
    plan: BalancedPlan,
    labels: ArrayLike,
    *,
    classes: Sequence[Any] | None = None,
    epoch: int = 0,
    num_batches: int = BATCHES_DRAWN,
) -> Figure:
    """Draw how many samples of each class every batch holds: plain shuffling, and the plan.

    Args:
        plan: the plan.
        labels: as in `draw_class_distribution`.
        classes: as in `draw_class_distribution`.
        epoch: the epoch whose first batches are drawn, at least 0.
        num_batches: how many batches, at least 1; fewer where the epoch has fewer.

    Returns:
        The figure, as in `draw_class_distribution`.

    Raises:
        ConfigError: the labels do not fit the plan, or `num_batches` is below 1.
    """
    number = whole_number(num_batches)
    if number is None or number < 1:
        raise ConfigError(f"num_batches is {num_batches!r}; it must be an integer of at least 1.")
    samples = labelled_samples(plan, labels, classes)
    shown = _shown(samples)
    with own_style():
        figure = new_figure(INCHES_WIDE, _rows_height(shown))
        draw_batches(figure, plan, samples, shown, epoch=epoch, num_batches=number)
    return figure


def draw_exposure(
    plan: BalancedPlan,
    labels: ArrayLike,
    *,
    classes: Sequence[Any] | None = None,
    patients: ArrayLike | None = None,
    epochs: int = 1,
) -> Figure:
    """Draw for each class how many of its patients are seen how often.

    Where the plan promises fair exposure, a line shows what independent draws with the same shares
    (such as torch's `WeightedRandomSampler` makes) would give on average.

    Args:
        plan: the plan.
        labels: as in `draw_class_distribution`.
        classes: as in `draw_class_distribution`.
        patients: `(N,)` patient of every sample; None counts samples instead.
        epochs: how many epochs to count, at least 1.

    Returns:
        The figure, as in `draw_class_distribution`.

    Raises:
        ConfigError: labels or patients do not fit the plan, or `epochs` is below 1.
    """
    samples = labelled_samples(plan, labels, classes)
    shown = _shown(samples)
    with own_style():
        figure = new_figure(INCHES_WIDE, _grid_height(shown))
        draw_grid(
            figure,
            plan,
            samples,
            shown,
            owners=_owners(patients, plan),
            epochs=_checked_epochs(epochs),
        )
    return figure


def draw_plan(
    plan: BalancedPlan,
    labels: ArrayLike,
    *,
    classes: Sequence[Any] | None = None,
    patients: ArrayLike | None = None,
    epochs: int = 1,
) -> Figure:
    """Draw the three pictures of a plan, one below the other.

    Args:
        plan: the plan.
        labels: as in `draw_class_distribution`.
        classes: as in `draw_class_distribution`.
        patients: as in `draw_exposure`.
        epochs: how many epochs exposure is counted over, at least 1; the other two pictures show
            the last of them, which differs from the first only under a schedule.

    Returns:
        The figure, as in `draw_class_distribution`.

    Raises:
        ConfigError: labels or patients do not fit the plan, or `epochs` is below 1.
    """
    samples = labelled_samples(plan, labels, classes)
    shown, last = _shown(samples), _checked_epochs(epochs) - 1
    owners = _owners(patients, plan)
    heights = [_pairs_height(shown), _rows_height(shown), _grid_height(shown)]
    with own_style():
        figure = new_figure(INCHES_WIDE, sum(heights) + LEAST_INCHES / 3)
        figure.suptitle(
            f"{plan.strategy.name}: global batches of {plan.global_batch_size:,}, seed {plan.seed}",
            fontsize=TITLE_SIZE,
        )
        pairs, rows, grid = figure.subfigures(3, 1, squeeze=False, height_ratios=heights)[:, 0]
        draw_pairs(pairs, plan, samples, shown, epoch=last)
        draw_batches(rows, plan, samples, shown, epoch=last, num_batches=BATCHES_DRAWN)
        draw_grid(grid, plan, samples, shown, owners=owners, epochs=last + 1)
    return figure


def _shown(samples: LabelledSamples) -> list[int]:
    """Choose the classes to draw, the commonest first."""
    sizes = samples.weigh(np.ones(len(samples.labels), dtype=np.int64))
    order: list[int] = np.argsort(-sizes, kind="stable").tolist()
    half = MOST_CLASSES // 2
    return order if len(order) <= MOST_CLASSES else order[:half] + order[-half:]


def _pairs_height(shown: Sequence[int]) -> float:
    """Give inches for the class distribution."""
    return max(LEAST_INCHES, INCHES_PER_PAIR * len(shown)) + INCHES_AROUND


def _rows_height(shown: Sequence[int]) -> float:
    """Give inches for the rows of batches."""
    return max(LEAST_INCHES, INCHES_PER_ROW * len(shown)) + INCHES_AROUND


def _grid_height(shown: Sequence[int]) -> float:
    """Give inches for the panels of exposure."""
    return INCHES_PER_PANEL * -(-len(shown) // PANELS_IN_A_ROW) + INCHES_AROUND


def _owners(patients: ArrayLike | None, plan: BalancedPlan) -> NDArray[np.intp] | None:
    """Number the patients, where they are named: `(N,)`."""
    if patients is None:
        return None
    names = complete_array("patients", patients)
    if names.shape != (plan.num_samples,):
        raise ConfigError(
            f"patients have shape {names.shape} for a plan over {plan.num_samples} samples; give "
            f"one per sample."
        )
    return np.unique(names, return_inverse=True)[1]


def _checked_epochs(epochs: int) -> int:
    """Give `epochs` as a plain integer of at least 1."""
    number = whole_number(epochs)
    if number is None or number < 1:
        raise ConfigError(f"epochs is {epochs!r}; it must be an integer of at least 1.")
    return number
