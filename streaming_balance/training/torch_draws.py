"""What torch draws inside a transform comes from a generator of the sample, not from the process.

torch has one global generator per process, which neither threads nor resumed runs can share without
drawing other numbers. Inside `KeyedDraws` every function that draws is given a keyed generator. The
mode belongs to one thread; the global generator is neither read nor moved, so that training may
draw from it at the same time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Every overridable function of torch that draws and takes a generator.
_TAKES_GENERATOR = frozenset(
    {
        *("rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli", "poisson"),
        *("binomial", "_standard_gamma", "_sample_dirichlet"),
        *("uniform_", "normal_", "random_", "bernoulli_", "exponential_", "cauchy_"),
        *("geometric_", "log_normal_"),
    }
)
# These take a generator since torch 2.8 only; what they do, said with functions that always did.
_DRAWS_LIKE = {"rand_like": "uniform_", "randn_like": "normal_", "randint_like": "random_"}
_SEED_BITS = (1 << 64) - 1


class KeyedDraws(TorchFunctionMode):
    """Makes torch draw from a key while it is entered, in the thread that entered it.

    `torch.nn.functional.dropout` and others that take no generator are left alone.

    Args:
        key: gives the key; asked for at the first draw, since most transforms never draw.

    Examples:
        >>> with KeyedDraws(lambda: 7):
        ...     first = torch.rand(2)
        >>> with KeyedDraws(lambda: 7):
        ...     torch.equal(torch.rand(2), first)
        True
    """

    def __init__(self, key: Callable[[], int]) -> None:
        super().__init__()
        self._key = key
        self._generators: dict[torch.device, torch.Generator] = {}

    def __enter__(self) -> KeyedDraws:
        super().__enter__()  # type: ignore[no-untyped-call]
        _entered().append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _entered().pop()
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function gives
        """Call a function of torch, with a keyed generator if it draws."""
        options = {} if kwargs is None else dict(kwargs)
        name = getattr(func, "__name__", "")
        if options.get("generator") is None:
            if name in _TAKES_GENERATOR:
                return func(*args, **options | {"generator": self._generator(args, options)})
            if name in _DRAWS_LIKE:
                return self._draw_like(_DRAWS_LIKE[name], args, options)
        return func(*args, **options)

    @contextlib.contextmanager
    def reseeded(self, seed: int) -> Iterator[None]:
        """Draw from a seed within a block, then go on with what was drawn from before."""
        key, generators = self._key, self._generators
        self._key, self._generators = lambda: seed, {}
        try:
            yield
        finally:
            self._key, self._generators = key, generators

    def _draw_like(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:  # noqa: ANN401
        """Fill a tensor like the first argument: `randint_like` also has limits."""
        shaped = {name: options[name] for name in options if name not in ("low", "high")}
        shaped.pop("generator", None)
        limits = [*args[1:], *(options[name] for name in ("low", "high") if name in options)]
        empty = torch.empty_like(args[0], **shaped)
        return getattr(empty, method)(*limits, generator=self._generator((empty,), {}))

    def _generator(self, args: tuple[Any, ...], options: Mapping[str, Any]) -> torch.Generator:
        """Give the generator of the device on which a call draws."""
        given = options.get("device")
        devices = [arg.device for arg in args if isinstance(arg, torch.Tensor)]
        device = torch.device(given) if given is not None else (devices or [_default_device()])[0]
        if device not in self._generators:
            generator = torch.Generator(device)
            self._generators[device] = generator.manual_seed(self._key() & _SEED_BITS)
        return self._generators[device]


def current_draws() -> KeyedDraws | None:
    """Give what this thread draws from, None where that is the global generator."""
    entered = _entered()
    return entered[-1] if entered else None


_local = threading.local()


def _entered() -> list[KeyedDraws]:
    """Give the modes that this thread is inside of."""
    if not hasattr(_local, "entered"):
        _local.entered = []
    entered: list[KeyedDraws] = _local.entered
    return entered


def _default_device() -> torch.device:
    """Give the device on which tensors are made."""
    return torch.get_default_device()


_counting = threading.Lock()


def one_thread_each() -> Callable[[], None]:
    """Give what lets torch compute on one thread whenever the thread that called it asks it to.

    A sum over a large tensor is cut into as many parts as there are threads, and another cut gives
    other last digits: a transform's result would depend on the machine, and on whether it runs in a
    thread or in a worker process, which torch gives one thread. Samples are worked on side by side
    anyway.

    Returns:
        To be called once, in each thread, before anything of torch.
    """
    # A thread takes its number when it first asks. The one that builds the threads does so now, or
    # it might ask while the number below stands.
    torch.get_num_threads()
    return _compute_on_one_thread


def _compute_on_one_thread() -> None:
    """Set the number of the calling thread, and of no other."""
    with _counting:
        others = torch.get_num_threads()
        torch.set_num_threads(1)
        # The call above also set the number that threads begin with later. A thread that ends at
        # once puts that one back.
        restoring = threading.Thread(target=torch.set_num_threads, args=(others,))
        restoring.start()
        restoring.join()
