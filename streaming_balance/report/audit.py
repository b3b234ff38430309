"""Who was seen in a run, and how often: from the data set and a saved state alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError, ResumeError
from streaming_balance.plan.epoch import PLAN_VERSION, BalancedPlan
from streaming_balance.report.plan_summary import patient_exposure
from streaming_balance.storage.labelling import carriers
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.state import LoaderState, delivered, mixed_in

# A state is a few hundred bytes; one with thousands of substitutions still fits easily.
MAX_STATE_BYTES = 64 * 2**20
# What tells a state from other documents, and how deep inside one it is looked for.
STATE_NAMES = frozenset({"plan_digest", "shards_digest", "position"})
MAX_DEPTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassExposure:
    """What a class was given in a run."""

    patients: int
    """Patients of the class in the split that the plan draws from."""
    seen: int
    """Patients delivered at least once; with mixing, that is as partners too."""
    delivered: int
    """Samples delivered."""
    share: float
    """Part of all deliveries; those of all classes sum to 1 unless samples have several."""
    exposure_min: int
    """Deliveries of the patient seen least, as partners too."""
    exposure_max: int
    """Deliveries of the patient seen most, as partners too."""
    as_partner: int
    """Times a sample was mixed into another one that was delivered; `delivered` has the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Who was seen, and how often, up to the position of a state."""

    split: str
    """The split that was trained on."""
    epoch: int
    """Epoch of the batch that comes next."""
    step: int
    """Step of the batch that comes next."""
    exposure: Mapping[str, int]
    """patient -> samples delivered, alone or as the partner of another, sorted by patient."""
    as_partner: Mapping[str, int]
    """patient -> those of `exposure` as the partner of another; empty without mixing."""
    mixing: Mapping[str, Any] | None
    """How batches were mixed: name, alpha, probability."""
    not_audited: tuple[str, ...]
    """Settings that may have changed who was seen in ways that nothing records."""
    classes: Mapping[str, ClassExposure]
    """By label, in class order, without the samples left out."""
    excluded: int
    """Samples of the split that the plan leaves out; `exposure` has their patients, too."""
    plan_digest: str
    """Digest of the plan that was followed."""
    shards_digest: str
    """Content digest of the data set."""


def read_state(path: Path) -> LoaderState:
    """Read a loader's state saved as JSON.

    Args:
        path: what `json.dump(loader.state_dict(), file)` wrote.

    Raises:
        ConfigError: the file cannot be read.
        ResumeError: it is not JSON, or no state.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_STATE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the state {path}: {error.strerror}.") from error
    try:
        if len(content) > MAX_STATE_BYTES:
            raise ValueError(f"it is larger than {MAX_STATE_BYTES} bytes")
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ResumeError(
            f"{path} is not a state saved as JSON ({error}). Save one in the training loop with "
            f"json.dump(loader.state_dict(), file)."
        ) from error
    try:
        _check_is_state(document)
        return LoaderState.from_dict(document)
    except ResumeError as error:
        raise ResumeError(f"{path}: {error}") from error


def audit_run(shards: ShardSet, state: LoaderState) -> Audit:
    """Count how often each patient was delivered up to a state.

    Args:
        shards: the data set that was trained on.
        state: the state of the training loader.

    Returns:
        Deliveries per patient and per class.

    Raises:
        ResumeError: the state is one of an evaluation or belongs to another data set, or its
            settings do not give the plan it names.
    """
    _check_is_of_training(state)
    if state.shards_digest != shards.digest:
        raise ResumeError(
            f"the state belongs to the data set {state.shards_digest}, but {shards.path} is "
            f"{shards.digest}. Give the folder the run was trained on."
        )
    plan, split = _rebuild_plan(shards, state)
    counts, partners = _counted(plan, state)
    labels, patients = shards.labels(split), shards.patients(split)
    left_out = np.isin(shards.keys(split), plan.settings["exclude"])
    left_out |= np.isin(patients, plan.settings["exclude"])
    total = max(1, int(counts.sum()))
    classes = {}
    for number, label in enumerate(shards.classes):
        mine = carriers(labels, number) & ~left_out
        exposure = patient_exposure(patients[mine], counts[mine] + partners[mine])
        classes[label] = ClassExposure(
            patients=len(exposure),
            seen=sum(times > 0 for times in exposure.values()),
            delivered=int(counts[mine].sum()),
            share=float(counts[mine].sum() / total),
            exposure_min=min(exposure.values(), default=0),
            exposure_max=max(exposure.values(), default=0),
            as_partner=int(partners[mine].sum()),
        )
    return Audit(
        split=split,
        epoch=state.position.epoch,
        step=state.position.step,
        exposure=patient_exposure(patients, counts + partners),
        as_partner=patient_exposure(patients, partners) if state.mixing else {},
        mixing=None if state.mixing is None else state.mixing.settings(),
        not_audited=("batch_transform",) if state.batch_transform else (),
        classes=classes,
        excluded=int(left_out.sum()),
        plan_digest=plan.digest,
        shards_digest=shards.digest,
    )


