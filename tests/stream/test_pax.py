"""PAX records are read exactly: one wrong length would shift every byte after it."""

from __future__ import annotations

import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.stream.headers import TarDamageError
from streaming_balance.stream.pax import parse_records
from tests.stream.tars import pax_records

KEYS = st.text(st.characters(blacklist_characters="=\0\n", blacklist_categories=["Cs"]), min_size=1)
VALUES = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]))


@given(st.dictionaries(KEYS.filter(lambda key: not key.isdigit()), VALUES, max_size=5))
def test_what_python_writes_is_read_back(records: dict[str, str]) -> None:
    numbers = ("size", "uid", "gid", "mtime", "atime", "ctime")
    records = {key: value for key, value in records.items() if key not in numbers}
    block = tarfile.TarInfo._create_pax_generic_header(records, b"x", "utf-8")  # type: ignore[attr-defined]
    size = int(block[124:135], 8)
    assert parse_records(block[512 : 512 + size]) == records


@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3), st.data())
def test_records_cut_anywhere_but_between_two_are_refused(
    records: dict[str, str], data: st.DataObject
) -> None:
    records = {"comment." + key: value for key, value in records.items()}
    payload = pax_records(records)
    lengths = [len(pax_records({key: value})) for key, value in records.items()]
    boundaries = {sum(lengths[:count]) for count in range(len(lengths) + 1)}
    cut = data.draw(st.integers(0, len(payload)))
    if cut in boundaries:
        assert len(parse_records(payload[:cut])) < len(records) or cut == len(payload)
    else:
        with pytest.raises(TarDamageError):
            parse_records(payload[:cut])


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        (b"16 path=P1.json\n" + b"\0" * 5, "wrong length"),
        (b"17 path=P1.json\n", "wrong length"),
        (b"15 path=P1.json\n", "wrong length"),
        (b"016 path=P1.jso\n", "wrong length"),
        (b"-16 path=P1.json\n", "wrong length"),
        (b"99999999999999 path=P1.json\n", "wrong length"),
        (b"3 \n", "no key or no value"),
        (b"2 \n", "wrong length"),
        (b"4 a\n", "no key or no value"),
        (b"5 =a\n", "no key or no value"),
        (b"11 path=\xff\xfe\n", "no UTF-8"),
        (b"14 size=-1234\n", "is no number"),
        (b"13 size=1e10\n", "is no number"),
        (b"14 mtime=never\n", "wrong length"),
        (b"15 mtime=never\n", "is no number"),
        (pax_records({"size": "9" * 21}), "is no number"),
        (pax_records({"size": "٣"}), "is no number"),
        (b"10 size=1\n10 size=2\n", "stands twice"),
        (b"10 path=a\n10 path=a\n", "stands twice"),
    ],
)
def test_records_that_are_none_are_refused(payload: bytes, problem: str) -> None:
    with pytest.raises(TarDamageError, match=problem):
        parse_records(payload)


def test_times_may_be_negative_and_have_parts_of_a_second() -> None:
    records = {"mtime": "-1.25", "atime": "1700000000.123456789", "ctime": "0", "uid": ""}
    assert parse_records(pax_records(records)) == records


def test_other_records_may_come_twice_and_the_last_one_holds() -> None:
    assert parse_records(b"13 comment=a\n13 comment=b\n") == {"comment": "b"}
