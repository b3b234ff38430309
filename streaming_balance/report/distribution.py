"""Pictures of what a plan delivers: class counts, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from streaming_balance.plan.epoch import BalancedPlan

# Told apart by people who do not see red and green alike (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
INCHES_WIDE, INCHES_PER_PANEL, DOTS_PER_INCH = 9.0, 1.9, 100


def batch_class_counts(
    plan: BalancedPlan, labels: NDArray[np.int64], *, num_classes: int, num_batches: int
) -> NDArray[np.int64]:
    """Count the classes in the first global batches of a plan, over as many epochs as it takes.

    Args:
        plan: the plan.
        labels: `(N,)` class number of every sample the plan is over.
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
        [np.bincount(labels[plan.batch(*place)], minlength=num_classes) for place in places],
        dtype=np.int64,
    )


def draw_class_counts(
    panels: Mapping[str, NDArray[np.int64]], classes: Sequence[str], path: Path
) -> None:
    """Draw class counts per batch as stacked bars, one panel above the other.

    Args:
        panels: title -> `(T, K)` counts per batch and class.
        classes: the K labels in class order.
        path: PNG file to write.
    """
    size = (INCHES_WIDE, INCHES_PER_PANEL * len(panels) + 0.6)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (title, counts) in zip(axes, panels.items(), strict=True):
        batches = np.arange(len(counts))
        floor = np.zeros(len(counts))
        for number, label in enumerate(classes):
            colour = COLOURS[number % len(COLOURS)]
            panel.bar(batches, counts[:, number], 0.85, bottom=floor, color=colour, label=label)
            floor += counts[:, number]
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_ylabel("samples")
        panel.set_xlim(-0.6, len(counts) - 0.4)
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("global batch")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Software": None})
