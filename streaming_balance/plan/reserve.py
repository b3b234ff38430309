"""Who stands in for a damaged sample: units of its class that are not in the batch, in keyed order.

The plan knows nothing of damage. It names, for every slot of every global batch, the same
candidates in the same order; whoever finds a sample damaged takes the first sound one. Slots of a
class never share a candidate, so ranks that know nothing of each other never choose the same one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streaming_balance.plan.keys import stream_key
from streaming_balance.plan.members import ClassMembers
from streaming_balance.plan.permutation import shuffled


def reserve(
    members: ClassMembers, batch: NDArray[np.int64], *, seed: int, epoch: int, step: int
) -> NDArray[np.int64]:
    """List a class's samples that may stand in for others in one global batch.

    Args:
        members: the units of the class that the strategy uses.
        batch: `(B,)` sample numbers of the global batch.
        seed: the run's seed.
        epoch: of the batch.
        step: of the batch.

    Returns:
        `(m,)` one sample of every unit that has none in the batch, in keyed order: a sample of a
        patient with several is chosen by key, too.

    Examples:
        >>> from streaming_balance.plan.members import sized_table
        >>> members = sized_table({"HGG": 5}).members[0]
        >>> sorted(reserve(members, np.array([1, 3]), seed=0, epoch=0, step=0).tolist())
        [0, 2, 4]
    """
    units = np.flatnonzero(~members.units_among(batch)).astype(np.int64)
    if not len(units):
        return units
    key = stream_key(seed, "reserve", members.label, epoch, step)
    order = units[shuffled(key, members.hashes()[units])]
    turns = np.full(len(order), stream_key(seed, "reserve turn", epoch, step) >> 66, np.int64)
    return members.pick(order, turns)
