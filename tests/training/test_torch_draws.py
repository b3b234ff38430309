"""What torch draws inside a transform: every function that draws, and nothing that does not."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from streaming_balance.training.torch_draws import KeyedDraws, current_draws, one_thread_each

SHAPE = torch.zeros(3, 4)
DRAWS: dict[str, Callable[[], torch.Tensor]] = {
    "rand": lambda: torch.rand(3, 4),
    "randn": lambda: torch.randn((3, 4), dtype=torch.float64),
    "randint": lambda: torch.randint(1 << 40, (9,)),
    "randperm": lambda: torch.randperm(50),
    "normal": lambda: torch.normal(0.0, 1.0, (9,)),
    "multinomial": lambda: torch.multinomial(torch.ones(50), 20),
    "Tensor.multinomial": lambda: torch.ones(50).multinomial(20),
    "bernoulli": lambda: torch.bernoulli(torch.full((64,), 0.5)),
    "poisson": lambda: torch.poisson(torch.full((64,), 9.0)),
    "uniform_": lambda: torch.FloatTensor(9).uniform_(2, 3),
    "normal_": lambda: torch.empty(9).normal_(),
    "random_": lambda: torch.empty(9, dtype=torch.int64).random_(),
    "bernoulli_": lambda: torch.empty(64).bernoulli_(0.5),
    "exponential_": lambda: torch.empty(9).exponential_(),
    "rand_like": lambda: torch.rand_like(SHAPE),
    "randn_like": lambda: torch.randn_like(SHAPE, dtype=torch.float64),
    "randint_like": lambda: torch.randint_like(SHAPE, 1 << 20),
    "randint_like between": lambda: torch.randint_like(SHAPE, low=-(1 << 20), high=1 << 20),
    "Beta": lambda: torch.distributions.Beta(0.4, 0.4).sample((9,)),
    "Normal": lambda: torch.distributions.Normal(0.0, 1.0).sample((9,)),  # type: ignore[no-untyped-call]
    "Gamma": lambda: torch.distributions.Gamma(2.0, 1.0).sample((9,)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_function_draws_from_the_key_and_moves_no_global_state(name: str) -> None:
    before = torch.get_rng_state()
    drawn = []
    for key in (7, 7, 8):
        with KeyedDraws(lambda key=key: key):  # type: ignore[misc]
            drawn.append(torch.stack([DRAWS[name](), DRAWS[name]()]))
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = drawn
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_has_the_shape_the_type_and_the_limits_torch_gives(name: str) -> None:
    outside = DRAWS[name]()
    with KeyedDraws(lambda: 3):
        inside = DRAWS[name]()
    assert (inside.shape, inside.dtype) == (outside.shape, outside.dtype)
    if name.startswith("randint_like"):
        limit = -(1 << 20) if "between" in name else 0
        assert inside.min() >= limit
        assert inside.max() < 1 << 20
    if name == "rand_like":
        assert inside.min() >= 0
        assert inside.max() < 1


def test_a_generator_that_is_given_is_the_one_that_is_used() -> None:
    expected = torch.rand(5, generator=torch.Generator().manual_seed(4))
    with KeyedDraws(lambda: 1):
        assert torch.equal(torch.rand(5, generator=torch.Generator().manual_seed(4)), expected)


def test_a_seed_holds_for_its_block_and_then_the_key_goes_on() -> None:
    with KeyedDraws(lambda: 1):
        straight = [torch.rand(2), torch.rand(2)]
    with KeyedDraws(lambda: 1) as draws:
        first = torch.rand(2)
        with draws.reseeded(42):
            seeded = torch.rand(2)
        assert torch.equal(first, straight[0])
        assert torch.equal(torch.rand(2), straight[1])
    assert torch.equal(seeded, torch.rand(2, generator=torch.Generator().manual_seed(42)))


def test_the_key_is_not_computed_where_nothing_is_drawn() -> None:
    def key() -> int:
        raise AssertionError

    with KeyedDraws(key):
        assert torch.ones(3).sum() == 3


def test_other_threads_draw_from_the_global_generator() -> None:
    found: list[object] = []

    def work() -> None:
        found.append(current_draws())
        found.append(torch.rand(3).tolist())

    torch.manual_seed(5)
    expected = torch.rand(3).tolist()
    torch.manual_seed(5)
    with KeyedDraws(lambda: 1) as draws:
        assert current_draws() is draws
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [None, expected]
    assert current_draws() is None


def test_an_error_inside_leaves_no_key_behind() -> None:
    with pytest.raises(KeyError), KeyedDraws(lambda: 1):
        raise KeyError
    assert current_draws() is None
    torch.manual_seed(6)
    first = torch.rand(1)
    torch.manual_seed(6)
    assert torch.equal(torch.rand(1), first)


def test_threads_that_settle_on_one_thread_at_once_leave_others_their_number() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in range(20):
            settle, together = one_thread_each(), threading.Barrier(8)
            inside: list[int] = []

            def work(
                settle: Callable[[], None] = settle,
                together: threading.Barrier = together,
                inside: list[int] = inside,
            ) -> None:
                together.wait()
                settle()
                inside.append(torch.get_num_threads())

            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            found: list[int] = []
            later = threading.Thread(
                target=lambda found=found: found.append(torch.get_num_threads())
            )
            later.start()
            later.join()
            assert inside == [1] * 8
            assert (found, torch.get_num_threads()) == ([3], 3)
    finally:
        torch.set_num_threads(before)
