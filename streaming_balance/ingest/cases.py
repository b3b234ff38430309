"""One sample to be, and what a cohort consists of before any voxel is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streaming_balance.errors import ShardError
from streaming_balance.ingest.nifti import stamps_of_nifti
from streaming_balance.ingest.sources import SourceStamp
from streaming_balance.storage.layout import sample_key
from streaming_balance.storage.manifest import Rejected

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".hdr.gz", ".hdr", ".npy", ".npz")
# The second half of a pair: read through its header, never a volume of its own.
VOXEL_SUFFIXES = (".img.gz", ".img")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One sample to be: the files of one patient, or of one of its samples."""

    patient: str
    """The patient's pseudonymous id, as given."""
    sample: str | None = None
    """Which of the patient's samples; None where it has only one."""
    label: str | None
    """The class, or findings joined by `|`; None until a table gives it, "" for an empty cell."""
    images: tuple[Path, ...]
    """Image files, in channel order."""
    modalities: tuple[str, ...]
    """Name of each image; ("image",) where there is only one kind."""
    seg: Path | None = None
    """Mask; None where the cohort has none."""
    split: str | None = None
    """The split given by a table; None if it is to be drawn."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Further columns of the tables, such as the site."""
    place: str
    """Where it was found: a folder below the source, or a line of the manifest."""
    stamps: tuple[SourceStamp, ...]
    """What its files looked like when they were found."""

    @property
    def key(self) -> str:
        """The sample's key in the shards."""
        return sample_key(self.patient, self.sample)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Everything that was found in a source."""

    cases: tuple[Case, ...]
    """What can be packed, as far as names and sizes tell."""
    rejected: tuple[Rejected, ...]
    """What cannot, each with its reason."""
    found: int
    """How many things there were: cases and rejected together."""
    columns: tuple[str, ...]
    """Names of the further columns, in table order."""
    warnings: tuple[str, ...] = ()
    """What the user should know about the source."""


def stamps_of(path: Path) -> tuple[SourceStamp, ...]:
    """Take the stamps of an image file and make sure that it can be one.

    Raises:
        ShardError: the file is missing or empty, is a hidden file of the system, or is of a kind
            that is not read.
    """
    if is_system_file(path):
        raise ShardError(f"{path}: a file of the operating system, not an image.")
    if not path.name.lower().endswith((*VOLUME_SUFFIXES, *VOXEL_SUFFIXES)):
        raise ShardError(f"{path}: not a NIfTI or NumPy file ({', '.join(VOLUME_SUFFIXES)}).")
    try:
        stamps = stamps_of_nifti(path)
    except OSError as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path}: cannot be opened ({error.strerror}).") from error
    for stamp in stamps:
        if not stamp.path.is_file():
            raise ShardError(f"{path}: not a regular file.")
        if stamp.size_bytes == 0:
            raise ShardError(f"{stamp.path}: empty file, 0 bytes; expected a header and voxels.")
    return stamps


def is_system_file(path: Path) -> bool:
    """Say whether an operating system left this file or folder.

    Examples:
        >>> is_system_file(Path("HGG/._P1_t1.nii.gz")), is_system_file(Path("HGG/P1_t1.nii.gz"))
        (True, False)
    """
    return path.name.startswith(".") or path.name in {"__MACOSX", "Thumbs.db", "desktop.ini"}


def reported_path(path: Path, root: Path) -> str:
    """Write a file's path for a report: the same wherever the source lies.

    Examples:
        >>> reported_path(Path("raw/HGG/P1.nii"), Path("raw"))
        'HGG/P1.nii'
        >>> reported_path(Path("elsewhere/P1.nii"), Path("raw"))
        'P1.nii'
    """
    relative = Path(os.path.relpath(path, root))
    # The way to a file outside the source names folders of the machine.
    return path.name if relative.parts[:1] == ("..",) else relative.as_posix()


def without_folder(reason: str, paths: tuple[Path, ...]) -> str:
    """Take the folders out of a reason, so that it is the same wherever the source lies."""
    for path in paths:
        reason = reason.removeprefix(f"{path}: ").replace(str(path), path.name)
    return reason
