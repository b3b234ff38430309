"""A ring: the newest replaces the oldest, whoever is held takes turns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.stream.ring import Ring
from streaming_balance.stream.stages import ITEM_BYTES
from tests.stream.labelled import Sample


@given(
    actions=st.lists(
        st.one_of(st.tuples(st.integers(0, 14), st.integers(0, 900)), st.none()), max_size=80
    ),
    room=st.integers(1, 5),
)
def test_a_ring_does_what_a_plain_list_would_do(
    actions: list[tuple[int, int] | None], room: int
) -> None:
    budget = room * ITEM_BYTES + 900
    ring: Ring[Sample] = Ring(budget=budget)
    # The model: [sample, whether it went on], in the order of age, and keys in the order of turns.
    ages: list[list[object]] = []
    fresh: list[str] = []
    used: list[str] = []
    for action in actions:
        if action is not None:
            number, size = action
            sample = Sample(f"s{number}", "a", size)
            lost = sum(not gone for held, gone in ages if held.key == sample.key)  # type: ignore[attr-defined]
            ages = [entry for entry in ages if entry[0].key != sample.key]  # type: ignore[attr-defined]
            ages.append([sample, False])
            if sample.key not in fresh + used:
                fresh.append(sample.key)
            while sum(held.num_bytes + ITEM_BYTES for held, _ in ages) > budget:  # type: ignore[attr-defined]
                oldest, gone = ages.pop(0)
                lost += not gone
                (fresh if oldest.key in fresh else used).remove(oldest.key)  # type: ignore[attr-defined]
            assert ring.put(sample) == lost
        elif ages:
            key = (fresh or used).pop(0)
            used.append(key)
            entry = next(entry for entry in ages if entry[0].key == key)  # type: ignore[attr-defined]
            assert ring.take() == (entry[0], not entry[1])
            entry[1] = True
        assert [held.key for held in ring] == [held.key for held, _ in ages]  # type: ignore[attr-defined]
        assert len(ring) == len(ages)
        assert ring.num_waiting == sum(not gone for _, gone in ages)
        assert ring.size == sum(held.num_bytes + ITEM_BYTES for held, _ in ages)  # type: ignore[attr-defined]
