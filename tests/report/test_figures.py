"""Figures of a plan: numbers counted by hand, layout measured, colours told apart."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.report.figures import (
    draw_batch_counts,
    draw_class_distribution,
    draw_exposure,
    draw_plan,
)
from streaming_balance.report.style import AFTER, BEFORE, COLOURS, EXPECTED, save_figure

BRATS = ["LGG"] * 75 + ["HGG"] * 210
FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia"),
    *("Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening"),
    *("Hernia", "No Finding", "Calcification of the Aorta", "Pneumomediastinum", "Tortuous Aorta"),
    *("Subcutaneous Emphysema", "Support Devices of Any Kind, Lines and Tubes"),
)


def brats_plan(**options: Any) -> BalancedPlan:
    return BalancedPlan.from_labels(BRATS, global_batch_size=8, seed=42, **options)


def long_tail(num_classes: int) -> list[str]:
    """A label list of 3,000 samples of the commonest class and few of the rarest."""
    sizes = (3000 * 0.75 ** np.arange(num_classes)).astype(int) + 1
    names = [FINDINGS[place % 20] + "+" * (place // 20) for place in range(num_classes)]
    return [name for name, size in zip(names, sizes, strict=True) for _ in range(size)]


def rendered(figure: Figure) -> Any:
    """Draw the figure and give the renderer that texts are measured with."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def visible_texts(figure: Figure) -> list[Text]:
    hidden = {text for axes in figure.axes for text in _undrawn_ticks(axes)}
    return [
        text
        for text in figure.findobj(Text)
        if isinstance(text, Text)
        and text.get_visible()
        and text.get_text().strip()
        and text not in hidden
    ]


def _undrawn_ticks(axes: Axes) -> Iterator[Text]:
    """Labels that matplotlib keeps but does not draw: beyond the limits, or of hidden panels."""
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        for tick in axis.majorTicks:
            if not (axes.axison and min(limits) <= tick.get_loc() <= max(limits)):
                yield tick.label1


def boxes(figure: Figure) -> list[tuple[str, Any]]:
    renderer = rendered(figure)
    return [(text.get_text(), text.get_window_extent(renderer)) for text in visible_texts(figure)]


