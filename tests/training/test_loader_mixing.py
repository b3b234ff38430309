"""Mixing in the loader: keyed, resumable, recorded, and both partners in the audit."""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from streaming_balance.cli.app import run
from streaming_balance.errors import ConfigError, ResumeError
from streaming_balance.report.audit import audit_run
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import BalancedLoader, train_loader
from streaming_balance.training.mixing import cutmix, mixup
from streaming_balance.training.state import LoaderState
from tests.building import Sample
from tests.training.cohorts import cohort, packed, voxels

CUTMIX = {"name": "cutmix", "alpha": 1.0}
STEPS = 3  # 14 patients in batches of 6, the last one filled


def loader_of(shards: ShardSet, **options: Any) -> BalancedLoader:
    """Build the loader most tests use."""
    settings: dict[str, Any] = {
        "global_batch_size": 6,
        "balance": "class_balanced",
        "seed": 7,
        "num_threads": 1,
        "mixing": CUTMIX,
    }
    return train_loader(shards, **settings | options)


def epochs(loader: BalancedLoader, count: int) -> list[dict[str, Any]]:
    """Take every batch of so many epochs."""
    return [batch for _ in range(count) for batch in loader]


def credited(batch: dict[str, Any]) -> Counter[str]:
    """Say who is in a batch: each row's own patient, and where it is mixed its partner's."""
    patients = batch["patient"]
    rows = batch["partner"].tolist()
    return Counter(patients) + Counter(
        patients[other] for row, other in enumerate(rows) if other != row
    )


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare all entries of two batches."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        assert same, name


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_a_loader_gives_what_the_function_makes_of_its_plain_batches(
    small: ShardSet, name: str, alpha: float
) -> None:
    function = mixup if name == "mixup" else cutmix
    with (
        loader_of(small, mixing=None) as plain,
        loader_of(small, mixing={"name": name, "alpha": alpha}) as mixed,
    ):
        for one, other in zip(epochs(plain, 2), epochs(mixed, 2), strict=True):
            assert_same(function(one, alpha=alpha, num_classes=2, seed=7), other)


def test_threads_and_a_named_device_change_nothing(small: ShardSet) -> None:
    with loader_of(small) as one, loader_of(small, num_threads=4, device="cpu") as other:
        for first, second in zip(epochs(one, 2), epochs(other, 2), strict=True):
            assert_same(first, second)


def keep(sample: dict[str, Any]) -> dict[str, Any]:
    """Leave a sample as it is; worker processes need a transform they can import."""
    return sample


def test_worker_processes_change_nothing(small: ShardSet) -> None:
    with (
        loader_of(small, transform=keep) as here,
        loader_of(small, transform=keep, workers=2) as there,
    ):
        for first, second in zip(epochs(here, 1), epochs(there, 1), strict=True):
            assert_same(first, second)


def test_resuming_anywhere_goes_on_as_if_never_stopped(small: ShardSet) -> None:
    halves = {"name": "mixup", "alpha": 0.3, "probability": 0.5}
    with loader_of(small, mixing=halves) as straight:
        expected = epochs(straight, 3)
    for stop in range(3 * STEPS):
        with loader_of(small, mixing=halves) as first, loader_of(small, mixing=halves) as second:
            for _ in itertools.islice(itertools.chain(first, first, first), stop):
                pass
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            assert_same(next(iter(second)), expected[stop])


def test_lambda_of_a_sample_is_the_same_on_any_number_of_ranks(small: ShardSet) -> None:
    halves = {"name": "mixup", "alpha": 0.3, "probability": 0.5}

    def lambdas(num_ranks: int) -> list[dict[int, float]]:
        """Unite the ranks' lambdas, batch by batch: slot -> lambda."""
        found: list[dict[int, float]] = [{} for _ in range(4 * STEPS)]
        for rank in range(num_ranks):
            with loader_of(small, mixing=halves, rank=rank, num_ranks=num_ranks) as loader:
                for place, batch in enumerate(epochs(loader, 4)):
                    pairs = zip(batch["slot"].tolist(), batch["lam"].tolist(), strict=True)
                    found[place].update(pairs)
        return found

    alone = lambdas(1)
    assert {len(batch) for batch in alone} == {6}
    assert lambdas(2) == alone
    assert lambdas(3) == alone


