"""`streaming-balance plan`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streaming_balance.cli.answers import print_json, print_table
from streaming_balance.cli.options import AsJson, DataSet, read_balance
from streaming_balance.config import read_settings
from streaming_balance.errors import ConfigError

if TYPE_CHECKING:
    from streaming_balance.plan.epoch import BalancedPlan
    from streaming_balance.report.plan_summary import PlanSummary
    from streaming_balance.storage.shards import ShardSet


def plan(
    folder: DataSet,
    global_batch_size: Annotated[
        int, typer.Option(help="Samples in a global batch, over all ranks.", show_default=False)
    ],
    balance: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Strategy, such as class_balanced. [natural order]"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="OPTION=VALUE", help="Option of the strategy; repeatable."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file with a data.balancing section.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the run. [the config's compute.seed, else 0]")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs to count exposure over.")] = 1,
    ranks: Annotated[
        int | None, typer.Option(metavar="R", help="Data-parallel ranks to deal batches to.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to plan over.")] = "train",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture to draw: .png or .svg.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what balancing will do, before any training.

    Prints the class counts of every split, how many samples of each class every batch holds, the
    class distribution before and after, how often patients will be seen, and which promises the
    strategy keeps. Nothing is read but the sample table. --plot draws the distribution, the first
    batches beside those of plain shuffling, and how often patients of each class are seen.

    \b
    Examples:
      streaming-balance plan cohort --balance class_balanced --global-batch-size 8
      streaming-balance plan cohort --balance power --set alpha=0.25 --global-batch-size 8
      streaming-balance plan cohort --config brats.yaml --global-batch-size 8 --epochs 20 --ranks 4
      streaming-balance plan cohort --config brats.yaml --global-batch-size 8 --plot plan.png

    \b
    Strategies:
      instance_balanced  natural shares, but exact in every batch
      class_balanced     equal shares
      power              shares in proportion to (n_c / N)^alpha
      effective_number   samples weigh 1 / E_n (option beta)
      manual_weights     a weight per sample of each class (option weights)
      target             shares as given (option shares)
      upsample           small classes repeated (option target_ratio)
      downsample         large classes thinned (options target_ratio, rotate)
    """
    from streaming_balance.plan.epoch import BalancedPlan
    from streaming_balance.plan.loss_weights import double_correction, plan_loss_weights
    from streaming_balance.report.plan_summary import summarise_plan
    from streaming_balance.storage.shards import open_shards

    if plot is not None:
        _check_drawable(plot)
    asked = read_settings(read_balance(balance, settings or [], config))
    shards = open_shards(folder)
    made = BalancedPlan.for_shards(
        shards,
        global_batch_size=global_batch_size,
        balance=asked.strategy,
        seed=seed if seed is not None else asked.seed or 0,
        split=split,
    )
    weights = plan_loss_weights(made, asked.class_weights, is_ordered=shards.classes_declared)
    summary = summarise_plan(shards, made, split=split, epochs=epochs, num_ranks=ranks)
    too_much = double_correction(made, weights)
    if too_much is not None:
        summary = replace(summary, warnings=(*summary.warnings, too_much))
    if plot is not None:
        _draw(made, shards, plot, split=split, epochs=epochs)
    if as_json:
        picture = {} if plot is None else {"plot": str(plot)}
        entries = {"settings": made.settings, "class_weights": weights}
        print_json(_document(summary) | entries | picture)
    else:
        print(repr(made))
        _print_tables(summary)
        if asked.class_weights.enabled:
            said = ", ".join(f"{label}: {weight:.4f}" for label, weight in weights.items())
            print(f"class weights for the loss: {said}")
        if plot is not None:
            print(f"picture: {plot}")


def _check_drawable(path: Path) -> None:
    """Refuse a picture that could not be written, before anything is counted."""
    from streaming_balance.report.style import check_picture_path

    check_picture_path(path)
    if not path.parent.is_dir():
        raise ConfigError(f"--plot is {path}, but there is no folder {path.parent}; make it first.")


def _draw(made: BalancedPlan, shards: ShardSet, path: Path, *, split: str, epochs: int) -> None:
    """Draw the plan's pictures into one file."""
    from streaming_balance.report.figures import draw_plan
    from streaming_balance.report.style import save_figure

    figure = draw_plan(
        made,
        shards.labels(split),
        classes=shards.classes,
        patients=shards.patients(split),
        epochs=epochs,
    )
    save_figure(figure, path)


def _document(summary: PlanSummary) -> dict[str, Any]:
    """Say a summary as JSON."""
    document = asdict(summary)
    for label, entry in summary.classes.items():
        document["classes"][label]["repeats"] = entry.repeats
    return document


def _print_tables(summary: PlanSummary) -> None:
    """Print a summary for people."""
    labels = list(summary.classes)
    print_table(
        "samples per split",
        ("split", *labels),
        ((name, *counts.values()) for name, counts in summary.splits.items()),
    )
    print_table(
        f"{summary.split}: an epoch of {summary.steps:,} steps of {summary.global_batch_size:,}",
        ("class", "patients", "before", "after", "share", "per batch"),
        (
            (
                label,
                entry.patients,
                entry.before,
                entry.after,
                entry.share,
                _span(entry.quota_least, entry.quota_most),
            )
            for label, entry in summary.classes.items()
        ),
    )
    print_table(
        f"how often a patient is seen in {summary.epochs:,} epoch(s)",
        ("class", "delivered", "mean", "least", "most"),
        (
            (label, entry.delivered, entry.repeats, entry.exposure_min, entry.exposure_max)
            for label, entry in summary.classes.items()
        ),
    )
    if summary.rank_batch is not None:
        print(f"a rank's part of a batch: {_span(*summary.rank_batch)} samples")
    if summary.twins.twins:
        print(
            f"a patient comes more than once in {summary.twins.batches_with_twins:,} of "
            f"{summary.twins.batches:,} batches: {summary.twins.twins:,} samples"
        )
    for promise, kept in summary.guarantees.items():
        print(f"{'kept    ' if kept else 'not kept'} {promise.replace('_', ' ')}")
    for warning in summary.warnings:
        print(f"note: {warning}")
    print(f"plan digest: {summary.digest}")


def _span(least: int, most: int) -> str:
    """Write a range of counts."""
    return f"{least:,}" if least == most else f"{least:,}-{most:,}"
