"""Addresses as messages show them: without passwords, tokens and signatures."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Whatever a URL carries before `@` or after `?` can be a password, a token or a signature.
_USER = re.compile(r"(\w+://)[^/\s'\"]*@")
_QUERY = re.compile(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*")
_PATH = re.compile(r"[\w.+-]*[./][\w./+-]*")


def without_secrets(text: str) -> str:
    """Take users, passwords and queries out of every URL in a text.

    Args:
        text: a URL, or a message that holds some.

    Returns:
        The same, safe to log.

    Examples:
        >>> without_secrets("curl: cannot reach https://me:secret@host/a.tar?X-Signature=abc")
        'curl: cannot reach https://host/a.tar?...'
    """
    return _QUERY.sub(r"\1?...", _USER.sub(r"\1", text))


def shown_command(words: Sequence[str]) -> str:
    """Give a command without what may be secret: its program, and its last word if that is a path.

    Args:
        words: program and arguments.

    Returns:
        Text that begins with `pipe:`.

    Examples:
        >>> shown_command(["curl", "-u", "me:secret", "https://host/a.tar?token=1"])
        'pipe:curl ... https://host/a.tar?...'
        >>> shown_command(["cat", "/data/a.tar"])
        'pipe:cat /data/a.tar'
        >>> shown_command(["fetch", "--token", "s3cr.et"])
        'pipe:fetch ...'
    """
    program, *rest = words
    if not rest:
        return f"pipe:{program}"
    last = rest[-1]
    is_value = len(rest) > 1 and rest[-2].startswith("-")
    if "://" in last:
        last = without_secrets(last)
    elif is_value or not _PATH.fullmatch(last) or last.startswith("-"):
        last = ""
    others = "..." if len(rest) > 1 or not last else ""
    return " ".join(part for part in (f"pipe:{program}", others, last) if part)
