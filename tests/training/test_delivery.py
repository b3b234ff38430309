"""What a loader is built with: refused by name with the way out, or taken as it was meant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streaming_balance.errors import ConfigError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import train_loader
from tests.training.cohorts import cohort, packed, seen

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def train(shards: Any, **options: Any) -> Any:
    """Build the training loader."""
    chosen: dict[str, Any] = {"global_batch_size": 4} | options
    return train_loader(shards, **chosen)


def evaluate(shards: Any, **options: Any) -> Any:
    """Build the evaluation loader."""
    chosen: dict[str, Any] = {"split": "val", "batch_size": 4} | options
    return eval_loader(shards, **chosen)


LOADERS = pytest.mark.parametrize("build", [train, evaluate])


@LOADERS
def test_numbers_of_numpy_are_as_good_as_plain_ones(
    small: ShardSet, build: Callable[..., Any]
) -> None:
    sizes = "global_batch_size" if build is train else "batch_size"
    plain = {sizes: 4, "num_threads": 2, "prefetch_bytes": 10_000, "size": (4, 3, 2)}
    of_numpy = {
        sizes: np.int64(4),
        "num_threads": np.uint8(2),
        "prefetch_bytes": np.int32(10_000),
        "size": tuple(np.array([4, 3, 2])),
    }
    with build(small, **plain) as one, build(small, **of_numpy) as other:
        assert [seen(batch) for batch in one] == [seen(batch) for batch in other]
        assert one.state_dict() == other.state_dict()


@LOADERS
@pytest.mark.parametrize("size", [(True, 8, 8), (8, 8, np.True_), (8, 0, 8), (8, 8.0, 8), ()])
def test_a_size_that_is_no_lengths_is_refused(
    small: ShardSet, build: Callable[..., Any], size: Any
) -> None:
    with pytest.raises(ConfigError, match="size is"):
        build(small, size=size)


@LOADERS
@needs_no_cuda
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_a_device_that_is_not_there_is_refused_when_the_loader_is_built(
    small: ShardSet, build: Callable[..., Any], device: Any
) -> None:
    with pytest.raises(ConfigError, match=r"device is 'cuda.*0 CUDA devices.*Use device=None"):
        build(small, device=device)


@LOADERS
@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_instead_of_a_data_set_says_how_to_open_it(
    small: ShardSet, build: Callable[..., Any], kind: Callable[[Path], Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(kind(small.path))
    assert f"open_shards('{small.path}')" in str(caught.value)


@LOADERS
@pytest.mark.parametrize("shards", [None, 5, ["a", "b"]])
def test_anything_else_instead_of_a_data_set_is_refused(
    build: Callable[..., Any], shards: Any
) -> None:
    with pytest.raises(ConfigError, match=r"shards is .*open_shards\('cohort/'\)"):
        build(shards)


def test_without_a_dtype_a_batch_has_the_common_dtype_of_its_own_samples(tmp_path: Path) -> None:
    kinds = {"H00": "uint8", "H01": "int16", "L00": "int16"}
    samples = [
        replace(sample, image=sample.image.astype(kinds[sample.key]))
        for sample in cohort(hgg=2, lgg=1, val=0)
    ]
    shards = packed(tmp_path / "mixed", samples)
    dtype_of_key: dict[str, torch.dtype] = {}
    with eval_loader(shards, split="train", batch_size=1, dtype=None) as loader:
        for batch in loader:
            dtype_of_key[batch["key"][0]] = batch["image"].dtype
    assert dtype_of_key == {"H00": torch.uint8, "H01": torch.int16, "L00": torch.int16}
    with eval_loader(shards, split="train", batch_size=3, dtype=None) as loader:
        assert [batch["image"].dtype for batch in loader] == [torch.int16]


def test_a_voxel_beyond_float16_stops_training_with_its_sample_and_the_way_out(
    tmp_path: Path,
) -> None:
    samples = cohort(hgg=2, lgg=1, val=0, dtype="float32")
    samples[1].image[0, 0, 0, 0] = 1e6
    shards = packed(tmp_path / "large", samples)
    with (
        train_loader(shards, global_batch_size=3, dtype=torch.float16) as loader,
        pytest.raises(ConfigError, match=r"'H01'.*Use float32, and cast on the device"),
    ):
        next(iter(loader))
