"""The edges of a plan: what is refused and how, what must not matter, what must."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan

BRATS = ["LGG"] * 75 + ["HGG"] * 210


class Shards:
    """A data set as a plan sees it: labels, patients and keys, the same in every split."""

    train_splits = ("train", "fold1")

    def __init__(self, patients: list[str], labels: list[str], classes: list[str]) -> None:
        self.classes = classes
        self._patients, self._labels = patients, labels

    def labels(self, split: str) -> NDArray[np.int64]:
        assert split in ("train", "fold1", "val")
        return np.array([self.classes.index(label) for label in self._labels], dtype=np.int64)

    def patients(self, split: str) -> NDArray[np.str_]:
        assert split in ("train", "fold1", "val")
        return np.array(self._patients)

    def keys(self, split: str) -> NDArray[np.str_]:
        assert split in ("train", "fold1", "val")
        return np.array([f"{name}__{place}" for place, name in enumerate(self._patients)])

    def column(self, split: str, name: str) -> NDArray[np.str_]:
        raise ConfigError(f"split {split!r} has no column {name!r}")


def plan_of(labels: Any = BRATS, **options: Any) -> BalancedPlan:
    return BalancedPlan.from_labels(labels, **{"global_batch_size": 8, **options})


def order_of(plan: BalancedPlan, names: list[str], label: str, epochs: int = 1) -> list[str]:
    """List who of a class is delivered, in the order of the class's turns."""
    number = plan.classes.index(label)
    drawn: list[str] = []
    for epoch in range(epochs):
        for step in range(plan.num_steps(epoch)):
            drawn += [
                names[sample] for sample in plan._draws.members_of(epoch, step)[number].tolist()
            ]
    return drawn


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "8", None, np.bool_(True), torch.tensor(1.5)])
def test_a_batch_size_that_is_none_is_refused(size: object) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size is .*integer of at least 1"):
        plan_of(global_batch_size=size)


def test_a_batch_size_of_numpy_is_a_batch_size() -> None:
    plan = plan_of(global_batch_size=np.int64(8))
    assert plan == plan_of()
    assert plan.settings["global_batch_size"] == 8


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "0", None])
def test_a_seed_that_is_none_is_refused(seed: object) -> None:
    with pytest.raises(ConfigError, match=r"seed is .*integer from 0 to 18446744073709551615"):
        plan_of(seed=seed)


def test_the_largest_seed_is_a_seed() -> None:
    assert plan_of(seed=2**64 - 1) != plan_of(seed=0)


@pytest.mark.parametrize("step", [-1, 36, 10**9])
def test_a_step_the_epoch_does_not_have_is_an_index_error(step: int) -> None:
    plan = plan_of()
    with pytest.raises(IndexError, match=rf"epoch 1 has steps 0 to 35; step {step} is none"):
        plan.batch(1, step)
    for ask in (plan.quotas, plan.batch_size):
        with pytest.raises(IndexError):
            ask(1, step)
    with pytest.raises(IndexError):
        plan.rank_batch(1, step, rank=0, num_ranks=1)


def test_exposure_may_be_asked_at_the_end_of_an_epoch_and_no_further() -> None:
    plan = plan_of()
    assert plan.exposure(0, 36).sum() == 288
    with pytest.raises(IndexError, match="step 37 is none"):
        plan.exposure(0, 37)
    with pytest.raises(IndexError, match="step -1 is none"):
        plan.exposure(0, -1)


def test_a_negative_epoch_is_an_index_error_and_fractions_are_type_errors() -> None:
    plan = plan_of()
    with pytest.raises(IndexError, match="epoch is -1; epochs count from 0"):
        plan.num_steps(-1)
    with pytest.raises(IndexError, match="epoch is -1"):
        plan.batch(-1, 0)
    for epoch, step in ((0, 1.0), (1.0, 0), (0, 36.0)):
        with pytest.raises(TypeError, match="float"):
            plan.exposure(epoch, step)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor])
def test_epochs_and_steps_of_any_library_are_integers(kind: Any) -> None:
    plan = plan_of()
    epoch, step = kind(1), kind(7)
    assert plan.num_steps(epoch) == 36
    assert plan.batch_size(epoch, step) == 8
    assert plan.batch(epoch, step).tolist() == plan.batch(1, 7).tolist()
    assert plan.quotas(epoch, step).tolist() == plan.quotas(1, 7).tolist()
    assert plan.exposure(epoch, step).tolist() == plan.exposure(1, 7).tolist()
    there = plan.rank_batch(epoch, step, rank=kind(1), num_ranks=kind(3))
    assert there.tolist() == plan.rank_batch(1, 7, rank=1, num_ranks=3).tolist()


