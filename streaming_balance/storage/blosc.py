"""Blosc from numcodecs, imported late, and kept to the calling thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from streaming_balance.errors import ShardError


@cache
def blosc_module() -> Any:  # noqa: ANN401 - numcodecs carries no types
    """Import Blosc on first use.

    Only this module of numcodecs is used: its registry also offers a codec that unpickles.
    """
    from numcodecs import blosc

    return blosc


@contextmanager
def blosc_on_this_thread() -> Iterator[Callable[..., Any]]:
    """Give Blosc's `decompress`, and keep Blosc's own thread pool out of it meanwhile.

    On the main thread numcodecs would use one process-wide pool, hold the GIL while it works, and
    place compressed blocks in whatever order threads finish. Elsewhere it works in the calling
    thread already. Only the main thread changes the switch, so two threads cannot restore it in
    the wrong order, and what other libraries set is back after the call.
    """
    blosc = blosc_module()
    if threading.get_ident() != threading.main_thread().ident:
        yield _decompress
        return
    before = blosc.use_threads
    blosc.use_threads = False
    try:
        yield _decompress
    finally:
        blosc.use_threads = before


def _decompress(chunk: memoryview, out: Any) -> None:  # noqa: ANN401 - any writable buffer
    """Decompress one chunk into `out`, which has its exact size."""
    try:
        blosc_module().decompress(chunk, out)
    except RuntimeError as error:
        raise ShardError(f"a Blosc chunk of {len(chunk):,} bytes is damaged: {error}") from error
