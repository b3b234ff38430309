"""The tour: a cohort made, packed, trained on twice, stopped, resumed elsewhere and audited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streaming_balance.demo.cohort import make_cohort
from streaming_balance.demo.narration import Narration, percent
from streaming_balance.demo.places import Places
from streaming_balance.demo.runs import Experiment, Resumption
from streaming_balance.errors import ConfigError
from streaming_balance.ingest.pack import write_shards
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.report.audit import Audit, audit_run
from streaming_balance.report.distribution import batch_class_counts, draw_class_counts
from streaming_balance.report.plan_summary import class_counts
from streaming_balance.report.saved_states import read_state
from streaming_balance.storage.shards import ShardSet, open_shards

# Below this the rare class has too few patients to be in both splits and to be measured.
FEWEST_PATIENTS = 20
SPLIT = "train=0.6,val=0.4"
BATCHES_DRAWN = 45
INDEPENDENT, NATURAL, BALANCED = "independent draws", "natural order", "class_balanced"
STRATEGIES: Mapping[str, Mapping[str, str]] = {
    INDEPENDENT: {"name": "instance_balanced", "draw": "iid"},
    NATURAL: {"name": "instance_balanced"},
    BALANCED: {"name": "class_balanced"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tour:
    """What the tour measured."""

    patients: Mapping[str, int]
    """label -> generated patients."""
    splits: Mapping[str, Mapping[str, int]]
    """split -> label -> patients."""
    rare: str
    """The class with the fewest patients."""
    rare_per_batch: Mapping[str, tuple[int, int]]
    """strategy -> fewest and most of the rare class in a batch."""
    steps: int
    """Steps that each network was trained for."""
    recall: Mapping[str, Mapping[str, float]]
    """`natural`, `balanced` and `resumed` -> label -> recall on validation."""
    resumption: Resumption
    """Stopped and resumed against uninterrupted."""
    audit: Audit
    """Who was seen in the run that was stopped and resumed."""
    places: Places
    """Where the files are."""


def take_tour(
    out: Path,
    *,
    patients: int = 285,
    epochs: int = 5,
    seed: int = 0,
    narration: Narration,
) -> Tour:
    """Show the whole way on a generated cohort.

    Args:
        out: folder to work in: a new or empty one, or that of an earlier tour.
        patients: how many to generate, at least 20.
        epochs: epochs to train for, at least 1.
        seed: names every random stream, in [0, 2**64 - 1].
        narration: tells people what happens.

    Returns:
        Everything that was measured.

    Raises:
        ConfigError: too few patients or epochs, or the folder holds something else.
    """
    if patients < FEWEST_PATIENTS or epochs < 1:
        raise ConfigError(
            f"patients is {patients} and epochs is {epochs}; the tour needs at least "
            f"{FEWEST_PATIENTS} patients and 1 epoch."
        )
    places = Places.claim(out)
    counts = _make(places, patients, seed, narration)
    shards = _pack(places, seed, narration)
    rare = min(counts, key=lambda label: counts[label])
    per_batch = _look_at_batches(shards, places, rare, seed, narration)
    experiment = Experiment(shards, epochs=epochs, seed=seed)
    recall = _train_twice(experiment, rare, narration)
    resumption = _stop_and_resume(experiment, places, narration)
    audit = _audit(shards, places, narration)
    tour = Tour(
        patients=counts,
        splits={split: class_counts(shards, split) for split in shards.splits},
        rare=rare,
        rare_per_batch=per_batch,
        steps=experiment.steps,
        recall={**recall, "resumed": resumption.recall},
        resumption=resumption,
        audit=audit,
        places=places,
    )
    _conclude(tour, narration)
    return tour


def _make(places: Places, patients: int, seed: int, narration: Narration) -> dict[str, int]:
    """Generate the cohort."""
    narration.stage("Make a cohort")
    counts = make_cohort(places.patients, patients=patients, seed=seed)
    ratio = max(counts.values()) / min(counts.values())
    listed = " and ".join(f"{count} {label}" for label, count in counts.items())
    narration.say(
        f"{patients} generated patients, {listed} ({ratio:.1f} to 1), laid out as BraTS is: four "
        f"modalities and a mask each. Seed {seed}."
    )
    narration.show(f"{places.patients}")
    return counts


def _pack(places: Places, seed: int, narration: Narration) -> ShardSet:
    """Pack the cohort into shards."""
    narration.stage("Pack it into shards, split by patient")
    report = write_shards(places.patients, places.cohort, split=SPLIT, seed=seed, overwrite=True)
    shards = open_shards(places.cohort)
    rows = [(split, *class_counts(shards, split).values()) for split in shards.splits]
    narration.table(("patients", *shards.classes), rows)
    narration.say(
        f"Found {report.found} = packed {report.packed} + rejected {len(report.rejected)}; no "
        f"patient is in two splits."
    )
    narration.show(f"{places.cohort}")
    return shards


def _look_at_batches(
    shards: ShardSet, places: Places, rare: str, seed: int, narration: Narration
) -> dict[str, tuple[int, int]]:
    """Count and draw what batches hold, before and after balancing."""
    narration.stage("Look at batches before and after balancing")
    counts = {name: _counts(shards, strategy, seed=seed) for name, strategy in STRATEGIES.items()}
    draw_class_counts(counts, shards.classes, places.picture)
    number = shards.classes.index(rare)
    spans = {
        name: (int(found[:, number].min()), int(found[:, number].max()))
        for name, found in counts.items()
    }
    narration.table(
        (f"{rare} per batch of {Experiment.global_batch_size}", "fewest", "most"),
        ((name, *span) for name, span in spans.items()),
    )
    narration.say(f"The first {BATCHES_DRAWN} batches of each, drawn:")
    narration.show(f"{places.picture}")
    return spans


def _counts(shards: ShardSet, strategy: Mapping[str, str], *, seed: int) -> NDArray[np.int64]:
    """Count the classes of a strategy's first batches."""
    plan = BalancedPlan.for_shards(
        shards, global_batch_size=Experiment.global_batch_size, balance=strategy, seed=seed
    )
    return batch_class_counts(
        plan,
        shards.labels("train"),
        num_classes=len(shards.classes),
        num_batches=BATCHES_DRAWN,
    )