def test_dropping_the_only_batch_names_the_largest_that_works() -> None:
    with pytest.raises(ConfigError, match=r"is 300, .*only 285 draws and last: drop .*<= 285"):
        plan_of(global_batch_size=300, balance={"name": "power", "last": "drop"})
    balance = {"name": "class_balanced", "replacement": False}
    with pytest.raises(ConfigError, match=r"is 151, .*150 draws and replacement: false .*<= 150"):
        plan_of(global_batch_size=151, balance=balance)


def test_a_batch_larger_than_the_cohort_is_filled_or_short() -> None:
    full = plan_of([0, 1, 1], global_batch_size=10)
    assert full.num_steps(0) == 1
    assert len(full.batch(0, 0)) == 10
    short = plan_of([0, 1, 1], global_batch_size=10, balance={"name": "natural", "last": "short"})
    assert sorted(short.batch(0, 0).tolist()) == [0, 1, 2]


def test_strata_beside_the_sections_say_where_they_belong() -> None:
    wanted = r"has no key 'strata'.*write strategy: \{name: class_balanced, strata: \['site'\]\}"
    for section in ({"upsampling": {"enabled": True}}, {}):
        with pytest.raises(ConfigError, match=wanted):
            plan_of(balance={**section, "strata": ["site"]})


@pytest.mark.parametrize("text", ["P1", b"P2", ""])
def test_names_to_exclude_are_a_list_and_no_text(text: Any) -> None:
    shards = Shards(["P1", "P2", "P3"], ["a", "a", "b"], ["a", "b"])
    wanted = r"exclude is .*a list of keys or patient ids, not text"
    with pytest.raises(ConfigError, match=wanted):
        BalancedPlan.for_shards(shards, global_batch_size=2, exclude=text)


