"""Many shards in one word: brace patterns as a shell expands them, and glob patterns."""

from __future__ import annotations

import glob
import itertools
import re
from pathlib import Path

from streaming_balance.errors import ConfigError

MAX_SHARDS = 1_000_000

_RANGE = re.compile(r"(-?[0-9]{1,18})\.\.(-?[0-9]{1,18})(?:\.\.(-?[0-9]{1,18}))?")
_MAX_BRACES = 100  # side by side or one within another


def expand_braces(pattern: str) -> list[str]:
    """Expand `{a,b}` and `{000..012}` as bash does; other braces stand for themselves.

    Args:
        pattern: text with any number of braces, also one within another.

    Returns:
        All texts, leftmost brace slowest; numbers keep their leading zeros.

    Raises:
        ConfigError: it would be over a million texts.

    Examples:
        >>> expand_braces("train-{008..010}.tar")
        ['train-008.tar', 'train-009.tar', 'train-010.tar']
        >>> expand_braces("{train,val}-{0..2..2}.tar")
        ['train-0.tar', 'train-2.tar', 'val-0.tar', 'val-2.tar']
        >>> expand_braces("awk {print}")
        ['awk {print}']
    """
    return _expand(pattern, pattern, 0)


def match_files(pattern: str) -> list[str]:
    """Give the files a glob pattern matches, sorted; the pattern itself where it is none.

    Args:
        pattern: a path, perhaps with `*`, `?`, `[...]`, or `**` for folders at any depth.

    Returns:
        Paths. A path that exists is taken as it is, whatever letters it has.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    if not glob.has_magic(pattern) or exists(pattern):
        return [pattern]
    found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute ones
    if not found:
        raise ConfigError(
            f"urls has {pattern!r}, which matches no file in {str(Path.cwd())!r}. "
            "Check the folder and the pattern."
        )
    return found


def exists(path: str) -> bool:
    """Say whether there is such a file; a text too long for a path is none."""
    try:
        return Path(path).exists()
    except OSError:
        return False


def _expand(text: str, whole: str, depth: int) -> list[str]:
    """Expand the first brace that means something, then what follows and what stands within."""
    if depth > _MAX_BRACES:
        raise ConfigError(f"urls has {whole[:80]!r} with over {_MAX_BRACES} braces.")
    for start, letter in enumerate(text):
        if letter != "{" or (stop := _closing(text, start)) is None:
            continue
        choices = _choices(text[start + 1 : stop], whole, depth)
        if choices is not None:
            rests = _expand(text[stop + 1 :], whole, depth + 1)
            if len(choices) * len(rests) > MAX_SHARDS:
                raise _too_many(whole)
            head = text[:start]
            return [head + choice + rest for choice, rest in itertools.product(choices, rests)]
    return [text]


def _closing(text: str, start: int) -> int | None:
    """Find the brace that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
    return None


def _choices(inside: str, whole: str, depth: int) -> list[str] | None:
    """Give what stands between two braces as choices; None where it is no list and no range."""
    match = _RANGE.fullmatch(inside)
    if match:
        return _numbers(match[1], match[2], match[3], whole)
    parts = _split_at_commas(inside)
    if len(parts) == 1:
        return None
    return [text for part in parts for text in _expand(part, whole, depth + 1)]


def _numbers(first: str, last: str, step: str | None, whole: str) -> list[str]:
    """Count from `first` to `last`, up or down, all of one width if either begins with a zero."""
    begin, end = int(first), int(last)
    stride = abs(int(step or 1)) or 1
    if abs(end - begin) // stride >= MAX_SHARDS:
        raise _too_many(whole)
    padded = any(len(text.lstrip("-")) > 1 and text.lstrip("-")[0] == "0" for text in (first, last))
    width = max(len(first), len(last)) if padded else 0
    numbers = range(begin, end + 1, stride) if begin <= end else range(begin, end - 1, -stride)
    return [f"{number:0{width}d}" for number in numbers]


def _split_at_commas(inside: str) -> list[str]:
    """Split at commas that stand in no further braces."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append(inside[start:at])
            start = at + 1
    return [*parts, inside[start:]]


def _too_many(whole: str) -> ConfigError:
    """Say that a pattern names too many shards."""
    return ConfigError(
        f"urls has {whole[:80]!r}, which stands for over {MAX_SHARDS:,} shards. Give parts of it."
    )
