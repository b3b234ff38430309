"""Pictures of what a plan delivers: class counts, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.report.style import (
    COLOURS,
    HATCHES,
    check_picture_path,
    new_figure,
    own_style,
    save_figure,
    tick_whole_numbers,
)
from streaming_balance.storage.labelling import count_carriers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

INCHES_WIDE, INCHES_PER_PANEL, INCHES_PER_LABEL, INCHES_AROUND = 9.0, 2.1, 0.19, 0.7
BAR_WIDTH = 0.86
# This many bars and more are drawn without gaps: the gaps would swallow them.
MANY_BATCHES = 100


def batch_class_counts(
    plan: BalancedPlan, labels: NDArray[Any], *, num_classes: int, num_batches: int
) -> NDArray[np.int64]:
    """Count the classes in the first global batches of a plan, over as many epochs as it takes.

    Args:
        plan: the plan.
        labels: `(N,)` class number of every sample the plan is over, or `(N, K)` of 0 and 1.
        num_classes: classes of the data set, K; a class a batch lacks counts 0 there.
        num_batches: how many global batches, T.

    Returns:
        `(T, K)` counts.

    Examples:
        >>> labels = np.array([0, 0, 0, 0, 0, 1])
        >>> plan = BalancedPlan.from_labels(labels, global_batch_size=2)
        >>> batch_class_counts(plan, labels, num_classes=2, num_batches=3).tolist()
        [[1, 1], [1, 1], [1, 1]]
    """
    steps = plan.num_steps(0)
    places = [divmod(number, steps) for number in range(num_batches)]
    return np.array(
        [count_carriers(labels[plan.batch(*place)], num_classes) for place in places],
        dtype=np.int64,
    )


def draw_class_counts(
    panels: Mapping[str, NDArray[np.int64]], classes: Sequence[str], path: Path
) -> Figure:
    """Draw class counts per batch as stacked bars, one panel above the other.

    The rarest class of the first panel stands at the bottom of every bar, where its counts can be
    compared from batch to batch. Equal counts give equal bytes, whatever the user's own matplotlib
    settings are.

    Args:
        panels: title -> `(T, K)` counts per batch and class.
        classes: the K labels in class order.
        path: file to write, PNG or SVG by its suffix.

    Returns:
        The figure, to be changed or saved elsewhere; it is not registered with pyplot.

    Raises:
        ConfigError: nothing to draw, counts that do not fit the classes, or another suffix.
    """
    _check_drawable(panels, classes, path)
    rarest_first = np.argsort(next(iter(panels.values())).sum(axis=0), kind="stable")
    with own_style():
        figure = new_figure(*_inches(len(panels), len(classes)))
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for panel, (title, counts) in zip(axes, panels.items(), strict=True):
            bars = _stack_bars(panel, counts, rarest_first)
            _caption(panel, title, counts, classes, rarest=int(rarest_first[0]))
        axes[-1].set_xlabel("global batch")
        _add_legend(figure, bars, [classes[number] for number in rarest_first])
    save_figure(figure, path)
    return figure


def _check_drawable(
    panels: Mapping[str, NDArray[np.int64]], classes: Sequence[str], path: Path
) -> None:
    """Refuse what would give an empty or a misleading picture."""
    check_picture_path(path)
    if not panels:
        raise ConfigError("there is no panel to draw; give at least one title with its counts.")
    for title, counts in panels.items():
        if counts.ndim != 2 or not len(counts) or counts.shape[1] != len(classes):
            raise ConfigError(
                f"the counts of {title!r} have shape {counts.shape}; give (batches, "
                f"{len(classes)}), one column for each of the {len(classes)} classes."
            )


def _inches(num_panels: int, num_classes: int) -> tuple[float, float]:
    """Give width and height: room for the panels, and for every label of the legend."""
    panels = INCHES_PER_PANEL * num_panels
    return INCHES_WIDE, max(panels, INCHES_PER_LABEL * num_classes) + INCHES_AROUND


def _stack_bars(
    panel: Axes, counts: NDArray[np.int64], order: NDArray[np.int64]
) -> list[Rectangle]:
    """Draw a bar per batch, class upon class, and give one bar of each class from the bottom."""
    batches = np.arange(len(counts))
    is_dense = len(counts) >= MANY_BATCHES
    floor = np.zeros(len(counts), dtype=np.int64)
    stacked = []
    for place, number in enumerate(order):
        bars = panel.bar(
            batches,
            counts[:, number],
            1.0 if is_dense else BAR_WIDTH,
            bottom=floor,
            color=COLOURS[place % len(COLOURS)],
            hatch=HATCHES[place // len(COLOURS) % len(HATCHES)],
            edgecolor="white",
            linewidth=0.0 if is_dense else 0.4,
        )
        stacked.append(bars.patches[0])
        floor = floor + counts[:, number]
    panel.set_xlim(-0.7, len(counts) - 0.3)
    panel.set_ylim(0, max(1, int(floor.max())))
    tick_whole_numbers(panel.xaxis, at_most=10)
    tick_whole_numbers(panel.yaxis, at_most=5)
    panel.set_ylabel("samples")
    panel.spines[["top", "right"]].set_visible(False)
    return stacked


def _caption(
    panel: Axes, title: str, counts: NDArray[np.int64], classes: Sequence[str], *, rarest: int
) -> None:
    """Name a panel on the left, and say on the right what its rarest class gets."""
    mine = counts[:, rarest]
    span = f"{mine.min()}" if mine.min() == mine.max() else f"{mine.min()} to {mine.max()}"
    panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
    said = f"{classes[rarest]}: {span} per batch"
    panel.set_title(said, loc="right", fontsize=10)


def _add_legend(figure: Figure, bars: Sequence[Rectangle], labels: Sequence[str]) -> None:
    """List the classes beside the panels, from the top of a bar to its bottom."""
    legend = figure.legend(
        bars[::-1],
        [str(number) for number in range(len(labels))],
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        labelspacing=0.3,
    )
    # Named afterwards: matplotlib drops labels such as "_other" from legends.
    for text, label in zip(legend.get_texts(), labels[::-1], strict=True):
        text.set_text(label)
