"""MONAI, Albumentations, TorchIO: the same sample whatever the threads, workers and ranks."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streaming_balance.errors import ConfigError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.adapters import adapted
from streaming_balance.training.loader import train_loader
from streaming_balance.training.transforms import KeyedTransform
from tests.building import Sample
from tests.training.cohorts import merged, packed, take
from tests.training.recipes import FLAT_RECIPES, RECIPES, albumentations_volume, monai_choice

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
SPACE = (12, 10, 8)
WAYS: list[dict[str, Any]] = [
    {"num_threads": 1},
    {"num_threads": 2},
    {"num_threads": 4},
    {"workers": 2},
    {"workers": 1, "num_threads": 3},
]
LIBRARIES = [name for name in RECIPES if name not in ("torch", "numpy")]


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Twelve volumes of two channels with masks."""
    return packed(tmp_path_factory.mktemp("volumes") / "cohort", masked(SPACE))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Twelve images of three channels with masks."""
    return packed(tmp_path_factory.mktemp("images") / "cohort", masked(SPACE[:2], channels=3))


def masked(space: tuple[int, ...], channels: int = 2) -> list[Sample]:
    """Make samples of random values in [0, 1) with masks of random zeros and ones."""
    generator = np.random.default_rng(5)
    axes = "CDHW" if len(space) == 3 else "CHW"
    return [
        Sample(
            key=f"P{n:02d}",
            image=generator.random((channels, *space), dtype=np.float32),
            axes=axes,
            seg=generator.integers(0, 2, space).astype(np.uint8),
            label="LGG" if n % 3 else "HGG",
        )
        for n in range(12)
    ]


def delivered(shards: ShardSet, transform: Any, **options: Any) -> list[tuple[Any, ...]]:
    """Give every batch of three epochs: members, and the bytes of image and mask."""
    settings: dict[str, Any] = {"global_batch_size": 4, "balance": "class_balanced", "seed": 9}
    with train_loader(shards, transform=transform, **settings | options) as loader:
        return [
            (batch["sample"].tolist(), as_bytes(batch["image"]), as_bytes(batch["seg"]))
            for _ in range(3)
            for batch in loader
        ]


def as_bytes(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype, bytes]:
    """Give shape, dtype and content."""
    return tuple(tensor.shape), tensor.dtype, tensor.numpy().tobytes()


def one(space: tuple[int, ...] = SPACE, channels: int = 2) -> dict[str, Any]:
    """Make a sample as a transform gets it."""
    generator = np.random.default_rng(1)
    return {
        "image": torch.from_numpy(generator.random((channels, *space), dtype=np.float32)),
        "seg": torch.from_numpy(generator.integers(0, 2, (1, *space)).astype(np.uint8)),
        "label": 1,
        "key": "P00",
        "patient": "P00",
        "sample": 0,
    }


def global_states() -> tuple[object, ...]:
    """Copy the states of the three global generators."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize("name", RECIPES)
def test_samples_are_identical_for_any_number_of_threads_and_workers(
    volumes: ShardSet, name: str
) -> None:
    transform = RECIPES[name]()
    runs = [delivered(volumes, transform, **way) for way in WAYS]
    for way, run in zip(WAYS, runs, strict=True):
        assert run == runs[0], way
    # Random it is: a sample comes back in another epoch, another way.
    images = [image for _, image, _ in runs[0]]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("name", FLAT_RECIPES)
def test_images_in_two_dimensions_are_identical_too(images: ShardSet, name: str) -> None:
    transform = FLAT_RECIPES[name]()
    runs = [delivered(images, transform, **way) for way in ({"num_threads": 3}, {"workers": 2})]
    assert runs[0] == runs[1]
    space = (6, 6) if "tensors" in name else SPACE[:2]
    for _, (shape, _, _), (mask_shape, _, _) in runs[0]:
        assert (shape, mask_shape) == ((4, 3, *space), (4, 1, *space))


