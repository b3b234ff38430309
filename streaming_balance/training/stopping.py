"""Stopping all ranks after the same step when one of them is told to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed

from streaming_balance.errors import BalanceError, ConfigError
from streaming_balance.stream.ranks import find_ranks

# No process can hear these; the system acts on them itself.
_NEVER_HEARD = frozenset(
    number
    for name in ("SIGKILL", "SIGSTOP")
    if (number := getattr(signal.Signals, name, None)) is not None
)


class StopTogether:
    """Lets every rank stop after the same step when any of them is told to.

    A cluster that wants a machine back sends SIGTERM to its processes, at other moments to each of
    them or to one alone. Within a `with` block of this class a signal only sets a flag of its rank.
    `requested`, which every rank calls once per step, asks by one all_reduce whether any rank has
    the flag, so that all of them hear it at the same step.

    Save inside the block: there another SIGTERM changes nothing, after it the handlers are again
    what they were before. SIGINT (Ctrl-C) is left alone unless `signals` names it, and then a
    second one interrupts as ever. Processes forked inside the block are ended by signals as before.
    Worker processes of a loader (`workers=N`) that start inside it leave these signals to their
    rank, since a cluster signals them too; those of other loaders do not.

    Args:
        signals: what tells a rank to stop: SIGTERM; Slurm can be told to send SIGUSR1 earlier.
        group: process group of torch.distributed whose ranks stop together; None is all of them.
        device: where the flag travels; None chooses by the group's backend. From a GPU the answer
            comes when the GPU has finished its step: a group with backend gloo does not wait.

    Raises:
        ConfigError: `signals` holds something that no process can hear.

    Examples:
        Somebody sends SIGTERM in the fourth step:

        >>> import signal
        >>> with StopTogether() as stop:
        ...     for step in range(1_000):
        ...         if step == 3:
        ...             signal.raise_signal(signal.SIGTERM)
        ...         if stop.requested():
        ...             print(f"saving after step {step}; rank {stop.asked_by} was told to stop")
        ...             break
        saving after step 3; rank 0 was told to stop
    """

    def __init__(
        self,
        *,
        signals: Iterable[int] = (signal.SIGTERM,),
        group: torch.distributed.ProcessGroup | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self._signals = _checked_signals(signals)
        self._group, self._device = group, device
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}
        self._received: set[int] = set()
        self._asked = self._was_entered = False
        self._asked_by: int | None = None
        self._calls = 0

    @property
    def asked_by(self) -> int | None:
        """The rank that was told to stop, the highest of several; None before `requested` said so.

        The same on every rank.
        """
        return self._asked_by

    def request(self) -> None:
        """Ask from code, in any thread: a limit of time is near, say. Other ranks need not."""
        self._asked = True

    def requested(self) -> bool:
        """Tell whether any rank was told to stop; every rank calls this equally often.

        Returns:
            The same on every rank. Once true it stays so, without asking again.

        Raises:
            BalanceError: the other ranks did not answer: one has died, say.
            ConfigError: this process cannot hear the signals or the other ranks.
        """
        if self._asked_by is None:
            if self._signals and not self._was_entered:
                raise ConfigError(
                    f"this StopTogether hears no {_names(self._signals)} yet: enter it first, "
                    f"`with StopTogether() as stop:` around the training loop; or use "
                    f"StopTogether(signals=()) if only request() asks."
                )
            self._calls += 1
            self._asked_by = self._ask()
        return self._asked_by is not None

    def __enter__(self) -> Self:
        if self in _entered:
            raise ConfigError("this StopTogether is in use already; make another one.")
        if self._signals and threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                f"StopTogether was entered in thread {threading.current_thread().name!r}, but "
                f"Python lets the main thread alone hear {_names(self._signals)}. Enter it there, "
                f"around what starts the thread, or use StopTogether(signals=()) and request()."
            )
        self._process, self._was_entered = os.getpid(), True
        _entered.append(self)
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Set the flag and do nothing else: whatever the process is doing goes on."""
        again = number == signal.SIGINT and number in self._received
        if again or os.getpid() != self._process:
            self._pass_on(number, frame)
            return
        self._received.add(number)
        self._asked = True

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Do what would have happened without this handler."""
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)
        elif previous != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        """Put the previous handlers back, once."""
        for number, previous in self._previous.items():
            # None stands for a handler that Python knows nothing of; it cannot be put back.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()
        if self in _entered:
            _entered.remove(self)

    def _ask(self) -> int | None:
        """Give the highest rank that was told to stop, None if none was."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            rank, num_ranks = find_ranks(None, None)
            _refuse_unheard(rank, num_ranks)
            return rank if self._asked else None
        rank, num_ranks = distributed.get_rank(), distributed.get_world_size(self._group)
        if num_ranks < 0:
            raise ConfigError(
                f"rank {rank} is not in the group that StopTogether was given. Give every rank a "
                f"group it belongs to, or group=None for all ranks."
            )
        place = self._device or _flag_device(distributed.get_backend_config(self._group))
        # Ranks count from 1 here, so that 0 says none.
        flag = torch.tensor([rank + 1 if self._asked else 0], device=place)
        try:
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=self._group)
            highest = int(flag.item())
        except RuntimeError as error:
            raise BalanceError(
                f"rank {rank} asked all {num_ranks} ranks whether to stop (call {self._calls} of "
                f"requested()), and they did not all answer: one has died, hangs, takes longer "
                f"than the group's timeout, or calls requested() more or less often than the "
                f"others. Look for what the other ranks said first; torchrun names the one that "
                f"failed first. Then resume from the last saved state, on any number of ranks. "
                f"torch says: {error}"
            ) from error
        return highest - 1 if highest else None


