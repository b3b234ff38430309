"""Where patients belong: their split and class, and who is meant by an id that nobody has."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from streaming_balance.errors import did_you_mean
from streaming_balance.storage.labelling import join_findings, split_findings
from streaming_balance.storage.shards import ShardSet

# Ids that are alike mostly begin alike, so they stand together; comparing a million takes minutes.
NEIGHBOURS = 2000


@dataclass(frozen=True, slots=True)
class Home:
    """Where a patient belongs in a data set."""

    split: str
    """The patient's split."""
    label: str
    """Class of the samples; where they have several, all of them in class order joined by `|`."""


def everybody(shards: ShardSet) -> set[str]:
    """Give the patients of all splits of a data set."""
    return {name for split in shards.splits for name in shards.patients(split).tolist()}


def homes(shards: ShardSet) -> dict[str, Home]:
    """Say where every patient of a data set belongs.

    Returns:
        By patient, split after split in the order of the sample table.

    Examples:
        >>> from streaming_balance.storage.shards import open_shards
        >>> demo = homes(open_shards("shards/demo"))
        >>> demo["Brats_demo_015"]
        Home(split='train', label='LGG')
    """
    found: dict[str, Home] = {}
    for split in shards.splits:
        words: dict[str, dict[str, None]] = {}
        pairs = zip(
            shards.patients(split).tolist(), shards.label_words(split).tolist(), strict=True
        )
        for patient, word in pairs:
            words.setdefault(patient, {})[word] = None
        for patient, mine in words.items():
            found[patient] = Home(split, _joined(mine, shards))
    return found


def home_of(patient: str, shards: ShardSet) -> Home | None:
    """Say where one patient of a data set belongs; None for somebody it does not have."""
    for split in shards.splits:
        mine = np.flatnonzero(shards.patients(split) == patient)
        if len(mine):
            return Home(split, _joined(shards.label_words(split)[mine].tolist(), shards))
    return None


def describe_unknown(patient: str, known: Sequence[ShardSet]) -> str:
    """Say that nobody has an id, and who may be meant.

    Args:
        patient: the id.
        known: the data sets it was looked for in.
    """
    names = sorted(set().union(*map(everybody, known)))
    place = bisect_left(names, patient)
    near = names[max(0, place - NEIGHBOURS) : place + NEIGHBOURS]
    folders = " nor in ".join(dict.fromkeys(str(shards.path) for shards in known))
    hint = _as_key(patient, known) or did_you_mean(patient, near)
    return f"there is no patient {patient!r} in {folders}.{hint}"


def _as_key(name: str, known: Iterable[ShardSet]) -> str:
    """Say whose sample has a key of this name, if one has."""
    for shards in known:
        for split in shards.splits:
            mine = np.flatnonzero(shards.keys(split) == name)
            if len(mine):
                owner = str(shards.patients(split)[mine[0]])
                return f" It is the key of a sample of patient {owner!r}."
    return ""


def _joined(words: Iterable[str], shards: ShardSet) -> str:
    """Join the labels of a patient's samples in class order, each once."""
    if shards.multi_label:
        words = (finding for word in words for finding in split_findings(word))
    return join_findings(words, shards.classes)
