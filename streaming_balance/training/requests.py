"""What is asked for: which samples make one rank's batch, and where they stand in the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.training.records import Substitution

Batch = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """Which samples make one rank's batch, and where they stand in the run."""

    epoch: int
    """Number of the epoch."""
    step: int
    """Number of the global batch in the epoch."""
    samples: NDArray[np.int64]
    """`(b,)` sample numbers, in delivery order."""
    slots: NDArray[np.int64]
    """`(b,)` positions in the global batch, before it was dealt to ranks."""
    global_size: int
    """Samples in the global batch."""
    num_ranks: int
    """Ranks that share the global batch."""
    substitutions: tuple[Substitution, ...] = ()
    """Which of `samples` stand in for damaged ones."""
