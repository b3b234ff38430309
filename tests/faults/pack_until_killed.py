"""Pack a small cohort, and die at a chosen system call: run by test_pack_crashes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from streaming_balance.storage.writer import EncodedSample, PackWriter, encode_array

SETTINGS = {"seed": 1}
WATCHED = ("open", "write", "fsync", "close", "replace", "unlink", "truncate", "pwrite")


def samples() -> list[EncodedSample]:
    """Encode five samples of two splits."""
    return [
        EncodedSample(
            key=f"P{number}",
            patient=f"P{number}",
            label="HGG" if number % 2 else "LGG",
            split="val" if number > 2 else "train",
            columns={},
            arrays=(
                encode_array(
                    "image",
                    np.arange(number, number + 24, dtype=np.int16).reshape(2, 3, 4),
                    axes="DHW",
                    codec="npy",
                ),
            ),
            details={},
        )
        for number in range(5)
    ]


def pack(folder: Path, *, overwrite: bool = False) -> None:
    """Pack as the command does: leave a complete data set alone, else finish it."""
    if not overwrite and PackWriter.already_complete(folder, SETTINGS) is not None:
        return
    with PackWriter(
        folder,
        classes=["LGG", "HGG"],
        splits=["train", "val"],
        train_splits=["train"],
        codec="npy",
        columns=[],
        shard_bytes=6_000,
        settings=SETTINGS,
        overwrite=overwrite,
    ) as writer:
        finished = writer.finished_keys()
        for sample in samples():
            if sample.key not in finished:
                writer.add(sample)
        writer.finish(found=5, rejected=[])


def die_at(call: int) -> None:
    """Kill this process instead of its `call`-th watched system call; a write is done by half."""
    calls = 0

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > call:
                if name == "write":
                    original(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return function

    for name in WATCHED:
        setattr(os, name, watched(name, getattr(os, name)))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        die_at(int(sys.argv[2]))
    pack(Path(sys.argv[1]))
