"""What the samplers share: the plan over some labels, this rank, and where iteration stands."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_balance.config import BalanceSetting, read_settings
from streaming_balance.errors import ConfigError, ResumeError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.options import whole_number
from streaming_balance.stream.ranks import find_ranks
from streaming_balance.training.announcement import announce, announcement
from streaming_balance.training.cursors import Place, SamplerPosition
from streaming_balance.training.labels import Labels, Strata, plain_labels, plain_strata
from streaming_balance.training.sharding import Dealt, ShardingWatch
from streaming_balance.training.state import LoaderState, Position, delivered


class PlannedSampler:
    """What both samplers share: the plan, this rank, and where iteration stands.

    Args:
        labels: `(N,)` one label per sample of the dataset.
        batch_size: samples in a batch of this rank.
        balance: what `train_loader` takes.
        seed: the run's seed, or None.
        patients: `(N,)` patient of every sample, or None.
        strata: name -> `(N,)` values to balance jointly with the label, or None.
        num_replicas: number of data-parallel ranks, or None.
        rank: data-parallel rank, or None.
    """

    def __init__(
        self,
        labels: Labels,
        *,
        batch_size: int,
        balance: BalanceSetting,
        seed: int | None,
        patients: Labels | None,
        strata: Strata | None,
        num_replicas: int | None,
        rank: int | None,
    ) -> None:
        self._batch_size = _checked_batch_size(batch_size)
        self.rank, self.num_replicas = _replicas(rank, num_replicas)
        settings = read_settings(balance)
        if seed is None:
            seed = 0 if settings.seed is None else settings.seed
        self.plan = BalancedPlan.from_labels(
            plain_labels(labels),
            global_batch_size=self._batch_size * self.num_replicas,
            balance=settings.strategy,
            seed=seed,
            patients=None if patients is None else plain_labels(patients),
            strata=plain_strata(strata),
        )
        self._position = SamplerPosition()
        messages = announcement(
            self.plan, settings, num_ranks=self.num_replicas, classes_declared=False
        )
        if not self.rank:
            announce(worth_saying(messages))
        self._watch = ShardingWatch(
            Dealt(rank=self.rank, num_ranks=self.num_replicas, is_sampler=True)
        )

    @property
    def batch_size(self) -> int:
        """Samples in a full batch of this rank."""
        return self._batch_size

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is to be iterated next.

        The current epoch keeps its position, so calling this at the top of every epoch is fine,
        after a resume too. Another epoch starts at its first step; what is skipped on the way is
        kept in the state.

        Args:
            epoch: at least 0.

        Raises:
            IndexError: a negative epoch, or one beyond what the plan's shares reach.
        """
        target = int(operator.index(epoch))
        if target != self._position.next.epoch:
            self.plan.quotas(target, 0)
            self._position.jump(target)

    def state_dict(self, *, epoch: int | None = None, step: int | None = None) -> dict[str, Any]:
        """Give the state: plain values, the same on every rank, to be saved with a checkpoint.

        It counts what was asked of this sampler. A `StatefulDataLoader` saves it batch by batch, so
        its own `state_dict()` is exact. A plain `DataLoader` with workers asks for some batches
        ahead: say where the training loop stands with `epoch` and `step`.

        Args:
            epoch: epoch of the batch that the training loop gets next; None with `step` None.
            step: number of that batch in its epoch, in [0, number of steps].

        Raises:
            ConfigError: only one of the two is given.
            IndexError: the epoch has no such step.
        """
        place = self._position.next
        if (epoch is None) != (step is None):
            raise ConfigError(
                f"epoch is {epoch!r} and step is {step!r}; give both to say where the training "
                f"loop stands, or neither."
            )
        if epoch is not None and step is not None:
            place = self._normal(Place(epoch=epoch, step=step))
        return self._state(place).to_dict() | {
            "taken": place.taken,
            "num_replicas": self.num_replicas if place.taken else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a run where its state says, on any number of ranks.

        Args:
            state: what `state_dict` gave, perhaps passed through JSON or `torch.save`. The global
                batch, `batch_size * num_replicas`, must be the same as then.

        Raises:
            ResumeError: the state belongs to another plan or other labels, or is damaged; lists
                what differs.
        """
        saved = LoaderState.from_dict(state)
        mine = self._state(self._position.next)
        if saved.settings.get("global_batch_size") != self.plan.global_batch_size:
            raise ResumeError(
                f"the state belongs to a run with global_batch_size "
                f"{saved.settings.get('global_batch_size')}, but batch_size {self._batch_size} x "
                f"num_replicas {self.num_replicas} is {self.plan.global_batch_size}. Choose a "
                f"batch_size with the same product."
            )
        saved.check_continues(mine)
        try:
            place = self._normal(
                Place(
                    epoch=saved.position.epoch,
                    step=saved.position.step,
                    taken=_whole(state.get("taken", 0)),
                )
            )
            for jump in saved.skipped:
                for end in jump:
                    self.plan.batch_size(end.epoch, end.step)
        except (IndexError, OverflowError) as error:
            raise ResumeError(
                f"the state stands at {saved.position}, which the plan does not have ({error}); it "
                f"is damaged. Use an earlier checkpoint."
            ) from error
        if place.taken and state.get("num_replicas") != self.num_replicas:
            raise ResumeError(
                f"the state stands inside a batch of num_replicas {state.get('num_replicas')}, "
                f"this sampler has {self.num_replicas}. Save the state after a whole batch: give "
                f"DataLoader and sampler the same batch_size."
            )
        self._position.move(place, saved.skipped)

    def exposure(self) -> NDArray[np.int64]:
        """Count how often each sample was asked for in this run, over all ranks.

        Returns:
            `(N,)` deliveries per sample; whole steps, without the epochs that were jumped over.
        """
        return delivered(self.plan, self._state(self._position.next))

    def num_steps(self, epoch: int) -> int:
        """Count the batches of an epoch, the same on every rank."""
        return self.plan.num_steps(epoch)

    def rank_batch(self, epoch: int, step: int) -> list[int]:
        """List the samples of one batch of this rank.

        Args:
            epoch: at least 0.
            step: in [0, num_steps(epoch)).

        Returns:
            Sample numbers: positions in the labels.

        Raises:
            IndexError: the epoch has no such step.
        """
        members = self.plan.batch(epoch, step)
        if self.num_replicas == 1 and len(members) == 1:
            return [int(members[0])]
        slots = self.plan.rank_slots(epoch, step, rank=self.rank, num_ranks=self.num_replicas)
        return [int(number) for number in members[slots]]

    def _state(self, place: Place) -> LoaderState:
        """Give the state as a value; a sampler knows of no shards."""
        return LoaderState(
            plan_digest=self.plan.digest,
            settings=self.plan.settings,
            shards_digest="",
            position=Position(place.epoch, place.step),
            skipped=self._position.skipped,
        )

    def _normal(self, place: Place) -> Place:
        """Give a place that the plan has; the end of an epoch is the start of the next one."""
        if place.step == self.plan.num_steps(place.epoch) and not place.taken:
            return Place(epoch=place.epoch + 1, step=0)
        size = len(self.rank_batch(place.epoch, place.step))
        if not 0 <= place.taken < size:
            raise IndexError(f"the batch has {size} samples; {place.taken} are not some of them.")
        return place


def _checked_batch_size(batch_size: object) -> int:
    """Give the batch size of a rank as a plain integer of at least 1."""
    size = whole_number(batch_size)
    if size is None or size < 1:
        raise ConfigError(
            f"batch_size is {batch_size!r}; it must be an integer of at least 1, the batch_size "
            f"you give the DataLoader."
        )
    return size


def _replicas(rank: int | None, num_replicas: int | None) -> tuple[int, int]:
    """Give rank and number of ranks; what is not given is looked up, each on its own."""
    if rank is None or num_replicas is None:
        found_rank, found_replicas = find_ranks(None, None)
        rank = found_rank if rank is None else rank
        num_replicas = found_replicas if num_replicas is None else num_replicas
    number, replicas = whole_number(rank), whole_number(num_replicas)
    if number is None or replicas is None or not 0 <= number < replicas:
        raise ConfigError(
            f"rank is {rank!r} and num_replicas is {num_replicas!r}; both are integers, and rank "
            f"must lie in 0..num_replicas-1. Leave both out to take them from torch.distributed or "
            f"from RANK and WORLD_SIZE."
        )
    return number, replicas


def worth_saying(messages: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Leave out what is said of batches where nobody asked for any: batches of one."""
    return [(level, said) for level, said in messages if not said.startswith("a batch of 1 ")]


def _whole(value: object) -> int:
    """Give a count of a state as a plain integer."""
    number = whole_number(value)
    if number is None:
        raise ResumeError(
            f"the state has taken {value!r}, which is no count; it is damaged. Use an earlier "
            f"checkpoint."
        )
    return number
