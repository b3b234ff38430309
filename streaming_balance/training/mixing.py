"""Mixup and CutMix: batches whose samples are mixed in pairs, by keys instead of a generator."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.nn.functional import one_hot

from streaming_balance.errors import ConfigError
from streaming_balance.plan.keys import check_seed
from streaming_balance.plan.options import whole_number
from streaming_balance.training.pairing import (
    Boxes,
    Mixing,
    Pairs,
    box_centres,
    cut_boxes,
    draw_pairs,
    mixed_steps,
    unmixed,
)
from streaming_balance.training.requests import Batch

logger = logging.getLogger(__name__)

# (b, C, H, W) and (b, C, D, H, W).
IMAGE_AXES = (4, 5)
_BATCH_AND_CHANNEL = 2


def mixup(
    batch: Mapping[str, Any], *, alpha: float = 1.0, num_classes: int, seed: int = 0
) -> Batch:
    """Blend each sample of a batch with another one, and their labels likewise.

    Args:
        batch: `image` (b, C, ...) of floats, `label` int64 (b,) or 0/1 (b, K), perhaps `seg`, and
            `epoch`, `step` and `slot` (b,) as a loader gives them: lambda depends on these and the
            seed alone. Without them every batch is batch 0, and rows count from 0.
        alpha: lambda is drawn from Beta(alpha, alpha); above 0, and 1 is uniform.
        num_classes: number of classes K.
        seed: integer in [0, 2**64 - 1].

    Returns:
        A new dict with `image` = lambda own + (1 - lambda) partner, `label` float32 (b, K) likewise
        of one-hot rows, `label_a` (own) and `label_b` (partner's) as they were, `lam` float64 (b,),
        and `partner` int64 (b,), the row each was mixed with. `seg` stays each sample's own, and
        `seg_b` is the partner's. All else is passed on; a batch of one is mixed with itself.

    Raises:
        ConfigError: a value is out of its range, images are integers or differ in shape, or labels
            are no classes below `num_classes`.

    Source:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.

    Examples:
        >>> batch = {"image": torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4),
        ...     "label": torch.tensor([0, 1]), "epoch": 0, "step": 3}
        >>> mixed = mixup(batch, alpha=0.4, num_classes=2, seed=1)
        >>> torch.allclose(mixed["image"][:, 0, 0, 0], mixed["label"][:, 1])
        True
    """
    return _mixed_by(Mixing(name="mixup", alpha=alpha), batch, num_classes=num_classes, seed=seed)


def cutmix(
    batch: Mapping[str, Any], *, alpha: float = 1.0, num_classes: int, seed: int = 0
) -> Batch:
    """Paste a box of another sample into each sample of a batch, and weigh labels by volume.

    The box has the side floor(S (1 - lambda)^(1 / ndim)) along an axis of S voxels and its centre
    anywhere; clipped at the border, it says what lambda becomes: the part of the voxels kept.

    Args:
        batch: as for `mixup`; `image` is (b, C, H, W) or (b, C, D, H, W) of any dtype, and `seg`
            has the same space, with or without a channel axis.
        alpha: lambda is drawn from Beta(alpha, alpha) before clipping; above 0, and 1 is uniform.
        num_classes: number of classes K.
        seed: integer in [0, 2**64 - 1].

    Returns:
        A new dict as from `mixup`, but with the partner's box in `image` and, the same box, in
        `seg`; no `seg_b`.

    Raises:
        ConfigError: a value is out of its range, images differ in shape or from their masks, or
            labels are no classes below `num_classes`.

    Source:
        Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
        Features", ICCV 2019.

    Examples:
        >>> batch = {"image": torch.tensor([0, 1]).reshape(2, 1, 1, 1, 1).expand(2, 1, 8, 8, 8),
        ...     "label": torch.tensor([0, 1]), "epoch": 0, "step": 3}
        >>> mixed = cutmix(batch, num_classes=2, seed=1)
        >>> pasted = (mixed["image"][0] == 1).double().mean()
        >>> bool(mixed["lam"][0] == 1 - pasted)
        True
    """
    return _mixed_by(Mixing(name="cutmix", alpha=alpha), batch, num_classes=num_classes, seed=seed)


class BatchMixer:
    """Mixes batches as a loader's settings say.

    Args:
        mixing: what is mixed, and how.
        num_classes: number of classes K.
        seed: the run's seed.
    """

    def __init__(self, mixing: Mixing, *, num_classes: int, seed: int) -> None:
        self._mixing, self._seed = mixing, check_seed(seed)
        classes = whole_number(num_classes)
        if classes is None or classes < 1:
            raise ConfigError(f"num_classes is {num_classes!r}; it must be an integer >= 1.")
        self._num_classes = classes

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch that cannot be mixed.

        Looks at the values of labels, so a loader asks before it moves them to a device.

        Raises:
            ConfigError: says what is wrong with the batch, and the way out.
        """
        name = self._mixing.name
        image = batch.get("image")
        if not isinstance(image, torch.Tensor):
            raise ConfigError(
                f"{name} needs the images of a batch in one tensor; here image is "
                f"{_described(image)}. Give the loader size=(D, H, W), or crop in the transform."
            )
        if name == "mixup" and not image.is_floating_point():
            raise ConfigError(
                f"mixup blends voxels, and image has dtype {image.dtype}. Give the loader "
                f"dtype=torch.float32, or cast the image before."
            )
        if name == "cutmix" and image.ndim not in IMAGE_AXES:
            raise ConfigError(
                f"cutmix needs images (b, C, H, W) or (b, C, D, H, W); here image has shape "
                f"{tuple(image.shape)}."
            )
        _check_labels(name, batch.get("label"), image, num_classes=self._num_classes)
        if name == "cutmix" and "seg" in batch:
            _check_masks(batch["seg"], image)

    def mix(
        self, batch: Mapping[str, Any], *, epoch: int, step: int, slots: Sequence[int]
    ) -> Batch:
        """Mix a batch that `check` accepts; one that is left alone gets the same entries.

        Args:
            batch: on any device; not changed.
            epoch: of the global batch.
            step: of the global batch.
            slots: `(b,)` positions of its rows in the global batch.

        Returns:
            A new dict as from `mixup` or `cutmix`.
        """
        mixing, place = self._mixing, {"seed": self._seed, "epoch": epoch}
        if mixed_steps(mixing, first=step, stop=step + 1, **place)[0]:
            pairs = draw_pairs(mixing, step=step, slots=slots, **place)
        else:
            pairs = unmixed(len(slots))
        mixed = _blended(batch, pairs) if mixing.name == "mixup" else _pasted(batch, pairs)
        return mixed | _mixed_labels(
            batch["label"], mixed["partner"], mixed["lam"], num_classes=self._num_classes
        )


