"""Where iteration stands: after break, errors, generators, jumps, and who may iterate."""

from __future__ import annotations

import gc
import itertools
import random
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pytest

from streaming_balance.errors import BalanceError, ConfigError
from streaming_balance.report.audit import audit_run
from streaming_balance.storage.shards import ShardSet
from streaming_balance.training.loader import BalancedLoader, train_loader
from streaming_balance.training.state import LoaderState
from tests.training.cohorts import run_python

STEPS = 4  # 14 patients in batches of 4


@pytest.fixture
def loader(small: ShardSet) -> Iterator[BalancedLoader]:
    """Four steps per epoch."""
    with train_loader(
        small, global_batch_size=4, balance="class_balanced", seed=2, num_threads=1
    ) as made:
        assert len(made) == STEPS
        yield made


def place(batch: dict[str, Any]) -> tuple[int, int]:
    """Say where in the run a batch stands."""
    return batch["epoch"], batch["step"]


def places(loader: BalancedLoader) -> list[tuple[int, int]]:
    """Iterate once, to the end."""
    return [place(batch) for batch in loader]


def stands(loader: BalancedLoader) -> tuple[int, int]:
    """Say which batch comes next, by the state."""
    position = loader.state_dict()["position"]
    assert position["epoch"] == loader.epoch
    return position["epoch"], position["step"]


def epoch(number: int, first: int = 0) -> list[tuple[int, int]]:
    """List the places of an epoch from a step on."""
    return [(number, step) for step in range(first, STEPS)]


def test_each_for_loop_is_one_epoch(loader: BalancedLoader) -> None:
    assert [places(loader) for _ in range(3)] == [epoch(0), epoch(1), epoch(2)]
    assert stands(loader) == (3, 0)


@pytest.mark.parametrize("stop", range(STEPS))
def test_after_break_the_rest_of_the_epoch_comes_and_then_the_next(
    loader: BalancedLoader, stop: int
) -> None:
    for batch in loader:
        if batch["step"] == stop:
            break
    rest = epoch(0, stop + 1)
    assert stands(loader) == (rest[0] if rest else (1, 0))
    # A break on the last batch leaves nothing: the next loop is the next epoch.
    assert places(loader) == (rest or epoch(1))


def test_breaking_again_and_again_loses_and_repeats_nothing(loader: BalancedLoader) -> None:
    got: list[tuple[int, int]] = []
    while len(got) < 3 * STEPS:
        for batch in loader:
            got.append(place(batch))
            break
    assert got == epoch(0) + epoch(1) + epoch(2)


def test_an_exception_in_the_loop_counts_the_batch_it_was_about(loader: BalancedLoader) -> None:
    def train() -> None:
        for batch in loader:
            if batch["step"] == 1:
                raise ValueError("loss is nan")

    with pytest.raises(ValueError, match="nan") as kept:
        train()
    # The traceback, with its frames, is still held, as notebooks and pytest do.
    assert kept.traceback
    assert stands(loader) == (0, 2)
    assert places(loader) == epoch(0, 2)


def test_keyboard_interrupt_in_the_loop_leaves_the_loader_usable(loader: BalancedLoader) -> None:
    def train() -> None:
        for _ in loader:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert places(loader) == epoch(0, 1)


def test_an_error_of_the_loader_that_a_notebook_keeps_does_not_lock_it(small: ShardSet) -> None:
    failing = True

    def flaky(batch: dict[str, Any]) -> dict[str, Any]:
        if failing:
            raise KeyboardInterrupt
        return batch

    with train_loader(small, global_batch_size=4, batch_transform=flaky) as loader:
        iterator = iter(loader)
        with pytest.raises(KeyboardInterrupt) as kept:
            next(iterator)
        failing = False
        assert place(next(iterator)) == (0, 0)
        failing = True
        with pytest.raises(KeyboardInterrupt):
            next(iterator)
        failing = False
        # Both the traceback and the iterator are still held.
        fresh = iter(loader)
        assert place(next(fresh)) == (0, 1)
        with pytest.raises(BalanceError, match="iterator in use"):
            next(iterator)
        assert kept.traceback
        assert [place(batch) for batch in fresh] == epoch(0, 2)
        # The old iterator was one of epoch 0, which is over.
        assert list(iterator) == []
        assert stands(loader) == (1, 0)


def test_islice_takes_exactly_what_it_was_asked_for(loader: BalancedLoader) -> None:
    assert [place(b) for b in itertools.islice(loader, 3)] == epoch(0)[:3]
    assert stands(loader) == (0, 3)
    assert [place(b) for b in itertools.islice(loader, STEPS)] == epoch(0, 3)
    assert [place(b) for b in itertools.islice(loader, STEPS)] == epoch(1)
    assert places(loader) == epoch(2)


