"""What each step of a plan delivers: batches, quotas, ranks, exposure."""

from __future__ import annotations

import operator

import numpy as np
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.draws import Draws, TurnedDraws
from streaming_balance.plan.frozen import Frozen
from streaming_balance.plan.keys import stream_key
from streaming_balance.plan.members import ClassTable
from streaming_balance.plan.ranks import check_ranks, rank_slots
from streaming_balance.plan.reserve import reserve


class PlannedSteps(Frozen):
    """The steps of a plan: every answer is a pure function of (epoch, step)."""

    __slots__ = ("_draws", "_latest", "_table", "first_epoch", "global_batch_size", "seed")

    _draws: Draws
    _table: ClassTable
    _latest: tuple[int, int, NDArray[np.int64]]
    """The global batch asked for last, with its epoch and step; absent before the first."""
    first_epoch: int
    """The epoch at whose first step the plan begins: 0, or where a run was carried over to it."""
    global_batch_size: int
    """Samples in a full global batch, over all ranks."""
    seed: int
    """The run's seed."""

    def num_steps(self, epoch: int) -> int:
        """Count the global batches of an epoch."""
        return self._draws.shape(check_epoch(epoch)).num_steps

    def batch_size(self, epoch: int, step: int) -> int:
        """Count the samples of a global batch; only a short last batch differs."""
        epoch, step = self._check_step(epoch, step)
        return self._draws.shape(epoch).size_of(step)

    def quotas(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Count the samples of each class in a global batch.

        Returns:
            `(K,)` counts in class order; a sample with several labels counts for each of them.

        Raises:
            IndexError: the epoch has no such step.
        """
        epoch, step = self._check_step(epoch, step)
        if self._table.membership is not None:
            return self._table.class_counts(self._draws.members_of(epoch, step))
        return self._table.class_sums(self._draws.quotas(epoch, step))

    def strata_quotas(self, epoch: int, step: int) -> dict[tuple[str, ...], int]:
        """Count the samples of each stratum in a global batch.

        Returns:
            (label, value of each strata column) -> count; (label,) alone without strata.

        Raises:
            IndexError: the epoch has no such step.
        """
        counts = self._draws.quotas(*self._check_step(epoch, step)).tolist()
        return dict(zip(self._table.names, counts, strict=True))

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """List the members of a global batch, class by class in a keyed order.

        Args:
            epoch: at least 0.
            step: in [0, num_steps(epoch)).

        Returns:
            `(B,)` sample numbers; the position of a sample here is its slot.

        Raises:
            IndexError: the epoch has no such step.
        """
        return self._members(*self._check_step(epoch, step)).copy()

    def _members(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Give a global batch, not to be written to, computed once for all ranks that ask."""
        latest = getattr(self, "_latest", None)
        # One reference to an immutable whole: threads may replace it under each other's eyes.
        if latest is None or latest[:2] != (epoch, step):
            latest = (epoch, step, self._compute_members(epoch, step))
            object.__setattr__(self, "_latest", latest)
        return latest[2]

    def _compute_members(self, epoch: int, step: int) -> NDArray[np.int64]:
        """List the members of a global batch, class by class in a keyed order."""
        drawn = self._draws.members_of(epoch, step)
        return np.concatenate([drawn[number] for number in self._dealing_order(epoch)])

    def substitutes(self, epoch: int, step: int, slot: int) -> NDArray[np.int64]:
        """List who may stand in for the sample at a slot of a global batch, best first.

        The reserve of a class is its patients that are not in the batch (under unit: sample, their
        samples), in keyed order. Of the q slots of the class, the i-th tries places i, i + q, i + 2q
        and so on, so that no two slots ever take the same one.

        Args:
            epoch: at least 0.
            step: in [0, num_steps(epoch)).
            slot: position in `batch(epoch, step)`.

        Returns:
            `(m,)` sample numbers of the same class; empty where the batch holds the whole class.

        Raises:
            IndexError: no such step or slot.
        """
        epoch, step = self._check_step(epoch, step)
        drawn = self._draws.members_of(epoch, step)
        place = int(operator.index(slot))
        if place >= 0:
            for number in self._dealing_order(epoch):
                if place < len(drawn[number]):
                    waiting = reserve(
                        self._draws.members[number],
                        self._table.of_same_patients(np.concatenate(drawn)),
                        seed=self.seed,
                        epoch=epoch,
                        step=step,
                    )
                    return waiting[place :: len(drawn[number])]
                place -= len(drawn[number])
        raise IndexError(f"epoch {epoch}, step {step} has no slot {slot}.")

    def rank_slots(self, epoch: int, step: int, *, rank: int, num_ranks: int) -> NDArray[np.int64]:
        """List the slots of a global batch that fall to one rank, in delivery order.

        Raises:
            IndexError: the epoch has no such step.
            ConfigError: no such rank, or more ranks than samples.
        """
        epoch, step = self._check_step(epoch, step)
        rank, num_ranks = check_ranks(rank, num_ranks, global_batch_size=self.global_batch_size)
        size = self._draws.shape(epoch).size_of(step)
        if size < num_ranks:
            raise ConfigError(
                f"last: short leaves {size} samples for the last batch of an epoch, fewer than "
                f"{num_ranks} ranks. Use last: full or last: drop, or at most {size} ranks."
            )
        key = stream_key(self.seed, "ranks", epoch, step)
        return rank_slots(size, rank=rank, num_ranks=num_ranks, key=key)

    def rank_batch(self, epoch: int, step: int, *, rank: int, num_ranks: int) -> NDArray[np.int64]:
        """List one rank's part of a global batch.

        Args:
            epoch: at least 0.
            step: in [0, num_steps(epoch)).
            rank: data-parallel rank in [0, num_ranks).
            num_ranks: number of data-parallel ranks, at most the global batch size.

        Returns:
            `(b,)` sample numbers; the parts of all ranks together are `batch(epoch, step)`.

        Raises:
            IndexError: the epoch has no such step.
            ConfigError: no such rank, or more ranks than samples.
        """
        slots = self.rank_slots(epoch, step, rank=rank, num_ranks=num_ranks)
        return self._members(int(epoch), int(step))[slots]

    def exposure(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Count how often each sample was delivered from the start of the run to a step.

        Where the run was carried over from another plan, the count starts at the change.

        Args:
            epoch: at least `first_epoch`.
            step: in [0, num_steps(epoch)]; that step's own batch is not counted.

        Returns:
            `(N,)` deliveries per sample number.

        Raises:
            IndexError: the epoch has no such step.
        """
        epoch, step = self._check_step(epoch, step, past_the_last=1)
        return self._draws.exposure(epoch, step)

    def ordinals(self, epoch: int, step: int) -> dict[str, int]:
        """Count the draws of each class, or stratum of one, before a step: whose turn it is.

        Where the run was carried over from another plan, the count starts at the change.

        Args:
            epoch: at least `first_epoch`.
            step: in [0, num_steps(epoch)]; that step's own batch is not counted.

        Returns:
            Label, or `label / value of each strata column` -> draws; empty for a plan that does
            not draw in passes.

        Raises:
            IndexError: the epoch has no such step.

        Examples:
            >>> from streaming_balance.plan.epoch import BalancedPlan
            >>> plan = BalancedPlan.from_labels(["LGG"] * 75 + ["HGG"] * 210, global_batch_size=8)
            >>> plan.ordinals(0, 17)
            {'HGG': 68, 'LGG': 68}
        """
        epoch, step = self._check_step(epoch, step, past_the_last=1)
        if not isinstance(self._draws, TurnedDraws):
            return {}
        names = [" / ".join(name) for name in self._table.names]
        if len(set(names)) < len(names):
            # Labels that hold the slash themselves: the unit separator is in none of them.
            names = [group.label for group in self._table.members]
        return dict(zip(names, self._draws.ordinals(epoch, step), strict=True))

    def _dealing_order(self, epoch: int) -> list[int]:
        """Order the groups as they stand in the batches of an epoch."""
        # The strata of a class stay together: dealing in turn is then fair to both.
        keys = [
            [stream_key(self.seed, "dealing", epoch, *part) for part in {name[:1]: 0, name: 0}]
            for name in self._table.names
        ]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def _check_step(self, epoch: int, step: int, *, past_the_last: int = 0) -> tuple[int, int]:
        """Give `epoch` and `step` as plain integers if the epoch has that step."""
        number, steps = int(operator.index(step)), self.num_steps(epoch)
        if epoch < self.first_epoch:
            raise IndexError(
                f"epoch {epoch} belongs to the plan before: the run was carried over to this plan "
                f"at epoch {self.first_epoch}. Ask the plan before for earlier steps."
            )
        if not 0 <= number < steps + past_the_last:
            raise IndexError(f"epoch {epoch} has steps 0 to {steps - 1}; step {number} is none.")
        return check_epoch(epoch), number


def check_epoch(epoch: int) -> int:
    """Give `epoch` as a plain integer of at least 0."""
    number = int(operator.index(epoch))
    if number < 0:
        raise IndexError(f"epoch is {number}; epochs count from 0.")
    return number
