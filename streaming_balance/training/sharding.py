"""Who deals batches to processes: this package, once. What is said where it happens twice, or not.

A sampler or loader knows its rank, but not what stands between it and the training loop.
Frameworks deal out whatever they are given, and a second dealing loses data without an error. So
whoever begins to iterate is looked at: the objects that ask, and the process group.
"""

from __future__ import annotations

import inspect
import logging
import os
from dataclasses import dataclass
from types import FrameType

import torch.distributed
from torch.utils.data import get_worker_info
from torch.utils.data.distributed import DistributedSampler

from streaming_balance.errors import ConfigError
from streaming_balance.stream.ranks import find_ranks
from streaming_balance.training.announcement import announce

# Classes of Accelerate and Transformers that hand each process some of what they iterate.
_DEALERS = frozenset({"BatchSamplerShard", "IterableDatasetShard", "DataLoaderDispatcher"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealer:
    """An object that iterates us and hands each process some of what we give."""

    name: str
    """Its class, with the module."""
    num_processes: int
    """How many processes it deals to."""
    is_sampler: bool
    """Whether it is a `DistributedSampler`, as Lightning puts around samplers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealt:
    """What a sampler or loader knows of its own dealing."""

    rank: int
    """Data-parallel rank it makes batches for."""
    num_ranks: int
    """Number of data-parallel ranks; 1 where it deals nothing."""
    is_sampler: bool
    """Whether it is a sampler; else a loader."""
    trains: bool = True
    """Whether every rank is to get other samples: not so where one process evaluates all."""

    @property
    def noun(self) -> str:
        """What users call it."""
        return "sampler" if self.is_sampler else "loader"

    @property
    def setting(self) -> str:
        """The argument that gives the number of ranks."""
        return "num_replicas" if self.is_sampler else "num_ranks"


class ShardingWatch:
    """Warns, once, where what it watches is dealt to processes twice, or by nobody.

    Args:
        dealt: what the watched sampler or loader knows of its own dealing.
    """

    def __init__(self, dealt: Dealt) -> None:
        self._dealt, self._process = dealt, os.getpid()
        self._ranks_seen = _ranks_around()
        self._said = False

    def look(self) -> None:
        """Look who begins to iterate; costs microseconds, calls no collective."""
        if self._said:
            return
        said = self._dealt_twice() or self._in_a_worker() or self._dealt_by_nobody()
        self._said = said is not None
        if said is not None and _speaks(self._dealt.rank):
            announce([(logging.WARNING, said)])

    def _dealt_twice(self) -> str | None:
        """Say that somebody deals out what is one rank's part already."""
        dealer = None if self._dealt.num_ranks == 1 else dealer_above()
        if dealer is None:
            return None
        if dealer.is_sampler:
            way_out = "Set use_distributed_sampler=False in Lightning's Trainer, or take away"
            way_out += " whatever puts that sampler around this one"
        elif self._dealt.is_sampler:
            way_out = "Leave its DataLoader out of accelerator.prepare"
        else:
            way_out = "Iterate the loader itself, without a dataset or DataLoader around it"
        return (
            f"this {self._dealt.noun} gives one of {self._dealt.num_ranks} ranks' part of each "
            f"batch, and {dealer.name} deals that out once more to {dealer.num_processes} "
            f"processes: the rest is lost. {way_out}; or give {self._dealt.setting}=1, rank=0 and "
            f"let it do all the dealing."
        )

    def _in_a_worker(self) -> str | None:
        """Say that worker processes of a DataLoader each iterate a loader."""
        worker = None if self._dealt.is_sampler else get_worker_info()
        if worker is None:
            return None
        is_copy = self._process != os.getpid()
        mine = (self._dealt.rank, self._dealt.num_ranks)
        # Built inside the worker, it may be dealt by worker: then its ranks are others than those
        # that are found.
        if not is_copy and (worker.num_workers == 1 or mine != self._ranks_seen):
            return None
        repeated = f"each of {worker.num_workers} workers delivers every batch once more, and "
        return (
            f"this loader is iterated in a worker process of a DataLoader: "
            f"{repeated if worker.num_workers > 1 else ''}the state in the training process stands "
            f"still. Iterate the loader itself; train_loader(workers=N) moves reading and "
            f"transforms to processes."
        )

    def _dealt_by_nobody(self) -> str | None:
        """Say that all processes of a group train on the same batches."""
        if self._dealt.num_ranks > 1 or not self._dealt.trains or dealer_above() is not None:
            return None
        size = _group_size()
        # Looked up when it was built, or given: only of samplers is 1 given for others to deal.
        is_early = self._ranks_seen == (0, 1)
        if size == 1 or not (is_early or (self._dealt.is_sampler and not _has_subgroups())):
            return None
        setting = self._dealt.setting
        way_out = f"Leave out rank and {setting}, or let accelerator.prepare have its DataLoader"
        if is_early:
            way_out = "Build it after torch.distributed.init_process_group (in Lightning: in setup)"
        return (
            f"this {self._dealt.noun} has {setting}=1 in a process group of {size}, and nobody "
            f"deals out what it gives: every process trains on all of each batch. {way_out}; or "
            f"give this process's data-parallel rank and {setting}."
        )


def dealer_above() -> Dealer | None:
    """Find who, among the callers, deals out what it iterates; None where nobody does.

    Examples:
        >>> dealer_above() is None
        True
    """
    frame = inspect.currentframe()
    while frame is not None:
        dealer = _dealer_in(frame)
        if dealer is not None:
            return dealer
        frame = frame.f_back
    return None


def _dealer_in(frame: FrameType) -> Dealer | None:
    """Give the object whose method runs in a frame, if it deals to several processes."""
    kind = _class_of(frame)
    if kind is None or kind.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return None
    is_sampler = issubclass(kind, DistributedSampler)
    if not is_sampler and not any(base.__name__ in _DEALERS for base in kind.__mro__):
        return None
    # Only here: asking any frame for its variables may keep them alive, a loop's last batch too.
    owner = frame.f_locals.get(frame.f_code.co_varnames[0])
    if is_sampler:
        count = getattr(owner, "num_replicas", 1)
    else:
        state = getattr(owner, "state", None)
        count = getattr(owner, "num_processes", None) or getattr(state, "num_processes", 1)
    if not isinstance(count, int) or count <= 1:
        return None
    name = f"{type(owner).__module__}.{type(owner).__qualname__}"
    return Dealer(name=name, num_processes=count, is_sampler=is_sampler)


def _class_of(frame: FrameType) -> type | None:
    """Find the class whose method runs in a frame, None for all else."""
    code = frame.f_code
    path = code.co_qualname.split(".")[:-1]
    if not path or not code.co_argcount:
        return None
    found: object = frame.f_globals.get(path[0])
    for name in path[1:]:
        found = getattr(found, name, None)
    return found if isinstance(found, type) else None


def _ranks_around() -> tuple[int, int] | None:
    """Give the rank and number of ranks that a look-up finds now; None where it finds nonsense."""
    try:
        return find_ranks(None, None)
    except ConfigError:
        return None


def _group_size() -> int:
    """Count the processes of the initialised process group; 1 where there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def _has_subgroups() -> bool:
    """Say whether this process is in smaller groups, too, as with tensor or pipeline parallelism.

    There, processes that share a model are to get the same batches.
    """
    world = getattr(torch.distributed.distributed_c10d, "_world", None)
    return len(getattr(world, "pg_map", ())) > 1


def _speaks(rank: int) -> bool:
    """Say whether this process is the one that logs."""
    worker = get_worker_info()
    if worker is not None and worker.id:
        return False
    return not (torch.distributed.get_rank() if _group_size() > 1 else rank)