def test_the_distribution_shows_what_there_is_and_what_the_first_epoch_delivers() -> None:
    figure = draw_class_distribution(brats_plan(), BRATS)
    axes = figure.axes[0]
    before, after = ([bar.get_width() for bar in bars] for bars in axes.containers)
    # 285 patients fill 36 batches of 8: 288 draws, half of them for each class.
    assert before == [210, 75]
    assert after == [144, 144]
    said = [text.get_text() for text in axes.texts]
    assert said == ["210 (73.7%)", "75 (26.3%)", "144 (50.0%)", "144 (50.0%)"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["HGG", "LGG"]


def test_the_distribution_of_a_later_epoch_counts_that_epoch_alone() -> None:
    plan = BalancedPlan.from_labels([0] * 5 + [1] * 4, global_batch_size=3, balance="power")
    drawn = []
    for epoch in range(6):
        bars = draw_class_distribution(plan, [0] * 5 + [1] * 4, epoch=epoch).axes[0].containers[1]
        drawn.append([bar.get_width() for bar in bars])
    counted = []
    for epoch in range(6):
        members = [plan.batch(epoch, step) for step in range(plan.num_steps(epoch))]
        counts = Counter((np.concatenate(members) >= 5).tolist())
        counted.append([counts[False], counts[True]])
    assert drawn == counted
    assert len({tuple(counts) for counts in counted}) > 1


def row_counts(figure: Figure, panel: int, most: list[int]) -> NDArray[np.int64]:
    """Read the class counts per batch back from the heights of the bars: `(T, K)`."""
    bars = [[bar.get_height() for bar in row] for row in figure.axes[panel].containers]
    return np.rint(np.abs(np.array(bars).T) / 0.8 * most).astype(np.int64)


def test_batches_are_drawn_as_planned_beside_those_of_plain_shuffling() -> None:
    plan = brats_plan()
    figure = draw_batch_counts(plan, BRATS)
    codes = np.array([1] * 75 + [0] * 210)
    planned = [np.bincount(codes[plan.batch(0, step)], minlength=2) for step in range(36)]
    left, right = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert right == ["4", "4"]
    spans = [[int(number) for number in span.split(" to ")] for span in left]
    most = [max(4, span[-1]) for span in spans]
    assert np.array_equal(row_counts(figure, 1, most), planned)
    shuffled = row_counts(figure, 0, most)
    # 35 full batches use 280 of 285 patients once; the 36th begins another pass.
    assert shuffled.sum(axis=1).tolist() == [8] * 36
    assert 205 <= shuffled[:35, 0].sum() <= 210
    assert 70 <= shuffled[:35, 1].sum() <= 75
    assert [[column.min(), column.max()] for column in shuffled.T] == spans
    assert spans[1][0] < 2 < 3 < spans[1][1]


def test_batches_that_differ_are_drawn_in_their_order_and_from_their_epoch() -> None:
    labels = [0] * 30 + [1] * 20 + [2] * 10
    plan = BalancedPlan.from_labels(labels, global_batch_size=7, seed=1)
    for epoch in (0, 3):
        figure = draw_batch_counts(plan, labels, epoch=epoch)
        spans = [text.get_text() for axes in figure.axes for text in axes.texts]
        highest = [int(span.split(" to ")[-1]) for span in spans]
        most = [max(pair) for pair in zip(highest[:3], highest[3:], strict=True)]
        planned = [plan.quotas(epoch, step).tolist() for step in range(plan.num_steps(epoch))]
        assert row_counts(figure, 1, most).tolist() == planned


def test_a_pass_of_plain_shuffling_shows_every_sample_once() -> None:
    labels = list(range(20))
    plan = BalancedPlan.from_labels(labels, global_batch_size=4, balance=None)
    figure = draw_batch_counts(plan, labels, num_batches=5)
    assert row_counts(figure, 0, [1] * 20).sum(axis=0).tolist() == [1] * 20
    other = BalancedPlan.from_labels(labels, global_batch_size=4, balance=None, seed=1)
    first, second = (
        row_counts(draw_batch_counts(made, labels), 0, [1] * 20) for made in (plan, other)
    )
    assert not np.array_equal(first, second)


def test_a_batch_larger_than_the_data_set_is_shuffled_in_whole_passes() -> None:
    labels = ["a"] * 3 + ["b"]
    plan = BalancedPlan.from_labels(labels, global_batch_size=10)
    figure = draw_batch_counts(plan, labels)
    assert [text.get_text() for text in figure.axes[0].texts] == ["3", "1"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["5", "5"]


def test_bars_of_exposure_count_patients_by_times_seen() -> None:
    plan = brats_plan()
    figure = draw_exposure(plan, BRATS, epochs=2)
    times = np.concatenate([plan.batch(epoch, step) for epoch in range(2) for step in range(36)])
    seen = np.bincount(times, minlength=285)
    for axes, members in zip(figure.axes, (seen[75:], seen[:75]), strict=True):
        drawn = {
            round(bar.get_x() + bar.get_width() / 2): bar.get_height()
            for bar in axes.containers[0]
            if bar.get_height()
        }
        assert drawn == Counter(members.tolist())
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["HGG\n210 samples, 1–2 times", "LGG\n75 samples, 3–4 times"]


def test_the_line_of_independent_draws_is_the_binomial_distribution() -> None:
    stats = pytest.importorskip("scipy.stats")
    figure = draw_exposure(brats_plan(), BRATS, epochs=2)
    for axes, size in zip(figure.axes, (210, 75), strict=True):
        (line,) = axes.lines
        times, expected = (np.asarray(values, dtype=np.float64) for values in line.get_data())
        # Of 576 draws each class gets half, each of its members alike.
        wanted = size * stats.binom.pmf(times, 576, 0.5 / size)
        assert np.allclose(expected, wanted, rtol=1e-9)
        assert expected.sum() > 0.99 * size


def test_long_runs_are_drawn_in_bars_of_several_times() -> None:
    labels = ["rare"] * 3 + ["common"] * 997
    plan = BalancedPlan.from_labels(labels, global_batch_size=10)
    figure = draw_exposure(plan, labels, epochs=20)
    axes = figure.axes[1]
    assert axes.get_title("left") == "rare\n3 samples, 3,333–3,334 times"
    bars = list(axes.containers[0])
    assert len(bars) <= 30
    (tall,) = [bar for bar in bars if bar.get_height()]
    assert tall.get_height() == 3
    assert tall.get_x() < 3333
    assert tall.get_x() + tall.get_width() > 3334
    assert np.sum(axes.lines[0].get_ydata()) == pytest.approx(3, rel=0.01)


def test_exposure_is_counted_by_patient_where_patients_are_named() -> None:
    labels = ["a"] * 6 + ["b"] * 3
    patients = ["P1", "P1", "P1", "P2", "P2", "P3", "P4", "P5", "P6"]
    plan = BalancedPlan.from_labels(labels, patients=patients, global_batch_size=6)
    figure = draw_exposure(plan, labels, patients=patients, epochs=3)
    # 6 patients fill one batch of 6 an epoch: each is seen once an epoch.
    assert [axes.get_title("left") for axes in figure.axes] == [
        "a\n3 patients, 3 times",
        "b\n3 patients, 3 times",
    ]
    assert figure.axes[0].get_ylabel() == "patients"


@pytest.mark.parametrize(
    ("balance", "strata"),
    [
        ({"name": "class_balanced", "draw": "iid"}, None),
        ({"name": "class_balanced", "strata_shares": "uniform"}, ["x"] * 5 + ["y"] * 7),
    ],
    ids=["drawn independently", "strata"],
)
def test_no_line_is_drawn_where_the_plan_or_chances_within_a_class_are_others(
    balance: dict[str, Any], strata: list[str] | None
) -> None:
    labels = ["a"] * 6 + ["b"] * 6
    plan = BalancedPlan.from_labels(labels, global_batch_size=4, balance=balance, strata=strata)
    assert not draw_exposure(plan, labels).axes[0].lines
    plain = BalancedPlan.from_labels(labels, global_batch_size=4)
    assert draw_exposure(plain, labels).axes[0].lines


def test_samples_with_several_findings_count_for_each_of_them() -> None:
    findings = [["Mass"], ["Mass", "Hernia"], ["Hernia"], ["Mass"]]
    matrix = np.array([[0, 1], [1, 1], [1, 0], [0, 1]])
    plan = BalancedPlan.from_labels(findings, global_batch_size=2, balance=None)
    for labels, classes in ((findings, None), (matrix, ["Hernia", "Mass"])):
        axes = draw_class_distribution(plan, labels, classes=classes).axes[0]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["Mass", "Hernia"]
        assert [bar.get_width() for bar in axes.containers[0]] == [3, 2]
        assert [bar.get_width() for bar in axes.containers[1]] == [3, 2]
        # Parts of the 4 samples, not of their 5 findings.
        assert [text.get_text() for text in axes.texts[:2]] == ["3 (75.0%)", "2 (50.0%)"]
        exposure = draw_exposure(plan, labels, classes=classes)
        assert exposure.axes[0].get_title("left") == "Mass\n3 samples, 1 time"
        assert not exposure.axes[0].lines


def test_a_class_without_samples_keeps_its_row() -> None:
    labels = np.array([0] * 6 + [2] * 2)
    plan = BalancedPlan.from_labels(labels, global_batch_size=4)
    figure = draw_plan(plan, labels, classes=["HGG", "none yet", "LGG"])
    pairs = figure.axes[0]
    assert [text.get_text() for text in pairs.get_yticklabels()] == ["HGG", "LGG", "none yet"]
    assert [bar.get_width() for bar in pairs.containers[1]] == [4, 4, 0]
    assert figure.axes[5].get_title("left") == "none yet\n0 samples, never"


def test_all_pictures_of_a_plan_stand_in_one_figure_under_its_strategy() -> None:
    figure = draw_plan(brats_plan(), BRATS, epochs=10)
    assert figure.get_suptitle() == "class_balanced: global batches of 8, seed 42"
    pairs, _, right, _, low_grade = figure.axes
    legend = figure.subfigs[0].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        "in the data set",
        "delivered in epoch 10",
    ]
    assert [bar.get_width() for bar in pairs.containers[1]] == [144, 144]
    assert right.get_title("left") == "class_balanced, epoch 10"
    assert low_grade.get_title("left") == "LGG\n75 samples, 19–20 times"


def test_of_very_many_classes_the_commonest_and_the_rarest_are_drawn_and_the_title_says_so() -> (
    None
):
    labels = long_tail(41)
    plan = BalancedPlan.from_labels(labels, global_batch_size=64)
    figure = draw_class_distribution(plan, labels)
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(names) == 40
    assert names[0] == "Atelectasis"
    assert "(the 20 commonest and 20 rarest of 41 classes)" in figure.get_suptitle()


@pytest.mark.parametrize("num_classes", [1, 2, 3, 7, 20])
def test_no_text_covers_another_or_leaves_the_page(num_classes: int) -> None:
    labels = long_tail(num_classes)
    plan = BalancedPlan.from_labels(labels, global_batch_size=32, seed=3)
    figure = draw_plan(plan, labels, epochs=300)
    texts = boxes(figure)
    assert len(texts) > 5 * num_classes
    page = figure.bbox
    for said, box in texts:
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, said
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, said
    for (one, first), (other, second) in itertools.combinations(texts, 2):
        assert not first.overlaps(second), f"{one!r} covers {other!r}"


@pytest.mark.parametrize("num_classes", [2, 20])
def test_panels_are_large_enough_to_be_read_and_cover_no_other(num_classes: int) -> None:
    labels = long_tail(num_classes)
    plan = BalancedPlan.from_labels(labels, global_batch_size=32)
    figure = draw_plan(plan, labels)
    rendered(figure)
    panels = [axes.get_window_extent() for axes in figure.axes]
    for panel in panels:
        assert panel.width / figure.dpi > 1.2
        assert panel.height / figure.dpi > 0.5
    for first, second in itertools.combinations(panels, 2):
        assert not first.overlaps(second)
    # A row of batches is higher than the letters of its class's name.
    assert panels[1].height / num_classes > 0.15 * figure.dpi


def test_every_class_is_named_at_its_own_row_even_with_a_name_of_any_length() -> None:
    labels = long_tail(20)
    plan = BalancedPlan.from_labels(labels, global_batch_size=32)
    figure = draw_plan(plan, labels)
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names[:19] == list(FINDINGS[:19])
    assert names[19] == "Support Devi…es and Tubes"


def test_labels_that_matplotlib_would_hide_or_read_as_formulas_are_shown_as_they_are() -> None:
    labels = ["_hidden"] * 3 + ["$_{y$"] * 2
    plan = BalancedPlan.from_labels(labels, global_batch_size=2)
    figure = draw_plan(plan, labels)
    rendered(figure)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["_hidden", "$_{y$"]


# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency", IEEE TVCG 2009, table of matrices at severity 1.0, on linear RGB.
VISION = {
    "full": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
WHITE = TO_XYZ.sum(axis=1)


def linear(colour: str) -> NDArray[np.float64]:
    """sRGB -> linear RGB (IEC 61966-2-1)."""
    parts = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(colour: str, vision: str) -> NDArray[np.float64]:
    """CIE L*a*b* of a colour as somebody sees it."""
    seen = np.clip(VISION[vision] @ linear(colour), 0, 1)
    ratio = TO_XYZ @ seen / WHITE
    curve = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = curve
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast_to_white(colour: str) -> float:
    """WCAG 2 contrast ratio, 1 to 21."""
    return float(1.05 / (TO_XYZ[1] @ linear(colour) + 0.05))


@pytest.mark.parametrize("vision", VISION)
def test_before_and_after_are_told_apart_with_any_colour_vision(vision: str) -> None:
    for one, other in itertools.combinations((BEFORE, AFTER, EXPECTED), 2):
        # 2.3 is a difference just noticed; ten times that is seen at a glance.
        assert np.linalg.norm(lab(one, vision) - lab(other, vision)) > 23


@pytest.mark.parametrize("colour", [BEFORE, AFTER, EXPECTED])
def test_bars_and_lines_stand_out_from_white_paper(colour: str) -> None:
    # WCAG 2.1, success criterion 1.4.11: graphics need 3 to 1.
    assert contrast_to_white(colour) > 3


@pytest.mark.parametrize("vision", [name for name in VISION if name != "full"])
def test_stacked_colours_are_told_apart_with_any_colour_vision(vision: str) -> None:
    for one, other in itertools.combinations(COLOURS, 2):
        assert np.linalg.norm(lab(one, vision) - lab(other, vision)) > 8, (one, other)


def test_red_and_green_of_equal_lightness_would_not_be_told_apart() -> None:
    far = [np.linalg.norm(lab("#C05040", name) - lab("#708030", name)) for name in VISION]
    assert min(far[1:3]) < 23 < far[0]


def test_the_words_of_an_svg_are_text(tmp_path: Path) -> None:
    save_figure(draw_plan(brats_plan(), BRATS), tmp_path / "plan.svg")
    root = ElementTree.parse(tmp_path / "plan.svg").getroot()
    words = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    wanted = {"HGG", "LGG", "plain shuffling", "144 (50.0%)", "times seen", "global batch"}
    assert wanted <= set(words)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_equal_plans_give_equal_files_whatever_the_users_settings(
    tmp_path: Path, suffix: str
) -> None:
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    save_figure(draw_plan(brats_plan(), BRATS), first)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "text.usetex": True}):
        save_figure(draw_plan(brats_plan(), BRATS), second)
    assert first.read_bytes() == second.read_bytes()


