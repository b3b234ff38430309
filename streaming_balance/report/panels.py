"""The panels that figures of a plan are put together from.

Every class has a row or a panel of its own with its name beside it, so that two classes and twenty
can be read alike and no colour has to be looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.report.picture_counts import (
    LabelledSamples,
    exposure_histogram,
    planned_batches,
    shuffled_batches,
    times_in_epoch,
    times_seen,
)
from streaming_balance.report.style import AFTER, BEFORE, EXPECTED, GUIDE, tick_whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

PANELS_IN_A_ROW = 4
SMALL, NORMAL = 8, 9
MOST_BARS = 30
LONGEST_NAME = 26


def draw_pairs(
    canvas: FigureBase,
    plan: BalancedPlan,
    samples: LabelledSamples,
    shown: Sequence[int],
    *,
    epoch: int,
) -> None:
    """Draw a pair of bars per class: in the data set, and delivered."""
    axes = canvas.subplots()
    places = np.arange(len(shown))
    delivered = times_in_epoch(plan, epoch=epoch)
    for kind, colour, offset, times in (
        ("in the data set", BEFORE, -0.2, np.ones_like(delivered)),
        (f"delivered in {_named(epoch)}", AFTER, 0.2, delivered),
    ):
        counts = samples.weigh(times)[shown]
        bars = axes.barh(places + offset, counts, 0.38, color=colour, label=kind)
        total = int(times.sum())
        said = [f"{count:,} ({count / total:.1%})" for count in counts.tolist()]
        axes.bar_label(bars, said, padding=3, fontsize=SMALL)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_yticks(places, [_class_name(samples, number) for number in shown])
    tick_whole_numbers(axes.xaxis, at_most=8)
    axes.set_xlabel("samples", fontsize=NORMAL)
    _plain(axes)
    _head(canvas, f"Samples of each class{_left_out(samples, shown)}", axes)


def draw_batches(
    canvas: FigureBase,
    plan: BalancedPlan,
    samples: LabelledSamples,
    shown: Sequence[int],
    *,
    epoch: int,
    num_batches: int,
) -> None:
    """Draw a row of bars per class, a bar per batch: shuffled on the left, planned on the right."""
    planned = planned_batches(plan, samples, epoch=epoch, num_batches=num_batches)
    shuffled = shuffled_batches(plan, samples, num_batches=len(planned))
    highest = np.maximum(1, np.maximum(planned.max(axis=0), shuffled.max(axis=0)))[shown]
    left, right = canvas.subplots(1, 2, sharey=True)
    for axes, counts, colour, title in (
        (left, shuffled[:, shown], BEFORE, "plain shuffling"),
        (right, planned[:, shown], AFTER, f"{plan.strategy.name}, {_named(epoch)}"),
    ):
        _draw_rows(axes, counts, highest, colour)
        axes.set_title(title, fontsize=NORMAL, loc="left")
        axes.set_xlabel("global batch", fontsize=NORMAL)
    left.set_ylim(len(shown), 0)
    names = [_class_name(samples, number) for number in shown]
    left.set_yticks(np.arange(len(shown)) + 0.6, names)
    title = "Samples of each class in every batch, from fewest to most"
    _head(canvas, title + _left_out(samples, shown))


def _draw_rows(
    axes: Axes, counts: NDArray[np.int64], highest: NDArray[np.int64], colour: str
) -> None:
    """Draw each class in its own row, as high as the row where a batch holds the most of it."""
    batches = np.arange(len(counts))
    for place, most in enumerate(highest.tolist()):
        mine = counts[:, place]
        axes.axhline(place + 1, color=GUIDE, linewidth=0.5)
        axes.bar(batches, -0.8 * mine / most, 0.8, bottom=place + 1, color=colour)
        axes.annotate(
            _span(int(mine.min()), int(mine.max())),
            (1.0, place + 0.6),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=SMALL,
        )
    axes.set_xlim(-0.7, len(counts) - 0.3)
    tick_whole_numbers(axes.xaxis, at_most=8)
    _plain(axes)


def draw_grid(
    canvas: FigureBase,
    plan: BalancedPlan,
    samples: LabelledSamples,
    shown: Sequence[int],
    *,
    owners: NDArray[np.intp] | None,
    epochs: int,
) -> None:
    """Draw a histogram per class."""
    exposure = plan.exposure(epochs, 0)
    counted = "samples" if owners is None else "patients"
    compare = plan.guarantees["fair_exposure"] and _is_even_within_classes(plan, samples)
    columns = min(PANELS_IN_A_ROW, len(shown))
    rows = -(-len(shown) // columns)
    panels = canvas.subplots(rows, columns, squeeze=False).ravel()
    for panel, number in zip(panels, shown, strict=False):
        times = times_seen(exposure, samples.having(number), owners)
        _draw_histogram(panel, times, total=int(exposure.sum()), compare=compare)
        said = f"{_counted(len(times), counted)}, {_times(times)}"
        panel.set_title(f"{_class_name(samples, number)}\n{said}", fontsize=SMALL, loc="left")
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    for panel in panels[::columns]:
        panel.set_ylabel(counted, fontsize=SMALL)
    for panel in panels[max(0, len(shown) - columns) : len(shown)]:
        panel.set_xlabel("times seen", fontsize=SMALL)
    over = "1 epoch" if epochs == 1 else f"{epochs:,} epochs"
    title = f"How often {counted} are seen in {over}{_left_out(samples, shown)}"
    _head(canvas, title, panels[0])


def _is_even_within_classes(plan: BalancedPlan, samples: LabelledSamples) -> bool:
    """Say whether quotas are the classes' own, so that all members of one have equal chances."""
    has_strata = any(len(cell) > 1 for cell in plan.strata_quotas(0, 0))
    by_class = samples.labels.ndim == 1 and set(map(str, plan.classes)) <= set(samples.classes)
    return by_class and not has_strata


