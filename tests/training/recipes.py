"""Random transforms of three libraries, as their users write them, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

BOTH = ["image", "seg"]
Recipe = Callable[[], Any]


def monai_spatial() -> Any:
    """Flip, rotate and crop image and mask together, then noise."""
    from monai import transforms

    return transforms.Compose(
        [
            transforms.RandFlipd(BOTH, prob=0.5, spatial_axis=0),
            transforms.RandAffined(BOTH, prob=0.8, rotate_range=0.3, mode=["bilinear", "nearest"]),
            transforms.RandSpatialCropd(BOTH, roi_size=(6, 6, 6), random_size=False),
            transforms.RandGaussianNoised("image", prob=0.8),
            transforms.NormalizeIntensityd("image"),
        ]
    )


def monai_choice() -> Any:
    """One of several, nested, and a cropper that gives a list of one."""
    from monai import transforms

    noise = transforms.RandGaussianNoised("image", prob=1)
    choice = transforms.OneOf([noise, transforms.RandBiasFieldd("image", prob=1)])
    crop = transforms.RandCropByPosNegLabeld(
        BOTH, label_key="seg", spatial_size=(4, 4, 4), num_samples=1
    )
    return transforms.Compose([choice, crop])


def albumentations_volume() -> Any:
    """Volumes: crop, turn, and holes."""
    import albumentations

    return albumentations.Compose(
        [
            albumentations.RandomCrop3D((6, 6, 6)),
            albumentations.CubicSymmetry(p=1),
            albumentations.CoarseDropout3D(p=1),
        ]
    )


def torchio_spatial() -> Any:
    """Flip, deform and resample image and mask together."""
    import torchio

    return torchio.Compose(
        [
            torchio.RandomFlip(axes=(0, 1, 2)),
            torchio.RandomAffine(),
            torchio.RandomElasticDeformation(num_control_points=5, max_displacement=1),
        ]
    )


def torchio_intensity() -> Any:
    """Everything that TorchIO seeds torch's global generator for, and a choice."""
    import torchio

    return torchio.Compose(
        [
            torchio.OneOf({torchio.RandomNoise(): 0.5, torchio.RandomGamma(): 0.5}),
            torchio.RandomNoise(),
            torchio.RandomMotion(),
            torchio.RandomBiasField(),
            torchio.RandomGhosting(),
            torchio.RandomSwap(patch_size=2),
        ]
    )


class Mixed:
    """Somebody's own transform, which holds those of libraries in attributes and lists."""

    def __init__(self) -> None:
        from monai import transforms

        self.steps = [transforms.RandFlipd(BOTH, prob=0.5, spatial_axis=1)]
        self.noise = functools.partial(transforms.RandGaussianNoised("image", prob=1))

    def __call__(self, sample: dict[str, Any]) -> Any:
        """Apply them one after another."""
        for step in self.steps:
            sample = step(sample)
        return self.noise(sample)


def torch_draws(sample: dict[str, Any]) -> dict[str, Any]:
    """Draw from torch's global generator, as torchvision and kornia do."""
    image = sample["image"]
    noise = torch.randn_like(image) + torch.rand(1) + torch.empty(1).uniform_(0, 1)
    noise = noise * torch.bernoulli(torch.full((1,), 0.5)) + torch.randint(0, 9, (1,))
    return sample | {"image": image + noise}


def numpy_draws(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Draw from the generator that is handed over; the mean depends on how sums are cut."""
    image = sample["image"] - sample["image"].mean()
    return sample | {"image": image + torch.from_numpy(rng.normal(size=image.shape))}


RECIPES: dict[str, Recipe] = {
    "monai spatial": monai_spatial,
    "monai choice": monai_choice,
    "albumentations volume": albumentations_volume,
    "torchio spatial": torchio_spatial,
    "torchio intensity": torchio_intensity,
    "own with monai inside": Mixed,
    "torch": lambda: torch_draws,
    "numpy": lambda: numpy_draws,
}


def albumentations_image() -> Any:
    """Images in two dimensions."""
    import albumentations

    return albumentations.Compose(
        [
            albumentations.HorizontalFlip(p=0.5),
            albumentations.RandomBrightnessContrast(p=1),
            albumentations.GaussNoise(p=1),
            albumentations.ElasticTransform(p=1),
        ]
    )


def albumentations_tensors() -> Any:
    """Images made tensors by the library itself."""
    import albumentations

    return albumentations.Compose([albumentations.RandomCrop(6, 6), albumentations.ToTensorV2()])


def monai_image() -> Any:
    """Images in two dimensions."""
    from monai import transforms

    return transforms.RandZoomd(BOTH, prob=1, mode=["bilinear", "nearest"])


def torchio_image() -> Any:
    """Images as one slice."""
    import torchio

    return torchio.Compose([torchio.RandomFlip(axes=(0, 1)), torchio.RandomNoise()])


FLAT_RECIPES: dict[str, Recipe] = {
    "albumentations image": albumentations_image,
    "albumentations tensors": albumentations_tensors,
    "monai image": monai_image,
    "torchio image": torchio_image,
}