@pytest.mark.parametrize("name", LIBRARIES)
def test_ranks_get_what_one_rank_gets(volumes: ShardSet, name: str) -> None:
    transform = RECIPES[name]()
    options: dict[str, Any] = {"global_batch_size": 4, "seed": 9, "transform": transform}
    with train_loader(volumes, **options) as alone:
        whole = [merged([batch]) for batch in alone]
    ranks = [train_loader(volumes, rank=r, num_ranks=2, **options) for r in range(2)]
    assert [merged(list(parts)) for parts in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_resumed_run_transforms_as_the_uninterrupted_one(volumes: ShardSet, name: str) -> None:
    def loader() -> Any:
        return train_loader(volumes, global_batch_size=4, seed=9, transform=RECIPES[name]())

    with loader() as straight, loader() as first, loader() as second:
        expected = take(straight, 5)
        take(first, 2)
        second.load_state_dict(first.state_dict())
        assert take(second, 3) == expected[2:]


@pytest.mark.parametrize("name", RECIPES)
def test_the_global_generators_stand_where_they_stood_after_every_call(name: str) -> None:
    transform = KeyedTransform(RECIPES[name](), seed=1)
    before = global_states()
    for slot in range(3):
        transform(one(), epoch=0, step=0, slot=slot)
        assert global_states() == before


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_process_drew_before_changes_nothing(name: str) -> None:
    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        transform = KeyedTransform(RECIPES[name](), seed=1)
        results.append(as_bytes(transform(one(), epoch=0, step=0, slot=3)["image"]))
    assert results[0] == results[1]


def test_noise_of_torchio_in_many_threads_leaves_training_its_random_numbers() -> None:
    """TorchIO's own way of seeding would reset the generator that training draws from meanwhile."""
    import torchio

    torch.manual_seed(3)
    undisturbed = torch.rand(20_000).tolist()
    torch.manual_seed(3)
    transform = KeyedTransform(torchio.RandomNoise(), seed=1)
    running = threading.Event()

    def work() -> None:
        for slot in range(40):
            transform(one(), epoch=0, step=0, slot=slot)
            running.set()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    running.wait(30)
    drawn = [torch.rand(1).item() for _ in range(20_000)]
    for thread in threads:
        thread.join()
    assert drawn == undisturbed


def test_torchio_outside_of_a_loader_still_draws_from_torch() -> None:
    import torchio

    KeyedTransform(torchio.RandomNoise(), seed=1)(one(), epoch=0, step=0, slot=0)
    noise = torchio.Noise(mean=0.0, std=1.0, seed=42)
    added = noise(torch.zeros(1, 4, 4, 4))
    expected = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(42))
    assert torch.equal(added, expected)


def test_masks_move_with_their_images() -> None:
    """Where the image is its own mask, every spatial transform keeps them equal."""
    for name in ("monai spatial", "albumentations volume", "torchio spatial"):
        transform = RECIPES[name]()
        if name == "monai spatial":
            transform.transforms = transform.transforms[:1] + transform.transforms[2:3]
        elif name == "albumentations volume":
            transform.transforms = transform.transforms[:2]
        else:
            transform.transforms = transform.transforms[:1]
        sample = one(channels=1)
        sample["image"] = sample["seg"].float()
        moved = 0
        for slot in range(6):
            keyed = KeyedTransform(transform, seed=1)
            result = keyed(copy.deepcopy(sample), epoch=0, step=0, slot=slot)
            assert torch.equal(result["image"], result["seg"].float()), name
            moved += not torch.equal(result["image"], sample["image"])
        assert moved, name


@pytest.mark.parametrize("name", [*LIBRARIES, *FLAT_RECIPES])
def test_a_batch_holds_plain_tensors_and_all_that_the_sample_had(name: str) -> None:
    flat = name in FLAT_RECIPES
    transform = (FLAT_RECIPES if flat else RECIPES)[name]()
    sample = one(SPACE[:2], 3) if flat else one()
    result = KeyedTransform(transform, seed=1)(sample, epoch=0, step=0, slot=0)
    assert set(result) == {"image", "seg", "label", "key", "patient", "sample"}
    assert type(result["image"]) is type(result["seg"]) is torch.Tensor
    assert result["image"].ndim == result["seg"].ndim == (3 if flat else 4)
    assert (result["label"], result["key"]) == (1, "P00")


def test_samples_without_a_mask_are_transformed_alone() -> None:
    for transform in (albumentations_volume(), RECIPES["torchio intensity"]()):
        sample = one()
        del sample["seg"]
        result = KeyedTransform(transform, seed=1)(sample, epoch=0, step=0, slot=0)
        assert "seg" not in result
        assert result["image"].shape[0] == 2