def _draw_histogram(panel: Axes, times: NDArray[np.int64], *, total: int, compare: bool) -> None:
    """Draw how many of a class are seen how often."""
    if len(times):
        found = exposure_histogram(times, total=total, compare=compare, max_bars=MOST_BARS)
        panel.bar(found.centres, found.counted, 0.9 * found.width, color=AFTER, label="by the plan")
        if found.expected is not None:
            panel.plot(
                found.centres,
                found.expected,
                color=EXPECTED,
                linewidth=1.2,
                drawstyle="steps-mid",
                label="by independent draws, on average",
            )
        edge = 0.6 * found.width
        panel.set_xlim(found.centres[0] - edge, found.centres[-1] + edge)
    panel.set_ylim(bottom=0)
    tick_whole_numbers(panel.xaxis, at_most=5)
    tick_whole_numbers(panel.yaxis, at_most=3)
    _plain(panel)


def _head(canvas: FigureBase, title: str, axes: Axes | None = None) -> None:
    """Put a picture's title on the left above it, and the legend of its bars on the right."""
    canvas.suptitle(title, x=0.01, horizontalalignment="left", fontsize=NORMAL, fontweight="bold")
    if axes is None:
        return
    handles, names = axes.get_legend_handles_labels()
    canvas.legend(
        handles,
        names,
        loc="upper right",
        ncols=2,
        frameon=False,
        fontsize=SMALL,
        borderaxespad=0.3,
    )


def _plain(axes: Axes) -> None:
    """Leave out lines that say nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)


def _class_name(samples: LabelledSamples, number: int) -> str:
    """Give a class's name, the middle left out where it is long."""
    name = samples.classes[number]
    half = (LONGEST_NAME - 1) // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def _left_out(samples: LabelledSamples, shown: Sequence[int]) -> str:
    """Say which classes are drawn if not all are."""
    if len(shown) == len(samples.classes):
        return ""
    half = len(shown) // 2
    return f" (the {half} commonest and {half} rarest of {len(samples.classes):,} classes)"


def _named(epoch: int) -> str:
    """Name an epoch as people count them."""
    return "the first epoch" if epoch == 0 else f"epoch {epoch + 1:,}"


def _counted(number: int, name: str) -> str:
    """Write a count with its noun."""
    return f"{number:,} {name.removesuffix('s') if number == 1 else name}"


def _times(times: NDArray[np.int64]) -> str:
    """Say how often the members of a class are seen."""
    if not len(times):
        return "never"
    least, most = int(times.min()), int(times.max())
    # A dash, since this has to fit above a narrow panel.
    return f"{_span(least, most, dash='–')} {'time' if most == 1 else 'times'}"


def _span(least: int, most: int, *, dash: str = " to ") -> str:
    """Write a range of counts."""
    return f"{least:,}" if least == most else f"{least:,}{dash}{most:,}"
