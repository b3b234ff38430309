"""Partners, lambdas and boxes: keyed, the same on any ranks, and true to the voxel."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from streaming_balance.errors import ConfigError
from streaming_balance.plan.keys import stream_key, words
from streaming_balance.training.pairing import (
    Mixing,
    box_centres,
    cut_boxes,
    draw_pairs,
    mixed_steps,
    parse_mixing,
)

SIGNIFICANCE = 1e-6
CUTMIX = Mixing(name="cutmix")


@pytest.mark.parametrize(
    ("space", "drawn", "centre", "low", "high", "kept"),
    [
        ((128, 128, 128), 0.5, (64, 64, 64), [14] * 3, [115] * 3, 0.5087141990661621),
        ((128, 128, 128), 0.5, (0, 64, 127), [0, 14, 77], [51, 115, 128], 0.8747344017028809),
        ((128, 128, 128), 0.9, (10, 120, 64), [0, 91, 35], [40, 128, 94], 0.9583625793457031),
        ((8, 8, 8), 0.875, (4, 4, 4), [2, 2, 2], [6, 6, 6], 0.875),
        # By hand: sides 4 of 8 and 5 of 10, volume 20 of 80.
        ((8, 10), 0.75, (4, 5), [2, 3], [6, 8], 0.75),
        # The corner keeps what lies inside: [-2, 2) and [7, 12) become [0, 2) and [7, 10).
        ((8, 10), 0.75, (0, 9), [0, 7], [2, 10], 1 - 6 / 80),
        ((8, 10), 0.0, (4, 5), [0, 0], [8, 10], 0.0),
        ((8, 10), 1.0, (4, 5), [4, 5], [4, 5], 1.0),
    ],
)
def test_boxes_are_those_worked_out_by_hand(
    space: tuple[int, ...],
    drawn: float,
    centre: tuple[int, ...],
    low: list[int],
    high: list[int],
    kept: float,
) -> None:
    boxes = cut_boxes(np.array([drawn]), np.array([centre]), space)
    assert boxes.low.tolist() == [low]
    assert boxes.high.tolist() == [high]
    assert boxes.kept.tolist() == pytest.approx([kept], rel=1e-12)


@given(
    sides=st.lists(st.integers(1, 24), min_size=2, max_size=3),
    drawn=st.floats(0, 1),
    where=st.lists(st.floats(0, 1, exclude_max=True), min_size=3, max_size=3),
)
def test_a_box_lies_inside_and_its_lambda_is_the_part_of_the_voxels_not_painted(
    sides: list[int], drawn: float, where: list[float]
) -> None:
    centre = [int(part * side) for part, side in zip(where, sides, strict=False)]
    boxes = cut_boxes(np.array([drawn]), np.array([centre]), tuple(sides))
    painted = np.zeros(sides, dtype=bool)
    for voxel in np.ndindex(*sides):
        inside = zip(voxel, boxes.low[0], boxes.high[0], strict=True)
        painted[voxel] = all(low <= place < high for place, low, high in inside)
    assert boxes.kept[0] == 1 - painted.sum() / painted.size
    longest = [int(side * (1 - drawn) ** (1 / len(sides)) + 1e-9) for side in sides]
    assert ((boxes.high - boxes.low)[0] <= longest).all()
    assert (boxes.low >= 0).all()
    assert (boxes.high <= sides).all()


def test_a_whole_side_of_a_volume_loses_no_voxel_to_rounding() -> None:
    for side in range(1, 200):
        # 1 - lambda is (n / side)**3, so the side of the box is n, if the root is true.
        lengths = np.arange(side + 1)
        drawn = 1 - (lengths / side) ** 3
        centres = np.full((side + 1, 3), side // 2)
        boxes = cut_boxes(drawn, centres, (side, side, side))
        assert ((boxes.high - boxes.low)[:-1] == lengths[:-1, None]).all()


def test_every_voxel_is_as_likely_a_centre_as_any_other() -> None:
    raw = words(stream_key(1, "centres"), 3 * 12_000).reshape(-1, 3)
    centres = box_centres(raw, (3, 4, 5))
    counts = Counter(map(tuple, centres.tolist()))
    assert len(counts) == 60
    assert stats.chisquare(list(counts.values())).pvalue > SIGNIFICANCE


@given(
    slots=st.lists(st.integers(0, 5_000), min_size=2, max_size=40, unique=True),
    step=st.integers(0, 10**9),
)
def test_every_row_is_a_partner_once_and_nobody_its_own(slots: list[int], step: int) -> None:
    partner = draw_pairs(CUTMIX, seed=3, epoch=1, step=step, slots=slots).partner
    assert sorted(partner.tolist()) == list(range(len(slots)))
    assert (partner != np.arange(len(slots))).all()


def test_who_is_paired_is_as_likely_as_any_other_pair() -> None:
    counts = Counter(
        int(draw_pairs(CUTMIX, seed=3, epoch=0, step=step, slots=range(5)).partner[2])
        for step in range(2_000)
    )
    assert sorted(counts) == [0, 1, 3, 4]
    assert stats.chisquare(list(counts.values())).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_lambda_and_box_of_a_slot_are_the_same_on_any_number_of_ranks(num_ranks: int) -> None:
    whole = draw_pairs(CUTMIX, seed=3, epoch=4, step=5, slots=range(29))
    for rank in range(num_ranks):
        slots = list(range(rank, 29, num_ranks))[::-1]
        part = draw_pairs(CUTMIX, seed=3, epoch=4, step=5, slots=slots)
        assert part.weight.tolist() == whole.weight[slots].tolist()
        assert part.places.tolist() == whole.places[slots].tolist()


def test_slots_far_apart_get_what_they_get_among_all_others() -> None:
    near = draw_pairs(CUTMIX, seed=3, epoch=0, step=0, slots=range(10_000))
    far = draw_pairs(CUTMIX, seed=3, epoch=0, step=0, slots=[9_999, 0])
    assert far.weight.tolist() == near.weight[[9_999, 0]].tolist()
    assert far.places.tolist() == near.places[[9_999, 0]].tolist()


@pytest.mark.parametrize("changed", [{"seed": 4}, {"epoch": 1}, {"step": 1}])
def test_another_seed_epoch_or_step_draws_anew(changed: dict[str, int]) -> None:
    place = {"seed": 3, "epoch": 0, "step": 0}
    one = draw_pairs(CUTMIX, slots=range(8), **place)
    other = draw_pairs(CUTMIX, slots=range(8), **place | changed)
    assert not set(one.weight.tolist()) & set(other.weight.tolist())


def test_mixup_and_cutmix_of_one_batch_draw_apart() -> None:
    one = draw_pairs(CUTMIX, seed=3, epoch=0, step=0, slots=range(8))
    other = draw_pairs(Mixing(name="mixup"), seed=3, epoch=0, step=0, slots=range(8))
    assert not set(one.weight.tolist()) & set(other.weight.tolist())


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 0.999, 1.0])
def test_so_many_batches_are_mixed_as_the_probability_says(probability: float) -> None:
    mixing = Mixing(name="mixup", probability=probability)
    mixed = mixed_steps(mixing, seed=2, epoch=0, first=0, stop=20_000)
    if probability in (0, 1):
        assert mixed.mean() == probability
    assert stats.binomtest(int(mixed.sum()), 20_000, probability).pvalue > SIGNIFICANCE


def test_whether_a_batch_is_mixed_depends_on_its_place_alone() -> None:
    half = Mixing(name="mixup", probability=0.5)
    whole = mixed_steps(half, seed=2, epoch=3, first=0, stop=50).tolist()
    for first in range(50):
        for stop in (first, first + 1, 50):
            part = mixed_steps(half, seed=2, epoch=3, first=first, stop=stop)
            assert part.tolist() == whole[first:stop]
    assert whole != mixed_steps(half, seed=2, epoch=4, first=0, stop=50).tolist()
    assert whole != mixed_steps(half, seed=3, epoch=3, first=0, stop=50).tolist()


@pytest.mark.parametrize(
    ("mixing", "complaint"),
    [
        ("cutmix", r"mixing is 'cutmix'; it must be None or a mapping such as .*'name': 'cutmix'"),
        ({}, r"mixing is \{\}, without a name; use 'mixup', 'cutmix'"),
        ({"alpha": 1.0}, "without a name"),
        ({"name": "cutmx"}, r"name is 'cutmx'; allowed: .*Did you mean 'cutmix'"),
        ({"name": None}, "name is None"),
        ({"name": "mixup", "alfa": 1}, r"the key 'alfa'; allowed: .*Did you mean 'alpha'"),
        ({"name": "mixup", "alpha": 0}, r"mixup: alpha is 0; it must be a number in \(0, 1e\+09\]"),
        ({"name": "mixup", "alpha": -1.0}, "alpha is -1.0"),
        ({"name": "mixup", "alpha": float("nan")}, "alpha is nan"),
        ({"name": "mixup", "alpha": float("inf")}, "alpha is inf"),
        ({"name": "mixup", "alpha": True}, "alpha is True"),
        ({"name": "mixup", "alpha": "1"}, "alpha is '1'"),
        ({"name": "cutmix", "probability": 1.1}, r"cutmix: probability is 1.1; .*\[0, 1\]"),
        ({"name": "cutmix", "probability": None}, "probability is None"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_allowed(mixing: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_mixing(mixing)


def test_whole_numbers_are_as_good_as_floats_and_written_alike() -> None:
    one = parse_mixing({"name": "mixup", "alpha": 1, "probability": 1})
    assert one == Mixing(name="mixup")
    assert repr(one) == repr(Mixing(name="mixup"))
