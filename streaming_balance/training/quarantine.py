"""Samples that turned out damaged, and who is delivered in their place.

The rules are the plan's (`BalancedPlan.substitutes`): who stands in depends on which samples are
damaged and on nothing else, so a process may learn of damage early or late, or never.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ShardError
from streaming_balance.training.records import Substitution
from streaming_balance.training.requests import BatchRequest

Candidates = Callable[[int, int, int], NDArray[np.int64]]


class Quarantine:
    """What a process knows of damaged samples.

    Args:
        candidates: gives the sample numbers that may stand in at (epoch, step, slot), best first.
    """

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        self._damaged: dict[int, ShardError] = {}

    def add(self, damaged: Mapping[int, ShardError]) -> None:
        """Remember damaged samples by number, and what is wrong with each."""
        for sample, error in damaged.items():
            self._damaged.setdefault(sample, error)

    def settled(self, request: BatchRequest) -> BatchRequest:
        """Replace the samples of a batch that are known to be damaged.

        Args:
            request: what the plan asks for, or what this gave for it before.

        Returns:
            The request with sound samples, as far as is known, and a record of each replaced.

        Raises:
            ShardError: nobody of the class is left to stand in.
        """
        planned = request.samples.copy()
        slots = {slot: place for place, slot in enumerate(request.slots.tolist())}
        for record in request.substitutions:
            planned[slots[record.slot]] = record.sample
        samples, records = planned.copy(), []
        for place, sample in enumerate(planned.tolist()):
            if sample in self._damaged:
                records.append(self._substitution(request, place, sample))
                samples[place] = records[-1].substitute
        if not records and not request.substitutions:
            return request
        return replace(request, samples=samples, substitutions=tuple(records))

    def _substitution(self, request: BatchRequest, place: int, sample: int) -> Substitution:
        """Choose who stands in for one sample."""
        slot = int(request.slots[place])
        candidates = self._candidates(request.epoch, request.step, slot).tolist()
        for substitute in candidates:
            if substitute not in self._damaged:
                return Substitution(
                    epoch=request.epoch,
                    step=request.step,
                    slot=slot,
                    sample=sample,
                    substitute=substitute,
                    reason=str(self._damaged[sample]),
                )
        raise ShardError(
            f"{self._damaged[sample]} Nobody is left to stand in for it at epoch {request.epoch}, "
            f"step {request.step}, slot {slot}: of its class, {len(candidates)} samples outside "
            f"this batch may take this slot, and none of them is sound."
        )
