"""Mixup and CutMix on batches: true to the voxel, keyed, and nothing of the input changed."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from streaming_balance.errors import ConfigError
from streaming_balance.training.mixing import _say_places_are_missing, cutmix, mixup

Mix = Callable[..., dict[str, Any]]
VOLUMES = (5, 2, 6, 7, 4)
IMAGES = (5, 3, 6, 9)


def batch_of(shape: tuple[int, ...] = VOLUMES, *, step: int = 0, **entries: Any) -> dict[str, Any]:
    """Make a batch whose every voxel is another number, as a loader would give it."""
    size = shape[0]
    image = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    batch = {
        "image": image,
        "label": torch.arange(size) % 3,
        "slot": torch.arange(size).flip(0),
        "patient": [f"P{row}" for row in range(size)],
        "epoch": 2,
        "step": step,
    }
    return batch | entries


def one_hot(label: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Write labels as rows of 0 and 1, the plain way."""
    rows = torch.zeros(len(label), num_classes, dtype=torch.float64)
    for row, number in enumerate(label.tolist()):
        rows[row, number] = 1
    return rows


@pytest.mark.parametrize("shape", [VOLUMES, IMAGES, (2, 1, 16, 16, 16), (40, 4, 8, 8)])
def test_lambda_is_the_true_fraction_of_voxels_kept_in_a_thousand_boxes(
    shape: tuple[int, ...],
) -> None:
    boxes = clipped = 0
    for step in range(-(-1_000 // shape[0])):
        batch = batch_of(shape, step=step)
        mixed = cutmix(batch, num_classes=3, seed=9)
        for row, other in enumerate(mixed["partner"].tolist()):
            kept = mixed["image"][row] == batch["image"][row]
            pasted = mixed["image"][row] == batch["image"][other]
            assert (kept ^ pasted).all()
            # The same voxels in every channel, and together a box.
            assert (pasted == pasted[:1]).all()
            inside = pasted[0].nonzero()
            if len(inside):
                sides = inside.amax(0) - inside.amin(0) + 1
                assert int(sides.prod()) == len(inside)
                clipped += bool((inside.amin(0) == 0).any())
            assert mixed["lam"][row].item() == 1 - pasted[0].sum().item() / pasted[0].numel()
            boxes += 1
    assert boxes >= 1_000
    assert clipped > 50


@pytest.mark.parametrize("shape", [VOLUMES, IMAGES, (7, 3)])
@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_mixup_is_the_weighted_sum_of_both_images(shape: tuple[int, ...], alpha: float) -> None:
    batch = batch_of(shape)
    mixed = mixup(batch, alpha=alpha, num_classes=3, seed=9)
    for row, other in enumerate(mixed["partner"].tolist()):
        lam = mixed["lam"][row].item()
        assert 0 < lam < 1
        wanted = lam * batch["image"][row].double() + (1 - lam) * batch["image"][other].double()
        assert torch.allclose(mixed["image"][row].double(), wanted, rtol=1e-6)
    assert mixed["image"].dtype == torch.float32


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_labels_are_mixed_as_the_images_are(mix: Mix) -> None:
    batch = batch_of()
    mixed = mix(batch, num_classes=4)
    partner, lam = mixed["partner"], mixed["lam"][:, None]
    assert torch.equal(mixed["label_a"], batch["label"])
    assert torch.equal(mixed["label_b"], batch["label"][partner])
    wanted = lam * one_hot(batch["label"], 4) + (1 - lam) * one_hot(mixed["label_b"], 4)
    assert mixed["label"].dtype == torch.float32
    assert mixed["lam"].dtype == torch.float64
    assert torch.allclose(mixed["label"].double(), wanted, atol=1e-7)
    # What a loss takes as targets beside logits of half the world's models.
    torch.nn.functional.cross_entropy(torch.randn(5, 4), mixed["label"])


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_several_findings_of_a_sample_are_mixed_as_rows(mix: Mix) -> None:
    rows = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]])
    mixed = mix(batch_of(label=rows), num_classes=3)
    lam = mixed["lam"][:, None]
    wanted = lam * rows + (1 - lam) * rows[mixed["partner"]]
    assert torch.allclose(mixed["label"].double(), wanted, atol=1e-7)
    assert torch.equal(mixed["label_b"], rows[mixed["partner"]])


@pytest.mark.parametrize("channels", [(1,), (), (3,)])
def test_masks_are_cut_by_the_same_box(channels: tuple[int, ...]) -> None:
    batch = batch_of()
    masks = torch.arange(5 * 168, dtype=torch.int16).reshape(5, 1, 6, 7, 4)
    masks = masks.expand(5, *channels, 6, 7, 4) if channels else masks[:, 0]
    mixed = cutmix(batch | {"seg": masks}, num_classes=3, seed=1)
    pasted = mixed["image"] != batch["image"]
    assert pasted.any()
    for row, other in enumerate(mixed["partner"].tolist()):
        wanted = torch.where(pasted[row, 0], masks[other], masks[row])
        assert torch.equal(mixed["seg"][row], wanted)
    assert mixed["seg"].dtype == torch.int16
    assert "seg_b" not in mixed