def test_drawing_loads_no_pyplot() -> None:
    program = (
        "import sys\n"
        "from streaming_balance.plan.epoch import BalancedPlan\n"
        "from streaming_balance.report.figures import draw_plan\n"
        "draw_plan(BalancedPlan.from_labels([0, 0, 1], global_batch_size=2), [0, 0, 1])\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "False\n"


@pytest.mark.parametrize(
    ("draw", "options", "complaint"),
    [
        (draw_class_distribution, {"labels": BRATS[1:]}, "284 labels for a plan over 285 samples"),
        (draw_class_distribution, {"labels": np.zeros((285, 3)), "classes": "ab"}, "(285, 3) for"),
        (
            draw_class_distribution,
            {"labels": np.full(285, 2), "classes": ["HGG", "LGG"]},
            "run from 2 to 2, but classes names 2: class numbers run from 0 to 1",
        ),
        (
            draw_class_distribution,
            {"labels": BRATS, "classes": ["HGG", "lgg"]},
            "hold 'LGG', which is none of the classes 'HGG', 'lgg'.",
        ),
        (draw_batch_counts, {"labels": BRATS, "num_batches": 0}, "num_batches is 0"),
        (draw_batch_counts, {"labels": BRATS, "num_batches": True}, "num_batches is True"),
        (draw_exposure, {"labels": BRATS, "epochs": 0}, "epochs is 0; it must be an integer"),
        (draw_plan, {"labels": BRATS, "epochs": 1.0}, "epochs is 1.0"),
        (draw_plan, {"labels": BRATS, "patients": ["P1"]}, "patients have shape (1,) for a plan"),
        (draw_plan, {"labels": BRATS, "patients": [None] * 285}, "285 patients are missing"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Any, options: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        draw(brats_plan(), **options)
