"""A hash of everything in a class table that shapes a plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.cells import Cells


def table_digest(
    cells: Cells,
    classes: Sequence[Any],
    patients: NDArray[np.str_] | None,
    keys: NDArray[np.str_] | None,
    excluded: NDArray[np.bool_] | None,
) -> str:
    """Hash a table: class names and codes, strata, patients, keys, exclusions.

    Args:
        cells: group of every sample.
        classes: `(K,)` labels in class order.
        patients: `(N,)` patient of every sample, or None.
        keys: `(N,)` sample keys, or None.
        excluded: `(N,)` True for samples that are left out, or None.

    Returns:
        32 hexadecimal digits.
    """
    membership = cells.membership
    digest = hashlib.blake2b(digest_size=16)
    digest.update(plain_digest([str(label) for label in classes]).encode())
    # The codes of a hundred million samples are hashed where they lie.
    _add_part(digest, np.ascontiguousarray(cells.codes, dtype="<i8").view(np.uint8).data)
    for names in (patients, keys):
        if names is not None:
            _add_part(digest, json.dumps(names.tolist()).encode())
    if excluded is not None:
        _add_part(digest, np.packbits(excluded).tobytes())
    if cells.strata is not None:
        _add_part(digest, json.dumps(cells.keys).encode())
    if membership is not None:
        _add_part(digest, np.packbits(membership).tobytes())
    return digest.hexdigest()


def _add_part(digest: hashlib.blake2b, payload: bytes | memoryview) -> None:
    """Hash a part and its length, so that no two tables read alike."""
    digest.update(len(payload).to_bytes(8, "little"))
    digest.update(payload)


def plain_digest(value: object) -> str:
    """Hash a plain value through its canonical JSON.

    Examples:
        >>> plain_digest({"HGG": 210}) == plain_digest({"HGG": 211})
        False
    """
    text = json.dumps(value, sort_keys=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
