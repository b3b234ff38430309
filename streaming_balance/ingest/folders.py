"""The `brats` layout: SOURCE/CLASS/CASE/CASE_MODALITY.nii.gz, the class folder may be left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from streaming_balance.errors import ShardError
from streaming_balance.ingest.cases import (
    VOLUME_SUFFIXES,
    VOXEL_SUFFIXES,
    Case,
    Cohort,
    is_system_file,
    stamps_of,
    without_folder,
)
from streaming_balance.storage.manifest import Rejected

MASK = "seg"
ONLY_MODALITY = "image"
BRATS_ORDER = ("t1", "t1ce", "t2", "flair")


@dataclass(slots=True, kw_only=True)
class _Folder:
    """One case folder while it is being looked through."""

    path: Path
    """The folder; its name is the patient."""
    label: str | None
    """Name of the class folder above it."""
    images: dict[str, Path] = field(default_factory=dict)
    """Modality, or "seg", -> file."""


@dataclass(slots=True, kw_only=True)
class _Findings:
    """Everything found below the source."""

    source: Path
    """The source folder."""
    folders: list[_Folder] = field(default_factory=list)
    """Case folders."""
    rejected: list[Rejected] = field(default_factory=list)
    """Everything that is neither a case folder nor part of one."""

    def reject(self, path: Path, reason: str, *, patient: str = "") -> None:
        """List something that will not be packed."""
        place = path.relative_to(self.source).as_posix()
        self.rejected.append(Rejected(patient=patient, path=place, reason=reason))


def find_in_folders(source: Path, *, ignored: tuple[Path, ...] = ()) -> Cohort:
    """List the cases of a folder tree.

    Args:
        source: holds class folders of case folders, or case folders straight away (whose labels
            must then come from a table). Files are named CASE_MODALITY or CASE-MODALITY, the mask
            CASE_seg.
        ignored: files and folders in the source that belong to the call, such as the labels table.

    Returns:
        A case per folder that has every modality that at least half of the folders have; images
        of other modalities, foreign files, incomplete folders and folders that may not be read as
        rejected.

    Raises:
        ShardError: the source itself may not be read.
    """
    findings = _Findings(source=source)
    skipped = {path.resolve() for path in ignored}
    for path in _children(source, findings, skipped):
        try:
            if _holds_volumes(path):
                _look_into_case(path, None, findings)
                continue
            for inner in _children(path, findings, skipped):
                _look_into_case(inner, path.name, findings)
        except ShardError as error:
            findings.reject(path, without_folder(str(error), (path,)))
    expected = _expected_modalities(findings.folders)
    cases = []
    for folder in findings.folders:
        try:
            cases.append(_case(folder, expected, findings))
        except ShardError as error:
            files = tuple(folder.images.values())
            at_fault = [path for path in files if str(error).startswith(f"{path}: ")]
            reason = without_folder(str(error), files)
            findings.reject((at_fault or [folder.path])[0], reason, patient=folder.path.name)
    rejected = tuple(sorted(findings.rejected, key=lambda entry: (entry.path, entry.reason)))
    return Cohort(
        cases=tuple(cases),
        rejected=rejected,
        found=len(cases) + len(rejected),
        columns=(),
    )


def _listed(folder: Path) -> list[Path]:
    """Give what a folder holds, in order; refuse one whose names or files may not be read."""
    try:
        children = sorted(folder.iterdir())
        for child in children[:1]:
            child.lstat()  # a folder may give the names and still refuse the files
    except OSError as error:
        raise ShardError(
            f"{folder}: cannot be read ({error.strerror}); get the right to read it."
        ) from error
    return children


def _children(folder: Path, findings: _Findings, skipped: set[Path]) -> Iterator[Path]:
    """Give the folders below one; everything else there is reported."""
    for path in _listed(folder):
        if path.resolve() in skipped:
            continue
        if is_system_file(path):
            findings.reject(path, "a file or folder of the operating system, not an image.")
        elif path.is_dir():
            yield path
        else:
            findings.reject(path, "not in a case folder: expected CLASS/CASE/CASE_MODALITY.nii.gz.")


def _holds_volumes(folder: Path) -> bool:
    """Say whether a folder is a case rather than a class."""
    return any(
        path.is_file() and _stem(path) and not is_system_file(path) for path in _listed(folder)
    )


def _stem(path: Path) -> str:
    """Give a volume's name without its suffix, or nothing if it is no volume."""
    lower = path.name.lower()
    for suffix in (*VOLUME_SUFFIXES, *VOXEL_SUFFIXES):
        if lower.endswith(suffix):
            return path.name[: -len(suffix)]
    return ""


