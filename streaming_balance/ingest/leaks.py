"""The same voxels under two names: a leak between splits, or a patient counted twice."""

from __future__ import annotations

from streaming_balance.errors import SplitError


class EqualVoxels:
    """Compares the content digest of every image with all before it.

    Examples:
        >>> equal = EqualVoxels()
        >>> equal.add("d1", key="P1", patient="P1", split="train")
        >>> equal.add("d1", key="P2", patient="P2", split="train")
        >>> equal.warnings
        ("'P1' and 'P2' in 'train' have identical voxels: one patient under two ids?",)
    """

    def __init__(self) -> None:
        self._first: dict[str, tuple[str, str, str]] = {}
        self._warnings: list[str] = []

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for every patient whose image another patient of the split has too."""
        return tuple(self._warnings)

    def add(self, voxels: str, *, key: str, patient: str, split: str) -> None:
        """Compare one sample's image with those before it.

        Args:
            voxels: content digest of the image.
            key: the sample's key.
            patient: its patient.
            split: its split.

        Raises:
            SplitError: another patient, in another split, has the same image.
        """
        first_key, first_patient, first_split = self._first.setdefault(
            voxels, (key, patient, split)
        )
        if first_patient == patient:
            return
        if first_split != split:
            raise SplitError(
                f"{first_key!r} in {first_split!r} and {key!r} in {split!r} have identical voxels: "
                "a leak, even under two names. Leave one of them out, or give both one patient id."
            )
        self._warnings.append(
            f"{first_key!r} and {key!r} in {split!r} have identical voxels: one patient under two "
            "ids?"
        )