def _mixed_by(mixing: Mixing, batch: Mapping[str, Any], *, num_classes: int, seed: int) -> Batch:
    """Mix a batch that says itself where it stands in the run."""
    mixer = BatchMixer(mixing, num_classes=num_classes, seed=seed)
    mixer.check(batch)
    if not {"epoch", "step"} <= batch.keys():
        _say_places_are_missing(mixing.name)
    num_rows = len(batch["image"])
    (epoch,) = _places("epoch", [batch.get("epoch", 0)], 1)
    (step,) = _places("step", [batch.get("step", 0)], 1)
    slots = _places("slot", batch.get("slot", range(num_rows)), num_rows)
    return mixer.mix(batch, epoch=epoch, step=step, slots=slots)


def _places(name: str, values: object, count: int) -> list[int]:
    """Give what says where a batch stands as plain whole numbers from 0."""
    given = values.tolist() if isinstance(values, torch.Tensor) else values
    numbers = [whole_number(value) for value in given] if isinstance(given, Iterable) else []
    known = [number for number in numbers if number is not None and number >= 0]
    if len(known) != count or len(numbers) != count:
        raise ConfigError(
            f"{name} of the batch is {given!r}; it must be {count} whole numbers from 0: where in "
            f"the run the batch stands. Leave it out to count from 0."
        )
    return known


@cache
def _say_places_are_missing(name: str) -> None:
    """Warn, once, that batches without a place are all mixed by the same numbers."""
    logger.warning(
        "%s was given a batch without 'epoch' and 'step', so every such batch is mixed by the same "
        "lambdas and boxes. Add both to the batch, or give each call another seed.",
        name,
    )


def _blended(batch: Mapping[str, Any], pairs: Pairs) -> Batch:
    """Blend images; masks stay, and the partners' come beside them."""
    image = batch["image"]
    partner, weight = _on_device_of(image, pairs)
    mixed = {**batch, "partner": partner, "lam": weight}
    if not pairs.is_identity:
        # Half precision would round lambda to three digits.
        precise = image.dtype if image.dtype == torch.float64 else torch.float32
        keep = weight.to(precise).reshape(-1, *[1] * (image.ndim - 1))
        other = image[partner].to(precise)
        mixed["image"] = torch.lerp(other, image.to(precise), keep).to(image.dtype)
    if "seg" in batch:
        masks = batch["seg"]
        is_tensor = isinstance(masks, torch.Tensor)
        mixed["seg_b"] = (
            masks[partner.to(masks.device)] if is_tensor else [masks[row] for row in pairs.partner]
        )
    return mixed


