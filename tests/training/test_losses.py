"""Losses by class against torch's own losses and numbers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from streaming_balance.training.class_weights import compute_class_weights
from streaming_balance.training.losses import ClassWeightedCrossEntropyLoss, ClassWeightedMSELoss

# Axes after the batch. The last of (2, 4, 5, 3) is as wide as a batch of 3: averaging over the axes
# 1, 2 and 3 of five gets that wrong without an error.
AXES = [(4,), (3, 5), (2, 4, 5), (2, 4, 5, 3), (2, 3, 3, 2, 4)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_errors(errors: list[float], axes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A prediction and a target whose samples have these mean squared errors."""
    target = random(len(errors), *axes, dtype=torch.float64)
    signs = target.sign() * torch.tensor(errors, dtype=torch.float64).sqrt().reshape(
        -1, *(1 for _ in axes)
    )
    return target + signs, target


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize(
    ("weights", "by_batch", "by_weights"),
    [
        ([1.0, 5.0], 10.333333333333334, 2.8181818181818183),
        ([1.4736842105263157, 0.5263157894736842], 1.543859649122807, 1.8333333333333333),
    ],
    ids=["1 and 5", "gliomas"],
)
def test_the_squared_error_is_weighted_by_class_for_any_number_of_axes(
    axes: tuple[int, ...], weights: list[float], by_batch: float, by_weights: float
) -> None:
    prediction, target = with_errors([1.0, 2.0, 4.0], axes)
    labels = torch.tensor([0, 1, 1])
    mean = ClassWeightedMSELoss(weights)(prediction, target, labels)
    assert float(mean) == pytest.approx(by_batch, rel=1e-12)
    weighted = ClassWeightedMSELoss(weights, reduction="weighted_mean")
    assert float(weighted(prediction, target, labels)) == pytest.approx(by_weights, rel=1e-12)
    total = ClassWeightedMSELoss(weights, reduction="sum")(prediction, target, labels)
    assert float(total) == pytest.approx(3 * by_batch, rel=1e-12)
    each = ClassWeightedMSELoss(weights, reduction="none")(prediction, target, labels)
    expected = [weights[0], 2 * weights[1], 4 * weights[1]]
    assert each.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_weights_of_one_give_torchs_squared_error_and_its_gradient(axes: tuple[int, ...]) -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    ours = random(6, *axes).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    target = random(6, *axes, seed=1)
    loss, expected = (
        ClassWeightedMSELoss([1.0, 1.0, 1.0])(ours, target, labels),
        nn.MSELoss()(theirs, target),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("axes", [(), (7,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("ignored", [False, True], ids=["all counted", "some ignored"])
def test_weighted_mean_is_torchs_cross_entropy_with_weights(
    axes: tuple[int, ...], ignored: bool
) -> None:
    logits = random(6, 3, *axes, dtype=torch.float64)
    labels = torch.randint(3, (6, *axes), generator=torch.Generator().manual_seed(1))
    if ignored:
        labels[0] = -100
    weights = [0.5, 2.0, 3.0]
    loss = ClassWeightedCrossEntropyLoss(weights, reduction="weighted_mean")(logits, labels)
    expected = nn.CrossEntropyLoss(torch.tensor(weights, dtype=torch.float64))(logits, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("axes", [(), (2, 3, 4)], ids=str)
def test_weights_of_one_give_torchs_cross_entropy(axes: tuple[int, ...]) -> None:
    logits = random(6, 3, *axes)
    labels = torch.randint(3, (6, *axes), generator=torch.Generator().manual_seed(1))
    loss = ClassWeightedCrossEntropyLoss([1.0, 1.0, 1.0])(logits, labels)
    torch.testing.assert_close(loss, nn.CrossEntropyLoss()(logits, labels))


def test_the_mean_cross_entropy_divides_by_samples_not_by_weights() -> None:
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    loss = ClassWeightedCrossEntropyLoss([3.0, 1.0])(logits, torch.tensor([0, 1]))
    expected = (3 * 0.3132616875182228 + 1.3132616875182228) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("axes", [(), (3, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_soft_targets_are_torchs_with_weights(axes: tuple[int, ...], reduction: str) -> None:
    logits = random(6, 3, *axes, dtype=torch.float64)
    shares = random(6, 3, *axes, seed=1, dtype=torch.float64).softmax(1)
    weights = [0.5, 2.0, 3.0]
    loss = ClassWeightedCrossEntropyLoss(weights, reduction=reduction)(logits, shares)  # type: ignore[arg-type]
    torchs = nn.CrossEntropyLoss(torch.tensor(weights, dtype=torch.float64), reduction="none")
    each = torchs(logits, shares)
    expected = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none"])
def test_a_share_of_one_is_the_class_itself(reduction: Any) -> None:
    labels = torch.tensor([0, 2, 1, 1])
    shares = nn.functional.one_hot(labels, 3).float()
    logits, target = random(4, 3), random(4, 3, seed=1)
    entropy = ClassWeightedCrossEntropyLoss([0.5, 2.0, 3.0], reduction=reduction)
    torch.testing.assert_close(entropy(logits, shares), entropy(logits, labels))
    squared = ClassWeightedMSELoss([0.5, 2.0, 3.0], reduction=reduction)
    torch.testing.assert_close(squared(logits, target, shares), squared(logits, target, labels))


def test_a_mixed_sample_weighs_the_mean_of_its_classes() -> None:
    prediction, target = with_errors([4.0], (2, 3, 3, 3))
    shares = torch.tensor([[0.25, 0.75]])
    loss = ClassWeightedMSELoss([1.0, 5.0])(prediction, target, shares)
    assert float(loss) == pytest.approx(4.0 * (0.25 + 3.75), rel=1e-6)


def test_ignored_samples_weigh_nothing_and_still_count_as_samples() -> None:
    prediction, target = with_errors([1.0, 2.0, 4.0], (2, 3))
    labels = torch.tensor([0, -100, 1])
    loss = ClassWeightedMSELoss([1.0, 5.0])(prediction, target, labels)
    assert float(loss) == pytest.approx((1 + 0 + 20) / 3, rel=1e-12)
    own = ClassWeightedMSELoss([1.0, 5.0], ignore_index=1, reduction="weighted_mean")
    assert float(own(prediction, target, torch.tensor([0, 1, 1]))) == pytest.approx(1.0)
    logits = random(3, 2)
    entropy = ClassWeightedCrossEntropyLoss([1.0, 5.0], reduction="none")(logits, labels)
    assert float(entropy[1]) == 0.0
    assert float(entropy[0]) > 0


def test_voxels_outside_may_have_a_label_of_ones_own_to_ignore() -> None:
    logits = random(2, 3, 4, 5, dtype=torch.float64)
    labels = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    labels[:, 0] = 255
    loss = ClassWeightedCrossEntropyLoss([0.5, 2.0, 3.0], ignore_index=255)(logits, labels)
    weights = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    total = nn.CrossEntropyLoss(weights, ignore_index=255, reduction="sum")(logits, labels)
    torch.testing.assert_close(loss, total / labels.numel(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum"])
def test_a_batch_of_ignored_samples_has_no_loss_and_no_gradient(reduction: Any) -> None:
    logits = random(3, 2).requires_grad_()
    labels = torch.full((3,), -100)
    entropy = ClassWeightedCrossEntropyLoss([1.0, 5.0], reduction=reduction)(logits, labels)
    squared = ClassWeightedMSELoss([1.0, 5.0], reduction=reduction)(logits, logits + 1, labels)
    assert entropy.item() == squared.item() == 0.0
    (entropy + squared).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("parts", [[8], [5, 3], [3, 3, 2], [1] * 8], ids=str)
@pytest.mark.parametrize("kind", ["squared error", "cross entropy"])
def test_ranks_of_unequal_size_add_up_to_the_gradient_of_the_whole_batch(
    parts: list[int], kind: str
) -> None:
    labels = torch.tensor([0, 1, 1, 1, 0, 1, -100, 1])
    inputs, target = random(8, 6, dtype=torch.float64), random(8, 2, seed=1, dtype=torch.float64)
    if kind == "cross entropy":
        entropy = ClassWeightedCrossEntropyLoss([1.47, 0.53])
    squared = ClassWeightedMSELoss([1.47, 0.53])

    def gradient(rows: slice, scale: float) -> torch.Tensor:
        matrix = random(6, 2, seed=2, dtype=torch.float64).requires_grad_()
        output = inputs[rows] @ matrix
        if kind == "cross entropy":
            loss = entropy(output, labels[rows])
        else:
            loss = squared(output, target[rows], labels[rows])
        (loss * scale).backward()
        assert matrix.grad is not None
        return matrix.grad

    whole = gradient(slice(0, 8), 1.0)
    ends = np.cumsum(parts).tolist()
    ranks = [
        gradient(slice(end - size, end), size * len(parts) / 8)  # `loss_scale` of a batch
        for size, end in zip(parts, ends, strict=True)
    ]
    torch.testing.assert_close(torch.stack(ranks).mean(0), whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    prediction, target = random(4, 2, 8, 8, 8).to(dtype), random(4, 2, 8, 8, 8, seed=1).to(dtype)
    labels = torch.tensor([0, 1, 1, 0])
    squared = ClassWeightedMSELoss([1.47, 0.53])
    loss = squared(prediction, target, labels)
    assert loss.dtype == torch.float32
    expected = squared(prediction.double(), target.double(), labels)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    logits = random(4, 2).to(dtype)
    entropy = ClassWeightedCrossEntropyLoss([1.47, 0.53])
    assert entropy(logits, labels).dtype == torch.float32
    assert float(entropy(logits, labels)) == pytest.approx(
        float(entropy(logits.double(), labels)), rel=1e-6
    )


@pytest.mark.parametrize("labels", [[0, 1, 1, 0], [[0.5, 0.5]] * 4], ids=["numbers", "shares"])
def test_autocast_does_not_reach_into_the_loss(labels: Any) -> None:
    layer = nn.Linear(6, 2)
    inputs, target = random(4, 6), random(4, 2, seed=1)
    squared = ClassWeightedMSELoss([1.47, 0.53])
    entropy = ClassWeightedCrossEntropyLoss([1.47, 0.53], logit_adjustment=[-1.3, -0.3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(inputs)
        assert output.dtype == torch.bfloat16
        inside = squared(output, target, torch.tensor(labels))
        inside_entropy = entropy(output, torch.tensor(labels))
    outside = squared(output.float(), target, torch.tensor(labels))
    assert inside.dtype == inside_entropy.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    expected = entropy(output.float(), torch.tensor(labels))
    torch.testing.assert_close(inside_entropy, expected, rtol=0, atol=0)


def test_weights_follow_the_module_and_stay_out_of_checkpoints() -> None:
    loss = ClassWeightedCrossEntropyLoss([1.47, 0.53], logit_adjustment=[-1.3, -0.3])
    assert dict(loss.named_buffers()).keys() == {"class_weights", "logit_adjustment"}
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []
    moved = loss.to("meta")
    assert moved.class_weights.device.type == "meta"
    assert moved.logit_adjustment is not None
    assert moved.logit_adjustment.device.type == "meta"


def test_a_loss_left_on_another_device_weighs_where_the_batch_is() -> None:
    loss = ClassWeightedCrossEntropyLoss([1.47, 0.53], logit_adjustment=[-1.3, -0.3])
    logits, labels = random(3, 2), torch.tensor([0, 1, 1])
    expected = loss(logits, labels)
    assert torch.equal(loss.to("meta")(logits, labels), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("is_moved", [True, False], ids=["moved", "left on the processor"])
def test_losses_on_a_device_under_autocast_are_those_of_the_processor(is_moved: bool) -> None:
    layer = nn.Linear(6, 2).cuda()
    inputs, target = random(4, 6).cuda(), random(4, 2, seed=1).cuda()
    squared = ClassWeightedMSELoss([1.47, 0.53])
    entropy = ClassWeightedCrossEntropyLoss([1.47, 0.53], logit_adjustment=[-1.3, -0.3])
    for labels in (torch.tensor([0, 1, -100, 0]), torch.tensor([[0.5, 0.5]] * 4)):
        with torch.autocast("cuda", dtype=torch.float16):
            output = layer(inputs)
            found = squared.to("cuda" if is_moved else "cpu")(output, target, labels.cuda())
            found_entropy = entropy.to("cuda" if is_moved else "cpu")(output, labels.cuda())
        expected = squared.cpu()(output.cpu(), target.cpu(), labels)
        torch.testing.assert_close(found.cpu(), expected)
        torch.testing.assert_close(found_entropy.cpu(), entropy.cpu()(output.cpu(), labels))


def test_a_model_cast_to_half_does_not_round_the_weights() -> None:
    prediction, target = with_errors([1.0, 2.0], (4,))
    labels = torch.tensor([0, 1])
    weights = [1.4736842105263157, 0.5263157894736842]
    expected = ClassWeightedMSELoss(weights)(prediction.float(), target.float(), labels)
    halved = ClassWeightedMSELoss(weights).half()
    assert torch.equal(halved(prediction.float(), target.float(), labels), expected)
    doubled = ClassWeightedMSELoss(weights).double()(prediction, target, labels)
    assert float(doubled) == pytest.approx((weights[0] + 2 * weights[1]) / 2, rel=1e-12)


def test_any_whole_dtype_of_labels_will_do() -> None:
    prediction, target = with_errors([1.0, 2.0, 4.0], (2, 3))
    loss = ClassWeightedMSELoss([1.0, 5.0])
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool):
        labels = torch.tensor([0, 1, 1]).to(dtype)
        assert float(loss(prediction, target, labels)) == pytest.approx(31 / 3, rel=1e-12)


def test_logit_adjustment_is_balanced_softmax() -> None:
    # Adding log n_c to logits 2 and 1: cross entropy worked out to 60 digits.
    logits = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    prior = [math.log(75 / 285), math.log(210 / 285)]
    loss = ClassWeightedCrossEntropyLoss([1.0, 1.0], logit_adjustment=prior)
    for label, expected in enumerate([0.7080665488763163, 0.678447131695158]):
        found = float(loss(logits, torch.tensor([label])))
        assert found == pytest.approx(expected, rel=1e-12)
    voxels = logits.reshape(1, 2, 1, 1, 1).expand(1, 2, 3, 4, 5)
    dense = loss(voxels, torch.zeros(1, 3, 4, 5, dtype=torch.int64))
    assert float(dense) == pytest.approx(0.7080665488763163, rel=1e-12)


def test_logit_adjustment_is_taken_by_name() -> None:
    by_name = ClassWeightedCrossEntropyLoss(
        [1.0, 1.0], classes=["LGG", "HGG"], logit_adjustment={"HGG": -0.3, "LGG": -1.3}
    )
    assert by_name.logit_adjustment is not None
    assert by_name.logit_adjustment.tolist() == pytest.approx([-1.3, -0.3])


def test_a_loss_touches_no_global_generator() -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    loss = ClassWeightedCrossEntropyLoss(compute_class_weights([0, 1, 1]))
    loss(torch.zeros(2, 2), torch.tensor([0, 1]))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]  # noqa: NPY002
