"""MONAI, Albumentations and TorchIO: the same result for a sample wherever it is transformed.

Each library keeps its random numbers elsewhere, and none knows which sample of which epoch it is
working on:

    MONAI            a `RandomState` in every random transform    set before every call
    Albumentations   two generators in every transform            set before every call
    TorchIO          torch's global generator                     see `torch_draws`

They also expect samples in different forms. MONAI's dictionary transforms take ours as they are;
the others are given what they know and the result is put back. A library is recognised by the
classes of the transform, so nothing here imports one that is not in use already.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.training.torch_draws import current_draws

Sample = dict[str, Any]
# Libraries annotate theirs in their own ways; what a transform gives is looked at when it is there.
Transform = Callable[..., Any]

_WORD = (1 << 32) - 1
_ARRAYS = ("image", "seg")


class Adapted:
    """A transform that draws from the generator it is given, in one thread at a time.

    Also when MONAI or Albumentations transforms are only part of it: in an attribute, a list, or
    another library's composition. Those that a plain function refers to are not found; wrap each
    of them with `adapted` and hand it the function's own `rng`.

    Args:
        transform: `transform(sample)`, `transform(sample, rng)`, or a transform of a library.
    """

    def __init__(self, transform: Transform) -> None:
        self.name = type(transform).__name__
        """What to call the transform in messages."""
        self._transform = transform
        self._parts = list(_keeping_generators(transform, set()))
        self._takes_generator = _takes_generator(transform)
        self._call = _caller(transform)

    @property
    def draws(self) -> bool:
        """Whether it has to be given a generator."""
        return self._takes_generator or bool(self._parts)

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None) -> Sample:
        """Transform one sample.

        Args:
            sample: `image` (C, D, H, W) or (C, H, W), and what else the batch will have.
            rng: what everything random in it is drawn from; only where `draws` is False may it be
                left out.

        Returns:
            What the transform gave, as tensors where a library has types of its own.

        Raises:
            ConfigError: the library is too old to be given generators, or gave several samples.
        """
        if self._parts:
            assert rng is not None, "a generator is handed over wherever `draws` says so"
            for part in self._parts:
                _set_generators(part, rng)
        if self._takes_generator:
            return _plain_tensors(self._transform(sample, rng))
        return _plain_tensors(self._call(self._transform, sample))


class PerThread:
    """A transform that any number of threads may call at once, each with a copy of its own.

    Args:
        transform: `transform(sample)`, `transform(sample, rng)`, or a transform of a library.
    """

    def __init__(self, transform: Transform) -> None:
        self._transform = transform
        self._copies = threading.local()

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None) -> Sample:
        """Transform one sample, as `Adapted` does."""
        mine: Adapted | None = getattr(self._copies, "mine", None)
        if mine is None:
            mine = self._copies.mine = Adapted(copy.deepcopy(self._transform))
        return mine(sample, rng)

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread:
        """Copy the transform; threads make their own copies of it anew."""
        return PerThread(copy.deepcopy(self._transform, memo))

    def __reduce__(self) -> tuple[type[PerThread], tuple[Transform]]:
        """Travel as the transform; threads make their own copies of it where it arrives."""
        return PerThread, (self._transform,)


def adapted(transform: Transform) -> PerThread:
    """Let a transform of any library draw from a generator that is handed over.

    `train_loader` and `eval_loader` do this with their `transform`. It is for functions that call
    transforms of a library inside: those are shared by all threads, and what they refer to is too.

    Args:
        transform: of MONAI (a dictionary transform), Albumentations or TorchIO, or one's own.

    Returns:
        `adapted(sample, rng) -> sample`, for any number of threads at once.

    Examples:
        >>> double = adapted(lambda sample: sample | {"image": 2 * sample["image"]})
        >>> double({"image": torch.ones(1)}, np.random.default_rng(0))
        {'image': tensor([2.])}
    """
    return transform if isinstance(transform, PerThread) else PerThread(transform)


def _takes_generator(transform: Transform) -> bool:
    """Say whether a transform takes a second argument without a default: the generator."""
    if _library(transform) is not None:
        return False
    try:
        parameters = list(inspect.signature(transform).parameters.values())
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p for p in parameters if p.kind in positional]
    return len(named) > 1 and (
        named[1].default is inspect.Parameter.empty or named[1].name == "rng"
    )


def _library(part: object) -> str | None:
    """Name the library whose transform this is, None if it is nobody's."""
    for kind in type(part).__mro__:
        root = kind.__module__.partition(".")[0]
        # TorchIO has dictionaries of its own too, a Subject say: only what is called transforms.
        if root in _CALLERS and callable(part):
            return root
    return None


