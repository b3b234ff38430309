"""Strata: joint quotas of label and columns, counted by hand from the batches themselves."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.shards import open_shards
from tests.building import Sample, pack

# Samples per (label, site); no total of a label or a site divides another.
SIZES = {
    ("HGG", "north"): 61,
    ("HGG", "south"): 23,
    ("HGG", "west"): 7,
    ("LGG", "north"): 5,
    ("LGG", "south"): 19,
    ("MEN", "west"): 11,
}
LABELS = ("HGG", "LGG", "MEN")
BALANCED = {"name": "class_balanced"}
CELLS = [cell for cell, size in SIZES.items() for _ in range(size)]
# 53 shares no factor with 126, so this visits every sample once.
MIXED = [CELLS[place * 53 % len(CELLS)] for place in range(len(CELLS))]


def plan_of(**options: Any) -> BalancedPlan:
    """Plan over the cohort above."""
    chosen: dict[str, Any] = {"balance": BALANCED, "global_batch_size": 10, "seed": 1}
    return BalancedPlan.from_labels(
        [label for label, _ in MIXED], strata=[site for _, site in MIXED], **{**chosen, **options}
    )


def cells_of(samples: Iterable[int]) -> Counter[tuple[str, str]]:
    """Count the cells of samples by looking them up in the cohort."""
    return Counter(MIXED[number] for number in samples)


def labels_of(cells: Counter[tuple[str, str]]) -> Counter[str]:
    """Add up counts of cells to counts of labels."""
    found: Counter[str] = Counter()
    for (label, _), count in cells.items():
        found[label] += count
    return found


def is_near(count: int, ideal: Fraction) -> bool:
    """Say whether a count is the floor or the ceiling of an ideal."""
    return math.floor(ideal) <= count <= math.ceil(ideal)


def drawn_in(plan: BalancedPlan, epoch: int) -> list[int]:
    """List the draws of an epoch."""
    steps = range(plan.num_steps(epoch))
    return [number for step in steps for number in plan.batch(epoch, step).tolist()]


def inside(shares: str) -> dict[tuple[str, str], Fraction]:
    """Give p(site | label) by hand."""
    found = {}
    for cell, size in SIZES.items():
        mates = [other for other in SIZES if other[0] == cell[0]]
        natural = Fraction(size, sum(SIZES[mate] for mate in mates))
        found[cell] = natural if shares == "natural" else Fraction(1, len(mates))
    return found


@pytest.mark.parametrize("last", ["full", "short", "drop"])
@pytest.mark.parametrize("shares", ["natural", "uniform"])
@pytest.mark.parametrize("name", ["class_balanced", "instance_balanced", "power"])
def test_epochs_and_batches_hold_floor_or_ceiling_of_every_label_and_cell(
    name: str, shares: str, last: str
) -> None:
    plan = plan_of(balance={"name": name, "strata_shares": shares, "last": last})
    within = inside(shares)
    for epoch in range(6):
        batches = [cells_of(plan.batch(epoch, step)) for step in range(plan.num_steps(epoch))]
        total: Counter[tuple[str, str]] = sum(batches, Counter())
        by_label, draws = labels_of(total), sum(total.values())
        for label in LABELS:
            assert is_near(
                by_label[label], Fraction(plan.shares[label]).limit_denominator() * draws
            )
        for cell, share in within.items():
            assert is_near(total[cell], by_label[cell[0]] * share)
        for batch in batches:
            part = Fraction(sum(batch.values()), draws)
            assert all(is_near(labels_of(batch)[label], by_label[label] * part) for label in LABELS)
            assert all(is_near(batch[cell], total[cell] * part) for cell in SIZES)


@pytest.mark.parametrize("shares", ["natural", "uniform"])
def test_over_many_epochs_sites_within_a_label_come_in_their_shares(shares: str) -> None:
    plan = plan_of(balance={**BALANCED, "strata_shares": shares})
    exposure, draws = plan.exposure(60, 0), 60 * 130
    for cell, share in inside(shares).items():
        got = sum(exposure[number] for number, found in enumerate(MIXED) if found == cell)
        assert abs(got - share * Fraction(draws, 3)) < 2


def test_labels_get_the_totals_they_have_without_strata() -> None:
    for name in ("class_balanced", "power", "instance_balanced"):
        with_strata = plan_of(balance=name)
        without = BalancedPlan.from_labels(
            [label for label, _ in MIXED], balance=name, global_batch_size=10, seed=1
        )
        for epoch in range(5):
            plain = Counter(MIXED[number][0] for number in drawn_in(without, epoch))
            assert labels_of(cells_of(drawn_in(with_strata, epoch))) == plain
        assert with_strata.digest != without.digest


def test_quotas_by_stratum_are_what_the_batches_hold() -> None:
    plan = plan_of()
    for epoch, step in ((0, 0), (3, 7), (9, 12)):
        batch = cells_of(plan.batch(epoch, step))
        assert plan.strata_quotas(epoch, step) == {cell: batch[cell] for cell in SIZES}
        by_label = labels_of(batch)
        assert plan.quotas(epoch, step).tolist() == [by_label[label] for label in plan.classes]


def test_several_columns_are_balanced_jointly() -> None:
    sex = ["fm"[number % 5 == 0] for number in range(len(MIXED))]
    sites = [site for _, site in MIXED]
    balance = {**BALANCED, "strata": ["label", "site", "sex"], "strata_shares": "uniform"}
    options: dict[str, Any] = {"balance": balance, "global_batch_size": 8}
    labels = [label for label, _ in MIXED]
    plan = BalancedPlan.from_labels(labels, strata={"sex": sex, "site": sites}, **options)
    rows = [(*cell, other) for cell, other in zip(MIXED, sex, strict=True)]
    there = set(rows)
    draws = Counter(rows[number] for epoch in range(30) for number in drawn_in(plan, epoch))
    whole = sum(draws.values())
    for row in there:
        mates = sum(other[0] == row[0] for other in there)
        assert abs(draws[row] - Fraction(whole, 3 * mates)) < 3
    assert set(plan.strata_quotas(0, 0)) == there
    as_array = np.array([sites, sex]).T
    for same in (as_array, as_array.tolist()):
        again = BalancedPlan.from_labels(labels, strata=same, **options)
        assert again.digest == plan.digest
        assert again.batch(4, 5).tolist() == plan.batch(4, 5).tolist()


def test_a_patient_in_two_strata_of_a_class_is_an_error_with_a_way_out() -> None:
    data: dict[str, Any] = {"labels": ["a", "a", "b"], "patients": ["P1", "P1", "P2"]}
    data |= {"strata": ["north", "south", "south"], "global_batch_size": 2}
    with pytest.raises(
        ConfigError, match=r"more than one stratum \('P1'; the first has 'a / north'"
    ):
        BalancedPlan.from_labels(**data)
    with pytest.raises(ConfigError, match="Set unit: sample"):
        BalancedPlan.from_labels(**data)
    plan = BalancedPlan.from_labels(**data, balance={**BALANCED, "unit": "sample"})
    assert sorted(plan.strata_quotas(0, 0)) == [("a", "north"), ("a", "south"), ("b", "south")]


def test_strata_of_patients_take_the_samples_of_a_patient_in_turn() -> None:
    owners = np.arange(60) // 3
    labels = np.where(owners < 14, "a", "b")
    sites = np.where(owners % 3 == 0, "north", "south")
    plan = BalancedPlan.from_labels(
        labels, patients=owners, strata=sites, global_batch_size=6, seed=5
    )
    assert plan.sizes == {"a": 14, "b": 6}
    exposure = plan.exposure(40, 0)
    counted = np.bincount(
        [number for epoch in range(40) for number in drawn_in(plan, epoch)], minlength=60
    )
    assert exposure.tolist() == counted.tolist()
    for owner in range(20):
        mine = exposure[owners == owner]
        assert mine.max() - mine.min() <= 1
    for label, site in {("a", "north"), ("a", "south"), ("b", "north"), ("b", "south")}:
        cell = (labels == label) & (sites == site)
        by_patient = np.bincount(owners[cell], exposure[cell])
        assert np.ptp(by_patient[np.unique(owners[cell])]) <= 1


@pytest.mark.parametrize("shares", ["natural", "uniform"])
@pytest.mark.parametrize("name", ["class_balanced", "power", "instance_balanced", "downsample"])
def test_without_replacement_nobody_comes_twice_in_an_epoch(name: str, shares: str) -> None:
    generator = np.random.default_rng(7)
    for trial in range(25):
        sizes = generator.integers(1, 8, size=(2 + trial % 2, 2))
        cells = [(c, s) for (c, s), n in np.ndenumerate(sizes) for _ in range(n)]
        plan = None
        for batch_size in (1 + trial % 3, 1):
            balance = {"name": name, "replacement": False, "strata_shares": shares}
            try:
                plan = BalancedPlan.from_labels(
                    [f"c{label}" for label, _ in cells],
                    strata=[f"s{site}" for _, site in cells],
                    balance=balance,
                    global_batch_size=batch_size,
                    seed=trial,
                )
                break
            except ConfigError:  # fewer draws than a batch
                continue
        assert plan is not None
        for epoch in range(10):
            drawn = drawn_in(plan, epoch)
            assert len(set(drawn)) == len(drawn)


def test_without_replacement_an_epoch_is_as_long_as_the_scarcest_stratum_allows() -> None:
    # Uniform: LGG north has 5 of 1/3 x 1/2 of the draws, so 30 draws; HGG west 7 x 9, MEN 11 x 3.
    balance = {**BALANCED, "replacement": False, "strata_shares": "uniform"}
    plan = plan_of(balance=balance, global_batch_size=5)
    assert plan.num_steps(0) == 6
    total = cells_of(drawn_in(plan, 0))
    assert total["LGG", "north"] == 5
    with pytest.raises(ConfigError, match=r"num_samples is 31 .* at most 30 draws"):
        plan_of(balance={**balance, "num_samples": 31}, global_batch_size=5)


def test_a_fixed_subset_keeps_the_strata_and_never_changes() -> None:
    balance = {"name": "downsample", "rotate": False}
    plan = plan_of(balance=balance, global_batch_size=11)
    # The smallest class, MEN, has 11: HGG 61 : 23 : 7 of 11 is 7.4 : 2.8 : 0.8, LGG 2.3 : 8.7.
    kept = {("HGG", "north"): 7, ("HGG", "south"): 3, ("HGG", "west"): 1}
    kept |= {("LGG", "north"): 2, ("LGG", "south"): 9, ("MEN", "west"): 11}
    for epoch in range(4):
        drawn = drawn_in(plan, epoch)
        assert cells_of(set(drawn)) == kept
        assert len(set(drawn)) == len(drawn) == 33
        assert set(drawn) == set(drawn_in(plan, 0))


def test_a_fixed_subset_of_uniform_strata_holds_as_many_of_each_as_there_are() -> None:
    balance = {"name": "downsample", "rotate": False, "strata_shares": "uniform"}
    plan = plan_of(balance=balance, global_batch_size=11)
    found = {number for epoch in range(6) for number in drawn_in(plan, epoch)}
    kept = cells_of(found)
    # LGG north has 5, asked for 5 or 6.
    assert labels_of(kept) in ({"HGG": 11, "LGG": lgg, "MEN": 11} for lgg in (10, 11))
    assert all(kept["HGG", site] in (3, 4) for site in ("north", "south", "west"))


def test_a_fixed_subset_without_anybody_of_a_small_stratum_never_asks_for_it() -> None:
    labels = ["a"] * 4 + ["b"] * 41
    sites = ["north"] * 44 + ["south"]
    plan = BalancedPlan.from_labels(
        labels,
        strata=sites,
        balance={"name": "downsample", "rotate": False},
        global_batch_size=4,
    )
    for epoch in range(30):
        drawn = drawn_in(plan, epoch)
        assert 44 not in drawn
        assert Counter(labels[number] for number in drawn) == {"a": 4, "b": 4}


def test_independent_draws_come_from_strata_in_their_shares() -> None:
    plan = plan_of(balance={**BALANCED, "draw": "iid", "strata_shares": "uniform"})
    total, draws = cells_of(np.repeat(np.arange(126), plan.exposure(300, 0))), 300 * 130
    for cell, share in inside("uniform").items():
        expected = float(share) * draws / 3
        assert abs(total[cell] - expected) < 5 * math.sqrt(expected)
    assert total.total() == draws
    assert len({tuple(cells_of(plan.batch(0, step)).values()) for step in range(13)}) > 5


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_ranks_get_floor_or_ceiling_of_every_label_and_stratum_of_a_batch(num_ranks: int) -> None:
    plan = plan_of(global_batch_size=20)
    for epoch, step in ((0, 0), (1, 3), (5, 6)):
        whole = cells_of(plan.batch(epoch, step))
        parts = [
            cells_of(plan.rank_batch(epoch, step, rank=rank, num_ranks=num_ranks))
            for rank in range(num_ranks)
        ]
        assert sum(parts, Counter()) == whole
        for part in parts:
            assert all(is_near(part[cell], Fraction(whole[cell], num_ranks)) for cell in SIZES)
            for label in LABELS:
                ideal = Fraction(labels_of(whole)[label], num_ranks)
                assert is_near(labels_of(part)[label], ideal)


def order_of(plan: BalancedPlan, cells: list[tuple[str, str]], cell: tuple[str, str]) -> list[int]:
    """List the members of one stratum in the order they come: which of its samples."""
    place = {number: at for at, number in enumerate(i for i, c in enumerate(cells) if c == cell)}
    return [
        place[number] for epoch in range(8) for number in drawn_in(plan, epoch) if number in place
    ]


def test_a_stratum_more_leaves_the_order_inside_the_others_alone() -> None:
    more = [*MIXED, *[("MEN", "east")] * 9, *[("AST", "west")] * 4]
    keys = [f"k{number:03}" for number in range(len(more))]
    few, many = (
        BalancedPlan.for_shards(
            Rows(cells, keys),
            balance={**BALANCED, "strata": ["label", "site"]},
            global_batch_size=6,
        )
        for cells in (MIXED, more)
    )
    for cell in (("HGG", "south"), ("LGG", "south"), ("MEN", "west")):
        one, other = order_of(few, MIXED, cell), order_of(many, more, cell)
        # Seams may be repaired over another length; whole passes start with the same first one.
        shared = min(len(one), len(other), SIZES[cell])
        assert one[:shared] == other[:shared]


def test_only_strata_enter_the_digest() -> None:
    plans = [plan_of(), plan_of(balance={**BALANCED, "strata_shares": "uniform"})]
    renamed = [site.upper() for _, site in MIXED]
    labels = [label for label, _ in MIXED]
    plans += [
        BalancedPlan.from_labels(labels, strata=strata, global_batch_size=10, seed=1)
        for strata in (renamed, None)
    ]
    assert len({plan.digest for plan in plans}) == 4
    assert plan_of().digest == plans[0].digest
    alone = BalancedPlan.from_labels(
        labels, balance={**BALANCED, "strata": ["label"]}, global_batch_size=10, seed=1
    )
    assert [alone.batch(2, step).tolist() for step in range(5)] == [
        plans[3].batch(2, step).tolist() for step in range(5)
    ]


def test_settings_with_strata_build_the_same_plan_again() -> None:
    plan = plan_of(balance={**BALANCED, "strata": ["label", "site"], "strata_shares": "uniform"})
    settings = json.loads(json.dumps(plan.settings))
    again = plan_of(balance=settings["balance"], seed=settings["seed"])
    assert again.digest == plan.digest


def test_a_distant_epoch_is_reached_in_a_few_steps_per_epoch() -> None:
    plan = plan_of(balance="power")
    exposure = plan.exposure(3000, 0)
    assert int(exposure.sum()) == 3000 * 130
    within, by_label = inside("natural"), Counter[str]()
    for number, cell in enumerate(MIXED):
        by_label[cell[0]] += int(exposure[number])
    for cell, share in within.items():
        got = sum(int(exposure[number]) for number, found in enumerate(MIXED) if found == cell)
        assert abs(got - by_label[cell[0]] * share) < 2
    again = plan_of(balance="power")
    assert again.batch(3000, 4).tolist() == plan.batch(3000, 4).tolist()
    walked = plan_of(balance="power")
    assert [walked.batch(epoch, 4).tolist() for epoch in range(150)] == [
        plan.batch(epoch, 4).tolist() for epoch in reversed(range(150))
    ][::-1]


class Rows:
    """A data set of one sample per patient with a column of sites."""

    train_splits = ("train",)

    def __init__(self, cells: list[tuple[str, str]], keys: list[str]) -> None:
        self._cells, self._keys = cells, np.array(keys[: len(cells)])
        self.classes = sorted({label for label, _ in cells})

    def labels(self, split: str) -> NDArray[np.int64]:
        assert split == "train"
        return np.array([self.classes.index(label) for label, _ in self._cells], dtype=np.int64)

    def patients(self, split: str) -> NDArray[np.str_]:
        assert split == "train"
        return self._keys

    def keys(self, split: str) -> NDArray[np.str_]:
        assert split == "train"
        return self._keys

    def column(self, split: str, name: str) -> NDArray[np.str_]:
        assert (split, name) == ("train", "site")
        return np.array([site for _, site in self._cells])


def test_excluded_samples_leave_their_stratum() -> None:
    keys = [f"k{number:03}" for number in range(len(MIXED))]
    rows = Rows(MIXED, keys)
    out = [number for number, cell in enumerate(MIXED) if cell == ("LGG", "north")]
    balance = {**BALANCED, "strata": ["label", "site"]}
    plan = BalancedPlan.for_shards(
        rows, balance=balance, global_batch_size=6, exclude=[keys[number] for number in out]
    )
    exposure = plan.exposure(5, 0)
    assert exposure[out].tolist() == [0] * 5
    assert plan.sizes == {"HGG": 91, "LGG": 19, "MEN": 11}
    lgg_south = [number for number, cell in enumerate(MIXED) if cell == ("LGG", "south")]
    assert abs(int(exposure[lgg_south].sum()) - int(exposure.sum()) / 3) < 1


class Torn(Rows):
    """Two of whose samples are one patient's, in two strata."""

    def patients(self, split: str) -> NDArray[np.str_]:
        names = super().patients(split).copy()
        names[MIXED.index(("HGG", "south"))] = names[MIXED.index(("HGG", "north"))]
        return names