def test_mixup_keeps_masks_and_puts_the_partners_beside_them() -> None:
    masks = torch.arange(5).reshape(5, 1, 1, 1, 1).expand(5, 1, 6, 7, 4)
    mixed = mixup(batch_of(seg=masks), num_classes=3)
    assert torch.equal(mixed["seg"], masks)
    assert torch.equal(mixed["seg_b"], masks[mixed["partner"]])
    some = [None if row == 2 else masks[row] for row in range(5)]
    mixed = mixup(batch_of(seg=some), num_classes=3)
    assert mixed["seg"] is some
    for row, other in enumerate(mixed["partner"].tolist()):
        assert mixed["seg_b"][row] is some[other]


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_nothing_of_the_batch_given_changes(mix: Mix) -> None:
    batch = batch_of(seg=torch.ones(5, 1, 6, 7, 4), name=["a"])
    before = copy.deepcopy(batch)
    mixed = mix(batch, num_classes=3)
    assert batch.keys() == before.keys()
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(batch[name], value)
        else:
            assert batch[name] == value
    assert mixed["name"] is batch["name"]
    assert mixed["image"].data_ptr() != batch["image"].data_ptr()
    assert (mixed["image"] != batch["image"]).any()


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_the_result_depends_on_seed_and_place_alone(mix: Mix) -> None:
    first = mix(batch_of(), num_classes=3, seed=4)
    torch.rand(3)
    again = mix(batch_of(epoch=torch.tensor(2)), num_classes=3, seed=np.int64(4))
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["lam"], again["lam"])
    for changed in ({"epoch": 3}, {"step": 1}, {"slot": torch.arange(5)}):
        assert not torch.equal(first["lam"], mix(batch_of(**changed), num_classes=3, seed=4)["lam"])
    assert not torch.equal(first["lam"], mix(batch_of(), num_classes=3, seed=5)["lam"])


def test_rows_in_another_order_are_mixed_alike() -> None:
    batch, order = batch_of(), torch.tensor([3, 1, 4, 0, 2])
    one = cutmix(batch, num_classes=3, seed=4)
    turned = {name: batch[name][order] for name in ("image", "label", "slot")}
    other = cutmix(batch | turned, num_classes=3, seed=4)
    assert torch.equal(other["image"], one["image"][order])
    assert torch.equal(other["label"], one["label"][order])


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_no_global_generator_is_touched(mix: Mix) -> None:
    before = (
        torch.get_rng_state(),
        np.random.get_state(legacy=False)["state"]["key"].copy(),  # noqa: NPY002
        random.getstate(),
    )
    mix(batch_of(), alpha=0.3, num_classes=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state(legacy=False)["state"]["key"] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mixup_keeps_the_dtype_and_rounds_once(dtype: torch.dtype) -> None:
    image = torch.linspace(-3, 3, 5 * 24).reshape(5, 1, 4, 6).to(dtype)
    mixed = mixup(batch_of(image=image), num_classes=3, seed=2)
    lam = mixed["lam"].reshape(5, 1, 1, 1)
    wanted = lam * image.double() + (1 - lam) * image[mixed["partner"]].double()
    assert mixed["image"].dtype == dtype
    error = (mixed["image"].double() - wanted).abs()
    # Rounding to nearest moves a number by half of eps at most; sums in float32 add a few of its.
    rounding = torch.finfo(dtype).eps / 2 * wanted.abs()
    slack = 1e-14 if dtype == torch.float64 else 2e-6
    assert (error <= rounding + slack).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.float16])
def test_cutmix_pastes_voxels_of_any_dtype(dtype: torch.dtype) -> None:
    image = (torch.arange(5 * 24).reshape(5, 1, 4, 6) % 7 > 2).to(dtype)
    mixed = cutmix(batch_of(image=image), num_classes=3)
    assert mixed["image"].dtype == dtype


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_voxels_that_rows_share_in_memory_are_neither_written_nor_confused(mix: Mix) -> None:
    # Each row begins one voxel after the one before, as in a sliding window.
    shared = torch.randn(36).as_strided((5, 2, 4, 4), (1, 16, 4, 1))
    before = shared.clone().contiguous()
    mixed = mix(batch_of(image=shared), num_classes=3)
    assert torch.equal(shared, before)
    assert torch.equal(mixed["image"], mix(batch_of(image=before), num_classes=3)["image"])