def heard_signals() -> tuple[int, ...]:
    """List the signals that this process hears by a `StopTogether` at the moment."""
    return tuple(sorted({number for stop in _entered for number in stop._previous}))


def leave_signals(signals: tuple[int, ...], owner: int, worker: int) -> None:  # noqa: ARG001
    """In a worker process: obey these signals from its owner alone, from now on.

    A cluster and torchrun signal a rank's whole process group. The rank notes it and goes on to the
    end of its step, for which it needs its workers. What its owner sends still ends a worker at
    once, and so does anybody's signal after its parent has died.

    Args:
        signals: numbers of the signals; none leaves all as it is.
        owner: process that started this one.
        worker: its number, which torch tells; all workers do the same.
    """
    # macOS does not say who sent a signal; there all of them end a worker.
    if signals and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(
            target=_obey, args=(signals, owner, os.getppid()), name="worker-signals", daemon=True
        ).start()


def _obey(signals: tuple[int, ...], owner: int, parent: int) -> None:
    """Wait for a signal that counts, and end the process as torch's own handler would."""
    while signal.sigwaitinfo(signals).si_pid != owner and os.getppid() == parent:
        pass
    os._exit(0)


def _checked_signals(signals: object) -> tuple[signal.Signals, ...]:
    """Give the signals by name, each once."""
    if not isinstance(signals, Iterable) or isinstance(signals, str | bytes):
        raise ConfigError(
            f"signals is {signals!r}; it must be several, such as (signal.SIGTERM, signal.SIGUSR1)."
        )
    numbers = list(signals)
    known = {int(number) for number in signal.Signals}
    for number in numbers:
        if not isinstance(number, int) or number not in known or number in _NEVER_HEARD:
            raise ConfigError(
                f"signals holds {number!r}, which no process can hear. Use signal.SIGTERM, "
                f"signal.SIGUSR1, signal.SIGINT or another of the signal module, but neither "
                f"SIGKILL nor SIGSTOP."
            )
    return tuple(signal.Signals(number) for number in dict.fromkeys(numbers))


def _names(signals: Iterable[signal.Signals]) -> str:
    """List signals by name."""
    return ", ".join(number.name for number in signals)


def _flag_device(backends: str) -> torch.device:
    """Choose where the flag travels, given the backend of each type of device.

    Examples:
        >>> _flag_device("cpu:gloo,cuda:nccl"), _flag_device("cuda:nccl")
        (device(type='cpu'), device(type='cuda'))
    """
    types = [pair.partition(":")[0] for pair in backends.split(",")]
    return torch.device("cpu" if "cpu" in types else types[0])


def _refuse_unheard(rank: int, num_ranks: int) -> None:
    """Refuse to stop alone where other ranks would wait for this one for ever."""
    if num_ranks > 1:
        raise ConfigError(
            f"the environment says that this is rank {rank} of {num_ranks}, but without "
            f"torch.distributed no rank can tell the others to stop. Call "
            f"torch.distributed.init_process_group() first."
        )


_entered: list[StopTogether] = []


def _leave_to_parent() -> None:
    """Let a forked child be ended as before: nobody in it asks whether to stop."""
    for stop in reversed(_entered.copy()):
        stop._restore()


if hasattr(os, "register_at_fork"):  # Windows has none, and is told of WSL where data is opened
    os.register_at_fork(after_in_child=_leave_to_parent)