def _keeping_generators(part: object, seen: set[int]) -> Iterator[Any]:
    """List the outermost parts of a transform that keep generators of their own."""
    if id(part) in seen or isinstance(part, str | bytes | type | ModuleType | FunctionType):
        return
    if isinstance(part, PerThread):
        # Given a generator by whoever calls it.
        return
    seen.add(id(part))
    if _keeps_generators(part):
        yield part
    elif isinstance(part, list | tuple | set):
        for item in part:
            yield from _keeping_generators(item, seen)
    elif isinstance(part, dict):
        # TorchIO's OneOf has transforms as keys.
        yield from _keeping_generators([*part, *part.values()], seen)
    elif callable(part):
        # Slots and C objects have none; what they hold cannot be seen.
        yield from _keeping_generators(list(getattr(part, "__dict__", {}).values()), seen)
        # What `functools.partial` and bound methods hold.
        for name in ("func", "args", "keywords", "__self__"):
            yield from _keeping_generators(getattr(part, name, None), seen)


def _keeps_generators(part: object) -> bool:
    """Say whether a part has MONAI's or Albumentations' way of being given generators."""
    library = _library(part)
    if library == "monai":
        return hasattr(part, "set_random_state")
    return library == "albumentations"


def _set_generators(part: Any, rng: np.random.Generator) -> None:  # noqa: ANN401 - a library's
    """Give new generators to one part, and with it to all that it is made of."""
    words = rng.bit_generator.random_raw(4)
    if _library(part) == "monai":
        seeds = np.asarray(words & np.uint64(_WORD), dtype=np.uint32)
        # The kind of generator that MONAI's own set_random_state(seed=...) makes.
        part.set_random_state(state=np.random.RandomState(seeds))
        return
    if not hasattr(part, "set_random_state"):
        raise ConfigError(
            f"transform {type(part).__name__} comes from an Albumentations that draws from the "
            f"process's global generators, which threads would share. Install albumentations 2.0 "
            f"or newer."
        )
    first, second, third, fourth = words.tolist()
    # Both kinds are what it draws from; neither is a global generator.
    generator = np.random.Generator(np.random.Philox(key=first << 64 | second))
    part.set_random_state(generator, random.Random(third << 64 | fourth))


def _caller(transform: Transform) -> Callable[[Any, Sample], Sample]:
    """Give how transforms of this library are called."""
    library = _library(transform)
    return _call_plainly if library is None else _CALLERS[library]


def _call_plainly(transform: Transform, sample: Sample) -> Sample:
    """Hand the sample over as it is."""
    return transform(sample)  # type: ignore[no-any-return] # checked where it is used


def _call_monai(transform: Transform, sample: Sample) -> Sample:
    """Hand the sample over as it is, and take it out of the list that croppers give."""
    try:
        result: Any = transform(sample)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        error.add_note(
            "A sample is a dict with 'image', 'seg' where packed, and more: of MONAI's transforms "
            "only those for dictionaries, with names that end in d, take it."
        )
        raise
    if not isinstance(result, list):
        return result  # type: ignore[no-any-return] # checked where all transforms' results are
    if len(result) != 1:
        raise ConfigError(
            f"transform {type(transform).__name__} gave {len(result)} samples for one, but a "
            f"sample has one place in its batch. Use num_samples=1."
        )
    return result[0]  # type: ignore[no-any-return]


