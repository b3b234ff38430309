"""Memory a reading thread uses again and again."""

from __future__ import annotations

import threading
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]


class Workspace(threading.local):
    """Memory of one thread: it grows to the largest need and is never given back."""

    def __init__(self) -> None:
        self._header = np.empty(0, np.uint8)
        self._stored = np.empty(0, np.uint8)
        self._decoded = np.empty(0, np.uint8)

    def header(self, num_bytes: int) -> Bytes:
        """Give `num_bytes` for a .npy header."""
        if self._header.size < num_bytes:
            self._header = np.empty(num_bytes, np.uint8)
        return self._header[:num_bytes]

    def stored(self, num_bytes: int) -> Bytes:
        """Give `num_bytes` for stored bytes on their way to the row."""
        if self._stored.size < num_bytes:
            self._stored = np.empty(num_bytes, np.uint8)
        return self._stored[:num_bytes]

    def decoded(self, num_bytes: int) -> Bytes:
        """Give `num_bytes` for decoded values on their way to the row."""
        if self._decoded.size < num_bytes:
            self._decoded = np.empty(num_bytes, np.uint8)
        return self._decoded[:num_bytes]
