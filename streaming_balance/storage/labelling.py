"""How labels are written: one class per sample, or a set of findings joined by `|`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.storage.codecs import encode
from streaming_balance.storage.layout import member_name

SEPARATOR = "|"


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelling:
    """The classes of a data set, and whether a sample has one of them or a set of findings.

    A set is written as its findings in class order joined by `|`, the empty set as the empty text.

    Examples:
        >>> labelling = Labelling(classes=("Effusion", "Mass", "Nodule"), multi_label=True)
        >>> labelling.numbers("Effusion|Nodule"), labelling.numbers("")
        ((0, 2), ())
        >>> labelling.words(["Mass", "", "Effusion|Nodule", "Mass"])
        ('', 'Effusion|Nodule', 'Mass')
    """

    classes: tuple[str, ...]
    """Label names; the place is the class number."""
    multi_label: bool
    """Whether a sample has a set of findings, each of them a class."""

    def __post_init__(self) -> None:
        joined = [name for name in self.classes if SEPARATOR in name]
        if self.multi_label and joined:
            raise ConfigError(
                f"classes name {joined[0]!r}, but under multi_label {SEPARATOR!r} joins the "
                "findings of one sample; name each finding alone."
            )

    def numbers(self, label: str) -> tuple[int, ...]:
        """Give the class numbers of a sample's label, ascending.

        Args:
            label: the name of its class; under `multi_label` its findings in class order joined
                by `|`, or the empty text.

        Raises:
            ConfigError: a finding is no class, or they are not in class order, each once.
        """
        names = split_findings(label) if self.multi_label else (label,)
        for name in names:
            if name not in self.classes:
                raise ConfigError(
                    f"label {name!r} is no class; known: {', '.join(self.classes)}."
                    + did_you_mean(name, self.classes)
                )
        numbers = tuple(self.classes.index(name) for name in names)
        if list(numbers) != sorted(set(numbers)):
            raise ConfigError(
                f"label {label!r} must name its findings in class order, each once: "
                f"{join_findings(names, self.classes)!r}."
            )
        return numbers

    def words(self, labels: Iterable[str]) -> tuple[str, ...]:
        """List the words of the sample table's label column: its rows are sorted by their places.

        Args:
            labels: labels of samples; which ones there are matters under `multi_label` only.

        Returns:
            All classes; under `multi_label` each set of findings once, by its class numbers.

        Raises:
            ConfigError: a label is no set of findings in class order.
        """
        return tuple(sorted(set(labels), key=self.numbers)) if self.multi_label else self.classes

    def indicators(self, words: Sequence[str]) -> NDArray[np.uint8]:
        """Say of sets of findings what they hold.

        Returns:
            `(len(words), K)` of 0 and 1, a column per class.
        """
        found = np.zeros((len(words), len(self.classes)), dtype=np.uint8)
        for row, word in enumerate(words):
            found[row, list(self.numbers(word))] = 1
        return found

    def member_name(self, key: str) -> str:
        """Name the member that holds a sample's class: `KEY.cls`, or `KEY.cls.npy` for a set."""
        return member_name(key, "cls") + (".npy" if self.multi_label else "")

    def payload(self, label: str) -> bytes:
        """Write the member that holds a sample's class.

        Returns:
            The class number in digits; under `multi_label` a .npy of K bytes 0 or 1, which
            WebDataset readers decode as they do any array.
        """
        if self.multi_label:
            return encode(self.indicators([label])[0], "npy")
        return b"%d" % self.numbers(label)[0]

    def in_json(self, label: str) -> str | list[str]:
        """Give a label as `KEY.json` says it: a name, or the list of findings."""
        return list(split_findings(label)) if self.multi_label else label


def split_findings(label: str) -> tuple[str, ...]:
    """Take joined findings apart.

    Examples:
        >>> split_findings("Effusion|Mass"), split_findings("")
        (('Effusion', 'Mass'), ())
    """
    return tuple(label.split(SEPARATOR)) if label else ()


def join_findings(names: Iterable[str], classes: Sequence[str]) -> str:
    """Join findings in class order, each once.

    Examples:
        >>> join_findings(["Mass", "Effusion"], ("Effusion", "Mass", "Nodule"))
        'Effusion|Mass'
    """
    held = set(names)
    return SEPARATOR.join(name for name in classes if name in held)


def carriers(labels: NDArray[Any], number: int) -> NDArray[np.bool_]:
    """Say which samples are of a class, or have it among their findings.

    Args:
        labels: `(n,)` class numbers, or `(n, K)` of 0 and 1, as `ShardSet.labels` gives them.
        number: class number.

    Examples:
        >>> carriers(np.array([0, 1, 1]), 1).tolist()
        [False, True, True]
        >>> carriers(np.array([[1, 0], [1, 1]]), 1).tolist()
        [False, True]
    """
    return np.asarray(labels == number if labels.ndim == 1 else labels[:, number] != 0)


def count_carriers(labels: NDArray[Any], num_classes: int) -> NDArray[np.int64]:
    """Count the samples of each class; one of several findings counts for each of them.

    Args:
        labels: `(n,)` class numbers, or `(n, K)` of 0 and 1.
        num_classes: K; classes without a sample count 0.

    Returns:
        `(K,)` counts.

    Examples:
        >>> count_carriers(np.array([0, 2, 2]), 4).tolist()
        [1, 0, 2, 0]
        >>> count_carriers(np.array([[1, 0], [1, 1]], dtype=np.uint8), 2).tolist()
        [2, 1]
    """
    if labels.ndim == 1:
        return np.asarray(np.bincount(labels, minlength=num_classes), dtype=np.int64)
    return np.asarray(labels.sum(axis=0, dtype=np.int64))