def test_a_function_hands_its_generator_to_what_it_calls() -> None:
    from monai import transforms

    noise = adapted(transforms.RandGaussianNoised("image", prob=1))

    def transform(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return noise(sample, rng)

    keyed = [KeyedTransform(transform, seed=1) for _ in range(2)]
    first, again = (k(one(), epoch=0, step=0, slot=5)["image"] for k in keyed)
    other = keyed[0](one(), epoch=0, step=0, slot=6)["image"]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_a_function_calls_may_be_called_in_many_threads_at_once() -> None:
    from monai import transforms

    noise = adapted(transforms.RandGaussianNoised("image", prob=1))
    samples = [{"image": torch.zeros(1, 24, 24, 24)} for _ in range(64)]

    def noisy(number: int) -> torch.Tensor:
        sample = dict(samples[number])
        image: torch.Tensor = noise(sample, np.random.default_rng(number))["image"]
        return image

    alone = [noisy(number) for number in range(64)]
    with ThreadPoolExecutor(4) as crew:
        together = list(crew.map(noisy, [*range(64), *range(64)]))
    for number, image in enumerate(together):
        assert torch.equal(image, alone[number % 64])
    sent = pickle.loads(pickle.dumps(noise))
    image = sent(dict(samples[3]), np.random.default_rng(3))["image"]
    assert torch.equal(image, alone[3])


def test_the_users_own_transform_object_is_never_touched(volumes: ShardSet) -> None:
    transform = monai_choice()
    transform.set_random_state(seed=4)
    before = transform.R.get_state()[1].tolist()
    delivered(volumes, transform, num_threads=2)
    assert transform.R.get_state()[1].tolist() == before


def test_several_samples_for_one_are_refused_with_the_way_out() -> None:
    from monai import transforms

    crop = transforms.RandSpatialCropSamplesd(["image"], roi_size=(4, 4, 4), num_samples=3)
    with pytest.raises(ConfigError, match=r"gave 3 samples for one.*num_samples=1"):
        KeyedTransform(crop, seed=1)(one(), epoch=0, step=0, slot=0)


def test_array_transforms_of_monai_are_told_apart_in_the_error() -> None:
    from monai import transforms

    with pytest.raises((AttributeError, KeyError, TypeError, ValueError, RuntimeError)) as caught:
        KeyedTransform(transforms.RandFlip(prob=1), seed=1)(one(), epoch=0, step=0, slot=0)
    assert any("names that end in d" in note for note in caught.value.__notes__)


def test_albumentations_that_cannot_be_given_generators_is_refused(tmp_path: Path) -> None:
    """A release before 2.0, stood in for by a module of that name with what it had."""
    source = "class Compose:\n    def __call__(self, **data):\n        return data\n"
    (tmp_path / "old.py").write_text(source)
    names: dict[str, Any] = {"__name__": "albumentations.core.composition"}
    exec(compile((tmp_path / "old.py").read_text(), "old.py", "exec"), names)
    with pytest.raises(ConfigError, match=r"Compose comes from an Albumentations .* 2\.0 or newer"):
        KeyedTransform(names["Compose"](), seed=1)(one(), epoch=0, step=0, slot=0)


def test_seeds_of_torchio_mean_the_same_inside_and_outside_of_a_loader() -> None:
    """A Subject's history names the seed of its noise; replaying it must give the same noise."""
    import torchio

    noise = torchio.Noise(mean=0.0, std=1.0, seed=42)
    sample = {"image": torch.zeros(1, 4, 4, 4), "key": "P00"}
    inside = KeyedTransform(noise, seed=1)(sample, epoch=0, step=0, slot=0)["image"]
    assert torch.equal(inside, noise(torch.zeros(1, 4, 4, 4)))


def counted(sample: dict[str, Any]) -> dict[str, Any]:
    """Say on how many threads torch computes here, and a mean whose last digits depend on it."""
    large = torch.linspace(0, 1, 200_000).reshape(1, -1) ** 3
    return sample | {"threads": torch.get_num_threads(), "mean": large.mean().reshape(1)}


@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_torch_computes_on_one_thread_inside_transforms_and_on_all_outside(
    volumes: ShardSet, way: dict[str, Any]
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with train_loader(volumes, global_batch_size=4, transform=counted, **way) as loader:
            batches = list(loader)
        found = [torch.get_num_threads()]
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
    finally:
        torch.set_num_threads(before)
    assert found == [3, 3]
    assert {n for batch in batches for n in batch["threads"].tolist()} == {1}
    assert len({mean for batch in batches for mean in batch["mean"].flatten().tolist()}) == 1
