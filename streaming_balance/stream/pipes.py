"""Shards that a program writes to its standard output: `pipe:aws s3 cp s3://bucket/a.tar -`.

The program is started as it is, without a shell: `|`, `>` and `$NAME` mean nothing. Whoever wants a
shell names one: `pipe:sh -c 'zcat a.tar.gz | head -c 1000'`. That it ended well is part of the
data: a stream whose program was killed, or reported an error, is not a stream that ended.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.stream.passing import FileStream
from streaming_balance.stream.shown import shown_command, without_secrets

_SHELL_WORDS = frozenset({"|", "||", "&&", "&", ";", ">", ">>", "<", "2>", "2>&1"})
_LAST_WORDS_BYTES = 2048
_PIPE_BYTES = 1 << 20  # Linux allows it to everyone; 64 KiB mean 16 times the task switches


def command_words(command: str) -> list[str]:
    """Split the text after `pipe:` into program and arguments.

    Args:
        command: the text, quoted as for a shell.

    Returns:
        At least one word.

    Raises:
        ConfigError: it is empty, a quote is open, or it would need a shell.

    Examples:
        >>> command_words("cat 'my shards/a.tar'")
        ['cat', 'my shards/a.tar']
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"urls has a pipe: whose command cannot be split: {error}.") from error
    if not words:
        raise ConfigError("urls has a pipe: without a command. Write pipe:cat a.tar, for example.")
    for word in words:
        if word in _SHELL_WORDS:
            raise ConfigError(
                f"urls has {shown_command(words)!r} with {word!r}, which only a shell understands, "
                "and none is started. Ask for one: pipe:sh -c '...'."
            )
    return words


class PipeStream:
    """The standard output of a program that is started for it.

    Args:
        words: program and arguments.
        timeout_seconds: how long the program may run on after it closed its output.

    Raises:
        ShardError: the program cannot be started.
    """

    size: int | None = None

    def __init__(self, words: Sequence[str], *, timeout_seconds: float) -> None:
        self._name = shown_command(words)
        self._timeout_seconds = timeout_seconds
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the stream
        try:
            # A session of its own: a shell and all it started can be stopped together.
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                start_new_session=True,
                pipesize=_PIPE_BYTES,
            )
        except OSError as error:
            self._complaints.close()
            raise ShardError(f"{self._name} cannot be started: {error.strerror}") from error
        assert self._process.stdout is not None
        self._output = FileStream(self._process.stdout, self._name, owned=True)
        self._ended_well = False

    def read(self, count: int) -> bytes:
        """Give exactly `count` bytes; fewer only where the program ended, and ended well.

        Raises:
            ShardError: the program failed or was killed.
        """
        found = self._output.read(count)
        if len(found) < count:
            self._check_exit()
        return found

    def read_some(self, count: int) -> bytes:
        """Give 1 to `count` bytes; none only where the program ended, and ended well.

        Raises:
            ShardError: the program failed or was killed.
        """
        found = self._output.read_some(count)
        if not found:
            self._check_exit()
        return found

    def close(self) -> None:
        """Stop the program if it still runs. May be called twice."""
        if self._process.returncode is None:
            self._kill()
        self._output.close()
        self._complaints.close()

    def _check_exit(self) -> None:
        """Raise unless the program ends, and says that all went well."""
        if self._ended_well:
            return
        try:
            status = self._process.wait(self._timeout_seconds)
        except subprocess.TimeoutExpired:
            self._kill()
            raise ShardError(
                f"{self._name} closed its output, but did not end within "
                f"{self._timeout_seconds:g} s, so nobody knows whether all was written."
            ) from None  # its text would show the whole command
        if status != 0:
            raise ShardError(f"{self._name} {self._ending(status)}")
        self._ended_well = True

    def _ending(self, status: int) -> str:
        """Say how the program ended, and what it complained about last."""
        how = f"ended with exit status {status}"
        if status < 0:
            how = f"was killed by signal {-status}"
        length = os.fstat(self._complaints.fileno()).st_size
        # The program writes where this descriptor stands, so it must not be moved.
        start = max(0, length - _LAST_WORDS_BYTES)
        tail = os.pread(self._complaints.fileno(), _LAST_WORDS_BYTES, start)
        text = without_secrets(tail.decode(errors="replace")).strip()
        return f"{how}: {text}" if text else f"{how} and wrote nothing to its standard error."

    def _kill(self) -> None:
        """Kill the program and whatever it started, and wait for it."""
        # Not waited for yet, so the number is still its own.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