def test_zip_with_the_counter_first_loses_no_batch(loader: BalancedLoader) -> None:
    assert [place(b) for _, b in zip(range(2), loader, strict=False)] == epoch(0)[:2]
    assert places(loader) == epoch(0, 2)


def test_zip_with_the_loader_first_counts_the_batch_that_zip_drops(loader: BalancedLoader) -> None:
    # Python's zip has taken a third batch when it finds the counter empty; the state says so.
    assert [place(b) for b, _ in zip(loader, range(2), strict=False)] == epoch(0)[:2]
    assert stands(loader) == (0, 3)


def test_a_generator_holds_the_loader_until_it_is_closed(loader: BalancedLoader) -> None:
    def halves() -> Generator[tuple[int, int], None, None]:
        for batch in loader:
            yield place(batch)

    generator = halves()
    assert next(generator) == (0, 0)
    with pytest.raises(BalanceError, match="iterator in use"):
        iter(loader)
    generator.close()
    assert places(loader) == epoch(0, 1)


def test_a_second_live_iterator_is_refused_and_the_first_goes_on(loader: BalancedLoader) -> None:
    first = iter(loader)
    next(first)
    with pytest.raises(BalanceError, match="two would take batches from each other"):
        iter(loader)
    assert [place(b) for b in first] == epoch(0, 1)
    assert places(loader) == epoch(1)


def test_an_iterator_never_asked_for_a_batch_counts_as_live(loader: BalancedLoader) -> None:
    first = iter(loader)
    with pytest.raises(BalanceError, match="iterator in use"):
        list(loader)
    del first
    assert places(loader) == epoch(0)


def test_an_iterator_that_gave_the_last_batch_is_in_nobody_s_way(loader: BalancedLoader) -> None:
    first = iter(loader)
    assert [place(next(first)) for _ in range(STEPS)] == epoch(0)
    second = iter(loader)
    assert place(next(second)) == (1, 0)
    with pytest.raises(StopIteration):
        next(first)
    del second
    loader.set_epoch(0)
    # Back in the epoch of the old iterator, which stays at its end all the same.
    assert list(first) == []
    assert places(loader) == epoch(0)


def test_deleting_the_iterator_frees_the_loader_without_the_garbage_collector(
    loader: BalancedLoader,
) -> None:
    gc.disable()
    try:
        iterator = iter(loader)
        next(iterator)
        del iterator
        assert places(loader) == epoch(0, 1)
    finally:
        gc.enable()


def test_an_iterator_keeps_its_loader_alive(small: ShardSet) -> None:
    iterator = iter(train_loader(small, global_batch_size=4))
    gc.collect()
    assert [place(batch) for batch in iterator] == epoch(0)


@pytest.mark.parametrize("stop", [0, 1, STEPS])
def test_setting_the_current_epoch_keeps_the_position(loader: BalancedLoader, stop: int) -> None:
    list(itertools.islice(loader, stop))
    here = stands(loader)
    loader.set_epoch(loader.epoch)
    loader.set_epoch(loader.epoch)
    assert stands(loader) == here
    assert loader.state_dict()["skipped"] == []


def test_an_epoch_beyond_what_the_shares_allow_is_refused_at_once(small: ShardSet) -> None:
    shares = {"HGG": 1, "LGG": 2**-33}
    balance = {"name": "target", "shares": shares}
    with train_loader(small, global_batch_size=4, balance=balance) as loader:
        with pytest.raises(ConfigError, match="is too far"):
            loader.set_epoch(2**20 + 70)
        assert loader.epoch == 0


def test_the_usual_loop_with_set_epoch_skips_nothing(loader: BalancedLoader) -> None:
    got = []
    for number in range(3):
        loader.set_epoch(number)
        got += places(loader)
    assert got == epoch(0) + epoch(1) + epoch(2)
    assert loader.state_dict()["skipped"] == []


def test_setting_the_current_epoch_right_after_loading_keeps_the_position(
    loader: BalancedLoader, small: ShardSet
) -> None:
    loader.set_epoch(1)
    list(itertools.islice(loader, 2))
    state = loader.state_dict()
    with train_loader(small, global_batch_size=4, balance="class_balanced", seed=2) as resumed:
        resumed.load_state_dict(state)
        for number in range(resumed.epoch, 3):
            resumed.set_epoch(number)
            assert places(resumed) == epoch(number, 2 if number == 1 else 0)
        assert resumed.state_dict()["skipped"] == state["skipped"]


def test_setting_another_epoch_jumps_to_its_first_step_and_says_what_was_skipped(
    loader: BalancedLoader,
) -> None:
    list(itertools.islice(loader, 2))
    loader.set_epoch(5)
    assert stands(loader) == (5, 0)
    assert loader.state_dict()["skipped"] == [{"from": [0, 2], "to": [5, 0]}]
    assert places(loader) == epoch(5)
    loader.set_epoch(1)
    assert places(loader) == epoch(1)
    assert loader.state_dict()["skipped"][1] == {"from": [6, 0], "to": [1, 0]}


