"""A paragraph for a methods section, every sentence computed from a run's state and tables.

It has what TRIPOD+AI asks of a study about how data were divided and used (item 12a), about class
imbalance (item 13) and about training against evaluation (item 16), as far as a loader knows it.

Source:
    Collins et al., "TRIPOD+AI statement: updated guidance for reporting clinical prediction models
    that use regression or machine learning methods", BMJ 2024;385:e078378.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import numpy as np

from streaming_balance.report.audit import Audit, LegSummary
from streaming_balance.report.tallies import Tallies
from streaming_balance.report.wording import counted, joined, spanned
from streaming_balance.storage.labelling import carriers
from streaming_balance.storage.shards import ShardSet

DISTRIBUTION = "streaming-balance"


def methods_paragraph(audit: Audit, tallies: Tallies) -> str:
    """Write what a methods section has to say about the data and how they were drawn.

    Args:
        audit: who was seen in a run, and how often.
        tallies: what that was summed up from.

    Returns:
        One paragraph.
    """
    run = tallies.run
    shards = [leg.shards for leg in run.legs]
    sentences = [
        *(_cohort(one) for one in {one.digest: one for one in shards}.values()),
        _separation(shards),
        *_training(audit, tallies),
        *_deliveries(audit, tallies),
        *_exceptions(audit, tallies),
        _evidence(audit),
    ]
    return " ".join(sentences)


def _cohort(shards: ShardSet) -> str:
    """Say how many patients of which class each split of a data set has."""
    owners = {split: shards.patients(split).tolist() for split in shards.splits}
    counts = {split: len(set(owner)) for split, owner in owners.items()}
    by_class = {split: _patients_by_class(shards, split) for split in shards.splits}
    parts = [
        f"{counted(count, 'patient')} in {split} ({_listed(by_class[split])})"
        for split, count in counts.items()
    ]
    several = shards.multi_label or any(
        sum(by_class[split].values()) > count for split, count in counts.items()
    )
    note = "; a patient of several classes counts in each" if several else ""
    return (
        f"The data set with content digest {shards.digest} has "
        f"{counted(sum(counts.values()), 'patient')} with {counted(len(shards), 'sample')}: "
        f"{joined(parts)}{note}."
    )


def _patients_by_class(shards: ShardSet, split: str) -> dict[str, int]:
    """Count the patients of each class in a split."""
    labels, owners = shards.labels(split), shards.patients(split)
    return {
        label: len(set(owners[carriers(labels, number)].tolist()))
        for number, label in enumerate(shards.classes)
    }


def _separation(shards: Iterable[ShardSet]) -> str:
    """Say that no patient is in two splits, which opening a table has checked."""
    if all(len(one.splits) == 1 for one in shards):
        return "The data set is not divided: all patients are in one split."
    return (
        "No patient is in two splits: this was checked over the whole sample table when it was "
        "opened for this report."
    )


def _training(audit: Audit, tallies: Tallies) -> list[str]:
    """Say by which plans batches were drawn."""
    if len(audit.legs) == 1:
        return [f"Training drew {_plan(audit.legs[0], tallies, 0)}."]
    sentences = [f"Training followed {len(audit.legs)} plans, one after another."]
    for number, leg in enumerate(audit.legs):
        sentences.append(
            f"Plan {number + 1} drew {_plan(leg, tallies, number)}, and delivered "
            f"{_amount(leg)}, until epoch {leg.stop[0]}, step {leg.stop[1]}."
        )
    return sentences


def _plan(leg: LegSummary, tallies: Tallies, number: int) -> str:
    """Say what was drawn from, how, and in what batches."""
    settings = leg.settings
    plan = tallies.run.legs[number].plan
    several = len({one.shards.digest for one in tallies.run.legs}) > 1
    where = f" of data set {leg.shards_digest}" if several else ""
    strategy = _strategy({**settings["balance"], "unit": plan.unit})
    return (
        f"from {settings['split']}{where} alone, by the strategy {strategy}, in global batches of "
        f"{counted(settings['global_batch_size'], 'sample')}, with seed {settings['seed']} (plan "
        f"version {settings['version']}, plan digest {leg.plan_digest})"
    )


def _strategy(settings: Mapping[str, Any]) -> str:
    """Write a name and its options."""
    options = {name: value for name, value in settings.items() if name != "name"}
    written = ", ".join(
        f"{name}: {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in options.items()
    )
    return f"{settings['name']} ({written})"


def _deliveries(audit: Audit, tallies: Tallies) -> list[str]:
    """Say how much was delivered, how it was shared by the classes, and by the patients of each."""
    batches = sum(leg.batches for leg in audit.legs)
    samples = sum(leg.samples for leg in audit.legs)
    until = f"Before epoch {audit.epoch}, step {audit.step} (both count from 0)"
    if not samples:
        return [f"{until}, nothing was delivered yet."]
    natural = _natural_shares(tallies)
    drawer = "were drawn from" if len(audit.legs) == 1 else "the last plan drew from"
    shares = joined(
        f"{label} was {entry.share:.1%} of them ({natural.get(label, 0.0):.1%} of the samples that "
        f"{drawer})"
        for label, entry in audit.classes.items()
    )
    jumps = sum(len(leg.skipped) for leg in audit.legs)
    return [
        f"{until}, {counted(batches, 'global batch', 'global batches')} delivered "
        f"{counted(samples, 'sample')}: {shares}.",
        _times(audit),
        *([f"Epochs were left out or repeated by {counted(jumps, 'jump')}."] if jumps else []),
    ]


def _times(audit: Audit) -> str:
    """Say how often the patients of each class were seen."""
    drawn = {label: entry for label, entry in audit.classes.items() if entry.patients}
    parts = (
        f"{'each' if number else 'Each patient'} of {label}{'' if number else ' was seen'} "
        f"{spanned(entry.exposure_min, entry.exposure_max)}"
        for number, (label, entry) in enumerate(drawn.items())
    )
    aside = ", being mixed into others included" if audit.mixing else ""
    return f"{joined(parts)}{aside}."


def _natural_shares(tallies: Tallies) -> dict[str, float]:
    """Give the part of the samples drawn from that has each class, in the last leg."""
    leg, kept = tallies.run.last, ~tallies.legs[-1].left_out
    labels, total = leg.shards.labels(leg.split), max(1, int(np.count_nonzero(kept)))
    return {
        label: int(np.count_nonzero(carriers(labels, number) & kept)) / total
        for number, label in enumerate(leg.shards.classes)
    }


def _amount(leg: LegSummary) -> str:
    """Say how much a leg delivered."""
    batches = counted(leg.batches, "global batch", "global batches")
    return f"{batches} with {counted(leg.samples, 'sample')}"


def _exceptions(audit: Audit, tallies: Tallies) -> list[str]:
    """Say who was left out, replaced or mixed."""
    sentences = [*_exclusions(tallies), _replacements(audit, tallies), *_mixings(audit)]
    if audit.not_audited:
        sentences.append(
            f"A {joined(audit.not_audited)} of the user's own changed batches, and what it did is "
            f"recorded nowhere."
        )
    return sentences


def _mixings(audit: Audit) -> list[str]:
    """Say how each plan's batches were mixed."""
    sentences = []
    for number, leg in enumerate(audit.legs):
        if leg.mixing is not None:
            of = f" of plan {number + 1}" if len(audit.legs) > 1 else ""
            how = _strategy(leg.mixing)
            sentences.append(
                f"Batches{of} were mixed by {how}, samples with others of their batch."
            )
    return sentences


