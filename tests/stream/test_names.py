"""Keys are what webdataset makes of names; names that lead elsewhere are no names."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from streaming_balance.errors import ConfigError
from streaming_balance.stream.names import (
    is_metadata,
    key_rule,
    missing_fields,
    readable_name,
    split_at_first_dot,
    split_at_last_dot,
)


@given(st.from_regex(r"[aB1._/ é]{1,20}", fullmatch=True))
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    if name.rpartition("/")[2].startswith("."):
        # Files hidden in a folder: webdataset makes one sample of all of them, named like the
        # folder. `._P1.cls` is what macOS leaves behind, not a patient.
        assert split_at_first_dot(name) is None
        return
    key, field = base_plus_ext(name)
    assert split_at_first_dot(name) == (None if key is None else (key, field.lower()))


@given(st.from_regex(r"_{0,3}[a/_.]{0,6}_{0,3}", fullmatch=True))
def test_metadata_is_what_webdataset_passes_over(name: str) -> None:
    assert is_metadata(name) == bool(re.match(r"__[^/]*__($|/)", name))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("1.2.840.113619.2.dcm", ("1.2.840.113619.2", "dcm")),
        ("study/1.2.3.DCM", ("study/1.2.3", "dcm")),
        ("v1.2/README", None),
        ("study/.DS_Store.x", None),
        ("README", None),
    ],
)
def test_keys_with_dots_end_at_the_last_one(name: str, split: tuple[str, str] | None) -> None:
    assert split_at_last_dot(name) == split


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ConfigError, match=r"keys is 'lastdot'.*Did you mean 'last_dot'"):
        key_rule("lastdot")  # type: ignore[arg-type]


def test_a_wanted_field_is_met_with_or_without_the_ending_of_its_codec() -> None:
    assert missing_fields({"image", "cls", "seg"}, ["image.npb", "cls", "segment"]) == ["seg"]
    assert missing_fields({"image.npb"}, ["image.npb"]) == []
    assert missing_fields({"image.npb"}, ["image"]) == ["image.npb"]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "no name"),
        (b"/abs/P1.cls", "absolute"),
        (b"../P1.cls", "leads out"),
        (b"a/../../P1.cls", "leads out"),
        (b"a/..", "leads out"),
        (b"P1\0.cls", "NUL"),
        (b"P1\n.cls", "control character"),
        (b"P1\x7f.cls", "control character"),
        (b"P\xe4.cls", "no UTF-8"),
        (b"P" * 4097, "4,097 bytes"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(raw: bytes, problem: str) -> None:
    shown, found = readable_name(raw)
    assert found is not None
    assert problem in found
    assert shown.isprintable()


@pytest.mark.parametrize("raw", ["a..b/P1..cls", "./P1.cls", "a//b.cls", "ä/日本.cls", "P" * 4096])
def test_names_that_are_only_unusual_are_taken(raw: str) -> None:
    assert readable_name(raw.encode()) == (raw, None)
