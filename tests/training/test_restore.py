"""Restoring at every step of two epochs of many configurations, and from what was restored."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import BalancedLoader, train_loader
from streaming_balance.training.merging import merge_states
from tests.building import Sample
from tests.training.cohorts import packed, voxels
from tests.training.test_substitution import damage

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

SHAPE = (1, 4, 3, 2)
COHORTS = {"even": (9, 5), "rare": (11, 1), "large": (60, 25), "tiny": (2, 2)}
DAMAGED = ("H03", "H05", "L01")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration of a run."""

    balance: Any
    """What to balance by."""
    batch: int
    """Samples in a global batch."""
    ranks: int = 1
    """Data-parallel ranks."""
    cohort: str = "even"
    """Who is trained on."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other settings of the loader."""
    after: str | None = None
    """What the run balanced by in its first three batches, before its plan was changed."""


def noisy(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Add keyed noise, and flip by chance."""
    image = sample["image"] + torch.from_numpy(rng.normal(size=sample["image"].shape))
    return sample | {"image": image.flip(1) if rng.random() < 0.5 else image}


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    """Change a whole batch."""
    return batch | {"image": batch["image"] * 2}


NOISY = {"transform": noisy}
MIXUP = {"mixing": {"name": "mixup", "alpha": 0.4}}
CUTMIX = {"mixing": {"name": "cutmix", "probability": 0.5}}
SUBSTITUTE = {"on_error": "substitute"}
CASES = {
    "natural": Case(balance=None, batch=6),
    "natural, short, 2 ranks": Case(
        balance={"name": "natural", "last": "short"}, batch=5, ranks=2, options=NOISY
    ),
    "natural, drop, 3 ranks": Case(balance={"name": "natural", "last": "drop"}, batch=4, ranks=3),
    "natural, one step an epoch": Case(balance=None, batch=14, ranks=7),
    "class_balanced": Case(balance="class_balanced", batch=4, options={"num_threads": 3}),
    "class_balanced, 3 ranks share 7": Case(balance="class_balanced", batch=7, ranks=3),
    "class_balanced, a class of one": Case(balance="class_balanced", batch=6, cohort="rare"),
    "class_balanced, batches of one": Case(balance="class_balanced", batch=1, cohort="tiny"),
    "nobody twice": Case(balance={"name": "class_balanced", "replacement": False}, batch=2),
    "power": Case(balance={"name": "power", "alpha": 0.3, "last": "short"}, batch=6, ranks=2),
    "effective_number": Case(balance={"name": "effective_number", "beta": 0.9}, batch=5),
    "manual_weights": Case(
        balance={"name": "manual_weights", "weights": {"HGG": 1, "LGG": 2.5}}, batch=6, ranks=3
    ),
    "target": Case(
        balance={"name": "target", "shares": {"HGG": 0.3, "LGG": 0.7}}, batch=9, ranks=4,
        cohort="large",
    ),
    "upsample": Case(balance={"name": "upsample", "target_ratio": 0.8}, batch=6),
    "downsample": Case(balance={"name": "downsample"}, batch=4, ranks=2, cohort="large"),
    "downsample, fixed": Case(balance={"name": "downsample", "rotate": False}, batch=3),
    "progressively_balanced": Case(
        balance={"name": "progressively_balanced", "num_epochs": 3}, batch=5, ranks=2
    ),
    "deferred": Case(
        balance={"name": "deferred", "start_epoch": 1, "then": {"name": "upsample"}}, batch=6
    ),
    "repeat_factor": Case(balance={"name": "repeat_factor", "threshold": 0.6}, batch=4, ranks=2),
    "sample_weights": Case(balance={"name": "sample_weights", "weights": "hardness"}, batch=5),
    "p_k": Case(balance={"name": "p_k", "P": 2, "M": 2}, batch=4, ranks=4),
    "iid": Case(balance={"name": "class_balanced", "draw": "iid"}, batch=5, ranks=2),
    "strata": Case(
        balance={"name": "class_balanced", "strata": ["label", "site"]}, batch=8, ranks=2,
        cohort="large",
    ),
    "mixup": Case(balance="class_balanced", batch=6, ranks=2, options=MIXUP),
    "cutmix, sometimes": Case(
        balance="class_balanced", batch=5, options={**CUTMIX, **NOISY, "batch_transform": doubled}
    ),
    "substitution": Case(balance="class_balanced", batch=3, ranks=1, options=SUBSTITUTE),
    "substitution, 2 ranks": Case(balance="class_balanced", batch=4, ranks=2, options=SUBSTITUTE),
    "carried over": Case(balance="class_balanced", batch=5, ranks=2, after="upsample"),
    "some left out": Case(balance="class_balanced", batch=4, options={"exclude": ["H02", "L04"]}),
}  # fmt: skip
WORKERS = {
    "workers": Case(balance="class_balanced", batch=5, options={**NOISY, "workers": 2}),
    "workers, mixup, 2 ranks": Case(
        balance="natural", batch=8, ranks=2, options={**NOISY, **MIXUP, "workers": 1}
    ),
}


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    """Every cohort, and one with damaged samples."""
    folder = tmp_path_factory.mktemp("restore")
    sets = {name: packed(folder / name, patients(*sizes)) for name, sizes in COHORTS.items()}
    sets["damaged"] = packed(folder / "damaged", patients(*COHORTS["even"]))
    for key in DAMAGED:
        damage(sets["damaged"], key)
    return sets


def patients(hgg: int, lgg: int) -> list[Sample]:
    """Make patients of two classes, two sites and four degrees of hardness."""
    names = [*(f"H{n:02d}" for n in range(hgg)), *(f"L{n:02d}" for n in range(lgg))]
    return [
        Sample(
            key=name,
            image=voxels(number, SHAPE),
            label="HGG" if name[0] == "H" else "LGG",
            columns={"site": "AB"[number % 2], "hardness": str(1 + number % 4)},
        )
        for number, name in enumerate(names)
    ]


@contextlib.contextmanager
def ranks_of(
    cohorts: dict[str, ShardSet], case: Case, state: str | None = None, **changed: Any
) -> Iterator[list[BalancedLoader]]:
    """Build the loaders of all ranks, where a state says to go on."""
    settings: dict[str, Any] = {"seed": 19, "num_threads": 1, **case.options, **changed}
    name = "damaged" if "on_error" in case.options else case.cohort
    with contextlib.ExitStack() as stack:
        loaders = [
            stack.enter_context(
                train_loader(
                    cohorts[name],
                    global_batch_size=case.batch,
                    balance=case.balance,
                    rank=rank,
                    num_ranks=case.ranks,
                    **settings,
                )
            )
            for rank in range(case.ranks)
        ]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(state))
        yield loaders


def note(batch: dict[str, Any]) -> tuple[Any, ...]:
    """Say what one rank got: its place, who at which slot, and a checksum of every tensor."""
    hasher = hashlib.sha256()
    for name in sorted(batch):
        if isinstance(batch[name], torch.Tensor):
            hasher.update(repr((name, batch[name].dtype, tuple(batch[name].shape))).encode())
            hasher.update(batch[name].numpy().tobytes())
    place = batch["epoch"], batch["step"], batch["loss_scale"]
    return *place, batch["sample"].tolist(), batch["slot"].tolist(), hasher.hexdigest()


def step(loaders: list[BalancedLoader]) -> list[tuple[Any, ...]]:
    """Take one global batch: every rank's part."""
    return [note(next(iter(loader))) for loader in loaders]


def saved(loaders: list[BalancedLoader]) -> str:
    """Give the state of the run as it would be saved; ranks have the same, but for records."""
    states = [loader.state_dict() for loader in loaders]
    if states[0]["substitutions"] or states[0]["recorders"]:
        return json.dumps(merge_states(states))
    assert len({json.dumps(state) for state in states}) == 1
    return json.dumps(states[0])


def straight(
    cohorts: dict[str, ShardSet], case: Case, epochs: int = 2
) -> tuple[list[Any], list[str], list[Any]]:
    """Run without a stop: the batches, the state before each of them, and the exposure there."""
    batches: list[Any] = []
    states: list[str] = []
    exposures: list[Any] = []
    with ranks_of(cohorts, case) as loaders:
        if case.after is not None:
            for loader in loaders:
                loader.load_state_dict(left_early(cohorts, case), carry_exposure=True)
        # One batch of the epoch after: the last step and what comes after it are stops, too.
        while not batches or batches[-1][0][0] < epochs:
            states.append(saved(loaders))
            exposures.append(loaders[0].exposure().tolist())
            batches.append(step(loaders))
    return batches, states, exposures


def left_early(cohorts: dict[str, ShardSet], case: Case) -> dict[str, Any]:
    """Give the state of a run under another plan that was left in its first epoch."""
    earlier = replace(case, balance=case.after, after=None, batch=3, ranks=1)
    with ranks_of(cohorts, earlier) as (loader,):
        for _ in range(3):
            step([loader])
        return loader.state_dict()


@pytest.mark.parametrize("name", CASES)
def test_restoring_at_every_step_gives_the_batch_of_the_uninterrupted_run(
    cohorts: dict[str, ShardSet], name: str
) -> None:
    case = CASES[name]
    batches, states, exposures = straight(cohorts, case)
    places = [(ranks[0][0], ranks[0][1]) for ranks in batches]
    assert places[0] == (0, 0)
    assert places[-1] == (2, 0)
    assert len(set(places)) == len(places)
    for expected, state, exposure in zip(batches, states, exposures, strict=True):
        # Nothing is read ahead here, so that what was under way there cannot matter either.
        with ranks_of(cohorts, case, state, prefetch_bytes=0) as loaders:
            assert saved(loaders) == state
            # What other ranks replaced is known where their states were united.
            if case.options != SUBSTITUTE or case.ranks == 1:
                assert loaders[0].exposure().tolist() == exposure
            assert step(loaders) == expected


@pytest.mark.parametrize("name", CASES)
def test_a_run_restored_before_every_batch_is_the_uninterrupted_run(
    cohorts: dict[str, ShardSet], name: str
) -> None:
    case = CASES[name]
    batches, states, _ = straight(cohorts, case)
    state = states[0]
    for number, expected in enumerate(batches):
        with ranks_of(cohorts, case, state, prefetch_bytes=0) as loaders:
            assert step(loaders) == expected
            state = saved(loaders)
        if number + 1 < len(states):
            assert state == states[number + 1]


@pytest.mark.parametrize("name", WORKERS)
def test_restoring_worker_processes_at_every_step_and_from_other_numbers_of_them(
    cohorts: dict[str, ShardSet], name: str
) -> None:
    case = WORKERS[name]
    batches, states, _ = straight(cohorts, case, epochs=1)
    for workers in (0, case.options["workers"], 3):
        for expected, state in list(zip(batches, states, strict=True))[:: 1 + workers // 2]:
            with ranks_of(cohorts, case, state, workers=workers) as loaders:
                assert step(loaders) == expected


def test_the_configurations_are_more_than_twenty() -> None:
    assert len(CASES) + len(WORKERS) > 20


def test_every_damaged_sample_was_replaced_on_the_way(cohorts: dict[str, ShardSet]) -> None:
    case = CASES["substitution"]
    _, states, _ = straight(cohorts, case)
    replaced = {record["sample"] for record in json.loads(states[-1])["substitutions"]}
    keys = cohorts["damaged"].keys("train")
    assert {keys[number] for number in replaced} == set(DAMAGED)