def _pasted(batch: Mapping[str, Any], pairs: Pairs) -> Batch:
    """Paste boxes of partners into images and masks."""
    image = batch["image"]
    space = tuple(image.shape[_BATCH_AND_CHANNEL:])
    boxes = cut_boxes(pairs.weight, box_centres(pairs.places, space), space)
    partner, kept = _on_device_of(
        image, Pairs(partner=pairs.partner, weight=boxes.kept, places=pairs.places)
    )
    mixed = {**batch, "partner": partner, "lam": kept}
    if not pairs.is_identity:
        for name in ("image", "seg"):
            if name in batch:
                mixed[name] = _with_boxes(batch[name], pairs, boxes)
    return mixed


def _with_boxes(rows: torch.Tensor, pairs: Pairs, boxes: Boxes) -> torch.Tensor:
    """Copy an array and paste into each row the box of its partner."""
    mixed = rows.clone()
    for row, other in enumerate(pairs.partner.tolist()):
        corners = zip(boxes.low[row].tolist(), boxes.high[row].tolist(), strict=True)
        inside: tuple[Any, ...] = (..., *(slice(low, high) for low, high in corners))
        mixed[row][inside] = rows[other][inside]
    return mixed


def _on_device_of(image: torch.Tensor, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Put partners and lambdas beside the images."""
    # Apple's GPUs have no float64.
    precise = torch.float32 if image.device.type == "mps" else torch.float64
    return (
        torch.from_numpy(pairs.partner.copy()).to(image.device, non_blocking=True),
        torch.from_numpy(pairs.weight.copy()).to(image.device, precise, non_blocking=True),
    )


def _mixed_labels(
    label: torch.Tensor, partner: torch.Tensor, weight: torch.Tensor, *, num_classes: int
) -> Batch:
    """Mix labels as their images were."""
    partner, weight = partner.to(label.device), weight.to(label.device)
    rows = one_hot(label.long(), num_classes) if label.ndim == 1 else label
    own, keep = rows.to(weight.dtype), weight[:, None]
    return {
        "label": (keep * own + (1 - keep) * own[partner]).to(torch.float32),
        "label_a": label,
        "label_b": label[partner],
    }


def _check_labels(name: str, label: object, image: torch.Tensor, *, num_classes: int) -> None:
    """Refuse labels that are neither class numbers nor one row of classes per image."""
    if not isinstance(label, torch.Tensor) or len(label) != len(image) or not len(image):
        raise ConfigError(
            f"{name} needs one label per image and at least one of both; here label is "
            f"{_described(label)} for images of shape {tuple(image.shape)}."
        )
    if label.ndim == 2 and label.shape[1] == num_classes:
        return
    if label.ndim != 1 or label.is_floating_point() or label.is_complex():
        raise ConfigError(
            f"{name} with num_classes={num_classes} needs integer labels (b,) or rows "
            f"(b, {num_classes}); here label is {_described(label)} of {label.dtype}."
        )
    outside = label[(label < 0) | (label >= num_classes)]
    if len(outside):
        raise ConfigError(
            f"{name}: label has {int(outside[0])}, but num_classes is {num_classes}, so labels run "
            f"from 0 to {num_classes - 1}. Use the number of classes of the data set, and map or "
            f"leave out samples without a class."
        )


def _check_masks(masks: object, image: torch.Tensor) -> None:
    """Refuse masks that a box of the image does not fit."""
    space = image.shape[_BATCH_AND_CHANNEL:]
    if isinstance(masks, torch.Tensor) and (
        len(masks) == len(image) and masks.ndim > len(space) and masks.shape[-len(space) :] == space
    ):
        return
    raise ConfigError(
        f"cutmix cuts the same box from image and seg; here image has the space {tuple(space)}, "
        f"and seg is {_described(masks)}. Give every sample a mask of its image's shape, or take "
        f"'seg' out in the transform."
    )


def _described(value: object) -> str:
    """Say what stands where a tensor should."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        shapes = sorted({str(tuple(getattr(item, "shape", ()))) for item in value})
        return f"a list of {len(value)} of shapes {', '.join(shapes[:4])}"
    return "absent" if value is None else f"a {type(value).__name__}"
