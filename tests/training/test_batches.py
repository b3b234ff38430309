"""What stands in a batch: every voxel, every name, in the shape and dtype promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import train_loader
from tests.building import Sample, by_key
from tests.training.cohorts import as_float, cohort, packed, voxels


def centred(image: NDArray[Any], size: tuple[int, ...]) -> NDArray[Any]:
    """Crop or pad the axes of space to the centre, by plain slicing and numpy's own pad."""
    for axis, wanted in enumerate(size, start=1):
        length = image.shape[axis]
        start = max(0, (length - wanted) // 2)
        image = image.take(range(start, start + min(length, wanted)), axis=axis)
        before = (wanted - image.shape[axis]) // 2
        pads = [(0, 0)] * image.ndim
        pads[axis] = (before, wanted - image.shape[axis] - before)
        image = np.pad(image, pads)
    return image


def test_a_batch_holds_what_the_documentation_lists(small: ShardSet) -> None:
    plan = BalancedPlan.for_shards(small, global_batch_size=5, balance="class_balanced", seed=4)
    keys, patients, labels = (f("train") for f in (small.keys, small.patients, small.labels))
    with train_loader(small, global_batch_size=5, balance="class_balanced", seed=4) as loader:
        for step, batch in enumerate(loader):
            assert set(batch) == {
                *("image", "label", "sample", "slot"),
                *("key", "patient", "epoch", "step", "loss_scale"),
            }
            samples = batch["sample"].numpy()
            assert (batch["epoch"], batch["step"], batch["loss_scale"]) == (0, step, 1.0)
            assert plan.batch(0, step)[batch["slot"].numpy()].tolist() == samples.tolist()
            assert sorted(batch["slot"].tolist()) == list(range(5))
            assert batch["key"] == keys[samples].tolist()
            assert batch["patient"] == patients[samples].tolist()
            assert batch["label"].tolist() == labels[samples].tolist()
            assert {batch[n].dtype for n in ("label", "sample", "slot")} == {torch.int64}
            assert batch["image"].is_contiguous()


@pytest.mark.parametrize("codec", ["npy", "blosc"])
@pytest.mark.parametrize("size", [None, (4, 3, 5), (6, 2, 5), (1, 8, 4), (9, 9, 9)])
def test_images_are_those_packed_cropped_or_padded_to_the_centre(
    tmp_path: Path, codec: str, size: tuple[int, ...] | None
) -> None:
    samples = cohort(val=0)
    shards = packed(tmp_path / "cohort", samples, codec=codec)
    images = {s.key: s.image if size is None else centred(s.image, size) for s in samples}
    with train_loader(shards, global_batch_size=6, size=size, num_threads=2) as loader:
        for batch in loader:
            assert torch.equal(batch["image"], as_float([images[k] for k in batch["key"]]))


def test_volumes_of_unequal_shapes_come_as_a_list_in_batch_order(tmp_path: Path) -> None:
    samples = [
        Sample(key=f"P{n}", image=voxels(n, (2 + n % 3, 3, 4)), label="HGG") for n in range(6)
    ]
    images = by_key(samples)
    shards = packed(tmp_path / "cohort", samples)
    with train_loader(shards, global_batch_size=6, balance=None) as loader:
        for batch in loader:
            assert isinstance(batch["image"], list)
            for image, key in zip(batch["image"], batch["key"], strict=True):
                assert np.array_equal(image.numpy(), images[key].image[None].astype(np.float32))
    with train_loader(shards, global_batch_size=6, balance=None, size=(3, 3, 3)) as loader:
        for batch in loader:
            wanted = [centred(images[key].image[None], (3, 3, 3)) for key in batch["key"]]
            assert torch.equal(batch["image"], as_float(wanted))


@pytest.mark.parametrize(
    ("stored", "asked", "given"),
    [
        ("int16", torch.float32, torch.float32),
        ("int16", torch.float16, torch.float16),
        ("int16", torch.float64, torch.float64),
        ("int16", torch.int32, torch.int32),
        ("int16", None, torch.int16),
        ("uint8", None, torch.uint8),
        ("uint16", None, torch.uint16),
        ("float64", None, torch.float64),
        ("float64", torch.float32, torch.float32),
        ("bool", None, torch.bool),
        ("uint8", torch.int16, torch.int16),
    ],
)
def test_images_take_the_dtype_asked_for(
    tmp_path: Path, stored: str, asked: torch.dtype | None, given: torch.dtype
) -> None:
    samples = cohort(hgg=2, lgg=0, val=0, dtype=stored)
    shards = packed(tmp_path / "cohort", samples)
    images = by_key(samples)
    with train_loader(shards, global_batch_size=2, dtype=asked) as loader:
        (batch,) = loader
    assert batch["image"].dtype == given
    for image, key in zip(batch["image"], batch["key"], strict=True):
        assert np.array_equal(image.numpy(), images[key].image.astype(image.numpy().dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float32", torch.float8_e4m3fn])
def test_a_dtype_that_memory_cannot_be_filled_in_is_refused_with_the_way_out(
    small: ShardSet, dtype: Any
) -> None:
    with pytest.raises(ConfigError, match=r"dtype is .*Use torch\.float32.*cast after"):
        train_loader(small, global_batch_size=4, dtype=dtype)


def test_two_dimensional_images_have_a_channel_axis(tmp_path: Path) -> None:
    samples = [Sample(key=f"P{n}", image=voxels(n, (6, 7))) for n in range(3)]
    samples += [
        Sample(key=f"Q{n}", image=voxels(9 + n, (3, 6, 7)), axes="CHW", split="val")
        for n in range(3)
    ]
    shards = packed(tmp_path / "cohort", samples)
    images = by_key(samples)
    with train_loader(shards, global_batch_size=3) as loader:
        (batch,) = loader
    assert torch.equal(batch["image"], as_float([images[k].image[None] for k in batch["key"]]))
    with eval_loader(shards, split="val", batch_size=3, size=(4, 9)) as loader:
        (batch,) = loader
    wanted = [centred(images[k].image, (4, 9)) for k in batch["key"]]
    assert torch.equal(batch["image"], as_float(wanted))


@pytest.mark.parametrize("size", [(4, 4), (4, 4, 4, 4), (4,)])
def test_a_size_of_another_number_of_axes_names_the_sample_and_the_way_out(
    small: ShardSet, size: tuple[int, ...]
) -> None:
    with (
        train_loader(small, global_batch_size=4, size=size) as loader,
        pytest.raises(ConfigError, match=r"size is .* but [HL]\d\d has image .*length per axis"),
    ):
        next(iter(loader))


@pytest.mark.parametrize("size", [5, "abc", (0, 1, 2), (1.0, 2, 3), (-4, 4, 4)])
def test_a_size_that_is_no_lengths_is_refused_when_the_loader_is_built(
    small: ShardSet, size: Any
) -> None:
    with pytest.raises(ConfigError, match="size is"):
        train_loader(small, global_batch_size=4, size=size)


def with_masks(every: int) -> list[Sample]:
    """Make 12 patients, of whom every so many-th has no mask."""
    return [
        Sample(
            key=f"P{n:02d}",
            image=voxels(n),
            seg=None if every and n % every == 0 else voxels(n, (4, 3, 5), "uint8") % 4,
            label="LGG" if n % 2 else "HGG",
        )
        for n in range(12)
    ]


def unchanged(sample: dict[str, Any]) -> dict[str, Any]:
    """Transform nothing."""
    return sample


@pytest.mark.parametrize("transform", [None, unchanged])
@pytest.mark.parametrize("size", [None, (5, 2, 5)])
def test_masks_stand_beside_images_in_their_own_dtype(
    tmp_path: Path, transform: Any, size: tuple[int, ...] | None
) -> None:
    samples = with_masks(0)
    shards, masks = packed(tmp_path / "cohort", samples), by_key(samples)
    with train_loader(shards, global_batch_size=4, transform=transform, size=size) as loader:
        for batch in loader:
            segs = [masks[key].seg for key in batch["key"]]
            wanted = [seg[None] for seg in segs if seg is not None]
            wanted = wanted if size is None else [centred(seg, size) for seg in wanted]
            assert batch["seg"].dtype == torch.uint8
            assert np.array_equal(batch["seg"].numpy(), np.stack(wanted))


@pytest.mark.parametrize("transform", [None, unchanged])
@pytest.mark.parametrize("every", [2, 3, 5])
def test_samples_without_a_mask_have_none_in_its_place(
    tmp_path: Path, transform: Any, every: int
) -> None:
    samples = with_masks(every)
    shards, masks = packed(tmp_path / "cohort", samples), by_key(samples)
    mixed = 0
    with train_loader(shards, global_batch_size=4, transform=transform, seed=1) as loader:
        for batch in loader:
            segs = [masks[key].seg for key in batch["key"]]
            if all(seg is None for seg in segs):
                assert batch.get("seg", [None] * 4) == [None] * 4
                continue
            mixed += any(seg is None for seg in segs)
            for found, seg in zip(batch["seg"], segs, strict=True):
                assert (found is None) == (seg is None)
                assert seg is None or np.array_equal(found.numpy(), seg[None])
    assert mixed


@pytest.mark.parametrize(("batch", "ranks"), [(8, 3), (7, 2), (5, 5), (13, 4)])
def test_mean_losses_scaled_per_rank_and_averaged_weigh_every_sample_alike(
    small: ShardSet, batch: int, ranks: int
) -> None:
    loaders = [
        train_loader(small, global_batch_size=batch, rank=rank, num_ranks=ranks, num_threads=1)
        for rank in range(ranks)
    ]
    for parts in zip(*loaders, strict=True):
        averaged = sum(p["loss_scale"] * p["image"].mean().item() for p in parts) / ranks
        whole = torch.cat([p["image"] for p in parts]).mean().item()
        assert averaged == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("verify", "sometimes"),
        ("device", "gpu"),
        ("num_threads", 0),
        ("num_threads", True),
        ("prefetch_bytes", -1),
        ("prefetch_bytes", 1.5),
        ("workers", -1),
        ("workers", True),
        ("on_error", "skip"),
        ("global_batch_size", 0),
    ],
)
def test_a_wrong_setting_is_refused_by_name_when_the_loader_is_built(
    small: ShardSet, setting: str, value: Any
) -> None:
    options: dict[str, Any] = {"global_batch_size": 4} | {setting: value}
    with pytest.raises(ConfigError, match=f"{setting} is "):
        train_loader(small, **options)


@pytest.mark.parametrize("dtype", [torch.float32, None])
@pytest.mark.parametrize("size", [None, (4, 4, 4)])
def test_the_bytes_counted_are_those_of_the_arrays_handed_out(
    tmp_path: Path, dtype: torch.dtype | None, size: tuple[int, ...] | None
) -> None:
    shapes = [(4, 3, 5), (2, 6, 4), (4, 3, 5)]
    samples = [
        Sample(
            key=f"P{n}",
            image=voxels(n, shapes[n % 3]),
            seg=None if n % 2 else voxels(n, shapes[n % 3], "uint8"),
        )
        for n in range(9)
    ]
    shards = packed(tmp_path / "mixed", samples)
    counted = 0
    with train_loader(shards, global_batch_size=9, dtype=dtype, size=size) as loader:
        for batch in loader:
            for field in ("image", "seg"):
                counted += sum(row.nbytes for row in batch[field] if row is not None)
        assert loader.stats()["bytes"] == counted
