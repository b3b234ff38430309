"""The same voxels under two names: a leak between splits, or a patient counted twice."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from streaming_balance.errors import SplitError


@dataclass(slots=True)
class EqualVoxels:
    """Collects the content digests of images and compares them at the end."""

    owners: defaultdict[str, list[tuple[str, str, str]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """Content digest -> (key, patient, split) of every sample with it."""

    def add(self, voxels: str, *, key: str, patient: str, split: str) -> None:
        """Remember one sample's image.

        Args:
            voxels: content digest of the image.
            key: the sample's key.
            patient: its patient.
            split: its split.
        """
        self.owners[voxels].append((key, patient, split))

    def check(self) -> tuple[str, ...]:
        """Compare all samples.

        Returns:
            A sentence for every two patients of one split with equal voxels.

        Raises:
            SplitError: two patients in two splits have equal voxels.
        """
        warnings = []
        for samples in self.owners.values():
            key, patient, split = samples[0]
            for other_key, other_patient, other_split in samples[1:]:
                if other_patient == patient:
                    continue
                if other_split != split:
                    raise SplitError(
                        f"{key!r} in {split!r} and {other_key!r} in {other_split!r} have identical "
                        "voxels: a leak, even under two names. Remove one of them, or give both "
                        "one patient id."
                    )
                warnings.append(
                    f"{key!r} and {other_key!r} in {split!r} have identical voxels: one patient "
                    "under two ids?"
                )
        return tuple(warnings)
