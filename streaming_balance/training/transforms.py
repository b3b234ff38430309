"""Users' transforms: given the same sample at the same place of a run, always the same result."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from streaming_balance.errors import ConfigError
from streaming_balance.plan.keys import stream_key

Sample = dict[str, Any]
Transform = Callable[..., Sample]


class KeyedTransform:
    """Runs a transform with a generator that depends on the sample's place alone.

    Most random transforms keep state and are not safe for threads, so every thread works with a
    copy of its own.

    Args:
        transform: `transform(sample)` or `transform(sample, rng)`, giving a dict.
        seed: the run's seed.
    """

    def __init__(self, transform: Transform, *, seed: int) -> None:
        self._transform, self._seed = transform, seed
        self._takes_generator = _takes_generator(transform)
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
        transform = getattr(self._copies, "transform", None)
        if transform is None:
            transform = self._copies.transform = self._copied()
        # Kept here, since a transform may change the sample it is given.
        name = sample.get("key")
        try:
            if self._takes_generator:
                key = stream_key(self._seed, "transform", epoch, step, slot)
                result = transform(sample, np.random.Generator(np.random.Philox(key=key)))
            else:
                result = transform(sample)
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

    def _copied(self) -> Transform:
        """Copy the transform for this thread."""
        try:
            return copy.deepcopy(self._transform)
        except TypeError as error:
            raise ConfigError(
                f"transform {type(self._transform).__name__} cannot be copied ({error}), and every "
                f"reader thread works with its own copy. Make what it holds (a lock, a file) when "
                f"it is first needed, or define __deepcopy__."
            ) from error


def _takes_generator(transform: Transform) -> bool:
    """Say whether a transform takes a second argument without a default: the generator."""
    try:
        parameters = list(inspect.signature(transform).parameters.values())
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p for p in parameters if p.kind in positional]
    return len(named) > 1 and (
        named[1].default is inspect.Parameter.empty or named[1].name == "rng"
    )
