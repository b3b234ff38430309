"""The paragraph for a methods section: true to the letter, its numbers worked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streaming_balance.report.audit import audit_of
from streaming_balance.report.methods import methods_paragraph
from streaming_balance.report.saved_states import document_digest
from streaming_balance.report.tallies import Tallies
from streaming_balance.storage.shards import ShardSet
from tests.building import Sample
from tests.report.witness import Witness, audited_shards, build, damage, tallied
from tests.training.cohorts import cohort, packed, voxels


def paragraph(tallies: Tallies) -> str:
    """Write the paragraph."""
    return methods_paragraph(audit_of(tallies), tallies)


def trained(
    shards: ShardSet, epochs: int, *, num_ranks: int = 1, **options: Any
) -> tuple[Tallies, dict[str, Any]]:
    """Train whole epochs on all ranks, and count from what rank 0 saved."""
    loaders, witness = build(shards, num_ranks, options), Witness()
    for _ in range(epochs):
        witness.train(loaders, len(loaders[0]))
    state = loaders[0].state_dict()
    for loader in loaders:
        loader.close()
    return tallied(shards, state), state


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """9 HGG and 5 LGG patients in train, 7 in val, one sample each."""
    return packed(tmp_path_factory.mktemp("plain") / "cohort", cohort())


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """12 HGG and 9 LGG patients in train, 3 in val; every third of train has two samples."""
    return audited_shards(tmp_path_factory.mktemp("several") / "cohort")


def test_the_whole_paragraph_of_a_plain_run(plain: ShardSet) -> None:
    # 14 patients make 2 full batches of 7 in natural order: three epochs are 6 batches of 42.
    tallies, state = trained(plain, 3, global_batch_size=7)
    assert paragraph(tallies) == (
        f"The data set with content digest {plain.digest} has 21 patients with 21 samples: 14 "
        f"patients in train (HGG 9, LGG 5) and 7 patients in val (HGG 7, LGG 0). No patient is in "
        f"two splits: this was checked over the whole sample table when it was opened for this "
        f"report. Training drew from train alone, by the strategy instance_balanced (unit: "
        f"sample), in global batches of 7 samples, with seed 5 (plan version 1, plan digest "
        f"{state['plan_digest']}). Before epoch 3, step 0 (both count from 0), 6 global batches "
        f"delivered 42 samples: HGG was 64.3% of them (64.3% of the samples that were drawn from) "
        f"and LGG was 35.7% of them (35.7% of the samples that were drawn from). Each patient of "
        f"HGG was seen 3 times and each of LGG 3 times. Nobody was excluded by name. No damaged "
        f"sample was replaced. These figures were computed with streaming-balance 0.1.0 from the "
        f"sample table and a state of the training loader with digest {document_digest(state)}."
    )


def test_balancing_exclusions_and_mixing_are_told(several: ShardSet) -> None:
    # 19 patients are left: 4 batches of 6, 12 of each class in an epoch, 24 in two.
    # 24 over 11 is 2 to 3, 24 over 8 is 3; as partners, everybody counts as often again.
    tallies, _ = trained(
        several,
        2,
        balance={"name": "power", "alpha": 0},
        exclude=["H03", "L04__a"],
        mixing={"name": "mixup"},
        batch_transform=lambda batch: batch,
    )
    text = paragraph(tallies)
    assert "28 samples: 21 patients in train (HGG 12, LGG 9)" not in text
    assert "has 24 patients with 31 samples: 21 patients in train (HGG 12, LGG 9)" in text
    assert "by the strategy power (alpha: 0, unit: patient), in global batches of 6 samples" in text
    # 16 HGG samples of 12 patients, 12 LGG samples of 9; left are 14 and 11.
    assert "HGG was 50.0% of them (56.0% of the samples that were drawn from)" in text
    assert (
        "Each patient of HGG was seen 4 to 6 times and each of LGG 6 times, being mixed into "
        "others included." in text
    )
    assert "3 samples of 2 patients were excluded by name." in text
    assert "Batches were mixed by mixup (alpha: 1.0, probability: 1.0), samples with others" in text
    assert "A batch_transform of the user's own changed batches" in text
    assert "No damaged sample was replaced." in text


def test_each_plan_s_own_mixing_is_told_and_no_other(plain: ShardSet) -> None:
    balanced: dict[str, Any] = {"balance": "class_balanced"}
    _, state = trained(plain, 1, **balanced, mixing={"name": "cutmix", "alpha": 0.5})
    for options in ({"seed": 6}, {"seed": 7, "mixing": {"name": "mixup"}}):
        (loader,) = build(plain, 1, balanced | options)
        loader.load_state_dict(state, carry_exposure=True)
        Witness().train([loader], 2)
        state = loader.state_dict()
        loader.close()
    tallies = tallied(plain, state)
    text = paragraph(tallies)
    assert "Batches of plan 1 were mixed by cutmix (alpha: 0.5, probability: 1.0), samples" in text
    assert "Batches of plan 3 were mixed by mixup (alpha: 1.0, probability: 1.0), samples" in text
    assert text.count("were mixed") == 2
    mixings = [leg.mixing and leg.mixing["name"] for leg in audit_of(tallies).legs]
    assert mixings == ["cutmix", None, "mixup"]


def test_one_of_anything_is_told_in_the_singular(tmp_path: Path) -> None:
    samples = [
        Sample(key=name, image=voxels(number), patient=name, label=label)
        for number, (name, label) in enumerate((("P1", "HGG"), ("P2", "LGG"), ("P3", "LGG")))
    ]
    shards = packed(tmp_path / "cohort", samples)
    loaders = build(shards, 1, {"global_batch_size": 1, "exclude": ["P3"]})
    Witness().train(loaders, 1)
    text = paragraph(tallied(shards, loaders[0].state_dict()))
    loaders[0].close()
    assert "has 3 patients with 3 samples: 3 patients in train (HGG 1, LGG 2)." in text
    assert "The data set is not divided: all patients are in one split." in text
    assert "in global batches of 1 sample, with" in text
    assert "1 global batch delivered 1 sample:" in text
    assert "seen once" in text
    assert "1 sample of 1 patient was excluded by name." in text


def test_nothing_delivered_is_told(plain: ShardSet) -> None:
    tallies, _ = trained(plain, 0)
    assert "Before epoch 0, step 0 (both count from 0), nothing was delivered yet." in paragraph(
        tallies
    )


def test_substitutions_are_counted_and_what_is_not_known_is_told(tmp_path: Path) -> None:
    shards = audited_shards(tmp_path / "cohort")
    # Half a pass of each class in an epoch, so in two epochs L01 comes once or more.
    damage(shards, "L01__a")
    options: dict[str, Any] = {"balance": "class_balanced", "on_error": "substitute"}
    tallies, state = trained(shards, 2, **options)
    count = len(state["substitutions"])
    assert count > 1
    assert f"{count} deliveries of damaged samples were replaced by others of their class." in (
        paragraph(tallies)
    )
    alone, half = trained(shards, 2, num_ranks=2, **options)
    mine = len(half["substitutions"])
    word = "delivery" if mine == 1 else "deliveries"
    verb = "was" if mine == 1 else "were"
    assert (
        f"{mine} {word} of damaged samples {verb} replaced by others of their class, and those of "
        f"rank 1 of 2 are not known."
    ) in paragraph(alone)
    many, _ = trained(shards, 1, num_ranks=4, **options)
    assert "those of 3 ranks of 4 are not known." in paragraph(many)


def test_what_was_never_known_of_earlier_ranks_is_told(tmp_path: Path) -> None:
    shards = audited_shards(tmp_path / "cohort")
    options: dict[str, Any] = {"balance": "class_balanced", "on_error": "substitute"}
    _, state = trained(shards, 1, num_ranks=2, **options)
    loaders = build(shards, 1, options)
    loaders[0].load_state_dict(state)
    Witness().train(loaders, 2)
    tallies = tallied(shards, loaders[0].state_dict())
    loaders[0].close()
    assert "those of some ranks at an earlier time are not known." in paragraph(tallies)


def test_a_jump_is_told(plain: ShardSet) -> None:
    loaders = build(plain, 1, {"global_batch_size": 7})
    for epoch in (2, 5):
        loaders[0].set_epoch(epoch)
        Witness().train(loaders, 1)
    text = paragraph(tallied(plain, loaders[0].state_dict()))
    loaders[0].close()
    assert "Before epoch 5, step 1 (both count from 0), 2 global batches delivered 14" in text
    assert "Epochs were left out or repeated by 2 jumps." in text


def test_each_plan_of_a_carried_run_is_told(plain: ShardSet, tmp_path: Path) -> None:
    _, state = trained(plain, 1, balance="class_balanced", exclude=["H00"])
    other = packed(tmp_path / "other", [one for one in cohort() if one.key != "H01"])
    (loader,) = build(other, 1, {"balance": "class_balanced", "seed": 6})
    loader.load_state_dict(state, carry_exposure=plain)
    Witness().train([loader], 1)
    text = paragraph(tallied(other, loader.state_dict(), tables=[plain]))
    loader.close()
    assert f"content digest {plain.digest} has 21 patients" in text
    assert f"content digest {other.digest} has 20 patients" in text
    assert "Training followed 2 plans, one after another." in text
    # 13 patients in batches of 6 make 3 steps of an epoch.
    assert f"Plan 1 drew from train of data set {plain.digest} alone, by the strategy" in text
    assert "delivered 3 global batches with 18 samples, until epoch 1, step 0." in text
    assert f"Plan 2 drew from train of data set {other.digest} alone" in text
    assert "delivered 1 global batch with 6 samples, until epoch 1, step 1." in text
    assert "4 global batches delivered 24 samples: HGG was 50.0% of them (61.5% of the" in text
    assert "1 sample of 1 patient was excluded by name by plan 1." in text


def test_a_patient_of_several_findings_counts_in_each(tmp_path: Path) -> None:
    findings = ("Mass", "Mass|Nodule", "", "Nodule")
    samples = [
        Sample(key=f"P{number}", image=voxels(number), label=label)
        for number, label in enumerate(findings)
    ]
    shards = packed(tmp_path / "cohort", samples, classes=("Mass", "Nodule"), multi_label=True)
    tallies, _ = trained(shards, 1, global_batch_size=2)
    text = paragraph(tallies)
    assert (
        "4 patients with 4 samples: 4 patients in train (Mass 2, Nodule 2); a patient of several "
        "classes counts in each." in text
    )
