"""What a cast may do to stored values: round them, never wrap them or make them infinite.

Whether integers fit is known from their dtype. Whether floats do is known from their values alone,
so the cast itself says so: the processor notes an overflow while it casts, and numpy raises it.
That costs no pass over the data, and settings of numpy are a thread's own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.storage.members import StoredArray

_FREE = nullcontext()


def can_hold(wanted: np.dtype[Any], stored: np.dtype[Any]) -> bool:
    """Say whether a dtype can hold another's values, as far as dtypes tell.

    Examples:
        >>> can_hold(np.dtype("float32"), np.dtype("int16"))
        True
        >>> can_hold(np.dtype("float16"), np.dtype("int32"))
        False
    """
    if np.can_cast(stored, wanted, "safe"):
        return True
    if wanted.kind != "f":
        return False
    if stored.kind in "iu":
        return float(np.iinfo(stored).max) <= float(np.finfo(wanted).max)
    return stored.kind == "f"


def finite_kept(
    wanted: np.dtype[Any], member: StoredArray
) -> AbstractContextManager[FiniteKept | None]:
    """Guard the filling of a row: what is finite as stored must be finite in the row.

    Args:
        wanted: dtype of the row.
        member: what it is filled with; infinite values in it stay so.

    Returns:
        A context for the filling; it raises `ConfigError`, naming the sample, for a value beyond
        `wanted`. Free of cost where no float becomes narrower.
    """
    if wanted is member.dtype or member.dtype.kind != "f":
        return _FREE
    return FiniteKept(wanted, member) if wanted.itemsize < member.dtype.itemsize else _FREE


class FiniteKept:
    """The context that `finite_kept` gives where a cast can overflow.

    Args:
        wanted: dtype of the row.
        member: what the row is filled with.
    """

    def __init__(self, wanted: np.dtype[Any], member: StoredArray) -> None:
        self._wanted, self._member = wanted, member
        self._errors_raised = np.errstate(over="raise")

    def __enter__(self) -> FiniteKept:
        self._errors_raised.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._errors_raised.__exit__(kind, error, traceback)
        if isinstance(error, FloatingPointError):
            raise ConfigError(
                f"{self._member} holds {self._member.dtype} values beyond "
                f"{np.finfo(self._wanted).max:g}, the largest of {self._wanted}: they would become "
                "infinite. Use float32, and cast on the device."
            ) from error


def check_request(row: NDArray[Any], member: StoredArray) -> None:
    """Refuse a row that no crop, pad or cast of a stored array can fill.

    Raises:
        ConfigError: other channels or axes, a dtype that cannot hold its values, or no decoder.
    """
    if member.codec == "bytes":
        raise ConfigError(
            f"{member} has no decoder, so no row can be filled with it. `read` gives its bytes."
        )
    wanted = member.row_shape
    if row.ndim != len(wanted) or row.shape[0] != wanted[0]:
        raise ConfigError(
            f"a row of out has shape {row.shape}, but {member} is stored as {wanted}: crop and "
            f"pad change lengths in space, not channels or axes. Give rows ({wanted[0]}, "
            f"{', '.join('DHW'[-len(wanted[1:]) :])})."
        )
    if row.dtype != member.dtype and not can_hold(row.dtype, member.dtype):
        raise ConfigError(
            f"out is {row.dtype}, but {member} is stored as {member.dtype}, which it cannot "
            "hold. Ask for the stored dtype or for float32."
        )