@pytest.mark.parametrize(
    ("patients", "message"),
    [
        (["P1"], r"patients has shape \(1,\) for 285 labels; give one per sample"),
        ([None] * 285, "285 patients are missing, the first at sample 0"),
        (["P1", float("nan")] * 142 + ["P1"], "142 patients are missing, the first at sample 1"),
        ([float("nan")] * 285, "285 patients are missing"),
    ],
)
def test_patients_that_do_not_fit_or_are_missing_are_refused(
    patients: list[Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(patients=patients)


def test_asking_for_patients_that_nobody_named_is_refused() -> None:
    balance = {"name": "power", "unit": "patient"}
    with pytest.raises(ConfigError, match="unit is 'patient', but no patients are given"):
        plan_of(balance=balance)
    with pytest.raises(ConfigError, match="unit is 'patient', but no patients are given"):
        BalancedPlan.from_class_sizes({"a": 3}, global_batch_size=1, balance=balance)
    assert plan_of(balance=balance, patients=range(285)).unit == "patient"


def test_a_patient_with_two_labels_is_an_error_unless_samples_are_balanced() -> None:
    patients = ["P0", "P0", "P1", "P2"]
    with pytest.raises(ConfigError, match=r"1 patients .*'P0'.*Set unit: sample"):
        plan_of([0, 1, 0, 1], patients=patients)
    plan = plan_of([0, 1, 0, 1], patients=patients, balance={"name": "power", "unit": "sample"})
    assert plan.unit == "sample"
    assert not plan.guarantees["no_twin_in_a_batch"]
    assert plan_of([0, 1, 0, 1], patients=patients, balance=None).unit == "sample"


def test_what_is_promised_is_said() -> None:
    assert all(plan_of().guarantees.values())
    assert all(plan_of(patients=range(285)).guarantees.values())
    two_each = plan_of(patients=[n // 2 for n in range(285)], balance=None)
    assert two_each.guarantees["exact_quotas"]
    assert not two_each.guarantees["fair_exposure"]
    with pytest.raises(TypeError):
        two_each.guarantees["fair_exposure"] = True  # type: ignore[index]


def test_a_name_to_exclude_that_nobody_has_is_refused_with_the_nearest() -> None:
    shards = Shards(["P1", "P2", "P3"], ["a", "a", "b"], ["a", "b"])
    with pytest.raises(ConfigError, match=r"exclude names 'P1__9', .*Did you mean 'P1__0'\?"):
        BalancedPlan.for_shards(shards, global_batch_size=2, exclude=["P1", "P1__9"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"balance": "class_balanced"},
        {"balance": {"name": "power", "alpha": 1}},
        {"balance": {"name": "natural", "num_samples": "oversample"}},
        {"balance": {"name": "natural", "draw": "iid"}},
        {"balance": {"upsampling": {"enabled": True}}},
    ],
)
def test_a_split_that_is_not_for_training_is_never_balanced(options: dict[str, Any]) -> None:
    shards = Shards(["P1", "P2", "P3"], ["a", "a", "b"], ["a", "b"])
    wanted = r"on split 'val', which is not for training.*eval_loader.*--train-splits"
    with pytest.raises(ConfigError, match=wanted):
        BalancedPlan.for_shards(shards, global_batch_size=2, split="val", **options)
    for split in ("train", "fold1"):
        assert (
            BalancedPlan.for_shards(shards, global_batch_size=2, split=split, **options).seed == 0
        )


@pytest.mark.parametrize(
    "balance",
    [None, "none", "natural", "instance_balanced", {"name": "natural", "last": "short"}, {}],
)
def test_a_split_that_is_not_for_training_may_be_planned_in_natural_order(balance: Any) -> None:
    shards = Shards(["P1", "P2", "P3"], ["a", "a", "b"], ["a", "b"])
    plan = BalancedPlan.for_shards(shards, global_batch_size=3, split="val", balance=balance)
    assert sorted(plan.batch(0, 0).tolist()) == [0, 1, 2]


def test_excluding_a_whole_class_names_it() -> None:
    shards = Shards(["P1", "P2", "P3"], ["a", "a", "b"], ["a", "b"])
    with pytest.raises(ConfigError, match="class 'b' is declared but has no training sample"):
        BalancedPlan.for_shards(shards, global_batch_size=2, exclude=["P3"])


def test_a_declared_class_without_samples_is_named() -> None:
    shards = Shards(["P1", "P2"], ["a", "b"], ["a", "b", "c"])
    with pytest.raises(ConfigError, match=r"class 'c' is declared .*'a', 'b'"):
        BalancedPlan.for_shards(shards, global_batch_size=2)
    natural = BalancedPlan.for_shards(shards, global_batch_size=2, balance=None)
    assert natural.quotas(0, 0).tolist() == [1, 1, 0]
    assert natural.exposure(1, 0).tolist() == [1, 1]
    balance = {"name": "class_balanced", "empty_class": "renormalize"}
    renormalised = BalancedPlan.for_shards(shards, global_batch_size=2, balance=balance)
    assert renormalised.shares == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert renormalised.quotas(0, 0).tolist() == [1, 1, 0]


def test_plans_with_neighbouring_seeds_and_epochs_share_no_batch() -> None:
    earlier, later = plan_of(seed=42), plan_of(seed=43)
    for step in range(36):
        assert earlier.batch(1, step).tolist() != later.batch(0, step).tolist()
    mixes = [
        [sorted(plan.batch(epoch, step).tolist()) for step in range(36)]
        for plan, epoch in ((earlier, 0), (earlier, 1), (later, 0), (later, 1))
    ]
    flat = [tuple(batch) for mix in mixes for batch in mix]
    assert len(set(flat)) == len(flat)


def test_the_class_mix_differs_between_epochs_and_seeds() -> None:
    def mix(seed: int, epoch: int) -> tuple[int, ...]:
        plan = plan_of(balance=None, seed=seed)
        return tuple(int(plan.quotas(epoch, step)[0]) for step in range(36))

    mixes = [mix(seed, epoch) for seed in (0, 1) for epoch in range(6)]
    assert len(set(mixes)) >= 11


def test_the_first_class_is_not_favoured_when_shares_do_not_divide_the_batch() -> None:
    plan = BalancedPlan.from_class_sizes(
        {"a": 100, "b": 100, "c": 100}, global_batch_size=4, seed=2
    )
    first = np.zeros(3, dtype=np.int64)
    for epoch in range(300):
        first += plan.quotas(epoch, 0)
    # One class of three gets the fourth place of the first batch: about 100 epochs each.
    assert (np.abs(first - 400) < 5 * np.sqrt(300 * 2 / 9)).all()


@given(
    gone=st.sets(st.integers(0, 59), min_size=1, max_size=20),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=30)
def test_excluding_patients_leaves_the_order_of_the_others(gone: set[int], seed: int) -> None:
    patients = [f"P{number:02}" for number in range(90)]
    shards = Shards(patients, ["a"] * 60 + ["b"] * 30, ["a", "b"])
    left_out = [patients[number] for number in gone]
    options: dict[str, Any] = {"global_batch_size": 6, "seed": seed}
    whole = BalancedPlan.for_shards(shards, **options)
    fewer = BalancedPlan.for_shards(shards, exclude=left_out, **options)
    before = order_of(whole, patients, "a", epochs=2)[:60]
    after = order_of(fewer, patients, "a", epochs=2)[: 60 - len(gone)]
    assert after == [name for name in before if name not in left_out]


def test_excluding_one_of_ten_thousand_samples_leaves_the_order_of_the_others() -> None:
    # Classes known by size alone are not sorted at this size; those with names are.
    names = [f"P{number:05}" for number in range(10_000)]
    shards = Shards(names, ["a"] * 10_000, ["a"])
    options: dict[str, Any] = {"global_batch_size": 1000, "balance": None, "seed": 4}
    whole = BalancedPlan.for_shards(shards, **options)
    fewer = BalancedPlan.for_shards(shards, exclude=["P00007"], **options)
    after = np.concatenate([fewer.batch(0, step) for step in range(9)])
    before = np.concatenate([whole.batch(0, step) for step in range(10)])
    assert after.tolist() == before[before != 7][: len(after)].tolist()


def test_adding_patients_leaves_the_order_of_the_others() -> None:
    # The newcomer's name comes first, so every sample number moves.
    names = [f"P{number:02}" for number in range(1, 60)]
    before = Shards(names, ["a"] * 59, ["a"])
    after = Shards(["P00", *names], ["a"] * 60, ["a"])
    first = order_of(BalancedPlan.for_shards(before, global_batch_size=59), names, "a")
    later = order_of(BalancedPlan.for_shards(after, global_batch_size=60), ["P00", *names], "a")
    assert [name for name in later if name != "P00"] == first


def test_adding_a_class_leaves_the_order_of_the_others_alone() -> None:
    names = [f"P{number:02}" for number in range(80)]
    two = Shards(names, ["m"] * 40 + ["z"] * 40, ["m", "z"])
    grown = [f"N{number}" for number in range(9)] + names
    three = Shards(grown, ["b"] * 9 + ["m"] * 40 + ["z"] * 40, ["b", "m", "z"])
    for label in ("m", "z"):
        # With two classes an epoch asks for 42 of the 40, with three for 30: other seams, other
        # groups, and still the same first pass.
        before = order_of(BalancedPlan.for_shards(two, global_batch_size=6), names, label, 2)
        after = order_of(BalancedPlan.for_shards(three, global_batch_size=6), grown, label, 3)
        assert after[:40] == before[:40]


def test_the_order_of_samples_of_another_class_does_not_matter() -> None:
    names = [f"P{number:02}" for number in range(40)]
    labels = ["a"] * 20 + ["b"] * 20
    shuffled = np.random.default_rng(0).permutation(40)
    straight = Shards(names, labels, ["a", "b"])
    mixed_names = [names[place] for place in shuffled]
    mixed = Shards(mixed_names, [labels[place] for place in shuffled], ["a", "b"])
    for label in ("a", "b"):
        one = order_of(BalancedPlan.for_shards(straight, global_batch_size=4), names, label, 4)
        two = order_of(BalancedPlan.for_shards(mixed, global_batch_size=4), mixed_names, label, 4)
        assert one == two


def test_planning_leaves_every_global_generator_alone() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    python, library = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    for draw in ("quota", "iid"):
        plan = plan_of(balance={"name": "class_balanced", "draw": draw})
        plan.batch(3, 5)
        plan.rank_batch(3, 5, rank=1, num_ranks=3)
        plan.exposure(2, 0)
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), library)
    now = np.random.get_state(legacy=False)  # noqa: NPY002
    assert isinstance(now, dict)
    assert isinstance(numpy_state, dict)
    assert now["state"]["pos"] == numpy_state["state"]["pos"]
    np.testing.assert_array_equal(now["state"]["key"], numpy_state["state"]["key"])


def test_global_seeds_do_not_change_the_plan() -> None:
    batches = []
    for seed in (1, 2):
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        batches.append(plan_of().batch(0, 0).tolist())
    assert batches[0] == batches[1]


@pytest.mark.parametrize("last", ["full", "short"])
def test_eight_threads_asking_at_random_get_what_one_gets_in_turn(last: str) -> None:
    options: dict[str, Any] = {
        "global_batch_size": 8,
        "balance": {"name": "power", "last": last},
        "seed": 4,
    }
    sizes = {"a": 40, "b": 300, "c": 1_500_000}
    alone = BalancedPlan.from_class_sizes(sizes, **options)
    shared = BalancedPlan.from_class_sizes(sizes, **options)
    steps = alone.num_steps(0)
    random_places = np.random.default_rng(0)
    places = [
        (int(epoch), int(step))
        for epoch, step in zip(
            random_places.integers(0, 12, 600), random_places.integers(0, steps, 600), strict=True
        )
    ] + [(epoch, steps - 1) for epoch in range(12)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda place: shared.batch(*place).tolist(), places))
    assert got == [alone.batch(*place).tolist() for place in places]


