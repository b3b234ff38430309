"""Who belongs to each class: units (patients or samples) and the samples they own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.cells import Cells
from streaming_balance.plan.keys import name_hashes, stream_key
from streaming_balance.plan.options import listed
from streaming_balance.plan.permutation import EXACT_LIMIT, mix64, sort_keys
from streaming_balance.plan.table_digest import plain_digest, table_digest

PATIENTS_SHOWN = 5
# Numbers that nobody can leave out need no order that survives it: above this a place is cheaper
# to compute than a pass is to sort (0.2 ms here, 50 ms at `EXACT_LIMIT`).
NUMBERED_EXACT_LIMIT = 1 << 13


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassMembers:
    """The units of one class, in the order of their sample numbers."""

    label: str
    """The class's name as text; random streams are keyed by it."""
    size: int
    """Number of units n_c."""
    first: int
    """First sample number, where the samples are a plain range."""
    samples: NDArray[np.int64] | None
    """`(m,)` sample numbers grouped by unit; None where they are `first, first + 1, ...`."""
    starts: NDArray[np.int64] | None
    """`(n_c + 1,)` where each unit's samples start; None where every unit is one sample."""
    names: NDArray[np.str_] | None
    """`(n_c,)` patient ids or sample keys; None where sample numbers are the names."""
    owners: NDArray[np.uint64] | None = None
    """`(n_c,)` hash of each sample's patient, where patients take turns; else None."""

    @property
    def sorted_up_to(self) -> int:
        """The largest class whose passes are sorted whole, so that leaving one out moves none."""
        numbered = self.samples is None and self.names is None and self.owners is None
        return NUMBERED_EXACT_LIMIT if numbered else EXACT_LIMIT

    def hashes(self) -> NDArray[np.uint64]:
        """Hash every unit by its own name: `(n_c,)`."""
        if self.names is not None:
            return name_hashes(self.names)
        return mix64(self.pick_first(np.arange(self.size, dtype=np.int64)).astype(np.uint64))

    def pick_first(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the first sample number of each unit."""
        places = units if self.starts is None else self.starts[units]
        return places + self.first if self.samples is None else self.samples[places]

    def pick(self, units: NDArray[np.int64], turns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the sample each unit shows at its next turn.

        Args:
            units: `(m,)` units.
            turns: `(m,)` how many turns the unit had before; its samples take turns.

        Returns:
            `(m,)` sample numbers.
        """
        if self.starts is None or self.samples is None:
            return self.pick_first(units)
        start = self.starts[units]
        owned = self.starts[units + 1] - start
        return self.samples[start + (self._first_shown(units) + turns) % owned]

    def spread(self, turns: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Add each unit's `turns` to `counts`, per sample number.

        Args:
            turns: `(n_c,)` turns every unit has had.
            counts: `(N,)` deliveries per sample; added to in place.
        """
        units = np.arange(self.size, dtype=np.int64)
        if self.starts is None or self.samples is None:
            counts[self.pick_first(units)] += turns
            return
        owned = np.diff(self.starts)
        shown = np.repeat(self._first_shown(units), owned)
        turns_here, owned_here = np.repeat(turns, owned), np.repeat(owned, owned)
        place = np.arange(len(self.samples)) - np.repeat(self.starts[:-1], owned)
        # Sample i of a unit that starts with sample o comes at turns r, r + owned, ..., r = i - o.
        wait = (place - shown) % owned_here
        counts[self.samples] += (turns_here - wait + owned_here - 1) // owned_here

    def units_with(self, membership: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Say which labels each unit has in any of its samples: `(n_c, K)` of `(N, K)`."""
        if self.starts is None or self.samples is None:
            return membership[self.pick_first(np.arange(self.size, dtype=np.int64))]
        owned = membership[self.samples]
        return np.asarray(np.logical_or.reduceat(owned, self.starts[:-1], axis=0), dtype=np.bool_)

    def units_among(self, samples: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which units have a sample among these: `(n_c,)`."""
        if self.starts is None or self.samples is None:
            return np.isin(self.pick_first(np.arange(self.size, dtype=np.int64)), samples)
        owned = np.isin(self.samples, samples)
        return np.asarray(np.logical_or.reduceat(owned, self.starts[:-1]), dtype=np.bool_)

    def subset(self, units: NDArray[np.int64]) -> ClassMembers:
        """Keep only some units, in ascending order."""
        starts = np.arange(self.size + 1, dtype=np.int64) if self.starts is None else self.starts
        owned = starts[units + 1] - starts[units]
        new_starts = np.concatenate([[0], np.cumsum(owned)]).astype(np.int64)
        places = np.arange(new_starts[-1]) + np.repeat(starts[units] - new_starts[:-1], owned)
        samples = places + self.first if self.samples is None else self.samples[places]
        return ClassMembers(
            label=self.label,
            size=len(units),
            first=0,
            samples=np.asarray(samples, dtype=np.int64),
            starts=None if self.starts is None else new_starts,
            names=None if self.names is None else self.names[units],
            owners=None if self.owners is None else self.owners[units],
        )

    def _first_shown(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """Choose the sample each unit starts with: by its name, not always the first image."""
        if self.names is not None:
            hashes = name_hashes(self.names[units])
        else:
            hashes = mix64(self.pick_first(units).astype(np.uint64))
        # Half the range leaves room to add a number of turns without overflow.
        return (hashes >> np.uint64(2)).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassTable:
    """All classes of one split, and a digest of everything that shapes a plan."""

    classes: tuple[Any, ...]
    """`(K,)` labels in class order, as the user gave them."""
    members: tuple[ClassMembers, ...]
    """`(G,)` the units of each group: a class, or a stratum of a class, class after class."""
    groups: tuple[int, ...]
    """`(G,)` class number of each group."""
    num_samples: int
    """Samples in the split, including excluded ones."""
    by_patient: bool
    """Whether units are patients."""
    one_sample_each: bool
    """Whether no patient owns more than one sample."""
    digest: str
    """Hash over key, patient, label and strata of every sample."""
    strata: tuple[tuple[str, ...], ...] | None = None
    """`(G,)` the values of the strata columns of each group; None without strata."""
    membership: NDArray[np.bool_] | None = None
    """`(N, K)` which labels each sample has, where all are drawn from one group; else None."""
    patient_numbers: NDArray[np.intp] | None = None
    """`(N,)` number of each sample's patient, where units are samples and patients have several."""

    def of_same_patients(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """List these samples, and all others of their patients where units are samples."""
        if self.patient_numbers is None:
            return samples
        mine = np.isin(self.patient_numbers, self.patient_numbers[samples])
        return np.flatnonzero(mine).astype(np.int64)

    @property
    def sizes(self) -> dict[str, int]:
        """Label as text -> number of units, in class order."""
        if self.membership is not None:
            counts = self.members[0].units_with(self.membership).sum(axis=0).tolist()
            return dict(zip(map(str, self.classes), counts, strict=True))
        sizes = dict.fromkeys(map(str, self.classes), 0)
        for group, number in zip(self.members, self.groups, strict=True):
            sizes[str(self.classes[number])] += group.size
        return sizes

    @property
    def quota_sizes(self) -> dict[str, int]:
        """What shares are given to -> number of units: classes, or all samples as one."""
        if self.membership is not None:
            return {self.members[0].label: self.members[0].size}
        return self.sizes

    @property
    def has_strata(self) -> bool:
        """Whether classes are divided into strata."""
        return self.strata is not None

    @property
    def names(self) -> list[tuple[str, ...]]:
        """`(G,)` the label of each group, and the values of its strata columns."""
        if self.strata is None:
            return [(group.label,) for group in self.members]
        labels = [str(self.classes[number]) for number in self.groups]
        return [(label, *values) for label, values in zip(labels, self.strata, strict=True)]

    def class_counts(self, drawn: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Count the samples of each class among the draws of each group.

        Args:
            drawn: `(G,)` lists of sample numbers.

        Returns:
            `(K,)` counts; with several labels a sample counts for each of them.
        """
        if self.membership is not None:
            return np.asarray(self.membership[drawn[0]].sum(axis=0), dtype=np.int64)
        return self.class_sums([len(samples) for samples in drawn])

    def class_sums(self, by_group: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Add up `(G,)` counts of groups to `(K,)` counts of classes."""
        sums = np.zeros(len(self.classes), dtype=np.int64)
        np.add.at(sums, np.array(self.groups, dtype=np.int64), by_group)
        return sums


def sized_table(sizes: Mapping[Any, int]) -> ClassTable:
    """Describe classes by their sizes alone; sample numbers run through them in class order.

    Args:
        sizes: label -> number of samples, each at least 0.

    Raises:
        ConfigError: a size is not a whole number >= 0.

    Examples:
        >>> sized_table({"HGG": 210, "LGG": 75}).members[1].first
        210
    """
    if len({str(label) for label in sizes}) < len(sizes):
        raise ConfigError(f"labels {listed(sizes)} are not all different as text; rename one.")
    members, first = [], 0
    for label, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 0:
            raise ConfigError(f"class {label!r} has size {size!r}; sizes are whole numbers >= 0.")
        members.append(_range_members(str(label), first, int(size)))
        first += int(size)
    return ClassTable(
        classes=tuple(sizes),
        members=tuple(members),
        groups=tuple(range(len(members))),
        num_samples=first,
        by_patient=False,
        one_sample_each=True,
        digest=plain_digest({str(label): int(size) for label, size in sizes.items()}),
    )


def class_table(
    codes: NDArray[np.int64],
    *,
    classes: Sequence[Any],
    patients: NDArray[np.str_] | None,
    keys: NDArray[np.str_] | None,
    excluded: NDArray[np.bool_] | None,
    by_patient: bool,
    cells: Cells | None = None,
) -> ClassTable:
    """Group samples into classes and units.

    Args:
        codes: `(N,)` class number of every sample.
        classes: `(K,)` labels in class order.
        patients: `(N,)` patient of every sample, or None.
        keys: `(N,)` sample keys, or None where sample numbers are the names.
        excluded: `(N,)` True for samples to leave out, or None.
        by_patient: whether a class cycles over patients rather than samples.
        cells: which group of its class each sample belongs to, or None where classes are whole.

    Raises:
        ConfigError: a patient has two labels although classes cycle over patients.
    """
    cells = cells or Cells.of_classes(codes, classes)
    owner = None
    if patients is not None:
        ids, owner = np.unique(patients, return_inverse=True)
        if by_patient:
            present = cells.codes if excluded is None else np.where(excluded, -1, cells.codes)
            _check_one_label(present, owner, ids, cells.shown, are_strata=cells.strata is not None)
    in_order = bool((cells.codes[1:] >= cells.codes[:-1]).all())
    rows, bounds = _rows_by_group(cells, excluded)
    members = []
    for number, label in enumerate(cells.keys):
        first, last = bounds[number : number + 2].tolist()
        if excluded is None and not by_patient and in_order:
            member = _range_members(label, first, last - first)
        else:
            member = _grouped(label, rows[first:last], owner if by_patient else None)
        members.append(_named(member, patients if by_patient else keys))
    if patients is not None and owner is not None and _takes_patients_in_turn(cells.codes, owner):
        members = [_owned(member, patients) for member in members]
    return ClassTable(
        classes=tuple(classes),
        members=tuple(members),
        groups=cells.groups,
        num_samples=len(codes),
        by_patient=by_patient,
        one_sample_each=owner is None or len(ids) == len(codes),
        digest=table_digest(cells, classes, patients, keys, excluded),
        strata=cells.strata,
        membership=cells.membership,
        patient_numbers=None if by_patient or owner is None or len(ids) == len(codes) else owner,
    )


def _rows_by_group(
    cells: Cells, excluded: NDArray[np.bool_] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sort the rows that are not left out by group, and say where each group starts."""
    codes = cells.codes
    # Numbers of 16 bits are sorted by counting, eight times as fast.
    if len(cells.keys) < np.iinfo(np.int16).max:
        codes = codes.astype(np.int16)
    if excluded is None:
        rows, counted = np.argsort(codes, kind="stable"), cells.codes
    else:
        included = np.flatnonzero(~excluded)
        rows = included[np.argsort(codes[included], kind="stable")]
        counted = cells.codes[included]
    counts = np.bincount(counted, minlength=len(cells.keys))
    return rows, np.concatenate([[0], np.cumsum(counts)])


def fixed_subset(members: ClassMembers, size: int, *, seed: int) -> ClassMembers:
    """Keep the `size` units with the smallest keyed hashes: the same ones for the whole run."""
    if size >= members.size:
        return members
    keys = sort_keys(stream_key(seed, "subset", members.label), members.hashes())
    chosen = np.argpartition(keys, size - 1)[:size]
    return members.subset(np.sort(chosen).astype(np.int64))


def _range_members(label: str, first: int, size: int) -> ClassMembers:
    """Describe a class whose samples are consecutive numbers."""
    return ClassMembers(label=label, size=size, first=first, samples=None, starts=None, names=None)


def _grouped(label: str, rows: NDArray[np.int64], owner: NDArray[np.intp] | None) -> ClassMembers:
    """Group the rows of a class by owner, or let each row be its own unit."""
    starts = None
    size = len(rows)
    if owner is not None:
        rows = rows[np.argsort(owner[rows], kind="stable")]
        changes = np.flatnonzero(np.diff(owner[rows], prepend=-1))
        size = len(changes)
        if size < len(rows):
            starts = np.append(changes, len(rows)).astype(np.int64)
    return ClassMembers(label=label, size=size, first=0, samples=rows, starts=starts, names=None)


def _named(members: ClassMembers, names: NDArray[np.str_] | None) -> ClassMembers:
    """Attach unit names, which matter only where passes are sorted exactly."""
    if names is None or members.size > EXACT_LIMIT or not members.size:
        return members
    return replace(members, names=names[members.pick_first(np.arange(members.size))])


def _takes_patients_in_turn(codes: NDArray[np.int64], owner: NDArray[np.intp]) -> bool:
    """Say whether a patient has two labels, so that classes of samples take patients in turn."""
    lowest, highest = _group_span(codes, owner)
    return bool((lowest < highest).any())


def _owned(members: ClassMembers, patients: NDArray[np.str_]) -> ClassMembers:
    """Attach patients, who then take turns, where passes are sorted exactly."""
    if members.size > EXACT_LIMIT or not members.size:
        return members
    ids, owner = np.unique(
        patients[members.pick_first(np.arange(members.size))], return_inverse=True
    )
    return replace(members, owners=name_hashes(ids)[owner])


def _check_one_label(
    codes: NDArray[np.int64],
    owner: NDArray[np.intp],
    ids: NDArray[np.str_],
    classes: Sequence[Any],
    *,
    are_strata: bool,
) -> None:
    """Refuse a patient with two labels, or in two strata of one."""
    lowest, highest = _group_span(codes, owner)
    torn = np.flatnonzero(lowest < highest)
    if torn.size:
        shown = listed(ids[torn[:PATIENTS_SHOWN]].tolist())
        one, kind = torn[0], "stratum" if are_strata else "class"
        raise ConfigError(
            f"{torn.size} patients have samples of more than one {kind} ({shown}; the first has "
            f"{classes[lowest[one]]!r} and {classes[highest[one]]!r}). Set unit: sample to balance "
            f"samples instead of patients."
        )


def _group_span(
    codes: NDArray[np.int64], owner: NDArray[np.intp]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give the lowest and the highest group of each patient; no group lies above any."""
    highest = np.full(int(owner.max(initial=-1)) + 1, -1, dtype=np.int64)
    lowest = np.full(len(highest), np.iinfo(np.int64).max)
    labelled = codes >= 0
    np.minimum.at(lowest, owner[labelled], codes[labelled])
    np.maximum.at(highest, owner[labelled], codes[labelled])
    return lowest, highest
