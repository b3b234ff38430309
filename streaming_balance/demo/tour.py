"""The tour: a cohort made, packed, trained on twice, stopped, resumed elsewhere and audited."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from streaming_balance.demo.cohort import make_cohort
from streaming_balance.demo.network import SmallNetwork, recall_by_class, train_network
from streaming_balance.ingest.pack import write_shards
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.report.audit import Audit, audit_run, read_state
from streaming_balance.report.distribution import batch_class_counts, draw_class_counts
from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import BalancedLoader, train_loader

GLOBAL_BATCH_SIZE = 8
EPOCHS = 10
SPLIT = "train=0.6,val=0.4"
# Somewhere inside an epoch, on a number of ranks that divides neither the batch nor its classes.
STOP_AFTER_STEPS, RESUMED_RANKS, COMPARED_STEPS = 22, 3, 12
BATCHES_DRAWN = 40
# Nine batches of these small volumes; reading hundreds ahead would take the processors' time from
# the network.
PREFETCH_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Tour:
    """What the tour showed."""

    cohort: Path
    """The packed data set."""
    patients: Mapping[str, int]
    """label -> generated patients."""
    natural_recall: Mapping[str, float]
    """label -> recall on validation after training in natural order."""
    balanced_recall: Mapping[str, float]
    """The same after as many balanced steps."""
    compared_batches: int
    """Global batches compared after the stop."""
    equal_batches: int
    """How many of them held the same samples when resumed on other ranks."""
    audit: Audit
    """Who was seen in the balanced run."""
    picture: Path
    """Class counts per batch, before and after."""


def take_tour(out: Path, *, patients: int = 190, seed: int = 0, say: Callable[[str], None]) -> Tour:
    """Show the whole way on a generated cohort.

    Args:
        out: folder to work in; running again in it is fine.
        patients: how many to generate, at least 20.
        seed: names every random stream, in [0, 2**64 - 1].
        say: called with a line of text whenever there is something to tell.

    Returns:
        Everything that was measured.
    """
    counts = make_cohort(out / "patients", patients=patients, seed=seed)
    say(f"1. made {patients} patients: {_listed(counts)}, four modalities, in {out / 'patients'}")
    packed = write_shards(out / "patients", out / "cohort", split=SPLIT, seed=seed, overwrite=True)
    shards = open_shards(out / "cohort")
    say(f"2. packed {packed.packed} into {out / 'cohort'}: {_sizes(shards)}")
    say(f"3. training twice for {EPOCHS} epochs of batches of {GLOBAL_BATCH_SIZE}")
    natural = _trained_recall(shards, balance=None, seed=seed)
    say(f"   natural order:  recall on validation {_percentages(natural)}")
    state_file = out / "state.json"
    balanced = _trained_recall(shards, balance="class_balanced", seed=seed, state_file=state_file)
    say(f"   class_balanced: recall on validation {_percentages(balanced)}")
    equal = sum(_resumed_equals_uninterrupted(shards, seed=seed))
    say(
        f"4. stopped in mid-epoch after {STOP_AFTER_STEPS} steps, resumed on {RESUMED_RANKS} "
        f"ranks: {equal} of {COMPARED_STEPS} global batches hold the same samples"
    )
    audit = audit_run(shards, read_state(state_file))
    say(f"5. audit of the balanced run, from {state_file} alone:")
    for label, entry in audit.classes.items():
        times = " or ".join(map(str, sorted({entry.exposure_min, entry.exposure_max})))
        say(f"   {label}: {entry.delivered} deliveries, each of {entry.patients} patients {times}x")
    picture = _draw(shards, out / "batches.png", seed=seed)
    say(f"6. class counts per batch, before and after: {picture}")
    return Tour(
        cohort=out / "cohort",
        patients=counts,
        natural_recall=natural,
        balanced_recall=balanced,
        compared_batches=COMPARED_STEPS,
        equal_batches=equal,
        audit=audit,
        picture=picture,
    )


def _trained_recall(
    shards: ShardSet, *, balance: str | None, seed: int, state_file: Path | None = None
) -> dict[str, float]:
    """Train a fresh network and judge it on the untouched validation set."""
    with ExitStack() as stack:
        train = stack.enter_context(_loader(shards, balance, seed))
        val = stack.enter_context(eval_loader(shards, split="val", batch_size=GLOBAL_BATCH_SIZE))
        modalities = len(shards.read("train", 0)["image"])
        network = SmallNetwork(modalities, len(shards.classes), seed=seed)
        train_network(network, chain.from_iterable(train for _ in range(EPOCHS)))
        if state_file is not None:
            state_file.write_text(json.dumps(train.state_dict()), encoding="utf-8")
        return recall_by_class(network, val, shards.classes)


def _resumed_equals_uninterrupted(shards: ShardSet, *, seed: int) -> Iterator[bool]:
    """Stop a run, resume it on other ranks, and compare batch by batch."""
    with ExitStack() as stack:
        whole = stack.enter_context(_loader(shards, "class_balanced", seed))
        batches = _endless(whole)
        for _ in islice(batches, STOP_AFTER_STEPS):
            pass
        state = json.loads(json.dumps(whole.state_dict()))
        parts = []
        for rank in range(RESUMED_RANKS):
            part = stack.enter_context(
                _loader(shards, "class_balanced", seed, rank=rank, num_ranks=RESUMED_RANKS)
            )
            part.load_state_dict(state)
            parts.append(_endless(part))
        for _ in range(COMPARED_STEPS):
            expected = sorted(next(batches)["key"])
            found = sorted(key for part in parts for key in next(part)["key"])
            yield found == expected


def _loader(
    shards: ShardSet, balance: str | None, seed: int, *, rank: int = 0, num_ranks: int = 1
) -> BalancedLoader:
    """Make one rank's training loader."""
    return train_loader(
        shards,
        global_batch_size=GLOBAL_BATCH_SIZE,
        balance=balance,
        seed=seed,
        rank=rank,
        num_ranks=num_ranks,
        prefetch_bytes=PREFETCH_BYTES,
    )


def _endless(loader: BalancedLoader) -> Iterator[dict[str, Any]]:
    """Go on from epoch to epoch."""
    while True:
        yield from loader


def _draw(shards: ShardSet, path: Path, *, seed: int) -> Path:
    """Draw what batches hold when samples are merely shuffled, and when they are balanced."""
    panels = {}
    strategies = {
        "shuffled: whatever comes": {"name": "instance_balanced", "draw": "iid"},
        "class_balanced: the same in every batch": {"name": "class_balanced"},
    }
    for title, balance in strategies.items():
        plan = BalancedPlan.for_shards(
            shards, global_batch_size=GLOBAL_BATCH_SIZE, balance=balance, seed=seed
        )
        panels[title] = batch_class_counts(
            plan,
            shards.labels("train"),
            num_classes=len(shards.classes),
            num_batches=BATCHES_DRAWN,
        )
    draw_class_counts(panels, shards.classes, path)
    return path


def _sizes(shards: ShardSet) -> str:
    """Write the sizes of the splits."""
    return _listed({split: shards.size(split) for split in shards.splits})


def _listed(counts: Mapping[str, int]) -> str:
    """Write counts by name."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _percentages(recall: Mapping[str, float]) -> str:
    """Write recall by class."""
    return ", ".join(f"{label} {value:.0%}" for label, value in recall.items())