def _exclusions(tallies: Tallies) -> list[str]:
    """Say who each plan leaves out by name."""
    sentences = []
    for number, (tally, owner) in enumerate(zip(tallies.legs, tallies.owners, strict=True)):
        count = int(np.count_nonzero(tally.left_out))
        if count:
            patients = len(np.unique(owner[tally.left_out]))
            by = f" by plan {number + 1}" if len(tallies.legs) > 1 else ""
            sentences.append(
                f"{counted(count, 'sample')} of {counted(patients, 'patient')} "
                f"{'was' if count == 1 else 'were'} excluded by name{by}."
            )
    return sentences or ["Nobody was excluded by name."]


def _replacements(audit: Audit, tallies: Tallies) -> str:
    """Say how often damaged samples were replaced, and whether that is all that is known."""
    count = len(audit.substitutions)
    if not audit.complete:
        return (
            f"{counted(count, 'delivery', 'deliveries')} of damaged samples "
            f"{'was' if count == 1 else 'were'} replaced by others of their class, and those of "
            f"{described_gap(tallies)} are not known."
        )
    if not count:
        return "No damaged sample was replaced."
    return (
        f"{counted(count, 'delivery', 'deliveries')} of damaged samples "
        f"{'was' if count == 1 else 'were'} replaced by others of their class."
    )


def described_gap(tallies: Tallies) -> str:
    """Say whose records of substitutions a run's state lacks."""
    recorders = tallies.run.state.recorders
    if recorders is None:
        return "some ranks at an earlier time"
    missing = sorted(set(range(recorders.num_ranks)) - set(recorders.ranks))
    named = f"rank {missing[0]}" if len(missing) == 1 else f"{len(missing):,} ranks"
    return f"{named} of {recorders.num_ranks:,}"


def _evidence(audit: Audit) -> str:
    """Say what all this was computed from, and by what."""
    return (
        f"These figures were computed with {DISTRIBUTION} {_release()} from the sample table and a "
        f"state of the training loader with digest {audit.state_digest}."
    )


def _release() -> str:
    """Give the version of the package that is installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "(not installed)"


def _listed(counts: Mapping[str, int]) -> str:
    """Write counts by label."""
    return ", ".join(f"{label} {count:,}" for label, count in counts.items())
