"""The main job on real patients: pack, stream balanced, resume, validate, audit."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from streaming_balance.ingest.nifti_writing import write_nifti
from streaming_balance.ingest.pack import write_shards
from streaming_balance.storage.shards import ShardSet, open_shards
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import BalancedLoader, train_loader
from tests.conftest import PROJECT_ROOT

EPOCHS = 20
STEPS = 17  # 130 patients in batches of 8, the last one filled
RANKS = (1, 2, 3, 4, 5, 7, 8)
RUNNER = [sys.executable, "-m", "streaming_balance"]
Voxels = dict[str, NDArray[Any]]
Merged = dict[int, tuple[int, str]]


def call(*arguments: object) -> Any:
    """Run a command in a process of its own and read the JSON it prints."""
    ended = subprocess.run(
        [*RUNNER, *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def read(path: Path) -> NDArray[Any]:
    """Read a volume with nibabel."""
    image: Any = nibabel.load(path)
    return np.asanyarray(image.dataobj)


@pytest.fixture(scope="module")
def volumes(shared_data: Path) -> Voxels:
    """Every patient's voxels, by nibabel."""
    folder = shared_data / "labelled" / "hippocampus" / "images"
    return {
        path.name.removesuffix(".nii.gz"): read(path) for path in sorted(folder.glob("*.nii.gz"))
    }


@pytest.fixture(scope="module")
def listed(shared_data: Path) -> list[dict[str, str]]:
    """The rows of the derived labels."""
    table = shared_data / "labelled" / "hippocampus" / "derived_labels.csv"
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def manifest(folder: Path, listed: list[dict[str, str]], shared_data: Path, every: int) -> Path:
    """Write the packer's table; every so many-th patient goes to `val`."""
    source = shared_data / "labelled" / "hippocampus"
    path = folder / "cohort.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "label", "image", "seg", "split"])
        for number, row in enumerate(listed):
            patient = row["patient"]
            label = "small" if row["label_small_hippocampus"] == "1" else "usual"
            files = [source / kind / f"{patient}.nii.gz" for kind in ("images", "labels")]
            split = "val" if every and number % every == 0 else "train"
            writer.writerow([patient, label, *files, split])
    return path