def _train_twice(
    experiment: Experiment, rare: str, narration: Narration
) -> dict[str, Mapping[str, float]]:
    """Train in natural order and balanced, and compare recall."""
    narration.stage("Train a small 3-D network twice: natural and balanced")
    narration.say(
        f"Equal initial weights, {experiment.steps} steps each, batches of "
        f"{experiment.global_batch_size}. Recall on the validation patients, each once, as they "
        f"come:"
    )
    natural, balanced = experiment.natural.recall, experiment.balanced.recall
    there = class_counts(experiment.shards, "val")
    rows = [
        (label, there[label], percent(natural[label]), percent(balanced[label]))
        for label in natural
    ]
    mean = ("mean", sum(there.values()), percent(_mean(natural)), percent(_mean(balanced)))
    narration.table(("recall", "patients", "natural", "balanced"), [*rows, mean])
    narration.say(f"With balanced batches {_changes(natural, balanced, rare)}.")
    return {"natural": natural, "balanced": balanced}


def _stop_and_resume(experiment: Experiment, places: Places, narration: Narration) -> Resumption:
    """Stop in mid-epoch, resume on two ranks, and compare with the uninterrupted run."""
    narration.stage(f"Stop in mid-epoch, resume on {experiment.resumed_ranks} ranks")
    found = experiment.stop_and_resume(places)
    narration.say(
        f"One rank trained until epoch {found.epoch}, step {found.step}, saved its state and "
        f"network, and stopped. From there, {found.ranks} ranks trained to the end."
    )
    narration.show(f"{places.checkpoint}")
    narration.say(
        f"{'PASS' if found.is_equal else 'FAIL'}: {found.equal} of {found.compared} global batches "
        f"hold what the uninterrupted run's hold: sample numbers, places and voxel checksums.",
        style="bold green" if found.is_equal else "bold red",
    )
    recalls = ", ".join(f"{label} {percent(value)}" for label, value in found.recall.items())
    narration.say(f"Recall of the resumed network: {recalls}.")
    return found


def _audit(shards: ShardSet, places: Places, narration: Narration) -> Audit:
    """Say who was seen, from the data set and the saved state alone."""
    narration.stage("Audit the run that was stopped and resumed")
    audit = audit_run(shards, read_state(places.state))
    narration.table(
        ("class", "patients", "seen", "delivered", "share", "least", "most"),
        (
            (
                label,
                entry.patients,
                entry.seen,
                entry.delivered,
                percent(entry.share),
                entry.exposure_min,
                entry.exposure_max,
            )
            for label, entry in audit.classes.items()
        ),
    )
    narration.say("Computed from the data set and the saved state, nothing else:")
    narration.show(f"{places.state}")
    return audit


def _conclude(tour: Tour, narration: Narration) -> None:
    """Sum up what was measured, and say how to go on."""
    narration.stage("Shown")
    least, most = tour.rare_per_batch[BALANCED]
    drawn_least, drawn_most = tour.rare_per_batch[INDEPENDENT]
    found = tour.resumption
    changes = _changes(tour.recall["natural"], tour.recall["balanced"], tour.rare)
    lines = (
        f"{tour.rare} per batch: {_span(least, most)} balanced, "
        f"{_span(drawn_least, drawn_most)} by independent draws",
        f"recall on validation: {changes}",
        f"resumed on {found.ranks} ranks: {found.equal} of {found.compared} global batches are the "
        f"same: {'PASS' if found.is_equal else 'FAIL'}",
        *(
            f"{label}: {entry.seen} of {entry.patients} patients seen, each "
            f"{_span(entry.exposure_min, entry.exposure_max)} times"
            for label, entry in tour.audit.classes.items()
        ),
    )
    for line in lines:
        narration.say(f"- {line}")
    narration.say("Look at the picture and go on:")
    narration.show(f"  {tour.places.picture}")
    narration.show(f"  streaming-balance inspect {tour.places.cohort}")
    narration.show(f"  streaming-balance audit {tour.places.cohort} --state {tour.places.state}")


def _changes(natural: Mapping[str, float], balanced: Mapping[str, float], rare: str) -> str:
    """Say how recall changed, the rare class first, whatever it did."""
    labels = sorted(natural, key=lambda label: label != rare)
    return ", ".join(_change(label, natural[label], balanced[label]) for label in labels)


def _change(label: str, before: float, after: float) -> str:
    """Say what became of one number."""
    if percent(before) == percent(after):
        return f"{label} stays at {percent(after)}"
    verb = "rises" if after > before else "falls"
    return f"{label} {verb} from {percent(before)} to {percent(after)}"


def _mean(recall: Mapping[str, float]) -> float:
    """Give the mean over classes, each counting alike."""
    return sum(recall.values()) / len(recall)


def _span(least: int, most: int) -> str:
    """Write a range of counts."""
    return f"{least}" if least == most else f"{least} to {most}"
