"""How pictures look and are written: colours, matplotlib's own defaults, equal bytes every time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streaming_balance.errors import ConfigError

try:
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ConfigError(
        "pictures need matplotlib, which is not installed. Install it with "
        "pip install 'streaming-balance[report]'."
    ) from error

if TYPE_CHECKING:
    from matplotlib.axis import Axis

# Told apart by people who do not see red and green alike (Okabe and Ito, 2008); their black is left
# out, since hatching would not show on it.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
# With more classes than colours, the colours come again, hatched: 7 x 5 classes look different.
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\")
# Two of them stand for before and after: the pair with the most contrast to white and each other.
BEFORE, AFTER = "#D55E00", "#0072B2"
# What is expected rather than counted, and what only guides the eye.
EXPECTED, GUIDE = "#333333", "#BBBBBB"

# Neither a date nor a version of matplotlib belongs into a file that is compared.
METADATA: Mapping[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
}
DOTS_PER_INCH = 120


def check_picture_path(path: Path) -> None:
    """Refuse a file name that does not say which kind of picture to write.

    Raises:
        ConfigError: the suffix is neither `.png` nor `.svg`.
    """
    if path.suffix not in METADATA:
        raise ConfigError(
            f"{path}: pictures are written as {' or '.join(METADATA)}; give a name that ends so."
        )


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; equal figures give equal bytes, whatever the user's matplotlib settings are.

    Args:
        figure: any figure.
        path: file to write, PNG or SVG by its suffix.

    Raises:
        ConfigError: another suffix.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "empty.svg"
        >>> save_figure(new_figure(1, 1), path)
        >>> "<svg" in path.read_text()
        True
    """
    check_picture_path(path)
    with own_style():
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata=METADATA[path.suffix])


@contextmanager
def own_style() -> Iterator[None]:
    """Draw in matplotlib's default style, with names in an SVG that do not change."""
    with (
        matplotlib.style.context("default"),
        matplotlib.rc_context(
            {
                "svg.hashsalt": "streaming-balance",
                # Text stays text: it can be searched, selected and read aloud.
                "svg.fonttype": "none",
                # A label may hold dollar signs; it is never a formula.
                "text.parse_math": False,
                "hatch.linewidth": 0.6,
            }
        ),
    ):
        yield


def new_figure(width: float, height: float, *, row_gap: float = 0.03) -> Figure:
    """Make a figure that finds room for its texts; pyplot knows nothing of it.

    Args:
        width: inches.
        height: inches.
        row_gap: room between rows of panels, as part of a panel's height.

    Returns:
        The figure; make and draw it inside `own_style`.
    """
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1, hspace=row_gap)
    return Figure(figsize=(width, height), layout=layout)


def tick_whole_numbers(axis: Axis, *, at_most: int) -> None:
    """Put ticks at whole numbers only, few enough to be read."""
    axis.set_major_locator(
        MaxNLocator(nbins=at_most, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    )
