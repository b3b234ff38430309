"""Runs that change their plan: what holds for any cohort, any plans and any moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_balance.plan.epoch import BalancedPlan
from tests.plan.carrying import Cohort, Options, Place, following, used_by


@st.composite
def cohorts(draw: st.DrawFn) -> Cohort:
    """Up to four classes of up to 24 patients with one to three samples each, shuffled."""
    sizes = draw(st.lists(st.integers(2, 24), min_size=1, max_size=4))
    many = draw(st.booleans())
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = [
        (f"c{label}", f"c{label}p{number}", f"c{label}p{number}i{image}")
        for label, size in enumerate(sizes)
        for number in range(size)
        for image in range(int(random.integers(1, 4)) if many else 1)
    ]
    # Shuffled patient by patient: the images of one keep their order.
    order = {name: random.random() for _, name, _ in rows}
    rows.sort(key=lambda row: order[row[1]])
    labels, owners, images = zip(*rows, strict=True)
    return Cohort(labels=labels, owners=owners, images=images)


@st.composite
def legs(draw: st.DrawFn, cohort: Cohort) -> tuple[Cohort, Options]:
    """Any cohort of the same patients, some left out, and any quota plan over it."""
    everybody = sorted(set(cohort.owners))
    gone = draw(st.lists(st.sampled_from(everybody), unique=True, max_size=len(everybody) // 3))
    classes = {
        label: {o for o, c in zip(cohort.owners, cohort.labels, strict=True) if c == label}
        for label in set(cohort.labels)
    }
    here = cohort.without([name for name in gone if not any({name} == c for c in classes.values())])
    here = here if set(here.labels) == set(cohort.labels) else cohort
    balance: Options = {
        "name": draw(
            st.sampled_from(
                ["class_balanced", "power", "instance_balanced", "upsample", "downsample"]
            )
        ),
        "unit": "patient",
        "last": draw(st.sampled_from(["full", "short", "drop"])),
    }
    if balance["name"] == "downsample":
        balance["rotate"] = draw(st.booleans())
    if draw(st.booleans()):
        balance["replacement"] = False
        balance["last"] = "drop"
    batch = draw(st.integers(1, 12))
    if balance["last"] == "drop":
        batch = min(batch, len(classes))
    return here, {"batch": batch, "balance": balance, "seed": draw(st.integers(0, 99))}


@dataclass(slots=True)
class Onlooker:
    """Counts what comes, by the names of patients and samples, over several plans."""

    turns: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)

    def watch(
        self, cohort: Cohort, plan: BalancedPlan, places: Sequence[Place], known: set[str]
    ) -> None:
        """Follow a leg step by step and check what holds at every one of them.

        Args:
            cohort: who takes part.
            plan: the plan of the leg.
            places: the steps of the leg.
            known: patients who have been with the run from its start, under every plan.
        """
        counted = np.zeros(len(cohort.owners), dtype=np.int64)
        for place in places:
            assert plan.exposure(*place).tolist() == counted.tolist()
            batch = plan.batch(*place).tolist()
            np.add.at(counted, batch, 1)
            self.turns.update(cohort.owners[row] for row in batch)
            self.images.update(cohort.images[row] for row in batch)
            for label in set(cohort.labels):
                names = {o for o, c in zip(cohort.owners, cohort.labels, strict=True) if c == label}
                totals = [self.turns[name] for name in names & known]
                assert not totals or max(totals) - min(totals) <= 1
        for row, image in enumerate(cohort.images):
            owner = cohort.owners[row]
            others = [i for i, o in zip(cohort.images, cohort.owners, strict=True) if o == owner]
            if owner in known:
                assert abs(self.images[image] - self.images[others[0]]) <= 1


@given(cohort=cohorts(), data=st.data())
@settings(max_examples=80)
def test_old_members_stay_within_one_over_any_three_plans_and_exposure_is_what_counting_gives(
    cohort: Cohort, data: st.DataObject
) -> None:
    onlooker, known = Onlooker(), set(cohort.owners)
    old, start = None, (data.draw(st.integers(0, 2)), 0)
    for _ in range(3):
        here, options = data.draw(legs(cohort))
        plan = here.plan(**options)
        if old is not None:
            plan = plan.carried_from(old, epoch=start[0], step=start[1])
            start = (start[0], 0)
            assert plan.first_epoch == start[0]
        else:
            start = (0, 0)
        known &= used_by(here, plan)
        places = following(plan, start, data.draw(st.integers(0, 25)))
        onlooker.watch(here, plan, places[:-1], known)
        old, start = plan, places[-1]


@given(cohort=cohorts(), data=st.data())
@settings(max_examples=80)
def test_batches_hold_the_new_plan_s_quotas_and_no_twin_that_they_could_do_without(
    cohort: Cohort, data: st.DataObject
) -> None:
    before, options = data.draw(legs(cohort))
    here, changed = data.draw(legs(cohort))
    old, new = before.plan(**options), here.plan(**changed)
    left = following(old, (0, 0), data.draw(st.integers(0, 30)))[-1]
    plan = new.carried_from(old, epoch=left[0], step=left[1])
    pool = used_by(here, plan)
    sizes = Counter(
        label for owner, label in set(zip(here.owners, here.labels, strict=True)) if owner in pool
    )
    classes = dict(zip(here.owners, here.labels, strict=True))
    for epoch in range(left[0], left[0] + 3):
        in_epoch: Counter[str] = Counter()
        for step in range(plan.num_steps(epoch)):
            batch = plan.batch(epoch, step)
            assert len(batch) == new.batch_size(epoch, step)
            quotas = [sum(here.labels[row] == label for row in batch) for label in plan.classes]
            assert quotas == new.quotas(epoch, step).tolist()
            assert quotas == plan.quotas(epoch, step).tolist()
            times = Counter(here.owners[row] for row in batch)
            asked = dict(zip(plan.classes, quotas, strict=True))
            in_epoch += times
            for owner, count in times.items():
                assert count <= -(-asked[classes[owner]] // sizes[classes[owner]])
        if not plan.strategy.replacement:
            assert max(in_epoch.values()) == 1
