"""Rank and number of ranks: from arguments, torch.distributed or the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from streaming_balance.errors import ConfigError
from streaming_balance.stream.ranks import find_ranks


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_nothing_known_means_one_rank() -> None:
    assert find_ranks(None, None) == (0, 1)


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert find_ranks(0, 5) == (0, 5)


def test_torch_distributed_wins_over_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    distributed: Any = torch.distributed
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert find_ranks(None, None) == (0, 1)
    finally:
        torch.distributed.destroy_process_group()
    assert find_ranks(None, None) == (2, 3)


@pytest.mark.parametrize(
    ("rank", "num_ranks"),
    [
        (0, None),
        (None, 2),
        (2, 2),
        (-1, 2),
        (0, 0),
        (0, -3),
        (0.5, 2),
        (0, 2.0),
        (True, 2),
        ("0", 1),
    ],
)
def test_half_or_wrong_ranks_are_refused(rank: Any, num_ranks: Any) -> None:
    with pytest.raises(ConfigError, match=r"rank is .* and num_ranks is "):
        find_ranks(rank, num_ranks)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match="give both, or neither"):
        find_ranks(None, None)


def test_a_variable_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK='first'"):
        find_ranks(None, None)
