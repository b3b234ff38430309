"""Splitting patients into train, validation and test.

A patient goes to one split with everything it owns. Every label is divided on its own, so a rare
class stands in each split in its proportion, and a patient's place follows from its name alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from streaming_balance.errors import ConfigError, SplitError
from streaming_balance.plan.keys import check_seed, stream_key

# Split names become file names ("train-000000.tar"), so they stay plain.
SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Fractions written as decimals rarely sum to exactly 1: three thirds may be written 0.333.
FRACTION_SUM_TOLERANCE = Fraction(1, 500)
KNOWN_ORDER = ("train", "val", "valid", "validation", "test")
NAMES_SHOWN = 5


def parse_fractions(split: str | Mapping[str, float | Fraction]) -> dict[str, Fraction]:
    """Read the fractions of a split.

    Args:
        split: `"train=0.7,val=0.15,test=0.15"` or the same as a mapping; every fraction in
            (0, 1], together 1.

    Returns:
        The exact fraction of each split in the order given, scaled to a sum of exactly 1.

    Raises:
        ConfigError: a name or a fraction cannot be used, or the sum is not 1.

    Examples:
        >>> parse_fractions("train=0.75,val=0.25")
        {'train': Fraction(3, 4), 'val': Fraction(1, 4)}
    """
    pairs = _pairs_of_text(split) if isinstance(split, str) else split.items()
    if not pairs:
        raise ConfigError("split names no split; write for example split='train=0.8,val=0.2'.")
    fractions: dict[str, Fraction] = {}
    for name, value in pairs:
        if not isinstance(name, str) or not SPLIT_NAME.fullmatch(name):
            raise ConfigError(
                f"split has the name {name!r}; a name is 1 to 64 letters, digits, '_' or '-'."
            )
        if name in fractions:
            raise ConfigError(f"split names {name!r} twice; give each split one fraction.")
        fractions[name] = _fraction(name, value)
    total = sum(fractions.values(), Fraction(0))
    if abs(total - 1) > FRACTION_SUM_TOLERANCE:
        raise ConfigError(
            f"split has fractions with a sum of {float(total):g}; every patient goes somewhere, "
            "so they must sum to 1."
        )
    return {name: fraction / total for name, fraction in fractions.items()}


def split_patients(
    patients: Sequence[str],
    labels: Sequence[str],
    *,
    fractions: Mapping[str, float | Fraction],
    seed: int,
) -> dict[str, str]:
    """Assign every patient to a split, each label on its own.

    A patient's place among the patients of its label comes from a key made of the seed, the label
    and its id: the order they are listed in does not matter, and another patient more or less
    leaves the order of the others alone.

    Args:
        patients: `(n,)` ids; a patient may come once per sample.
        labels: `(n,)` labels. A patient with several is divided with the rarest of them.
        fractions: split name -> fraction in (0, 1], together 1.
        seed: names the random stream, in [0, 2**64 - 1].

    Returns:
        Patient -> split. Of every label each split gets the floor or the ceiling of its share;
        what is left over goes to the largest remainders, ties to the split named first.

    Raises:
        ConfigError: lengths differ, or a fraction cannot be used.

    Examples:
        >>> assigned = split_patients(
        ...     [f"P{i}" for i in range(8)], ["HGG"] * 6 + ["LGG"] * 2,
        ...     fractions={"train": 0.5, "val": 0.5}, seed=0,
        ... )
        >>> sorted(assigned.values())
        ['train', 'train', 'train', 'train', 'val', 'val', 'val', 'val']
    """
    if len(patients) != len(labels):
        raise ConfigError(
            f"split_patients got {len(patients)} patients and {len(labels)} labels; "
            "give one label per patient listed."
        )
    seed = check_seed(seed)
    shares = parse_fractions(fractions)
    members: dict[str, list[str]] = {}
    for patient, label in _rarest_label(patients, labels).items():
        members.setdefault(label, []).append(patient)
    assigned: dict[str, str] = {}
    for label, names in members.items():
        ordered = sorted(names, key=lambda name: (_place(seed, label, name), name))
        start = 0
        for split, count in _largest_remainders(shares, len(ordered)).items():
            assigned.update(dict.fromkeys(ordered[start : start + count], split))
            start += count
    return {patient: assigned[patient] for patient in dict.fromkeys(patients)}


def check_patients_apart(patients: Sequence[str], splits: Sequence[str]) -> None:
    """Make sure that no patient stands in two splits.

    Args:
        patients: `(n,)` ids, one per sample.
        splits: `(n,)` the split each sample is in.

    Raises:
        SplitError: naming the patients found in more than one split.

    Examples:
        >>> check_patients_apart(["P1", "P1", "P2"], ["train", "train", "val"])
    """
    places: dict[str, dict[str, None]] = {}
    for patient, split in zip(patients, splits, strict=True):
        places.setdefault(patient, {})[split] = None
    both = {patient: tuple(found) for patient, found in places.items() if len(found) > 1}
    if not both:
        return
    shown = ", ".join(
        f"{patient!r} ({' and '.join(found)})"
        for patient, found in list(both.items())[:NAMES_SHOWN]
    )
    more = f" and {len(both) - NAMES_SHOWN} more" if len(both) > NAMES_SHOWN else ""
    raise SplitError(
        f"{len(both)} patient(s) stand in more than one split: {shown}{more}. A patient belongs to "
        "one split with all its samples: correct the split column, or leave it out and give "
        "split='train=0.7,val=0.15,test=0.15'."
    )


def order_splits(names: Iterable[str]) -> tuple[str, ...]:
    """Put split names in the customary order: train, val, test, then the others by name.

    Examples:
        >>> order_splits(["test", "fold1", "train"])
        ('train', 'test', 'fold1')
    """
    known = {name: place for place, name in enumerate(KNOWN_ORDER)}
    return tuple(sorted(set(names), key=lambda name: (known.get(name, len(known)), name)))


def _pairs_of_text(text: str) -> list[tuple[str, str]]:
    """Cut `"train=0.7,val=0.3"` into names and values."""
    pairs = []
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(
                f"split has the part {part.strip()!r}; write NAME=FRACTION, for example "
                "split='train=0.7,val=0.15,test=0.15'."
            )
        pairs.append((name.strip(), value.strip()))
    return pairs


def _fraction(name: str, value: object) -> Fraction:
    """Read one fraction exactly as it is written: 0.7 means 7/10."""
    problem = (
        f"split gives {name!r} the fraction {value!r}; it must be a number above 0, at most 1."
    )
    if isinstance(value, bool) or not isinstance(value, int | float | str | Fraction):
        raise ConfigError(problem)
    try:
        fraction = Fraction(str(value))
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(problem) from error
    if not 0 < fraction <= 1:
        raise ConfigError(problem)
    return fraction


def _rarest_label(patients: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """Choose the label each patient is divided with: its rarest, so that rare ones spread."""
    owners = Counter(label for _, label in set(zip(patients, labels, strict=True)))
    chosen: dict[str, str] = {}
    for patient, label in zip(patients, labels, strict=True):
        held = chosen.get(patient, label)
        chosen[patient] = min(held, label, key=lambda name: (owners[name], name))
    return chosen


def _place(seed: int, label: str, patient: str) -> int:
    """Give the key that orders the patients of a label."""
    return stream_key(seed, "split", label, patient)


def _largest_remainders(shares: Mapping[str, Fraction], count: int) -> dict[str, int]:
    """Divide `count` patients: floors first, then one more for the largest remainders."""
    ideal = {name: share * count for name, share in shares.items()}
    counts = {name: int(amount) for name, amount in ideal.items()}
    # sorted() is stable: of equal remainders the split named first comes first.
    by_remainder = sorted(ideal, key=lambda name: counts[name] - ideal[name])
    for name in by_remainder[: count - sum(counts.values())]:
        counts[name] += 1
    return counts
