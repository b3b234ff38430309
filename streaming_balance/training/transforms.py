"""Users' transforms: given the same sample at the same place of a run, always the same result."""

from __future__ import annotations

import copy
import random
import threading

import numpy as np
import torch

from streaming_balance.errors import ConfigError
from streaming_balance.plan.keys import stream_key, words
from streaming_balance.training.adapters import Adapted, Sample, Transform
from streaming_balance.training.torch_draws import KeyedDraws

__all__ = ["KeyedTransform", "Sample", "Transform"]


class KeyedTransform:
    """Runs a transform so that what it draws depends on the sample's place alone.

    Most random transforms keep state and are not safe for threads, so every thread works with a
    copy of its own.

    Args:
        transform: `transform(sample)` or `transform(sample, rng)`, giving a dict, or a transform of
            MONAI, Albumentations or TorchIO.
        seed: the run's seed.
        owns_process: seed the process's global generators before every call too. Only for a worker
            process that runs one transform at a time: nobody else draws from them there.
    """

    def __init__(self, transform: Transform, *, seed: int, owns_process: bool = False) -> None:
        self._transform, self._seed, self._owns_process = transform, seed, owns_process
        self._copies = threading.local()

    def __call__(self, sample: Sample, *, epoch: int, step: int, slot: int) -> Sample:
        """Transform one sample.

        Args:
            sample: `image`, `label` and what else the batch will have.
            epoch: of the global batch.
            step: of the global batch.
            slot: position in the global batch, the same on any number of ranks.

        Returns:
            What the transform gave.

        Raises:
            ConfigError: it gave something else than a dict.
            Exception: what the transform raised, with a note of the sample and its place.
        """
        transform: Adapted | None = getattr(self._copies, "transform", None)
        if transform is None:
            transform = self._copies.transform = self._copied()
        # Kept here, since a transform may change the sample it is given.
        name = sample.get("key")
        try:
            result = self._drawn(transform, sample, (epoch, step, slot))
        except BaseException as error:
            error.add_note(
                f"The transform was given sample {name!r} at epoch {epoch}, step {step}, slot "
                f"{slot}."
            )
            raise
        if not isinstance(result, dict) or "image" not in result:
            found = f"a dict of {list(result)}" if isinstance(result, dict) else repr(type(result))
            raise ConfigError(f"transform gave {found}; it must give a dict with at least 'image'.")
        return result

    def _drawn(self, transform: Adapted, sample: Sample, place: tuple[int, int, int]) -> Sample:
        """Run a transform with everything it may draw from keyed by the place."""
        rng = None
        if transform.draws:
            key = stream_key(self._seed, "transform", *place)
            rng = np.random.Generator(np.random.Philox(key=key))
        if self._owns_process:
            _seed_process(stream_key(self._seed, "transform process", *place))
        with KeyedDraws(lambda: stream_key(self._seed, "transform torch", *place)):
            return transform(sample, rng)

    def _copied(self) -> Adapted:
        """Copy the transform for this thread."""
        try:
            return Adapted(copy.deepcopy(self._transform))
        except TypeError as error:
            raise ConfigError(
                f"transform {type(self._transform).__name__} cannot be copied ({error}), and every "
                f"reader thread works with its own copy. Make what it holds (a lock, a file) when "
                f"it is first needed, or define __deepcopy__."
            ) from error


def _seed_process(key: int) -> None:
    """Seed the global generators of Python, numpy and torch in a process that is ours."""
    first, second, *rest = words(key, 4).tolist()
    random.seed(first)
    np.random.seed([word & 0xFFFFFFFF for word in rest])  # noqa: NPY002 - what old libraries use
    torch.default_generator.manual_seed(second)
