"""Tars for the tests of streams, written by Python's tarfile or header by header by hand."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streaming_balance.stream.counts import StreamCounts
from streaming_balance.stream.rules import TarRules
from streaming_balance.stream.samples import StreamSample
from streaming_balance.stream.sources import expand
from streaming_balance.stream.tarstream import SampleReader

END = bytes(1024)

Contents = Mapping[str, bytes] | Sequence[tuple[str, bytes]]

COHORT = {
    "P1.image.npb": bytes(range(256)) * 5,
    "P1.cls": b"1",
    "P2.image.npb": b"two" * 300,
    "P2.cls": b"0",
    "P3.image.npb": b"",
    "P3.cls": b"1",
}


def tar_of(contents: Contents, format_: int = tarfile.GNU_FORMAT) -> bytes:
    """Python's tarfile writes the members."""
    file = io.BytesIO()
    pairs = contents.items() if isinstance(contents, Mapping) else contents
    with tarfile.open(fileobj=file, mode="w", format=format_) as archive:
        for name, payload in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return file.getvalue()


def with_checksum(header: bytes) -> bytes:
    """Put the right checksum into a header, padded as its size is."""
    blank = header[:148] + b" " * 8 + header[156:]
    form = b"%6o\0 " if header[124:125] == b" " else b"%06o\0 "
    return header[:148] + form % sum(blank) + header[156:]


def header(
    name: bytes, size: bytes | int = 0, kind: bytes = b"0", magic: bytes = b"ustar\x0000"
) -> bytes:
    """Write one header by hand; a size given as bytes is put in as it is."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    text = bytearray(512)
    text[0 : len(name)] = name
    text[100:124] = b"0000644\x000000000\x000000000\0"
    text[124 : 124 + len(field)] = field
    text[136:148] = b"00000000000\0"
    text[156:157] = kind
    text[257 : 257 + len(magic)] = magic
    return with_checksum(bytes(text))


def member(
    name: bytes, payload: bytes = b"", kind: bytes = b"0", magic: bytes = b"ustar\x0000"
) -> bytes:
    """Write a header by hand, its payload, and the padding after it."""
    return header(name, len(payload), kind, magic) + payload + bytes(-len(payload) % 512)


def pax(records: Mapping[str, str | bytes], kind: bytes = b"x") -> bytes:
    """Write a PAX header by hand."""
    return member(b"PaxHeaders/x", pax_records(records), kind)


def pax_records(records: Mapping[str, str | bytes]) -> bytes:
    """Write PAX records: each begins with its own length."""
    written = b""
    for key, value in records.items():
        text = value.encode() if isinstance(value, str) else value
        rest = b" " + key.encode() + b"=" + text + b"\n"
        length = len(rest)
        while length != len(rest) + len(str(length)):
            length = len(rest) + len(str(length))
        written += str(length).encode() + rest
    return written


def put(folder: Path, content: bytes, name: str = "shard.tar") -> str:
    """Write a file and give its path."""
    path = folder / name
    path.write_bytes(content)
    return str(path)


def zipped(content: bytes) -> bytes:
    """Compress with Python's gzip, the same bytes every time."""
    return gzip.compress(content, 6, mtime=0)


def read_all(
    urls: object, rules: TarRules | None = None, *, allow_pipe: bool = False
) -> tuple[list[StreamSample], StreamCounts]:
    """Read all samples; also give the counts, which must reconcile."""
    reader = SampleReader(expand(urls, allow_pipe=allow_pipe), rules=rules)  # type: ignore[arg-type]
    samples = list(reader)
    assert reader.counts.reconcile
    return samples, reader.counts


def contents(samples: Sequence[StreamSample]) -> dict[str, bytes]:
    """Give payloads by member name."""
    return {
        payload.name: payload.read() for sample in samples for payload in sample.members.values()
    }


class Trickle(io.RawIOBase):
    """A file that gives a few bytes at a time, as a socket does."""

    def __init__(self, content: bytes, step: int) -> None:
        self._file = io.BytesIO(content)
        self._step = step

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._file.read(min(self._step, len(buffer)))
        buffer[: len(found)] = found
        return len(found)