@pytest.fixture(scope="module")
def hippocampus(
    shared_data: Path, listed: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> ShardSet:
    """All 130 patients in one training split."""
    folder = tmp_path_factory.mktemp("hippocampus")
    source = manifest(folder, listed, shared_data, 0)
    report = write_shards(source, folder / "packed", classes="usual,small", shard_bytes=1 << 20)
    assert (report.found, report.packed, len(report.rejected)) == (130, 130, 0)
    return open_shards(folder / "packed")


def loader_of(shards: ShardSet, rank: int = 0, num_ranks: int = 1) -> BalancedLoader:
    """Build one rank's loader of the main job."""
    return train_loader(
        shards,
        global_batch_size=8,
        balance="class_balanced",
        seed=42,
        rank=rank,
        num_ranks=num_ranks,
        dtype=None,
        num_threads=1,
    )


def merged(parts: tuple[dict[str, Any], ...]) -> Merged:
    """Unite the ranks' parts of a global batch: slot -> (sample number, hash of its voxels)."""
    return {
        slot: (sample, hashlib.sha256(np.ascontiguousarray(image.numpy()).tobytes()).hexdigest())
        for part in parts
        for slot, sample, image in zip(
            part["slot"].tolist(), part["sample"].tolist(), part["image"], strict=True
        )
    }


def run(loaders: list[BalancedLoader], count: int) -> list[Merged]:
    """Take so many global batches, all ranks in step."""
    got: list[Merged] = []
    while len(got) < count:
        for parts in itertools.islice(zip(*loaders, strict=True), count - len(got)):
            got.append(merged(parts))
            assert len(got[-1]) == sum(len(part["sample"]) for part in parts) == 8
    return got


@pytest.fixture(scope="module")
def straight(hippocampus: ShardSet) -> list[Merged]:
    """Two epochs and a step of the uninterrupted run."""
    with loader_of(hippocampus) as loader:
        return run([loader], 2 * STEPS + 1)


def test_the_packed_classes_are_13_and_117(hippocampus: ShardSet) -> None:
    counts = Counter(hippocampus.labels("train").tolist())
    assert hippocampus.classes == ["usual", "small"]
    assert counts == {0: 117, 1: 13}


def test_twenty_epochs_are_balanced_fair_and_free_of_twins_at_every_step(
    hippocampus: ShardSet, listed: list[dict[str, str]]
) -> None:
    small = {row["patient"] for row in listed if row["label_small_hippocampus"] == "1"}
    times = dict.fromkeys((row["patient"] for row in listed), 0)
    with loader_of(hippocampus) as loader:
        assert loader.plan.guarantees["no_twin_in_a_batch"]
        assert len(loader) == STEPS
        for epoch in range(EPOCHS):
            for batch in loader:
                patients = batch["patient"]
                assert batch["epoch"] == epoch
                # Half and half; 13 >= 2 * 4 - 1 patients, so that none comes twice.
                assert sum(patient in small for patient in patients) == 4
                assert [int(p in small) for p in patients] == batch["label"].tolist()
                assert len(set(patients)) == 8
                for patient in patients:
                    times[patient] += 1
                for members in (small, times.keys() - small):
                    counts = [times[patient] for patient in members]
                    assert max(counts) - min(counts) <= 1
        # 20 epochs of 17 steps of 4: 1360 of each class, over 13 and over 117 patients.
        assert loader.stats()["class_counts"] == {"usual": 1360, "small": 1360}
        assert {times[patient] for patient in small} == {1360 // 13, 1360 // 13 + 1}
        assert {times[p] for p in times.keys() - small} == {1360 // 117, 1360 // 117 + 1}
        assert loader.stats()["exposure_spread"] == {"usual": 1, "small": 1}


def test_every_patient_s_voxels_and_mask_are_those_nibabel_reads(
    hippocampus: ShardSet, volumes: Voxels, shared_data: Path
) -> None:
    masks = shared_data / "labelled" / "hippocampus" / "labels"
    seen = set()
    with train_loader(hippocampus, global_batch_size=13, dtype=None, num_threads=2) as loader:
        for batch in loader:
            assert isinstance(batch["image"], list)
            for patient, image, seg in zip(
                batch["patient"], batch["image"], batch["seg"], strict=True
            ):
                wanted = volumes[patient]
                assert image.numpy().dtype == wanted.dtype.newbyteorder("=")
                assert np.array_equal(image.numpy(), wanted[None])
                mask = read(masks / f"{patient}.nii.gz")
                assert np.array_equal(seg.numpy(), mask[None])
                seen.add(patient)
    assert seen == set(volumes)
    assert len({volume.shape for volume in volumes.values()}) == 124


def centred(image: NDArray[Any], size: tuple[int, ...]) -> NDArray[Any]:
    """Crop or pad to the centre, index by index: row i shows voxel i + (stored - wanted) // 2."""
    out = np.zeros(size, dtype=image.dtype)
    places = []
    for stored, wanted in zip(image.shape, size, strict=True):
        shift = (stored - wanted) // 2 if stored >= wanted else -((wanted - stored) // 2)
        places.append([(i, i + shift) for i in range(wanted) if 0 <= i + shift < stored])
    inside = np.ix_(*([i for i, _ in axis] for axis in places))
    out[inside] = image[np.ix_(*([j for _, j in axis] for axis in places))]
    return out


@pytest.mark.parametrize("size", [(32, 48, 32), (64, 64, 64), (35, 51, 37)])
def test_with_a_size_every_patient_is_cropped_or_padded_to_the_centre(
    hippocampus: ShardSet, volumes: Voxels, size: tuple[int, int, int]
) -> None:
    seen = set()
    with train_loader(hippocampus, global_batch_size=13, size=size, num_threads=2) as loader:
        for batch in loader:
            assert tuple(batch["image"].shape) == (13, 1, *size)
            assert batch["seg"].shape == batch["image"].shape
            for patient, image in zip(batch["patient"], batch["image"], strict=True):
                wanted = centred(volumes[patient], size).astype(np.float32)
                assert np.array_equal(image[0].numpy(), wanted)
                seen.add(patient)
    assert seen == set(volumes)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_ranks_unite_to_the_same_global_batches_last_one_included(
    hippocampus: ShardSet, straight: list[Merged], num_ranks: int
) -> None:
    loaders = [loader_of(hippocampus, rank, num_ranks) for rank in range(num_ranks)]
    assert {len(loader) for loader in loaders} == {STEPS}
    for step, parts in enumerate(zip(*loaders, strict=True)):
        assert merged(parts) == straight[step]
        for label in (0, 1):
            counts = [part["label"].tolist().count(label) for part in parts]
            assert {4 // num_ranks, -(-4 // num_ranks)} >= set(counts)
    assert step == STEPS - 1
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize(
    ("stop", "before", "after"),
    [(0, 2, 1), (1, 1, 3), (8, 4, 2), (STEPS - 1, 3, 8), (STEPS, 1, 5), (STEPS + 1, 5, 1)],
)
def test_resuming_on_other_ranks_equals_the_uninterrupted_run(
    hippocampus: ShardSet, straight: list[Merged], stop: int, before: int, after: int
) -> None:
    first = [loader_of(hippocampus, rank, before) for rank in range(before)]
    assert run(first, stop) == straight[:stop]
    states = {json.dumps(loader.state_dict()) for loader in first}
    assert len(states) == 1
    # A resume of a resume: three batches on one rank, then the rest on others.
    with loader_of(hippocampus) as between:
        between.load_state_dict(json.loads(next(iter(states))))
        assert run([between], 3) == straight[stop : stop + 3]
        state = between.state_dict()
    second = [loader_of(hippocampus, rank, after) for rank in range(after)]
    for loader in second:
        loader.load_state_dict(state)
    assert run(second, STEPS - 3) == straight[stop + 3 : stop + STEPS]
    for loader in first + second:
        loader.close()


def test_validation_comes_in_packed_order_once_over_all_ranks(
    listed: list[dict[str, str]], shared_data: Path, tmp_path: Path, volumes: Voxels
) -> None:
    source = manifest(tmp_path, listed, shared_data, 4)
    write_shards(source, tmp_path / "packed", shard_bytes=1 << 20)
    shards = open_shards(tmp_path / "packed")
    assert shards.size("val") == 33
    order = shards.keys("val")[shards.packed_order("val")].tolist()
    assert sorted(order) == sorted(row["patient"] for row in listed[::4])
    for num_ranks in (1, 2, 5, 8, 40):
        for rank in range(num_ranks):
            with eval_loader(
                shards, split="val", batch_size=3, rank=rank, num_ranks=num_ranks, dtype=None
            ) as loader:
                found = []
                for batch in loader:
                    found += batch["key"]
                    for patient, image in zip(batch["patient"], batch["image"], strict=True):
                        assert np.array_equal(image.numpy()[0], volumes[patient])
            assert found == order[rank::num_ranks]


def test_the_audit_command_counts_what_the_loop_received(
    hippocampus: ShardSet, tmp_path: Path
) -> None:
    delivered: Counter[str] = Counter()
    with loader_of(hippocampus) as loader:
        for batch in itertools.islice(loader, 9):
            delivered.update(batch["patient"])
        (tmp_path / "state.json").write_text(json.dumps(loader.state_dict()))
    answer = call("audit", hippocampus.path, "--state", tmp_path / "state.json")
    assert (answer["epoch"], answer["step"]) == (0, 9)
    assert {patient: n for patient, n in answer["exposure"].items() if n} == delivered
    assert answer["classes"]["small"]["delivered"] == 36
    # 36 deliveries over 13 patients: two or three each.
    assert (
        answer["classes"]["small"]["exposure_min"],
        answer["classes"]["small"]["exposure_max"],
    ) == (2, 3)
    assert answer["shards_digest"] == hippocampus.digest


@pytest.fixture(scope="module")
def brats(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 285 names of BraTS 2018 over generated voxels, packed from their folders."""
    folder = tmp_path_factory.mktemp("brats")
    with (shared_data / "tree" / "brats18_names" / "brats18_cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    generator = np.random.default_rng(0)
    for row in rows:
        label, case = row["grade"], row["case"]
        for modality in ("t1", "t2"):
            path = folder / "raw" / label / case / f"{case}_{modality}.nii"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_nifti(path, generator.integers(0, 999, (3, 3, 3)).astype(np.int16))
    report = write_shards(folder / "raw", folder / "packed")
    assert (report.found, report.packed) == (285, 285)
    return folder / "packed"


def test_the_plan_of_285_brats_patients_is_what_one_works_out_by_hand(brats: Path) -> None:
    answer = call(
        *("plan", brats, "--balance", "class_balanced", "--global-batch-size", 8),
        *("--epochs", 20, "--ranks", 3),
    )
    # ceil(285 / 8) = 36 steps; 36 * 4 = 144 of each class an epoch; over 20 epochs 2880:
    # 2880 / 210 = 13.7 times a high-grade patient, 2880 / 75 = 38.4 times a low-grade one.
    assert answer["steps"] == 36
    hgg, lgg = answer["classes"]["HGG"], answer["classes"]["LGG"]
    assert (hgg["patients"], hgg["before"], hgg["after"], hgg["share"]) == (210, 210, 144, 0.5)
    assert (lgg["patients"], lgg["before"], lgg["after"], lgg["share"]) == (75, 75, 144, 0.5)
    assert (hgg["exposure_min"], hgg["exposure_max"]) == (13, 14)
    assert (lgg["exposure_min"], lgg["exposure_max"]) == (38, 39)


def test_the_audit_of_285_brats_patients_is_what_one_works_out_by_hand(
    brats: Path, tmp_path: Path
) -> None:
    shards = open_shards(brats)
    times: Counter[str] = Counter()
    with train_loader(shards, global_batch_size=8, balance="class_balanced", seed=1) as loader:
        for _ in range(2):
            for batch in loader:
                assert tuple(batch["image"].shape) == (8, 2, 3, 3, 3)
                times.update(batch["patient"])
        loader.set_epoch(7)
        for batch in itertools.islice(loader, 5):
            times.update(batch["patient"])
        (tmp_path / "state.json").write_text(json.dumps(loader.state_dict()))
    answer = call("audit", brats, "--state", tmp_path / "state.json")
    # Two epochs of 144 and five batches of 4, in each class; epochs 2 to 6 were jumped over.
    assert {name: entry["delivered"] for name, entry in answer["classes"].items()} == {
        "HGG": 308,
        "LGG": 308,
    }
    assert {p: n for p, n in answer["exposure"].items() if n} == dict(times)
    assert len(answer["exposure"]) == 285


@pytest.mark.parametrize("num_ranks", [2, 3, 5, 7, 8, 16])
def test_brats_batches_of_16_are_the_same_on_up_to_16_ranks(brats: Path, num_ranks: int) -> None:
    shards = open_shards(brats)

    def loaders(ranks: int) -> list[BalancedLoader]:
        return [
            train_loader(
                shards,
                global_batch_size=16,
                balance="class_balanced",
                rank=rank,
                num_ranks=ranks,
                num_threads=1,
            )
            for rank in range(ranks)
        ]

    (alone,) = loaders(1)
    together = loaders(num_ranks)
    assert {len(loader) for loader in together} == {18}
    for whole, *parts in zip(alone, *together, strict=True):
        assert merged(tuple(parts)) == merged((whole,))
        for label in (0, 1):
            counts = {part["label"].tolist().count(label) for part in parts}
            assert counts <= {8 // num_ranks, -(-8 // num_ranks)}
    for loader in [alone, *together]:
        loader.close()
