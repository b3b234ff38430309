"""A cohort worth auditing, and a witness who writes down what training loops are given."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streaming_balance.report.audit import audit_of
from streaming_balance.report.patient import answer_for
from streaming_balance.report.runs import rebuild_run
from streaming_balance.report.saved_states import SavedState
from streaming_balance.report.sightings import Sighting, patient_sightings
from streaming_balance.report.tallies import Tallies, tally_run
from streaming_balance.storage.members import SplitMembers
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import BalancedLoader, train_loader
from streaming_balance.training.state import LoaderState
from tests.building import Sample
from tests.training.cohorts import packed, voxels

Place = tuple[int, int, int]


def audited_cohort(*, hgg: int = 12, lgg: int = 9, val: int = 3) -> list[Sample]:
    """Make patients H00.., L00.. in `train`, every third with two samples, and V00.. in `val`."""
    names = [*(f"H{n:02d}" for n in range(hgg)), *(f"L{n:02d}" for n in range(lgg))]
    samples: list[Sample] = []
    for name in names:
        for part in ("a", "b") if int(name[1:]) % 3 == 0 else ("a",):
            samples.append(
                Sample(
                    key=f"{name}__{part}",
                    image=voxels(len(samples)),
                    patient=name,
                    label="HGG" if name[0] == "H" else "LGG",
                    columns={"weight": str(1 + int(name[1:]) % 3)},
                )
            )
    return samples + [
        Sample(
            key=f"V{n:02d}__a",
            image=voxels(200 + n),
            patient=f"V{n:02d}",
            split="val",
            columns={"weight": "1"},
        )
        for n in range(val)
    ]


def audited_shards(folder: Path, **sizes: int) -> ShardSet:
    """Pack that cohort over several shards."""
    return packed(folder, audited_cohort(**sizes), shard_bytes=8192)


def damage(shards: ShardSet, key: str, split: str = "train") -> None:
    """Flip one bit of a sample as it lies on the disk."""
    number = shards.keys(split).tolist().index(key)
    member = SplitMembers(shards.table, split, shards.arrays).stored_array(number, "image")
    descriptor = os.open(shards.path / shards.manifest.shards[member.shard].name, os.O_RDWR)
    place = member.offset + member.bytes - 3
    (byte,) = os.pread(descriptor, 1, place)
    os.pwrite(descriptor, bytes([byte ^ 4]), place)
    os.close(descriptor)


class Witness:
    """Counts deliveries as a training loop sees them, by patient and by key."""

    def __init__(self) -> None:
        self.exposure: Counter[str] = Counter()
        """Patient or key -> times delivered, or mixed into another."""
        self.as_partner: Counter[str] = Counter()
        """Those of them as what another was mixed with."""
        self.as_substitute: Counter[str] = Counter()
        """Those of them that the plan had not asked for."""
        self.substituted: Counter[str] = Counter()
        """Times somebody else came instead."""
        self.first: dict[str, Place] = {}
        """Patient or key -> (leg, epoch, step) of the first batch with them."""
        self.last: dict[str, Place] = {}
        """The same of the last one."""
        self.batches = 0
        """Global batches received."""

    def train(self, loaders: Sequence[BalancedLoader], steps: int, *, leg: int = 0) -> None:
        """Take steps of the rest of an epoch on all ranks together, at most to its end."""
        for parts in itertools.islice(zip(*loaders, strict=True), steps):
            self.batches += 1
            for loader, part in zip(loaders, parts, strict=True):
                self._receive(loader, part, leg)

    def _receive(self, loader: BalancedLoader, part: dict[str, Any], leg: int) -> None:
        """Write down one rank's part of a batch."""
        place = leg, part["epoch"], part["step"]
        keys, patients = part["key"], part["patient"]
        asked_for = loader.plan.batch(part["epoch"], part["step"])[part["slot"].numpy()]
        owners = loader._shards.patients("train")
        all_keys = loader._shards.keys("train")
        rows = part["partner"].tolist() if "partner" in part else range(len(keys))
        for row, (sample, wanted) in enumerate(
            zip(part["sample"].tolist(), asked_for.tolist(), strict=True)
        ):
            assert all_keys[sample] == keys[row]
            for names, of in ((keys, all_keys), (patients, owners)):
                name = names[row]
                self.exposure[name] += 1
                self.first.setdefault(name, place)
                self.last[name] = place
                if rows[row] != row:
                    self.exposure[names[rows[row]]] += 1
                    self.as_partner[names[rows[row]]] += 1
                if sample != wanted:
                    self.as_substitute[name] += 1
                    self.substituted[str(of[wanted])] += 1


def build(shards: ShardSet, num_ranks: int, options: Mapping[str, Any]) -> list[BalancedLoader]:
    """Build the loaders of all ranks."""
    settings: dict[str, Any] = {"global_batch_size": 6, "seed": 5, "num_threads": 1}
    return [
        train_loader(shards, rank=rank, num_ranks=num_ranks, **(settings | dict(options)))
        for rank in range(num_ranks)
    ]


def saved(state: Mapping[str, Any]) -> SavedState:
    """Give a state as it comes out of a JSON file."""
    return SavedState.of(LoaderState.from_dict(json.loads(json.dumps(state))))


def tallied(
    shards: ShardSet, state: Mapping[str, Any], *, tables: Sequence[ShardSet] = ()
) -> Tallies:
    """Count from a state that went through JSON."""
    return tally_run(rebuild_run(shards, saved(state), tables=tables))


def places(sightings: Mapping[str, Sighting | None]) -> dict[str, Place]:
    """Give those who were seen, and where."""
    return {
        name: (where.leg, where.epoch, where.step)
        for name, where in sightings.items()
        if where is not None
    }


def nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    """Leave out those who have none."""
    return {name: count for name, count in counts.items() if count}


def of(names: set[str], counts: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out all others."""
    return {name: value for name, value in counts.items() if name in names}


def check(tallies: Tallies, witness: Witness) -> None:
    """Compare everything an audit says about everybody with what was received."""
    legs = tallies.run.legs
    patients = {name for leg in legs for name in leg.shards.patients("train").tolist()}
    audit, seen = audit_of(tallies), patient_sightings(tallies)
    assert audit.complete
    assert audit.exposure.keys() == patients
    assert nonzero(audit.exposure) == of(patients, witness.exposure)
    assert nonzero(audit.as_partner) == of(patients, witness.as_partner)
    assert audit.as_substitute == of(patients, witness.as_substitute)
    assert audit.substituted == of(patients, witness.substituted)
    assert len(audit.substitutions) == sum(of(patients, witness.substituted).values())
    assert seen.first.keys() == seen.last.keys() == patients
    assert places(seen.first) == of(patients, witness.first)
    assert places(seen.last) == of(patients, witness.last)
    assert sum(leg.batches for leg in audit.legs) == witness.batches


def check_one(tallies: Tallies, patient: str, witness: Witness) -> None:
    """Compare what an audit says about one patient's samples with what was received."""
    answer = answer_for(patient, tallies)
    everything = {patient: answer.times} | answer.samples
    for name, times in everything.items():
        assert times.exposure == witness.exposure[name]
        assert times.as_partner == witness.as_partner[name]
        assert times.as_substitute == witness.as_substitute[name]
        assert times.substituted == witness.substituted[name]
        ends = {"first": times.first_seen, "last": times.last_seen}
        assert places(ends) == {
            end: known[name]
            for end, known in (("first", witness.first), ("last", witness.last))
            if name in known
        }