def test_batches_are_the_callers_to_change() -> None:
    plan = plan_of()
    first = plan.batch(0, 0)
    kept = first.tolist()
    first[:] = -1
    quotas = plan.quotas(0, 0)
    quotas[:] = -1
    exposure = plan.exposure(1, 0)
    exposure[:] = -1
    assert plan.batch(0, 0).tolist() == kept
    assert plan.quotas(0, 0).tolist() == [4, 4]
    assert plan.exposure(1, 0).min() >= 0
    single = plan_of(["x"] * 9, global_batch_size=9)
    whole = single.batch(0, 0)
    whole[:] = -1
    assert sorted(single.batch(0, 0).tolist()) == list(range(9))


def test_a_plan_is_a_frozen_value() -> None:
    plan = plan_of()
    for name in ("seed", "digest", "strategy", "anything"):
        with pytest.raises(AttributeError, match=f"a plan is frozen: {name} cannot be set"):
            setattr(plan, name, 1)
    assert plan == plan_of()
    assert hash(plan) == hash(plan_of())
    assert plan != plan_of(seed=1)
    assert plan != "plan"
    assert repr(plan) == (
        "BalancedPlan(class_balanced, {HGG: 210, LGG: 75}, global_batch_size=8, seed=0)"
    )


def test_settings_are_plain_and_build_the_plan_again() -> None:
    balance = {"name": "target", "shares": {"LGG": 0.3, "HGG": 0.7}, "last": "short"}
    plan = plan_of(balance=balance, seed=7)
    settings = plan.settings
    assert settings["version"] == 1
    again = plan_of(
        balance=settings["balance"],
        seed=settings["seed"],
        global_batch_size=settings["global_batch_size"],
    )
    assert again == plan
    settings["balance"]["shares"]["LGG"] = 0.9
    assert plan.settings["balance"]["shares"]["LGG"] == 0.3