def test_channels_last_memory_is_mixed_alike_and_kept() -> None:
    batch = batch_of(IMAGES)
    last = batch["image"].contiguous(memory_format=torch.channels_last)
    for mix in (mixup, cutmix):
        mixed = mix(batch | {"image": last}, num_classes=3)
        assert torch.equal(mixed["image"], mix(batch, num_classes=3)["image"])
        assert mixed["image"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_a_batch_of_one_stays_as_it_is(mix: Mix) -> None:
    batch = batch_of((1, 2, 4, 4))
    mixed = mix(batch, num_classes=3)
    assert torch.allclose(mixed["image"], batch["image"])
    assert torch.equal(mixed["label"], torch.tensor([[1.0, 0, 0]]))


def test_batches_of_any_loader_are_mixed_and_a_missing_place_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _say_places_are_missing.cache_clear()
    samples = [{"image": torch.full((1, 4, 4), float(n)), "label": n % 2} for n in range(4)]
    with caplog.at_level(logging.WARNING):
        first = mixup(default_collate(samples), num_classes=2)
        again = mixup(default_collate(samples), num_classes=2)
    assert torch.equal(first["image"], again["image"])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "without 'epoch' and 'step'" in said[0]
    assert "Add both to the batch, or give each call another seed" in said[0]


@pytest.mark.parametrize(
    ("mix", "entries", "complaint"),
    [
        (
            mixup,
            {"image": [torch.zeros(1, 4, 4), torch.zeros(1, 4, 5)]},
            r"image is a list of 2 of shapes \(1, 4, 4\), \(1, 4, 5\)\. Give the loader size=",
        ),
        (cutmix, {"image": None}, "in one tensor; here image is absent"),
        (mixup, {"image": torch.zeros(5, 1, 4, 4, dtype=torch.int16)}, "dtype=torch.float32"),
        (cutmix, {"image": torch.zeros(5, 4, 4)}, r"\(b, C, D, H, W\); here .* \(5, 4, 4\)"),
        (cutmix, {"label": torch.arange(4)}, r"one label per image.*shape \(4,\)"),
        (mixup, {"label": ["a"] * 5}, "label is a list of 5"),
        (mixup, {"label": torch.rand(5)}, r"integer labels \(b,\) or rows \(b, 3\).*float32"),
        (mixup, {"label": torch.zeros(5, 2)}, r"num_classes=3 .*rows \(b, 3\).*shape \(5, 2\)"),
        (cutmix, {"label": torch.tensor([0, 1, 3, 0, 0])}, "label has 3, but num_classes is 3"),
        (cutmix, {"label": torch.tensor([0, -1, 0, 0, 0])}, "label has -1, .*from 0 to 2"),
        (cutmix, {"seg": torch.zeros(5, 1, 6, 7, 5)}, r"the space \(6, 7, 4\), and seg is"),
        (cutmix, {"seg": [None] * 5}, "Give every sample a mask"),
        (mixup, {"alpha": 0}, r"mixup: alpha is 0; it must be a number in \(0, "),
        (cutmix, {"alpha": "1"}, "cutmix: alpha is '1'"),
        (mixup, {"num_classes": 0}, "num_classes is 0; it must be an integer >= 1"),
        (mixup, {"num_classes": True}, "num_classes is True"),
        (cutmix, {"seed": -1}, "seed is -1"),
        (cutmix, {"slot": torch.arange(4)}, r"slot of the batch is .*must be 5 whole numbers"),
        (cutmix, {"slot": torch.arange(5) - 1}, "slot of the batch is"),
        (mixup, {"slot": 3}, "slot of the batch is 3"),
        (mixup, {"epoch": 0.5}, r"epoch of the batch is \[0.5\]; it must be 1 whole"),
        (mixup, {"step": -1}, r"step of the batch is \[-1\]"),
        (cutmix, {"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_what_cannot_be_mixed_is_refused_with_the_way_out(
    mix: Mix, entries: dict[str, Any], complaint: str
) -> None:
    options: dict[str, Any] = {"num_classes": 3}
    options |= {name: entries[name] for name in ("alpha", "num_classes", "seed") if name in entries}
    with pytest.raises(ConfigError, match=complaint):
        mix(batch_of() | entries, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_a_batch_on_a_cuda_device_is_mixed_there_as_on_the_processor(mix: Mix) -> None:
    batch = batch_of(seg=torch.ones(5, 1, 6, 7, 4))
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    there = mix(batch | {name: value.cuda() for name, value in tensors.items()}, num_classes=3)
    for name, value in mix(batch, num_classes=3).items():
        if isinstance(value, torch.Tensor):
            assert there[name].is_cuda
            assert torch.allclose(there[name].cpu(), value)
