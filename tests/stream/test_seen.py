"""Keys are remembered exactly, in bounded memory."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError
from streaming_balance.stream.seen import SeenKeys


@given(st.lists(st.text(max_size=3), max_size=200))
def test_every_key_is_found_where_it_was_first_met(keys: list[str]) -> None:
    seen = SeenKeys()
    first: dict[str, tuple[int, int]] = {}
    for number, key in enumerate(keys):
        place = (number % 7, 512 * number)
        assert seen.remember(key, *place) == first.get(key)
        first.setdefault(key, place)
    assert len(seen) == len(first)


def test_places_up_to_a_million_shards_and_petabytes_are_kept() -> None:
    seen = SeenKeys()
    seen.remember("P1", 999_999, (8 << 50) - 512)
    assert seen.remember("P1", 0, 0) == (999_999, (8 << 50) - 512)


def test_a_table_grows_to_its_bound_and_counts_what_it_forgets() -> None:
    seen = SeenKeys(max_bytes=1 << 20)
    for number in range(100_000):
        assert seen.remember(str(number), number % 3, 512 * number) is None
    assert len(seen) == (1 << 20) // 16 * 3 // 4
    assert len(seen) + seen.num_forgotten == 100_000
    assert seen.remember("17", 0, 0) == (2, 512 * 17)
    size = sum(sys.getsizeof(table) for table in (seen._marks, seen._places))
    assert size <= (1 << 20) + 1024


def test_a_table_too_small_to_begin_with_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_key_bytes is 100"):
        SeenKeys(max_bytes=100)