def _plain_tensors(sample: Sample) -> Sample:
    """Give plain tensors for those of libraries, whose history and geometry no batch can hold."""
    if not isinstance(sample, dict):
        return sample  # refused where all transforms' results are
    own = [name for name, value in sample.items() if isinstance(value, torch.Tensor)]
    plain = {
        name: sample[name].as_subclass(torch.Tensor)
        for name in own
        if type(sample[name]) is not torch.Tensor
    }
    return sample | plain if plain else sample


def _call_albumentations(transform: Callable[..., dict[str, Any]], sample: Sample) -> Sample:
    """Hand over channels last, as `image` and `mask` in 2-D, `volume` and `mask3d` in 3-D."""
    flat = sample["image"].ndim == 3
    names = {"image": "image", "seg": "mask"} if flat else {"image": "volume", "seg": "mask3d"}
    given = {
        names[ours]: _channels_last(sample[ours], drop=ours == "seg")
        for ours in _ARRAYS
        if sample.get(ours) is not None
    }
    result = transform(**given)
    ours = {theirs: name for name, theirs in names.items()}
    changed = {
        ours.get(name, name): _channels_first(value, with_channels=4 - flat)
        for name, value in result.items()
    }
    return sample | changed


def _channels_last(array: object, *, drop: bool) -> NDArray[Any]:
    """Move the channels to the end; a mask of one channel has no such axis."""
    values = np.asarray(array)
    if drop and len(values) == 1:
        return np.ascontiguousarray(values[0])
    return np.ascontiguousarray(np.moveaxis(values, 0, -1))


def _channels_first(value: object, *, with_channels: int) -> object:
    """Move the channels back; what the transform made a tensor has them in front already."""
    if isinstance(value, torch.Tensor):
        return value[None] if value.ndim == with_channels - 1 else value
    if not isinstance(value, np.ndarray):
        return value
    if value.ndim == with_channels - 1:
        value = value[..., None]
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(value, -1, 0)))


def _call_torchio(transform: Callable[[Any], Any], sample: Sample) -> Sample:
    """Hand over a Subject: the image a ScalarImage, the mask a LabelMap, 2-D as one slice."""
    library: Any = sys.modules["torchio"]
    _keep_seeds_inside(library.transforms.Transform)
    flat = sample["image"].ndim == 3
    kinds = {"image": library.ScalarImage, "seg": library.LabelMap}
    given = {
        name: kinds[name](tensor=_deepened(sample[name], flat=flat))
        for name in _ARRAYS
        if sample.get(name) is not None
    }
    subject = transform(library.Subject(given))
    images = subject.get_images_dict(intensity_only=False)
    changed = {
        name: image.data.squeeze(-1) if flat else image.data for name, image in images.items()
    }
    return sample | changed


def _deepened(array: object, *, flat: bool) -> torch.Tensor:
    """Give a tensor of four axes, the last of length 1 where there were three."""
    tensor = torch.as_tensor(array)
    return tensor.unsqueeze(-1) if flat else tensor


_keeping = threading.Lock()


def _keep_seeds_inside(kind: Any) -> None:  # noqa: ANN401 - TorchIO's Transform
    """Let TorchIO's noise seed the sample's generator where it would seed the process's.

    Its `_use_seed` saves torch's global state, seeds it and puts it back: two threads that do so at
    once leave the state of one of them behind, and training draws other numbers meanwhile. Outside
    of our transforms it does what it always did.
    """
    with _keeping:
        original = getattr(kind, "_use_seed", None)
        if original is None or hasattr(original, "_streaming_balance"):
            return

        @contextlib.contextmanager
        def use_seed(seed: int) -> Iterator[None]:
            draws = current_draws()
            with original(seed) if draws is None else draws.reseeded(seed):
                yield

        use_seed._streaming_balance = True  # type: ignore[attr-defined]
        kind._use_seed = staticmethod(use_seed)


_CALLERS: dict[str, Callable[[Any, Sample], Sample]] = {
    "monai": _call_monai,
    "albumentations": _call_albumentations,
    "torchio": _call_torchio,
}
