"""What one seed stands for: everything is drawn here, before anything runs.

So a case can be printed, and the same seed is the same case.
"""

from __future__ import annotations

import numpy as np

from streaming_balance.errors import ConfigError, ResumeError
from streaming_balance.plan.epoch import BalancedPlan
from tests.simulation.cases import Case, Leg, Recipe, Table, cells_of
from tests.simulation.recipes import draw_balance

MOST_RANKS = 16
MOST_BATCHES = 24
FURTHEST_EPOCH = 30


def draw_case(seed: int) -> Case:
    """Draw a case from its seed."""
    random = np.random.default_rng([seed, 0])
    table = _table(random)
    recipe, plan = _recipe(random, table)
    num_batches = int(random.integers(2, MOST_BATCHES + 1))
    substitutes = bool(random.random() < 0.6)
    damaged = _damaged(random, table, plan, cells_of(table, recipe)) if substitutes else []
    num_legs = int(random.choice([1, 2, 2, 3, 4, 5]))
    num_changes = min(num_legs - 1, int(random.integers(3)))
    others = _other_recipes(random, table, recipe, plan, num_changes)
    limit = min(_smallest_batch(one) for one in (plan, *(other.plan(table) for other in others)))
    return Case(
        seed=seed,
        table=table,
        recipe=recipe,
        substitutes=substitutes,
        damaged=frozenset(damaged),
        num_batches=num_batches,
        jumps=_jumps(random, num_batches),
        legs=_legs(random, num_legs, limit, num_batches, others),
    )


def _table(random: np.random.Generator) -> Table:
    """Draw classes, patients and samples."""
    num_classes = int(random.integers(1, 7))
    sizes = random.integers(1, random.choice([6, 15, 41]), num_classes)
    most_samples = int(random.choice([1, 1, 1, 2, 4]))
    num_sites = int(random.integers(1, 4))
    # With samples of several classes a patient can only be planned for by sample.
    one_class_each = random.random() < 0.9
    numbers, owners, sites = [], [], []
    for number, size in enumerate(sizes.tolist()):
        for patient in range(size):
            site = f"site {random.integers(num_sites)}"
            for _ in range(int(random.integers(1, most_samples + 1))):
                numbers.append(number)
                owners.append(f"{number if one_class_each else 'P'}-{patient:02d}")
                sites.append(site)
    return Table(
        classes=[f"class {number}" for number in range(num_classes)],
        numbers=np.array(numbers, dtype=np.int64),
        owners=np.array(owners),
        columns={"site": np.array(sites), "weight": random.integers(1, 9, len(numbers)) / 4},
    )


def _recipe(
    random: np.random.Generator, table: Table, *, unit: str | None = None
) -> tuple[Recipe, BalancedPlan]:
    """Draw a plan that these classes allow."""
    while True:
        balance = draw_balance(random, table.classes, unit=unit)
        if balance["name"] == "p_k":
            batch_size = balance["P"] * balance["M"]
        else:
            batch_size = int(random.integers(1, random.choice([5, 17, 49, 49])))
        leaves_out = random.random() < 0.15
        recipe = Recipe(
            balance=balance,
            global_batch_size=batch_size,
            seed=int(random.integers(0, 2**63)),
            exclude=(str(table.owners[-1]),) if leaves_out else (),
        )
        try:
            return recipe, recipe.plan(table)
        except ConfigError:
            continue


def _other_recipes(
    random: np.random.Generator, table: Table, recipe: Recipe, plan: BalancedPlan, count: int
) -> list[Recipe]:
    """Draw so many plans that a run under this one can be carried over to, as far as there are."""
    others: list[Recipe] = []
    for _ in range(2 * count):
        other, new = _recipe(random, table, unit=plan.unit)
        try:
            new.carried_from(plan, epoch=0, step=0)
        except ResumeError:
            continue
        if len(others) < count and other not in (recipe, *others):
            others.append(other)
    return others


def _smallest_batch(plan: BalancedPlan) -> int:
    """Give the smallest global batch that ranks have to share, in any epoch a case can reach."""
    epochs = range(FURTHEST_EPOCH + MOST_BATCHES + 1)
    return min(plan.batch_size(epoch, plan.num_steps(epoch) - 1) for epoch in epochs)


def _damaged(
    random: np.random.Generator, table: Table, plan: BalancedPlan, cells: list[str]
) -> list[int]:
    """Draw up to 30 % of the samples; seldom so many that nobody is left to stand in."""
    share = random.uniform(0, 0.3)
    drawn = np.flatnonzero(random.random(len(cells)) < share).tolist()
    # In a cell of n patients, q of them in a batch, every slot has at least n // q - 1 candidates.
    slack = float(random.choice([1, 2, 3, np.inf]))
    asked = int(max(plan.quotas(0, step).max() for step in range(min(4, plan.num_steps(0)))))
    by_cell: dict[str, list[int]] = {}
    patients: dict[str, set[str]] = {}
    for sample, cell in enumerate(cells):
        patients.setdefault(cell, set()).add(str(table.owners[sample]))
    for sample in random.permutation(drawn).tolist():
        mine = by_cell.setdefault(cells[sample], [])
        if len(mine) < slack * (len(patients[cells[sample]]) // max(1, asked) - 1):
            mine.append(sample)
    return [sample for mine in by_cell.values() for sample in mine]


def _jumps(random: np.random.Generator, num_batches: int) -> dict[int, tuple[int, ...]]:
    """Draw when the training program jumps, and where to: forwards, back, there and back."""
    jumps = {}
    for _ in range(int(random.choice([0, 0, 1, 2, 3]))):
        furthest = int(random.choice([2, 4, FURTHEST_EPOCH]))
        targets = random.integers(0, furthest + 1, int(random.integers(1, 4))).tolist()
        jumps[int(random.integers(0, num_batches + 1))] = tuple(targets)
    return jumps


def _legs(
    random: np.random.Generator, count: int, limit: int, num_batches: int, others: list[Recipe]
) -> tuple[Leg, ...]:
    """Draw the starts of the job; from the second on some change the plan."""
    changes = sorted(random.permutation(np.arange(1, count))[: len(others)].tolist())
    carry_to = dict(zip(changes, others, strict=False))
    return tuple(
        _leg(
            random,
            limit,
            num_batches,
            is_last=number == count - 1,
            carry_to=carry_to.get(number),
        )
        for number in range(count)
    )


def _leg(
    random: np.random.Generator,
    limit: int,
    num_batches: int,
    *,
    is_last: bool,
    carry_to: Recipe | None,
) -> Leg:
    """Draw one start of the job, and when it dies."""
    most_ranks = min(limit, random.choice([3, 6, MOST_RANKS, MOST_RANKS]))
    # The larger of two draws: one rank alone comes often enough where batches are small.
    num_ranks = int(random.integers(1, most_ranks + 1, 2).max())
    every = int(random.integers(1, 8))
    savers = random.permutation(num_ranks)
    if random.random() < 0.15:
        savers = savers[: random.integers(1, num_ranks + 1)]
    # Every batch is a move of each rank, every checkpoint another one.
    moves = num_ranks * num_batches + num_batches // every * len(savers)
    return Leg(
        num_ranks=num_ranks,
        workers=int(random.integers(0, 5)),
        ahead=int(random.integers(0, 6)),
        checkpoint_every=every,
        savers=tuple(savers.tolist()),
        saves_after_jumps=bool(random.random() < 0.5),
        dies_after=None if is_last else int(random.integers(0, moves + 1)),
        carry_to=carry_to,
    )
