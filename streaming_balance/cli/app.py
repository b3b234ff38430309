"""`streaming-balance`: the commands together, and what every one of them does with an error."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import cast

import typer

from streaming_balance.cli.answers import print_error, print_json
from streaming_balance.cli.audit import audit
from streaming_balance.cli.demo import demo
from streaming_balance.cli.index import index
from streaming_balance.cli.inspect import inspect
from streaming_balance.cli.pack import pack
from streaming_balance.cli.plan import plan
from streaming_balance.cli.resample import resample
from streaming_balance.cli.verify import verify
from streaming_balance.errors import BalanceError, ConfigError, ResumeError

PROGRAM = "streaming-balance"
DONE, BAD_DATA, WRONG_CALL, INTERRUPTED = 0, 1, 2, 130

# The base of every error in the way a command is called. Typer's releases keep it in different
# modules, but the class it is made public through has always been derived from it.
_CallError = cast("type[Exception]", typer.BadParameter.__mro__[2])

app = typer.Typer(
    help="Exact, fair, resumable class balancing for streams of medical volumes.\n\n"
    "Pack volumes once, look at the data set and at the plan, train, audit.",
    epilog="Exit status: 0 done, 1 the data is bad, 2 the call is wrong.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _command in (pack, index, resample, verify, inspect, plan, audit, demo):
    app.command()(_command)


def main() -> None:
    """Run the command line of this process and exit."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.addLevelName(logging.WARNING, "warning")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: what stands after the program's name.

    Returns:
        The exit status: 0 done, 1 the data is bad, 2 the call is wrong, 130 interrupted.

    Examples:
        >>> run(["plan", "/nowhere", "--global-batch-size", "8", "--balance", "class_balanced"])
        1
    """
    try:
        # Called with nothing at all, show what there is.
        status = app(args=list(arguments) or ["--help"], prog_name=PROGRAM, standalone_mode=False)
        return status if isinstance(status, int) else DONE
    except BalanceError as error:
        _report(error, arguments)
        return WRONG_CALL if isinstance(error, ConfigError | ResumeError) else BAD_DATA
    except _CallError as error:
        _report(error, arguments)
        return WRONG_CALL
    except OSError as error:
        _report(error, arguments)
        return BAD_DATA
    except (KeyboardInterrupt, typer.Abort):
        print_error("interrupted; run the same command again to go on.")
        return INTERRUPTED


def _report(error: Exception, arguments: Sequence[str]) -> None:
    """Say what went wrong on stderr, and under --json also on stdout."""
    message = _message(error)
    if "--json" in arguments:
        kind = "UsageError" if isinstance(error, _CallError) else type(error).__name__
        print_json({"error": {"kind": kind, "message": message}})
    print_error(message)


def _message(error: Exception) -> str:
    """Give an error's text, with the notes added on its way up."""
    if isinstance(error, _CallError):
        text = str(getattr(error, "format_message", error.__str__)())
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else PROGRAM
        return f"{text} Try '{command} --help'."
    if isinstance(error, OSError) and not isinstance(error, BalanceError):
        where = f"{os.fspath(error.filename)!s}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return "\n".join([str(error), *getattr(error, "__notes__", ())])
