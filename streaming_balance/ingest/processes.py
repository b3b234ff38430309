"""Encoding cases in several processes, results in the order of the cases."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.ingest.encode import Task, encode_case
from streaming_balance.storage.encoded import EncodedSample
from streaming_balance.storage.manifest import Rejected

MAX_JOBS = 1024
# Cases waiting per process: one to work on, one to go on with. More would only fill memory.
CASES_AHEAD = 2


def check_jobs(jobs: int) -> None:
    """Make sure that `jobs` is a number of processes.

    Raises:
        ConfigError: it is not a whole number from 1 to 1024.
    """
    if type(jobs) is not int or not 1 <= jobs <= MAX_JOBS:
        raise ConfigError(f"jobs is {jobs!r}; it must be a whole number from 1 to {MAX_JOBS}.")


def encode_in_order(
    tasks: Sequence[Task], jobs: int
) -> Generator[EncodedSample | Rejected, None, None]:
    """Encode cases and give the results in the order of the tasks.

    Args:
        tasks: the cases.
        jobs: processes; 1 works in this one.

    Returns:
        A result per task. At most two cases per process are held in memory.

    Raises:
        ShardError: a source file changed, or a process died.
    """
    if jobs == 1 or len(tasks) < 2:
        yield from map(encode_case, tasks)
        return
    # Fresh processes: a fork would copy the locks of threads that the caller may run.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max_workers=min(jobs, len(tasks)), mp_context=context)
    waiting: deque[Future[EncodedSample | Rejected]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(encode_case, task))
            if len(waiting) >= jobs * CASES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ShardError(
            f"a packing process died, most likely out of memory at jobs={jobs}. Run the same "
            "command with fewer jobs; finished shards are kept. In a script, call write_shards "
            "below `if __name__ == '__main__':`."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
