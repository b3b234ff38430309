"""Where streams come from: paths, patterns, file objects, standard input, programs, web servers.

sources = expand("shards/train-{000..012}.tar")     what is meant, without opening anything
tar = open_source(sources[0], files)                 its bytes, decompressed
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast
from urllib.parse import unquote, urlsplit

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.stream.compressed import MAGIC_BYTES, decompressed, is_compressed
from streaming_balance.stream.local import LocalTar, ShardFiles
from streaming_balance.stream.passing import ByteStream, FileStream, PassingTar
from streaming_balance.stream.patterns import MAX_SHARDS, exists, expand_braces, match_files
from streaming_balance.stream.pipes import PipeStream, command_words
from streaming_balance.stream.shown import shown_command, without_secrets
from streaming_balance.stream.walking import TarBytes
from streaming_balance.stream.web import WebStream

SourceKind = Literal["file", "stdin", "object", "pipe", "web"]
DEFAULT_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSource:
    """One shard to stream, not opened yet."""

    kind: SourceKind
    """How it is opened."""
    address: str
    """Path, command or URL, with whatever is secret in it."""
    shown: str
    """The same as messages, samples and counts show it."""
    file: IO[bytes] | None = None
    """The file object of kind `object`, read from where it stands, and left open."""

    @property
    def can_repeat(self) -> bool:
        """Whether it can be opened again for another pass."""
        return self.kind in ("file", "pipe", "web")

    def __repr__(self) -> str:
        return f"ShardSource({self.kind}, {self.shown!r})"


Url = str | os.PathLike[str] | IO[bytes] | ShardSource
Urls = Url | Iterable[Url]


def expand(urls: Urls, *, allow_pipe: bool = False) -> tuple[ShardSource, ...]:
    """Say which shards `urls` means, in order, without opening any.

    Args:
        urls: one of these, or a sequence of them:
            a path, with `{000..012}` and `{a,b}` as in bash, and `*`, `?`, `[...]`, `**`;
            `file:` and a path; `http://` or `https://`, with braces; a binary file object;
            `-` for standard input; `pipe:` and a program, with braces, run without a shell; a
            `ShardSource` that was expanded before.
        allow_pipe: whether `pipe:` may start programs. Leave it off for URLs others wrote.

    Returns:
        At least one shard.

    Raises:
        ConfigError: nothing is named, a pattern matches nothing, a shard is named twice, `pipe:` is
            not allowed, or the address is of a kind that is not read.

    Examples:
        >>> [source.shown for source in expand("cohort/train-{000..002}.tar")]
        ['cohort/train-000.tar', 'cohort/train-001.tar', 'cohort/train-002.tar']
    """
    sources: list[ShardSource] = []
    for item in _items(urls):
        sources.extend(_expand_one(item, allow_pipe=allow_pipe))
        if len(sources) > MAX_SHARDS:
            raise ConfigError(f"urls names over {MAX_SHARDS:,} shards. Give parts of it.")
    if not sources:
        raise ConfigError("urls is empty; name at least one shard.")
    _refuse_twice(sources)
    return tuple(sources)


def open_source(
    source: ShardSource, files: ShardFiles, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
) -> TarBytes:
    """Open one shard, whatever it is compressed with.

    Args:
        source: what `expand` gave.
        files: opens local plain tars, and closes them.
        timeout_seconds: longest silence of a server, and how long a program may take to end.

    Returns:
        The bytes of its tar; to be closed.

    Raises:
        ConfigError: the URL is none, or it needs a library that is absent.
        ShardError: it cannot be opened.
    """
    if source.kind == "file":
        return _open_path(Path(source.address), files)
    return _passing(_open_stream(source, timeout_seconds), source.shown)


def _items(urls: Urls) -> Iterable[object]:
    """Give single addresses and file objects of whatever was passed."""
    if isinstance(urls, str | os.PathLike | ShardSource) or hasattr(urls, "read"):
        return [urls]
    if isinstance(urls, Iterable) and not isinstance(urls, bytes | dict):
        return urls
    raise ConfigError(
        f"urls is {urls!r}; it must be a path, a URL, a binary file object or a list of these."
    )


def _expand_one(item: object, *, allow_pipe: bool) -> Sequence[ShardSource]:
    """Say which shards one address or file object means."""
    if isinstance(item, ShardSource):
        return [item]
    if hasattr(item, "read"):
        file = cast(IO[bytes], item)
        name = getattr(file, "name", None)
        is_named = isinstance(name, str) and name
        shown = without_secrets(str(name)) if is_named else f"<{type(file).__name__}>"
        return [ShardSource(kind="object", address="", shown=shown, file=file)]
    if isinstance(item, os.PathLike):
        item = os.fsdecode(item)
        return _paths(_encodable(item))
    if not isinstance(item, str) or not item or "\0" in item:
        raise ConfigError(
            f"urls has {item!r}; an entry must be a path, a URL or a binary file object."
        )
    if _encodable(item) == "-":
        return [ShardSource(kind="stdin", address="-", shown="<standard input>")]
    if item.startswith("pipe:"):
        return _pipes(item, allow_pipe=allow_pipe)
    scheme, separator, _ = item.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        return [
            ShardSource(kind="web", address=url, shown=without_secrets(url))
            for url in expand_braces(item)
        ]
    if separator and scheme.isalnum() and scheme.lower() != "file":
        raise ConfigError(
            f"urls has {without_secrets(item)!r}: {scheme}:// is not read directly. Use a program "
            "that writes it to its standard output, such as 'pipe:aws s3 cp s3://... -', with "
            "allow_pipe=True (--allow-pipe)."
        )
    if item.startswith("file:"):
        item = _path_in(item)
    return _paths(item)


def _encodable(address: str) -> str:
    """Give an address that the system can be asked for."""
    try:
        os.fsencode(address)
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"urls has {address!r}, which holds half a character: no file has such a name."
        ) from error
    return address


def _path_in(url: str) -> str:
    """Give the path of a `file:` URL."""
    try:
        path = unquote(urlsplit(url).path)
    except ValueError as error:
        raise ConfigError(f"urls has {url!r}, which is no URL: {error}.") from error
    if not path or "\0" in path:
        raise ConfigError(f"urls has {url!r}, which names no file. Write file:///folder/a.tar.")
    return _encodable(path)


def _paths(pattern: str) -> list[ShardSource]:
    """Give the files a path or pattern means; one that exists is taken as it is."""
    if exists(pattern):
        return [_file(pattern)]
    return [_file(path) for text in expand_braces(pattern) for path in match_files(text)]


def _pipes(item: str, *, allow_pipe: bool) -> list[ShardSource]:
    """Give the programs a `pipe:` address means."""
    if not allow_pipe:
        raise ConfigError(
            f"urls has {shown_command(command_words(item[5:]))!r}, which would start a program. "
            "Say allow_pipe=True (--allow-pipe) if you wrote it yourself."
        )
    return [
        ShardSource(kind="pipe", address=command, shown=shown_command(command_words(command)))
        for command in expand_braces(item[5:])
    ]


def _file(path: str) -> ShardSource:
    """Give a file on disk, and which one it is wherever the process goes before it is opened."""
    return ShardSource(kind="file", address=str(Path(path).absolute()), shown=path)


def _refuse_twice(sources: Sequence[ShardSource]) -> None:
    """Raise if the same bytes would be read twice in one pass."""
    seen: set[object] = set()
    for source in sources:
        mark = id(source.file) if source.kind == "object" else (source.kind, source.address)
        if mark in seen:
            raise ConfigError(f"urls names {source.shown!r} twice; name each shard once.")
        seen.add(mark)


def _open_path(path: Path, files: ShardFiles) -> TarBytes:
    """Open a file on disk: by its places if it is a plain tar, else as a stream."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ShardError(f"{path} is a folder. Name the tars in it: {path}/*.tar")
        if stat.S_ISREG(status.st_mode):
            file = files.add(path)
            if not is_compressed(file.read(0, min(MAGIC_BYTES, file.size), "the first bytes")):
                return LocalTar(file)
        stream: ByteStream = FileStream(path.open("rb"), str(path), owned=True)
    except ShardError:
        raise
    except OSError as error:
        raise ShardError(
            f"{path} cannot be opened: {error.strerror}. Is the path right, and mounted here?"
        ) from error
    return _passing(stream, str(path))


def _passing(stream: ByteStream, shown: str) -> TarBytes:
    """Read a stream as a tar; whatever goes wrong at its start closes it."""
    with ExitStack() as undo:
        undo.callback(stream.close)
        tar = PassingTar(decompressed(stream, shown))
        undo.pop_all()
    return tar


def _open_stream(source: ShardSource, timeout_seconds: float) -> ByteStream:
    """Open what passes by once."""
    if source.kind == "pipe":
        return PipeStream(command_words(source.address), timeout_seconds=timeout_seconds)
    if source.kind == "web":
        return WebStream(source.address, timeout_seconds=timeout_seconds)
    if source.kind == "stdin":
        if sys.stdin is None:
            raise ShardError("this process has no standard input to read a shard from.")
        return FileStream(sys.stdin.buffer, source.shown, owned=False)
    assert source.file is not None
    return FileStream(source.file, source.shown, owned=False)