def test_leaving_out_the_sample_in_the_wrong_stratum_mends_its_patient() -> None:
    keys = [f"k{number:03}" for number in range(len(MIXED))]
    balance = {**BALANCED, "strata": ["label", "site"]}
    with pytest.raises(ConfigError, match="1 patients have samples of more than one stratum"):
        BalancedPlan.for_shards(Torn(MIXED, keys), balance=balance, global_batch_size=6)
    wrong = keys[MIXED.index(("HGG", "south"))]
    plan = BalancedPlan.for_shards(
        Torn(MIXED, keys), balance=balance, global_batch_size=6, exclude=[wrong]
    )
    assert plan.sizes["HGG"] == 90


def packed(folder: Path) -> list[Sample]:
    """Pack 24 samples of two sites."""
    samples = [
        Sample(
            key=f"s{number:02}",
            image=np.full((2, 2, 2), number, dtype=np.int16),
            label="LGG" if number % 4 == 0 else "HGG",
            columns={"site": "north" if number % 3 else "south", "scanner": f"m{number % 2}"},
        )
        for number in range(24)
    ]
    pack(folder, samples)
    return samples


def test_columns_of_a_packed_data_set_are_strata(tmp_path: Path) -> None:
    samples = {sample.key: sample for sample in packed(tmp_path)}
    shards = open_shards(tmp_path)
    balance = {**BALANCED, "strata": ["label", "site"], "strata_shares": "uniform"}
    plan = BalancedPlan.for_shards(shards, balance=balance, global_batch_size=8)
    keys = shards.keys("train").tolist()
    for step in range(plan.num_steps(0)):
        batch = [samples[keys[row]] for row in plan.batch(0, step).tolist()]
        counts = Counter((sample.label, sample.columns["site"]) for sample in batch)
        assert sorted(counts.values()) == [2, 2, 2, 2]
    other = BalancedPlan.for_shards(
        shards, balance={**balance, "strata": ["label", "scanner"]}, global_batch_size=8
    )
    assert other.digest != plan.digest


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    packed(tmp_path)
    shards = open_shards(tmp_path)
    with pytest.raises(ConfigError, match=r"no column 'sites'; .*Did you mean 'site'"):
        BalancedPlan.for_shards(
            shards, balance={**BALANCED, "strata": ["label", "sites"]}, global_batch_size=8
        )


