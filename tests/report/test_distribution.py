"""Pictures and counts of batches."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.report.distribution import batch_class_counts, draw_class_counts
from streaming_balance.report.style import COLOURS, HATCHES

Counts = NDArray[np.int64]


def bars_by_batch(figure: Figure, panel: int) -> list[list[tuple[float, float]]]:
    """(bottom, height) of every bar, batch by batch, upwards."""
    containers = figure.axes[panel].containers
    return [
        [(bar.get_y(), bar.get_height()) for bar in bars] for bars in zip(*containers, strict=True)
    ]


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_counts_run_on_into_the_next_epoch_and_show_absent_classes_as_0() -> None:
    labels = np.array([1] * 6 + [2] * 2)
    plan = BalancedPlan.from_labels(labels, global_batch_size=4, seed=1)
    counts = batch_class_counts(plan, labels, num_classes=4, num_batches=5)
    assert counts.tolist() == [[0, 2, 2, 0]] * 5


def test_bars_are_as_high_as_the_counts_with_the_rarest_class_at_the_bottom(tmp_path: Path) -> None:
    counts = np.array([[6, 2], [8, 0], [5, 3]])
    figure = draw_class_counts({"natural": counts}, ["HGG", "LGG"], tmp_path / "batches.png")
    assert bars_by_batch(figure, 0) == [[(0, 2), (2, 6)], [(0, 0), (0, 8)], [(0, 3), (3, 5)]]
    assert legend_labels(figure) == ["HGG", "LGG"]


def test_panels_share_order_and_axes_and_say_what_the_rarest_class_gets(tmp_path: Path) -> None:
    panels = {"before": np.array([[7, 1], [8, 0]]), "after": np.array([[4, 4], [3, 5], [4, 4]])}
    figure = draw_class_counts(panels, ["HGG", "LGG"], tmp_path / "batches.svg")
    said = [(axes.get_title("left"), axes.get_title("right")) for axes in figure.axes]
    assert said == [("before", "LGG: 0 to 1 per batch"), ("after", "LGG: 4 to 5 per batch")]
    assert bars_by_batch(figure, 1)[1] == [(0, 5), (5, 3)]
    assert [axes.get_ylabel() for axes in figure.axes] == ["samples", "samples"]
    assert figure.axes[1].get_xlabel() == "global batch"
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


def test_every_class_is_drawn_in_its_own_colour_in_proportion_to_its_counts(tmp_path: Path) -> None:
    counts = np.array([[6, 2]] * 10)
    draw_class_counts({"natural": counts}, ["HGG", "LGG"], tmp_path / "batches.png")
    pixels = np.rint(image.imread(tmp_path / "batches.png")[..., :3] * 255).astype(int)
    areas = []
    for colour in COLOURS[:2]:
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        areas.append(int((np.abs(pixels - wanted).max(axis=-1) <= 2).sum()))
    # The legend adds two equal patches; six to two is blurred by them a little.
    assert 2.6 < areas[1] / areas[0] < 3.1


@pytest.mark.parametrize("num_classes", [2, 20, 35])
def test_classes_look_different_and_no_label_is_cut_off_or_covers_a_panel(
    tmp_path: Path, num_classes: int
) -> None:
    counts: Counts = np.arange(1, num_classes + 1)[None].repeat(3, axis=0)
    classes = [f"diagnosis {number}" for number in range(num_classes)]
    panels = {"natural": counts, "balanced": counts[:, ::-1]}
    figure = draw_class_counts(panels, classes, tmp_path / "batches.png")
    looks = {
        (tuple(bars[0].get_facecolor()), bars[0].get_hatch()) for bars in figure.axes[0].containers
    }
    assert len(looks) == num_classes
    page, legend = figure.bbox, figure.legends[0].get_window_extent()
    assert sorted(legend_labels(figure)) == sorted(classes)
    assert page.x0 <= legend.x0
    assert legend.x1 <= page.x1
    assert page.y0 <= legend.y0
    assert legend.y1 <= page.y1
    for axes in figure.axes:
        panel = axes.get_tightbbox()
        assert panel is not None
        assert not panel.overlaps(legend)
        assert min(panel.x0, panel.y0) >= 0
        assert panel.y1 <= page.y1
    upper, lower = (axes.get_tightbbox() for axes in figure.axes)
    assert upper is not None
    assert lower is not None
    assert upper.y0 > lower.y1


def test_there_are_looks_for_35_classes() -> None:
    assert len(COLOURS) * len(HATCHES) == 35
    assert len(set(COLOURS)) == len(COLOURS)
    assert len(set(HATCHES)) == len(HATCHES)


def test_labels_that_matplotlib_would_hide_or_read_as_formulas_are_shown_as_they_are(
    tmp_path: Path,
) -> None:
    counts = np.array([[3, 1]])
    figure = draw_class_counts({"$x$": counts}, ["_other", "$_{y$"], tmp_path / "batches.png")
    assert legend_labels(figure) == ["_other", "$_{y$"]
    assert figure.axes[0].get_title("right") == "$_{y$: 1 per batch"


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_equal_counts_give_equal_files_without_a_date_whatever_the_users_settings(
    tmp_path: Path, suffix: str
) -> None:
    counts = np.array([[6, 2], [5, 3]])
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    draw_class_counts({"natural": counts}, ["HGG", "LGG"], first)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 10}):
        draw_class_counts({"natural": counts}, ["HGG", "LGG"], second)
        assert matplotlib.rcParams["font.size"] == 30
    assert first.read_bytes() == second.read_bytes()
    assert b"Matplotlib" not in first.read_bytes()
    assert b"dc:date" not in first.read_bytes()


def test_an_svg_is_a_drawing_with_a_shape_for_every_bar(tmp_path: Path) -> None:
    path = tmp_path / "batches.svg"
    draw_class_counts({"natural": np.array([[6, 2]] * 4)}, ["HGG", "LGG"], path)
    root = ElementTree.parse(path).getroot()
    colours = [
        element.get("style", "").partition("fill: ")[2][:7]
        for element in root.iter("{http://www.w3.org/2000/svg}path")
    ]
    # Four bars and the legend's patch.
    assert [colours.count(colour.lower()) for colour in COLOURS[:2]] == [5, 5]


def test_the_words_of_an_svg_are_text(tmp_path: Path) -> None:
    path = tmp_path / "batches.svg"
    draw_class_counts({"natural": np.array([[6, 2]] * 4)}, ["HGG", "LGG"], path)
    root = ElementTree.parse(path).getroot()
    words = {"".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"natural", "HGG", "LGG", "LGG: 2 per batch", "global batch"} <= words


def test_drawing_loads_no_pyplot_and_opens_no_window() -> None:
    program = (
        "import sys, tempfile, numpy, pathlib\n"
        "from streaming_balance.report.distribution import draw_class_counts\n"
        "path = pathlib.Path(tempfile.mkdtemp()) / 'batches.png'\n"
        "draw_class_counts({'a': numpy.array([[1, 2]])}, ['x', 'y'], path)\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "False\n"


def test_without_matplotlib_the_error_says_what_to_install() -> None:
    program = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "from streaming_balance.errors import ConfigError\n"
        "try:\n"
        "    import streaming_balance.report.distribution\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "pip install 'streaming-balance[report]'" in answer.stdout


@pytest.mark.parametrize(
    ("panels", "name", "complaint"),
    [
        ({"a": np.ones((3, 2))}, "batches.jpg", r"batches\.jpg: pictures are written as \.png or"),
        ({}, "batches.png", "no panel to draw"),
        ({"a": np.ones((3, 4))}, "batches.png", r"'a' have shape \(3, 4\); give \(batches, 2\)"),
        ({"a": np.ones((0, 2))}, "batches.png", r"'a' have shape \(0, 2\)"),
        ({"a": np.ones(2)}, "batches.png", r"'a' have shape \(2,\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    tmp_path: Path, panels: dict[str, Counts], name: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        draw_class_counts(panels, ["HGG", "LGG"], tmp_path / name)
    assert not any(tmp_path.iterdir())