def _look_into_case(path: Path, label: str | None, findings: _Findings) -> None:
    """Sort the files of a case folder into modalities and foreign files."""
    try:
        children = _listed(path)
    except ShardError as error:
        findings.reject(path, without_folder(str(error), (path,)), patient=path.name)
        return
    folder = _Folder(path=path, label=label)
    findings.folders.append(folder)
    names = {child.name.lower() for child in children}
    for child in children:
        stem, patient = _stem(child), path.name
        if is_system_file(child):
            findings.reject(child, "a file or folder of the operating system, not an image.")
        elif child.is_dir():
            findings.reject(child, "a folder inside a case folder is not looked into.")
        elif not stem:
            findings.reject(child, f"not a NIfTI or NumPy file ({', '.join(VOLUME_SUFFIXES)}).")
        elif child.name.lower().endswith(VOXEL_SUFFIXES):
            if not names & {f"{stem.lower()}.hdr", f"{stem.lower()}.hdr.gz"}:
                findings.reject(child, "voxels without their header (.hdr).")
        else:
            modality = _modality(stem, patient)
            if modality is None:
                findings.reject(child, f"its name is not that of the case, {patient}_MODALITY.")
            elif modality in folder.images:
                findings.reject(
                    child, f"a second file of {modality!r} beside {folder.images[modality].name}."
                )
            else:
                folder.images[modality] = child


def _modality(stem: str, patient: str) -> str | None:
    """Take the modality from a file's name: what follows the case's name."""
    if stem == patient:
        return ONLY_MODALITY
    rest = stem.removeprefix(patient)
    return rest[1:] if rest != stem and rest[0] in "_-" and len(rest) > 1 else None


def _expected_modalities(folders: list[_Folder]) -> tuple[str, ...]:
    """Find the modalities that at least half of the cases have, the mask last."""
    counts = Counter(modality for folder in folders for modality in folder.images)
    held = sum(any(modality != MASK for modality in folder.images) for folder in folders)
    common = {modality for modality, count in counts.items() if 2 * count >= held}
    images = common - {MASK}
    order = [name for name in BRATS_ORDER if name in images]
    if set(order) != images:
        order = sorted(images)
    return (*order, *(common & {MASK}))


def _case(folder: _Folder, expected: tuple[str, ...], findings: _Findings) -> Case:
    """Build the case of one folder."""
    patient, images = folder.path.name, folder.images
    if not images:
        raise ShardError("the case folder holds no images.")
    if set(images) == {MASK}:
        raise ShardError(f"{images[MASK]}: mask without image.")
    for modality in expected:
        if modality not in images:
            what = "mask ('seg')" if modality == MASK else f"modality {modality!r}"
            raise ShardError(
                f"patient {patient!r}: {what} is missing, which most other cases have."
            )
    stamps = tuple(stamp for modality in expected for stamp in stamps_of(images[modality]))
    for modality in sorted(images.keys() - set(expected)):
        findings.reject(images[modality], f"{modality!r} is in fewer than half of the cases.")
    modalities = tuple(modality for modality in expected if modality != MASK)
    return Case(
        patient=patient,
        label=folder.label,
        images=tuple(images[modality] for modality in modalities),
        modalities=modalities,
        seg=images[MASK] if MASK in expected else None,
        place=folder.path.relative_to(findings.source).as_posix(),
        stamps=stamps,
    )