FOUR = ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strata": ["x", "y", "x"]}, r"strata 'stratum 0' has shape \(3,\) for 4 samples"),
        ({"strata": {"site": ["x", "y"]}}, r"strata 'site' has shape \(2,\) for 4 samples"),
        ({"strata": ["x", None, "x", "y"]}, "1 strata are missing, the first at sample 1"),
        (
            {"strata": {"site": [1.0, 2.0, math.nan, 1]}},
            "1 strata 'site' are missing, the first at",
        ),
        ({"strata": ["x", "y", math.nan, "x"]}, "1 strata are missing, the first at sample 2"),
        ({"balance": {**BALANCED, "strata": ["label", "site"]}}, "no values are given"),
        (
            {"balance": {**BALANCED, "strata": ["label", "site"]}, "strata": {"sites": FOUR}},
            r"names 'site', but values are given for 'sites'.* Did you mean 'sites'",
        ),
        (
            {"balance": {**BALANCED, "strata": ["label", "site", "sex"]}, "strata": FOUR},
            "strata has 1 columns, but the strategy names 'site', 'sex'",
        ),
        ({"strata": np.zeros((4, 1, 1))}, r"strata has shape \(4, 1, 1\)"),
        ({"balance": {"name": "p_k", "P": 2, "M": 1}, "strata": FOUR}, "p_k plans by sample or by"),
        ({"balance": "repeat_factor", "strata": FOUR}, "repeat_factor plans by sample or by class"),
        (
            {"balance": {"name": "repeat_factor", "strata": ["site"]}},
            "strata is .* leave strata out",
        ),
        ({"balance": {**BALANCED, "strata": ["label", "label"]}}, "each once"),
        ({"balance": {**BALANCED, "strata_shares": "even"}}, "strata_shares is 'even'"),
    ],
)
def test_strata_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BalancedPlan.from_labels(FOUR, **{"global_batch_size": 2, **options})


@pytest.mark.parametrize("option", [{"strata": ["label", "site"]}, {"target_label": "a"}])
def test_classes_known_by_size_have_neither_strata_nor_several_labels(
    option: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError, match=r"known by their sizes alone\. Use from_labels"):
        BalancedPlan.from_class_sizes(
            {"a": 4, "b": 4}, balance={**BALANCED, **option}, global_batch_size=2
        )
