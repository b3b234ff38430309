"""Users' transforms: the same result whatever the threads and ranks, and no silent end."""

from __future__ import annotations

import functools
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch

from streaming_balance.errors import ConfigError
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.evaluation import eval_loader
from streaming_balance.training.loader import BalancedLoader, train_loader
from tests.training.cohorts import merged, take


def noisy(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Add noise, flip by chance, and keep what was drawn."""
    sample["image"] = sample["image"] + torch.from_numpy(rng.normal(size=sample["image"].shape))
    if rng.random() < 0.5:
        sample["image"] = sample["image"].flip(1)
    sample["drawn"] = rng.integers(1 << 40)
    return sample


def loader_of(shards: ShardSet, transform: Any, **options: Any) -> BalancedLoader:
    """Build the loader most tests use."""
    settings: dict[str, Any] = {"global_batch_size": 6, "balance": "class_balanced", "seed": 11}
    return train_loader(shards, transform=transform, **settings | options)


def test_threads_never_change_what_a_random_transform_does(small: ShardSet) -> None:
    runs = []
    for num_threads in (1, 2, 8):
        with loader_of(small, noisy, num_threads=num_threads) as loader:
            runs.append(take(loader, 9))
    assert runs[0] == runs[1] == runs[2]


def test_ranks_never_change_what_a_random_transform_does(small: ShardSet) -> None:
    with loader_of(small, noisy) as alone:
        whole = [merged([batch]) for batch in alone]
    for ranks in (2, 3, 5):
        loaders = [loader_of(small, noisy, rank=r, num_ranks=ranks) for r in range(ranks)]
        assert [merged(list(parts)) for parts in zip(*loaders, strict=True)] == whole


def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(small: ShardSet) -> None:
    with loader_of(small, noisy) as straight, loader_of(small, noisy) as first:
        expected = take(straight, 8)
        take(first, 5)
        with loader_of(small, noisy) as second:
            second.load_state_dict(first.state_dict())
            assert take(second, 3) == expected[5:]


def test_every_sample_epoch_and_seed_draws_its_own_numbers(small: ShardSet) -> None:
    drawn: list[int] = []
    for seed in (1, 2):
        with loader_of(small, noisy, seed=seed) as loader:
            for _ in range(3):
                for batch in loader:
                    drawn += batch["drawn"]
    assert len(drawn) == 2 * 3 * 3 * 6
    assert len(set(drawn)) == len(drawn)


def test_seed_42_epoch_1_and_seed_43_epoch_0_have_nothing_in_common(small: ShardSet) -> None:
    with loader_of(small, noisy, seed=42) as older, loader_of(small, noisy, seed=43) as newer:
        older.set_epoch(1)
        pairs = list(zip(older, newer, strict=True))
    assert all(set(a["drawn"]).isdisjoint(b["drawn"]) for a, b in pairs)
    assert any(a["sample"].tolist() != b["sample"].tolist() for a, b in pairs)


def test_no_global_generator_is_read_or_moved(small: ShardSet) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]  # noqa: NPY002
    with loader_of(small, noisy) as loader:
        first = take(loader, 4)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]  # noqa: NPY002
    assert before == after
    random.seed(1)
    torch.manual_seed(1)
    with loader_of(small, noisy) as loader:
        assert take(loader, 4) == first


class Crop:
    """A transform with state of its own, as most libraries write them."""

    def __init__(self) -> None:
        self.busy = False

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Fail if another thread is in the middle of this very object."""
        assert not self.busy, "one object in two threads"
        assert rng.random() < 1
        self.busy = True
        for _ in range(50):
            sample["image"] = sample["image"] * 1
        sample["thread"] = threading.current_thread().name
        self.busy = False
        return sample


def test_every_thread_works_with_its_own_copy(small: ShardSet) -> None:
    crop = Crop()
    with loader_of(small, crop, num_threads=8) as loader:
        names = {name for _ in range(5) for batch in loader for name in batch["thread"]}
    assert len(names) > 1
    assert not crop.busy


def plain(sample: dict[str, Any]) -> dict[str, Any]:
    """Take no generator."""
    return sample


def optional(sample: dict[str, Any], strength: float = 0.5) -> dict[str, Any]:
    """Take a setting of its own, which is no generator."""
    assert strength == 0.5
    return sample


def defaulted(sample: dict[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
    """Take a generator by its name."""
    assert isinstance(rng, np.random.Generator)
    return sample


def scaled(strength: float, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Have a setting bound in front."""
    assert strength == 0.5
    assert isinstance(rng, np.random.Generator)
    return sample


@pytest.mark.parametrize(
    "transform",
    [plain, optional, defaulted, functools.partial(scaled, 0.5), torch.nn.Identity()],
    ids=["plain", "setting", "named", "partial", "module"],
)
def test_a_transform_gets_a_generator_when_it_asks_for_one(small: ShardSet, transform: Any) -> None:
    with (
        loader_of(small, transform) as transformed,
        loader_of(small, None) as untouched,
    ):
        assert take(transformed, 3) == take(untouched, 3)


def test_a_transform_may_change_shapes_types_and_add_names(small: ShardSet) -> None:
    def change(sample: dict[str, Any]) -> dict[str, Any]:
        wide = sample["label"] == 1
        image = sample["image"].numpy()
        return {
            "image": image[:1, :2].astype(np.float64),
            "uneven": image[:, : 3 if wide else 2],
            "age": 0.5 + sample["sample"],
            "note": f"{sample['patient']}!",
        }

    with loader_of(small, change) as loader:
        for batch in loader:
            assert batch["image"].shape == (6, 1, 2, 3, 5)
            assert batch["image"].dtype == torch.float64
            lengths = [len(uneven[0]) for uneven in batch["uneven"]]
            assert lengths == [3 if label else 2 for label in batch["label"].tolist()]
            assert batch["age"].tolist() == [0.5 + n for n in batch["sample"].tolist()]
            assert batch["note"] == [f"{patient}!" for patient in batch["patient"]]


def test_batches_made_by_transforms_do_not_change_later(small: ShardSet) -> None:
    with loader_of(small, plain, num_threads=4) as loader:
        kept = [batch for _ in range(6) for batch in loader]
    with loader_of(small, None) as untouched:
        for batch in kept[:3]:
            assert torch.equal(batch["image"], next(iter(untouched))["image"])


@pytest.mark.parametrize("found", [None, [], {}, {"label": 1}, "image"])
def test_a_transform_must_give_a_dict_with_an_image(small: ShardSet, found: Any) -> None:
    with (
        loader_of(small, lambda _sample: found) as loader,
        pytest.raises(ConfigError, match="must give a dict with at least 'image'"),
    ):
        next(iter(loader))


def test_a_transform_that_raises_does_so_at_its_batch_and_again(small: ShardSet) -> None:
    with loader_of(small, None) as loader:
        members = [batch["sample"].tolist() for batch in loader]
    victim = next(n for n in members[1] if n not in members[0])

    def fail(sample: dict[str, Any]) -> dict[str, Any]:
        if sample["sample"] == victim:
            raise LookupError(f"no good: {sample['key']}")
        return sample

    with loader_of(small, fail, num_threads=2) as loader:
        iterator = iter(loader)
        assert next(iterator)["step"] == 0
        for _ in range(3):
            with pytest.raises(LookupError, match="no good"):
                next(iterator)
        assert loader.state_dict()["position"] == {"epoch": 0, "step": 1}


def test_a_transform_that_raises_says_for_which_sample_and_place(small: ShardSet) -> None:
    def fail(sample: dict[str, Any]) -> dict[str, Any]:
        wanted = sample.pop("key") == "L02"
        if wanted:
            raise LookupError("no good")
        return sample

    with loader_of(small, None) as loader:
        batch = next(batch for batch in loader if "L02" in batch["key"])
    slot = batch["slot"][batch["key"].index("L02")].item()
    with loader_of(small, fail) as loader, pytest.raises(LookupError) as caught:
        for _ in loader:
            pass
    (note,) = caught.value.__notes__
    assert note == (
        f"The transform was given sample 'L02' at epoch 0, step {batch['step']}, slot {slot}."
    )


@pytest.mark.parametrize("where", ["transform", "batch_transform"])
def test_a_transform_raising_stop_iteration_is_no_end_of_the_epoch(
    small: ShardSet, where: str
) -> None:
    def run_out(_: Any) -> Any:
        return next(iter(()))

    with (
        train_loader(small, global_batch_size=4, **{where: run_out}) as loader,  # type: ignore[arg-type]
        pytest.raises(RuntimeError, match="StopIteration"),
    ):
        for _ in loader:
            pass


def test_a_transform_that_cannot_be_copied_is_named_with_the_way_out(small: ShardSet) -> None:
    class Locked:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
            return sample

    with (
        loader_of(small, Locked()) as loader,
        pytest.raises(ConfigError, match="transform Locked cannot be copied"),
    ):
        next(iter(loader))


def test_a_batch_transform_runs_once_per_batch_in_the_thread_that_iterates(
    small: ShardSet,
) -> None:
    threads = []

    def mark(batch: dict[str, Any]) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return batch | {"marked": batch["step"]}

    with loader_of(small, None, batch_transform=mark) as loader:
        assert [batch["marked"] for batch in loader] == [0, 1, 2]
    assert threads == [threading.current_thread()] * 3


def test_evaluation_transforms_draw_the_same_in_every_run(small: ShardSet) -> None:
    runs = []
    for num_threads in (1, 4):
        with eval_loader(
            small, split="val", batch_size=3, transform=noisy, num_threads=num_threads
        ) as loader:
            runs.append(take(loader, 3))
    assert runs[0] == runs[1]