def test_the_digest_differs_with_everything_that_changes_a_batch() -> None:
    shards = Shards(["P1", "P2", "P3"], ["a", "a", "b"], ["a", "b"])
    plans = [
        plan_of(),
        plan_of(seed=1),
        plan_of(global_batch_size=4),
        plan_of(balance="power"),
        plan_of(balance={"name": "class_balanced", "last": "drop"}),
        plan_of(balance={"name": "class_balanced", "draw": "iid"}),
        plan_of(patients=range(285)),
        plan_of(BRATS[::-1]),
        plan_of(["LGG"] * 76 + ["HGG"] * 209),
        BalancedPlan.for_shards(shards, global_batch_size=2),
        BalancedPlan.for_shards(shards, global_batch_size=2, exclude=["P2"]),
        BalancedPlan.from_class_sizes({"LGG": 75, "HGG": 210}, global_batch_size=8),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)


@pytest.mark.parametrize(
    "balance",
    [
        "class_balanced",
        {"name": "downsample", "rotate": False},
        "upsample",
        "repeat_factor",
        {"name": "p_k", "P": 1, "M": 2},
        {"name": "sample_weights", "weights": [1.0, 2.0]},
    ],
    ids=str,
)
def test_leaving_everybody_out_is_refused_in_words_by_every_kind_of_strategy(
    balance: str | dict[str, Any],
) -> None:
    shards = Shards(["P1", "P2"], ["a", "a"], ["a"])
    with pytest.raises(ConfigError, match=r"no training sample|weights are 0"):
        BalancedPlan.for_shards(shards, global_batch_size=2, balance=balance, exclude=["P1", "P2"])


def test_options_written_as_defaults_do_not_change_the_digest() -> None:
    written = {"name": "uniform", "last": "full", "draw": "quota", "replacement": True}
    assert plan_of(balance=written) == plan_of()


def test_sample_and_patient_units_agree_where_everybody_has_one_sample() -> None:
    plan = plan_of(patients=range(285), balance={"name": "class_balanced", "unit": "sample"})
    assert plan.unit == "sample"
    assert all(plan.guarantees.values())


def test_a_slot_shows_its_class_and_classes_stand_in_keyed_order() -> None:
    plan = plan_of()
    first = set()
    for epoch in range(20):
        batch = np.array(BRATS)[plan.batch(epoch, 0)]
        assert list(batch[:4]) == [batch[0]] * 4
        assert list(batch[4:]) == [batch[4]] * 4
        first.add(str(batch[0]))
    assert first == {"LGG", "HGG"}
