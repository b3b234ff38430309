"""Names on disk follow one rule, whatever a patient is called."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError
from streaming_balance.storage.layout import member_name, sample_key, shard_name


@given(patient=st.text(st.characters(codec="utf-8"), min_size=1))
def test_a_key_is_plain_ascii_without_dots_and_says_the_patient(patient: str) -> None:
    key = sample_key(patient)
    assert re.fullmatch(r"[A-Za-z0-9_%-]+", key)
    assert unquote(key) == patient


def test_a_key_escapes_dots_slashes_blanks_percent_and_umlauts() -> None:
    assert sample_key("a.b/c d%é", "t.1") == "a%2Eb%2Fc%20d%25%C3%A9__t%2E1"


def test_file_names_that_are_no_utf8_still_make_a_key() -> None:
    assert sample_key(b"P\xff".decode("utf-8", "surrogateescape")) == "P%FF"


@pytest.mark.parametrize(("patient", "sample"), [("", None), ("P1", ""), ("", "t0")])
def test_a_key_of_nothing_is_refused(patient: str, sample: str | None) -> None:
    with pytest.raises(ConfigError, match="a key needs text"):
        sample_key(patient, sample)


@pytest.mark.parametrize("split", ["", "a.b", "../x", "a b", "x" * 65, "é"])
def test_a_split_that_cannot_name_a_file_is_refused(split: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a shard"):
        shard_name(split, 0)


@pytest.mark.parametrize("number", [-1, 1_000_000])
def test_a_shard_number_of_seven_digits_is_refused(number: int) -> None:
    with pytest.raises(ConfigError, match="raise shard_bytes"):
        shard_name("train", number)


def test_an_unknown_codec_has_no_extension() -> None:
    with pytest.raises(ConfigError, match="codec 'zst' is unknown; known: blosc, npy"):
        member_name("P1", "image", "zst")