def _check_is_state(document: object) -> None:
    """Refuse a document that is something else, saying where in it a state is, if it holds one."""
    if not isinstance(document, Mapping) or STATE_NAMES & document.keys():
        return
    place = next(_states_in(document, ""), None)
    if place is not None:
        raise ResumeError(
            f"this is not the state of a loader, but holds one at {place}. Save that entry alone "
            f"with json.dump(loader.state_dict(), file)."
        )
    if "version" not in document:
        raise ResumeError(
            "this is not the state of a loader: it has none of a state's entries, such as "
            "'plan_digest'. Save one with json.dump(loader.state_dict(), file)."
        )


def _states_in(content: object, place: str, depth: int = 0) -> Iterator[str]:
    """Give the places of loaders' states inside a document, written as Python reaches them."""
    if isinstance(content, Mapping) and content.keys() >= STATE_NAMES:
        yield place
    elif depth < MAX_DEPTH and isinstance(content, Mapping | list):
        pairs = content.items() if isinstance(content, Mapping) else enumerate(content)
        for name, inner in pairs:
            yield from _states_in(inner, f"{place}[{name!r}]", depth + 1)


def _check_is_of_training(state: LoaderState) -> None:
    """Refuse the state of an evaluation loader."""
    if "balance" not in state.settings and {"batch_size", "rank"} <= state.settings.keys():
        raise ResumeError(
            f"this is the state of an evaluation over {state.settings.get('split')!r}: it delivers "
            f"every sample once, in packed order, so there is nothing to audit. Give the state of "
            f"a training loader."
        )


def _rebuild_plan(shards: ShardSet, state: LoaderState) -> tuple[BalancedPlan, str]:
    """Build the plan a state names from the settings it holds, and check that it is that plan."""
    settings: Mapping[str, Any] = state.settings
    if settings.get("version") != PLAN_VERSION:
        raise ResumeError(
            f"the state's plan has version {settings.get('version')!r}; this release plans by "
            f"version {PLAN_VERSION}. Audit with the release that trained."
        )
    try:
        split = str(settings["split"])
        plan = BalancedPlan.for_shards(
            shards,
            global_batch_size=settings["global_batch_size"],
            balance=settings["balance"],
            seed=settings["seed"],
            split=split,
            exclude=settings["exclude"],
        )
    except (KeyError, TypeError, ConfigError) as error:
        raise ResumeError(
            f"the state's settings do not give a plan over {shards.path} "
            f"({type(error).__name__}: {error}). Use the state as the loader saved it."
        ) from error
    if plan.digest != state.plan_digest:
        raise ResumeError(
            f"the state names plan {state.plan_digest}, but its settings over {shards.path} give "
            f"{plan.digest}. Use the state as the loader saved it."
        )
    return plan, split


def _counted(plan: BalancedPlan, state: LoaderState) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count per sample how often it was delivered, and how often as the partner of another.

    A state that names places its plan lacks is damaged.
    """
    try:
        return delivered(plan, state), mixed_in(plan, state)
    except (IndexError, KeyError) as error:
        raise ResumeError(
            f"the state names a place that its plan does not have ({error}). Use the state as the "
            f"loader saved it."
        ) from error
