"""The order of copies: no two of a sample in a row wherever that can be had."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.stream.copies import CopyQueue, Pending
from streaming_balance.stream.draws import KeyedWords
from tests.stream.labelled import Sample

COPIES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def queue_of(copies: list[int], key: int) -> CopyQueue[Sample]:
    queue: CopyQueue[Sample] = CopyQueue(KeyedWords(key))
    for number, count in enumerate(copies):
        queue.append(Pending(Sample(f"s{number}", "a"), count))
    return queue


@given(copies=COPIES, key=st.integers(0, 2**128 - 1))
def test_the_rest_has_every_copy_and_no_two_of_a_sample_in_a_row_unless_one_outweighs_all_others(
    copies: list[int], key: int
) -> None:
    keys = [pending.item.key for pending in queue_of(copies, key).rest()]
    assert sorted(keys) == sorted(f"s{n}" for n, count in enumerate(copies) for _ in range(count))
    meetings = sum(first == second for first, second in pairwise(keys))
    # The others, one more than they are, are the runs that the heaviest can be cut into.
    assert meetings == max(0, max(copies) - (sum(copies) - max(copies) + 1))


@given(copies=COPIES, key=st.integers(0, 2**128 - 1), first=st.integers(0, 11))
def test_who_went_on_last_before_the_rest_does_not_begin_it(
    copies: list[int], key: int, first: int
) -> None:
    queue = queue_of(copies, key)
    queue.last_key = f"s{first % len(copies)}"
    keys = [pending.item.key for pending in queue.rest()]
    assert keys[0] != queue_of(copies, key).last_key
    if len(copies) > 1:
        assert keys[0] != f"s{first % len(copies)}"


@given(copies=COPIES, key=st.integers(0, 2**128 - 1))
def test_while_two_samples_are_held_nobody_goes_on_twice_in_a_row(
    copies: list[int], key: int
) -> None:
    queue = queue_of(copies, key)
    last, left = None, sum(copies)
    while left:
        held = len(list(queue))
        chosen = queue.next().item.key
        assert chosen != last or held == 1
        last, left = chosen, left - 1
    assert list(queue) == []


@given(copies=st.lists(st.integers(5, 9), min_size=2, max_size=12), key=st.integers(0, 2**64))
def test_nobody_goes_on_again_before_half_of_the_others_did(copies: list[int], key: int) -> None:
    queue = queue_of(copies, key)
    last: dict[str, int] = {}
    for place in range(4 * len(copies)):
        chosen = queue.next().item.key
        assert place - last.get(chosen, -len(copies)) >= len(copies) // 2
        last[chosen] = place
        if len(list(queue)) < len(copies):
            break


@given(key=st.integers(0, 2**64), late=st.integers(1, 9))
def test_samples_that_come_late_do_not_let_the_last_one_go_on_again(key: int, late: int) -> None:
    # One large sample leaves room for several small ones, which come in behind the last to go on.
    queue = queue_of([3], key)
    queue.next()
    for number in range(late):
        queue.append(Pending(Sample(f"late{number}", "a"), 1))
    assert queue.next().item.key != "s0"