@pytest.mark.parametrize("number", [-1, 1.0, None, "1"])
def test_an_epoch_that_is_none_is_refused_and_moves_nothing(
    loader: BalancedLoader, number: Any
) -> None:
    list(itertools.islice(loader, 2))
    before = loader.state_dict()
    with pytest.raises((IndexError, TypeError)):
        loader.set_epoch(number)
    assert loader.state_dict() == before


def test_the_position_cannot_change_under_an_iterator_in_use(loader: BalancedLoader) -> None:
    for batch in loader:
        # After the last batch of the loop nothing is left that could be pulled away.
        if batch["step"] < STEPS - 1:
            loader.set_epoch(0)
            with pytest.raises(BalanceError, match="cannot change under it"):
                loader.set_epoch(3)
    assert stands(loader) == (1, 0)
    assert loader.state_dict()["skipped"] == []


@pytest.mark.parametrize("seed", range(6))
def test_an_audit_counts_what_was_delivered_through_breaks_jumps_and_resumes(
    small: ShardSet, seed: int
) -> None:
    choose = random.Random(seed)
    delivered: Counter[str] = Counter()

    def fresh() -> BalancedLoader:
        return train_loader(
            small, global_batch_size=4, balance="class_balanced", seed=2, num_threads=1
        )

    loader = fresh()
    for _ in range(15):
        action = choose.choice(["deliver", "deliver", "jump", "resume"])
        if action == "deliver":
            for batch in itertools.islice(loader, choose.randint(1, STEPS)):
                delivered.update(batch["patient"])
        elif action == "jump":
            loader.set_epoch(choose.randint(0, 6))
        else:
            state = loader.state_dict()
            loader.close()
            loader = fresh()
            loader.load_state_dict(state)
        audit = audit_run(small, LoaderState.from_dict(loader.state_dict()))
        assert {p: n for p, n in audit.exposure.items() if n} == dict(delivered)
    patients = small.patients("train").tolist()
    assert dict(zip(patients, loader.exposure().tolist(), strict=True)) == dict(audit.exposure)
    loader.close()


def test_closing_twice_is_fine_and_a_closed_loader_says_so(loader: BalancedLoader) -> None:
    iterator = iter(loader)
    next(iterator)
    loader.close()
    loader.close()
    with pytest.raises(BalanceError, match="closed"):
        next(iterator)
    with pytest.raises(BalanceError, match="closed"):
        iter(loader)
    assert stands(loader) == (0, 1)
    assert loader.stats()["samples"] == 4


def test_an_interrupt_at_any_moment_loses_no_batch_that_was_not_received() -> None:
    # One signal per batch, later and later, so that it meets the loader wherever it may be.
    script = """
import signal, sys, tempfile
from pathlib import Path
from streaming_balance.training.loader import train_loader
from tests.training.cohorts import cohort, packed
with tempfile.TemporaryDirectory() as folder:
    shards = packed(Path(folder) / "cohort", cohort())
    loader = train_loader(shards, global_batch_size=4, num_threads=2)
    for batch in loader: pass
    armed, got, interrupts, tries = False, [(0, n) for n in range(4)], 0, 0
    def interrupt(*_):
        if armed:
            raise KeyboardInterrupt
    signal.signal(signal.SIGALRM, interrupt)
    while len(got) < 300:
        tries += 1
        iterator = iter(loader)
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, 1e-6 + tries % 50 * 1e-4)
            batch = next(iterator)
            armed = False
        except (KeyboardInterrupt, RuntimeError) as error:
            armed = False
            # Python's own Event.wait, met between two of its lines, turns one into the other.
            if isinstance(error, RuntimeError):
                assert isinstance(error.__context__, KeyboardInterrupt), error
            interrupts += 1
            # It may have come after `next` had returned: then the batch was received.
            position = loader.state_dict()["position"]
            assert (position["epoch"] * 4 + position["step"]) - len(got) in (0, 1)
            if position["epoch"] * 4 + position["step"] > len(got):
                got.append(None)
        else:
            got.append((batch["epoch"], batch["step"]))
        signal.setitimer(signal.ITIMER_REAL, 0)
        del iterator
    assert all(g in (None, divmod(n, 4)) for n, g in enumerate(got)), got
    print(interrupts, sum(g is None for g in got))
"""
    ended = run_python(script)
    assert ended.returncode == 0, ended.stderr[-2000:]
    interrupts, ambiguous = map(int, ended.stdout.split())
    assert interrupts > 5
    assert ambiguous < interrupts


def test_numpy_epochs_are_as_good_as_plain_ones(loader: BalancedLoader) -> None:
    loader.set_epoch(np.int64(3))  # type: ignore[arg-type]
    assert type(loader.epoch) is int
    assert places(loader) == epoch(3)
