"""`streaming-balance inspect` of tars: of standard input, or of files that nobody indexed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from streaming_balance.cli.answers import print_json, print_table, with_unit

if TYPE_CHECKING:
    from streaming_balance.stream.inspecting import TarSummary

SHAPES_SHOWN = 3
_ENDINGS = (".tar", ".gz", ".tgz", ".zst")
_PATTERN_LETTERS = frozenset("*?[{")
_ADDRESSES = ("http://", "https://", "file:", "pipe:")


def names_tars(source: str) -> bool:
    """Say whether text names tars to stream rather than the folder of a data set.

    Examples:
        >>> [names_tars(text) for text in ("-", "a/{000..012}.tar", "s.tar.gz", "cohort")]
        [True, True, True, False]
    """
    return (
        source == "-"
        or source.startswith(_ADDRESSES)
        or source.endswith(_ENDINGS)
        or not _PATTERN_LETTERS.isdisjoint(source)
    )


def inspect_stream(source: str, *, label: str, allow_pipe: bool, as_json: bool) -> None:
    """Say what some tars hold; end with 1 where they are damaged."""
    from streaming_balance.stream.inspecting import inspect_tars

    summary = inspect_tars(source, label=label, allow_pipe=allow_pipe)
    if as_json:
        print_json(summary.to_dict())
    else:
        _print_tables(summary, source)
    if not summary.is_sound:
        raise typer.Exit(1)


def _print_tables(summary: TarSummary, source: str) -> None:
    """Print what tars hold for people."""
    counts = summary.counts
    shown = "standard input" if source == "-" else source
    print(f"{shown}: {counts.samples_delivered:,} samples, {with_unit(counts.bytes_read)}")
    print_table(
        "",
        ("field", "members", "stored", "shapes"),
        (
            (
                name,
                found.members,
                with_unit(found.bytes),
                _shapes(found.shapes.most_common(), found.unread_headers),
            )
            for name, found in sorted(summary.fields.items())
        ),
    )
    classes = ", ".join(f"{name} ({count:,})" for name, count in summary.classes.most_common())
    print(f"classes: {classes or 'none'}; without a class: {summary.without_label:,}")
    passed = ", ".join(f"{name} ({count:,})" for name, count in counts.passed_over.items())
    if passed:
        print(f"passed over: {passed}")
    for skip in counts.skips:
        print(f"problem: {skip.reason}")
    if counts.skips_not_kept:
        print(f"and {counts.skips_not_kept:,} more problems")


def _shapes(shapes: list[tuple[str, int]], unread: int) -> str:
    """Write the most common shapes of a field."""
    shown = [f"{shape} ({count:,})" for shape, count in shapes[:SHAPES_SHOWN]]
    if len(shapes) > SHAPES_SHOWN:
        shown.append(f"and {len(shapes) - SHAPES_SHOWN:,} more")
    if unread:
        shown.append(f"no plain array ({unread:,})")
    return ", ".join(shown)
