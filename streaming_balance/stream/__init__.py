"""Balancing what passes by once: strict tar streams, stages over them, and their faces.

`streaming_balance.stream(urls)` begins a chain, and `streaming_balance.stream` is this package: one
name for both, so this module can be called. `help` knows its settings as
`streaming_balance.stream.pipeline.stream`, and the stages as those of `Stream` there.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streaming_balance.stream.names import KeyRule
    from streaming_balance.stream.pipeline import Stream
    from streaming_balance.stream.rules import OnError, UniqueKeys
    from streaming_balance.stream.sources import Urls


class _Callable(ModuleType):
    """A package that can be called."""

    def __call__(
        self,
        urls: Urls,
        *,
        label: str | None = "cls",
        seed: int = 0,
        on_error: OnError = "raise",
        keys: KeyRule = "webdataset",
        unique_keys: UniqueKeys = "stream",
        allow_pipe: bool = False,
    ) -> Stream:
        """Begin a chain: see `streaming_balance.stream.pipeline.stream`."""
        from streaming_balance.stream.pipeline import stream as begin

        return begin(
            urls,
            label=label,
            seed=seed,
            on_error=on_error,
            keys=keys,
            unique_keys=unique_keys,
            allow_pipe=allow_pipe,
        )


# Importing any module of this package binds its name in the root, where users call it.
stream = sys.modules[__name__]
stream.__class__ = _Callable
