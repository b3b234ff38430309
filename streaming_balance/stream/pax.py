"""What stands before a header and changes it: PAX records, and GNU tar's long names.

A name over 100 bytes, or a size of 8 GiB and more, does not fit the oldest header; both extensions
put it into a member of its own that comes first. Readers differ on what two of them for one member
mean, so here that is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from streaming_balance.stream.headers import Header, TarDamageError

MAX_EXTENSION_BYTES = 1 << 20  # as Go's reader; names and times need far less
MAX_EXTENSIONS = 16  # before one member; writers need two or three

_LENGTH = re.compile(rb"([1-9][0-9]{0,6}) ")
_WHOLE = re.compile(r"[0-9]{1,20}", re.ASCII)
_TIME = re.compile(r"-?[0-9]{1,20}(?:\.[0-9]{0,40})?", re.ASCII)
_NUMBERS = {"size": _WHOLE, "uid": _WHOLE, "gid": _WHOLE} | dict.fromkeys(
    ("mtime", "atime", "ctime"), _TIME
)
_SPARSE = "GNU.sparse."
# What a record can change of a member. Twice in one header, readers take either.
_EFFECTIVE = ("path", "size", "linkpath")


@dataclass(slots=True)
class Extensions:
    """What the headers before a member say about it."""

    everywhere: dict[str, str] = field(default_factory=dict)
    """What global headers change of all members that follow."""
    records: dict[str, str] | None = None
    """Records of this member's own PAX header; None without one."""
    name: bytes | None = None
    """GNU tar's long name."""
    link: bytes | None = None
    """GNU tar's long target of a link."""
    problem: str | None = None
    """Why the member they belong to cannot be taken, though what follows it is not in doubt."""

    def add(self, kind: bytes, payload: bytes) -> None:
        """Take in the extension of one member.

        Args:
            kind: its type flag: `x` or `X`, `L` or `K`.
            payload: its bytes.

        Raises:
            TarDamageError: its records are not as PAX has them, or there were some before.
        """
        if kind == b"L":
            self._refuse_second(self.name, "GNU long names")
            self.name = payload.rstrip(b"\0") if self.name is None else self.name
        elif kind == b"K":
            self._refuse_second(self.link, "GNU long links")
            self.link = payload.rstrip(b"\0")
        else:
            if self.records is not None:
                # Either may hold the size, and so the place of all that follows.
                raise TarDamageError("a second PAX header stands before one member")
            self.records = parse_records(payload)

    def add_everywhere(self, payload: bytes, *, is_first: bool) -> None:
        """Take in a global header.

        Args:
            payload: its bytes.
            is_first: whether no member came before it. Only then may it change names or sizes:
                reading that goes on in the middle of a tar knows its beginning, nothing more.

        Raises:
            TarDamageError: its records are not as PAX has them, or change what follows too late.
        """
        records = parse_records(payload)
        changing = [key for key in records if key in _EFFECTIVE or key.startswith(_SPARSE)]
        if changing and not is_first:
            raise TarDamageError(
                f"a PAX global header between members sets {changing[0]!r} from here"
            )
        self.everywhere |= {key: records[key] for key in changing}

    def start_next(self) -> None:
        """Forget what belonged to the member just read."""
        self.records = self.name = self.link = self.problem = None

    @property
    def wait_for_a_member(self) -> bool:
        """Whether an extension was read whose member has not come yet."""
        return self.records is not None or self.name is not None or self.link is not None

    def applied_to(self, header: Header) -> tuple[bytes, int | None, str | None]:
        """Say what a header means after these extensions.

        Args:
            header: the header that follows them.

        Returns:
            Its member's name; its payload bytes, None where none are given; why it cannot be
            taken, or None.
        """
        name, size, problem = header.name, header.size, self.problem
        records = self.everywhere | (self.records or {})
        if records.get("path"):
            name = records["path"].encode()
        elif self.name is not None:
            name = self.name
        elif header.has_rest:
            problem = problem or "holds NUL in its name"
        if records.get("size"):
            size = int(records["size"])
        if any(key.startswith(_SPARSE) for key in records):
            name = records.get(_SPARSE + "name", "").encode() or name
            problem = problem or "is a sparse file: its holes are not stored"
        return name, size, problem

    def _refuse_second(self, held: object, what: str) -> None:
        """Note a second extension of one kind for the same member."""
        if held is not None:
            self.problem = f"has two {what}, and readers differ on which one holds"


def parse_records(payload: bytes) -> dict[str, str]:
    r"""Read the records of a PAX header strictly.

    Args:
        payload: its bytes, `LENGTH KEY=VALUE\n` again and again.

    Returns:
        Values by key; of a key that stands there twice the last, as POSIX has it.

    Raises:
        TarDamageError: a record is cut, its length is wrong, it is no UTF-8, a number is none, or a
            name or a size stands there twice.

    Examples:
        >>> parse_records(b"16 path=P1.json\n11 size=70\n")
        {'path': 'P1.json', 'size': '70'}
    """
    records: dict[str, str] = {}
    for key, value in _records(payload):
        pattern = _NUMBERS.get(key)
        if pattern is not None and value and not pattern.fullmatch(value):
            raise TarDamageError(
                f"PAX record {key!r} has the value {value[:80]!r}, which is no number"
            )
        if key in records and key in _EFFECTIVE:
            raise TarDamageError(f"PAX record {key!r} stands twice in one header")
        records[key] = value
    return records


def _records(payload: bytes) -> Iterator[tuple[str, str]]:
    """Walk the records of a PAX header."""
    start = 0
    while start < len(payload):
        match = _LENGTH.match(payload, start)
        stop = start + int(match[1]) if match else 0
        if match is None or not match.end() < stop <= len(payload) or payload[stop - 1] != 0x0A:
            raise TarDamageError(f"PAX record {payload[start : start + 40]!r} has a wrong length")
        key, equals, value = payload[match.end() : stop - 1].partition(b"=")
        if not key or not equals:
            raise TarDamageError(
                f"PAX record {payload[start : start + 40]!r} has no key or no value"
            )
        try:
            yield key.decode(), value.decode()
        except UnicodeDecodeError as error:
            raise TarDamageError(f"PAX record {key[:40]!r} is no UTF-8") from error
        start = stop