def test_a_batch_left_alone_has_the_entries_of_a_mixed_one(small: ShardSet) -> None:
    rarely = {"name": "cutmix", "probability": 0.0}
    with loader_of(small, mixing=rarely) as mixed, loader_of(small, mixing=None) as plain:
        for one, other in zip(epochs(mixed, 1), epochs(plain, 1), strict=True):
            assert torch.equal(one["image"], other["image"])
            assert one["lam"].tolist() == [1.0] * 6
            assert one["partner"].tolist() == list(range(6))
            assert one["label"].argmax(1).tolist() == other["label"].tolist()
            assert one["label"].sum(1).tolist() == [1.0] * 6
            assert torch.equal(one["label_a"], one["label_b"])


def test_the_batch_transform_gets_mixed_batches(small: ShardSet) -> None:
    got: list[tuple[int, ...]] = []

    def look(batch: dict[str, Any]) -> dict[str, Any]:
        got.append(tuple(batch["label"].shape))
        return batch

    with loader_of(small, batch_transform=look) as loader:
        next(iter(loader))
    assert got == [(6, 2)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("probability", [1.0, 0.5])
def test_an_audit_credits_both_partners_through_breaks_jumps_and_resumes_on_other_ranks(
    small: ShardSet, seed: int, probability: float
) -> None:
    choose = random.Random(seed)
    mixing = {"name": "cutmix", "probability": probability}
    received: Counter[str] = Counter()

    def ranks(num_ranks: int) -> list[BalancedLoader]:
        return [
            loader_of(small, mixing=mixing, rank=rank, num_ranks=num_ranks)
            for rank in range(num_ranks)
        ]

    loaders = ranks(1)
    for _ in range(14):
        action = choose.choice(["deliver", "deliver", "jump", "resume"])
        if action == "deliver":
            count = choose.randint(1, STEPS)
            for loader in loaders:
                for batch in itertools.islice(loader, count):
                    received += credited(batch)
        elif action == "jump":
            epoch = choose.randint(0, 5)
            for loader in loaders:
                loader.set_epoch(epoch)
        else:
            state = loaders[0].state_dict()
            for loader in loaders:
                loader.close()
            loaders = ranks(choose.randint(1, 3))
            for loader in loaders:
                loader.load_state_dict(state)
        texts = {json.dumps(loader.state_dict()) for loader in loaders}
        assert len(texts) == 1
        audit = audit_run(small, LoaderState.from_dict(json.loads(texts.pop())))
        assert {name: times for name, times in audit.exposure.items() if times} == dict(received)
    patients = small.patients("train").tolist()
    exposure = dict(zip(patients, loaders[0].exposure().tolist(), strict=True))
    assert exposure == dict(audit.exposure)
    for loader in loaders:
        loader.close()


def test_patients_twice_in_a_batch_and_landings_amid_an_epoch_are_counted_as_often(
    small: ShardSet,
) -> None:
    # 7 LGG of a batch come from 5 patients, so some are there twice.
    options: dict[str, Any] = {
        "global_batch_size": 14,
        "mixing": {"name": "mixup", "probability": 0.5},
    }
    with loader_of(small, **options) as loader:
        assert len(loader) == 1
        received: Counter[str] = Counter()
        for batch in epochs(loader, 8):
            received += credited(batch)
        audit = audit_run(small, LoaderState.from_dict(loader.state_dict()))
    assert {name: times for name, times in audit.exposure.items() if times} == dict(received)

    halves = {"name": "mixup", "probability": 0.5}
    with loader_of(small, mixing=halves) as loader:
        everything = epochs(loader, 4)
        state = loader.state_dict()
    # Written by hand: the run left epoch 0 after a batch and went on amid epoch 2.
    state["skipped"] = [{"from": [0, 1], "to": [2, 1]}]
    was_there = [b for b in everything if (b["epoch"], b["step"]) == (0, 0) or b["epoch"] == 3]
    was_there += [b for b in everything if b["epoch"] == 2 and b["step"] >= 1]
    total = sum((credited(batch) for batch in was_there), Counter[str]())
    audit = audit_run(small, LoaderState.from_dict(state))
    assert {name: times for name, times in audit.exposure.items() if times} == dict(total)


def test_an_audit_tells_deliveries_and_partners_apart(small: ShardSet) -> None:
    with loader_of(small) as loader:
        own = Counter(name for batch in epochs(loader, 2) for name in batch["patient"])
        spread = loader.stats()["exposure_spread"]
        audit = audit_run(small, LoaderState.from_dict(loader.state_dict()))
    # All batches are mixed, so everybody was a partner as often as delivered.
    assert {name: times for name, times in audit.as_partner.items() if times} == dict(own)
    assert dict(audit.exposure) == {name: 2 * own[name] for name in audit.exposure}
    assert audit.mixing == {"name": "cutmix", "alpha": 1.0, "probability": 1.0}
    for entry in audit.classes.values():
        assert (entry.delivered, entry.as_partner) == (18, 18)
        assert entry.share == 0.5
    # HGG: 18 over 9 patients, LGG: 18 over 5, each as often a partner.
    seen = {label: (e.exposure_min, e.exposure_max) for label, e in audit.classes.items()}
    assert seen == {"HGG": (4, 4), "LGG": (6, 8)}
    # 18 of each class over 9 HGG and 5 LGG patients; partners do not blur what is fair.
    assert spread == {"HGG": 0, "LGG": 1}


def test_an_audit_of_a_run_without_mixing_names_no_partner(small: ShardSet) -> None:
    with loader_of(small, mixing=None) as loader:
        epochs(loader, 1)
        audit = audit_run(small, LoaderState.from_dict(loader.state_dict()))
    assert audit.mixing is None
    assert audit.as_partner == {}
    assert audit.not_audited == ()
    assert {entry.as_partner for entry in audit.classes.values()} == {0}


def test_the_audit_command_says_how_batches_were_mixed_and_what_it_cannot_know(
    small: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with loader_of(small, batch_transform=dict) as loader:
        epochs(loader, 1)
        (tmp_path / "state.json").write_text(json.dumps(loader.state_dict()))
    command = ["audit", str(small.path), "--state", str(tmp_path / "state.json")]
    assert run(command) == 0
    said = capsys.readouterr().out
    assert "mixing: name cutmix, alpha 1.0, probability 1.0" in said
    assert "mixed into others: 18 samples" in said
    assert "not audited: batch_transform" in said
    assert run([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["mixing"] == {"name": "cutmix", "alpha": 1.0, "probability": 1.0}
    assert document["not_audited"] == ["batch_transform"]
    assert sum(document["as_partner"].values()) == 18
    assert sum(document["exposure"].values()) == 36


def test_a_run_that_once_had_a_batch_transform_is_never_called_audited_again(
    small: ShardSet,
) -> None:
    with loader_of(small, batch_transform=dict) as first, loader_of(small) as second:
        assert second.state_dict()["batch_transform"] is False
        epochs(first, 1)
        second.load_state_dict(first.state_dict())
        assert second.state_dict()["batch_transform"] is True


def test_a_state_of_a_run_mixed_otherwise_is_refused_and_the_field_named(small: ShardSet) -> None:
    with loader_of(small) as mixed, loader_of(small, mixing=None) as plain:
        before = plain.state_dict()
        with pytest.raises(ResumeError, match=r"mixing: state has \{'name': 'cutmix', .*has None"):
            plain.load_state_dict(mixed.state_dict())
        assert plain.state_dict() == before
        with pytest.raises(ResumeError, match="mixing: state has None, loader has"):
            mixed.load_state_dict(before)
    other = loader_of(small, mixing=CUTMIX | {"alpha": 0.5})
    with pytest.raises(ResumeError, match=r"'alpha': 1\.0.*'alpha': 0\.5"):
        other.load_state_dict(mixed.state_dict())
    again = loader_of(small, mixing={"name": "cutmix", "alpha": 1, "probability": 1})
    again.load_state_dict(mixed.state_dict())


def test_a_state_from_before_mixing_was_recorded_is_one_without(small: ShardSet) -> None:
    loader = loader_of(small, mixing=None)
    state = loader.state_dict()
    del state["mixing"], state["batch_transform"]
    loader.load_state_dict(state)
    assert loader.state_dict()["mixing"] is None


@pytest.mark.parametrize(
    "damage",
    [
        {"mixing": "cutmix"},
        {"mixing": {"alpha": 1.0}},
        {"mixing": {"name": "cutmix", "alpha": -1}},
        {"mixing": {"name": "cutmix", "more": 1}},
        {"batch_transform": 1},
        {"batch_transform": None},
    ],
)
def test_a_state_whose_record_of_mixing_is_damaged_is_refused(
    small: ShardSet, damage: dict[str, Any]
) -> None:
    state = loader_of(small).state_dict() | damage
    with pytest.raises(ResumeError, match="damaged"):
        LoaderState.from_dict(state)


def test_the_record_of_mixing_is_small_and_never_grows(small: ShardSet) -> None:
    with loader_of(small) as mixed, loader_of(small, mixing=None) as plain:
        epochs(mixed, 4)
        epochs(plain, 4)
        longer = len(json.dumps(mixed.state_dict())) - len(json.dumps(plain.state_dict()))
    assert longer < 80


def test_images_of_unequal_shapes_are_refused_with_the_way_out_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    samples = [
        Sample(key=f"P{n}", image=voxels(n, (1, 4, 4, 4 + n % 2)), label="HGG" if n % 3 else "LGG")
        for n in range(6)
    ]
    shards = packed(tmp_path / "cohort", samples)
    with loader_of(shards) as loader:
        with pytest.raises(ConfigError, match=r"image is a list of 6 .*size=\(D, H, W\)"):
            next(iter(loader))
        assert loader.state_dict()["position"] == {"epoch": 0, "step": 0}
    with loader_of(shards, size=(4, 4, 4)) as loader:
        assert next(iter(loader))["image"].shape == (6, 1, 4, 4, 4)


def test_mixup_of_stored_integers_is_refused_with_the_way_out(small: ShardSet) -> None:
    with (
        loader_of(small, dtype=None, mixing={"name": "mixup"}) as loader,
        pytest.raises(ConfigError, match=r"dtype torch.int16.*dtype=torch.float32"),
    ):
        next(iter(loader))


def test_masks_packed_with_the_images_are_cut_with_them(tmp_path: Path) -> None:
    samples = [
        Sample(key=s.key, image=s.image, seg=(s.image[0] // 100).astype("uint8"), label=s.label)
        for s in cohort(val=0)
    ]
    shards = packed(tmp_path / "cohort", samples)
    with loader_of(shards) as loader:
        for batch in epochs(loader, 1):
            # A mask says whose voxels its image has, one by one, and so it does after mixing.
            assert torch.equal(batch["seg"].squeeze(1), (batch["image"][:, 0] // 100).byte())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"mixing": {"name": "cutmax"}}, "name is 'cutmax'.*Did you mean 'cutmix'"),
        ({"mixing": {"name": "mixup", "alpha": 0}}, "mixup: alpha is 0"),
        (
            {"global_batch_size": 5, "num_ranks": 3, "rank": 0},
            r"smallest global batch has 5 for 3 ranks. Use global_batch_size >= 6",
        ),
        (
            {"balance": {"name": "natural", "last": "short"}, "num_ranks": 2, "rank": 0},
            r"has 2 for 2 ranks. Use global_batch_size >= 4 \(and last: full\)",
        ),
        ({"split": "val", "balance": None}, r"mixing .*split 'val', .*those that are: 'train'"),
    ],
)
def test_what_cannot_be_mixed_is_refused_when_the_loader_is_built(
    small: ShardSet, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        loader_of(small, **options)


def test_how_batches_are_mixed_is_logged_at_the_start(
    small: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        loader_of(small, mixing={"name": "mixup", "alpha": 0.4})
    assert "mixing with mixup: alpha 0.4, probability 1.0" in caplog.messages
