"""Imports only point down, each library stays in its own room, and the core stays pure.

Read from the source with `ast`, so that an import inside a function counts as much as one on top.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "streaming_balance"
PROJECT_ROOT = Path(__file__).resolve().parents[2]
ROOT_MODULE = PROJECT_ROOT / PACKAGE / "__init__.py"  # re-exports everything, by name, on first use
SOURCES = sorted(set((PROJECT_ROOT / PACKAGE).rglob("*.py")) - {ROOT_MODULE})

# Lowest first. A module imports from its own part and from lower floors, never from another part
# of its own floor: `plan` and `storage` share one, so neither knows the other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("plan", "storage", "safe_yaml"),
    ("stream",),
    ("config", "tabular"),
    ("training", "ingest"),
    ("report",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}

# What a plan may know about the world: arithmetic and containers. Neither clock, file, environment
# nor generator of random numbers is here.
PLAN_MAY_IMPORT = frozenset(
    {
        *("__future__", "abc", "collections", "copy", "dataclasses", "enum", "functools", "types"),
        *("bisect", "fractions", "heapq", "itertools", "math", "numbers", "numpy", "operator"),
        *("hashlib", "json", "logging", "re", "struct", "typing", "warnings"),
    }
)

# Where a library may be imported; the empty tuple means nowhere.
ROOMS: dict[str, tuple[str, ...]] = {
    "torch": ("training", "demo", "stream.nodes", "stream.ranks"),
    "torchdata": ("training.workers", "stream.nodes"),
    "webdataset": (),
    "nibabel": ("ingest",),
    "pydicom": ("ingest",),
    "isal": ("ingest",),
    "matplotlib": ("report",),
    "imblearn": ("tabular",),
    "sklearn": (),
    "obstore": ("storage.remote",),
    "typer": ("cli",),
    "yaml": ("safe_yaml",),
    "numcodecs": ("storage",),
    # Reading any of these can run code that came with the data.
    "pickle": (),
    "cPickle": (),
    "dill": (),
    "cloudpickle": (),
    "marshal": (),
    "shelve": (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported name of one module."""

    target: str
    """Dotted name of the module imported from."""
    name: str | None
    """The name taken from it, None for a plain `import`."""
    level: int
    """Number of leading dots; 0 is absolute."""
    line: int
    """Line in the file, from 1."""
    late: bool
    """Whether it stands inside a function."""

    @property
    def library(self) -> str:
        """The top-level package it loads."""
        return self.target.partition(".")[0]


def module_name(path: Path) -> str:
    """Dotted name of a file inside the package, without the package's own name."""
    parts = path.relative_to(PROJECT_ROOT / PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(source: str) -> Iterator[Import]:
    """Every import of a file, wherever it stands."""
    yield from _imports(ast.parse(source), late=False)


def _imports(node: ast.AST, *, late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(target=alias.name, name=None, level=0, line=child.lineno, late=late)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                yield Import(
                    target=child.module or "",
                    name=alias.name,
                    level=child.level,
                    line=child.lineno,
                    late=late,
                )
        inside = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(child, late=inside)


def problems(module: str, source: str) -> list[str]:
    """Every rule that a module's imports break, as `module:line: what is wrong`."""
    found = []
    for item in imports_of(source):
        for complaint in _complaints(module, item):
            found.append(f"{PACKAGE}.{module}:{item.line}: {complaint}")
    return found


def _complaints(module: str, item: Import) -> Iterator[str]:
    part = module.partition(".")[0]
    if item.level:
        yield "relative import; write the whole name"
    elif item.library == PACKAGE:
        yield from _inner_complaints(part, item)
    else:
        yield from _library_complaints(module, part, item)


def _inner_complaints(part: str, item: Import) -> Iterator[str]:
    if item.target == PACKAGE:
        yield "imports from the package root; name the module that defines it"
        return
    target = item.target.split(".")[1]
    if part not in FLOOR_OF or target not in FLOOR_OF:
        yield f"{part!r} or {target!r} has no place in the layers; give it one in FLOORS"
    elif part != target and FLOOR_OF[target] >= FLOOR_OF[part]:
        yield f"{part} must not import {target}: imports only point down"


def _library_complaints(module: str, part: str, item: Import) -> Iterator[str]:
    if part == "plan" and item.library not in PLAN_MAY_IMPORT:
        yield f"plan must not import {item.library}: a plan is a pure value"
    if item.library in ROOMS and not _is_in(module, ROOMS[item.library]):
        yield f"{item.library} belongs in {', '.join(ROOMS[item.library]) or 'no module'}"
    if item.library == "numcodecs":
        if (item.target, item.name) != ("numcodecs", "blosc"):
            yield "only `from numcodecs import blosc`: its registry loads a pickle codec"
        if not item.late:
            yield "numcodecs is imported late, inside a function"


def _is_in(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PROJECT_ROOT)))
def test_imports_only_point_down_and_libraries_stay_in_their_rooms(path: Path) -> None:
    module = module_name(path)
    assert problems(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("plan.epoch", "from streaming_balance.storage import index", "only point down"),
        ("storage.index", "import streaming_balance.plan.keys", "only point down"),
        ("training.loader", "from streaming_balance.ingest import pack", "only point down"),
        ("config", "from streaming_balance.cli.app import main", "only point down"),
        ("report.page", "from streaming_balance.demo import cohort", "only point down"),
        ("novel.thing", "import streaming_balance.errors", "no place in the layers"),
        ("plan.epoch", "import os", "a pure value"),
        ("plan.epoch", "def later():\n    import time", "a pure value"),
        ("plan.epoch", "from random import Random", "a pure value"),
        ("plan.epoch", "import torch", "a pure value"),
        ("storage.reader", "import torch.utils.data", "torch belongs in"),
        ("stream.reservoir", "import torch", "torch belongs in"),
        ("training.loader", "import torchdata.nodes", "torchdata belongs in"),
        ("storage.tar", "import webdataset", "no module"),
        ("demo.cohort", "import nibabel", "nibabel belongs in ingest"),
        ("storage.index", "import pydicom", "pydicom belongs in ingest"),
        ("demo.pictures", "import matplotlib.pyplot", "matplotlib belongs in report"),
        ("ingest.tables", "def f():\n    import imblearn", "imblearn belongs in tabular"),
        ("tabular", "from streaming_balance.config import load_config", "only point down"),
        ("storage.codecs", "from numcodecs import blosc", "imported late"),
        ("storage.codecs", "def f():\n    import numcodecs", "only `from numcodecs import blosc`"),
        ("storage.codecs", "def f():\n    from numcodecs import registry", "only `from numcodecs"),
        (
            "ingest.pack",
            "def f():\n    from numcodecs import blosc",
            "numcodecs belongs in storage",
        ),
        ("training.loader", "import pickle", "no module"),
        ("training.loader", "from . import buffers", "relative import"),
        ("training.loader", "from streaming_balance import open_shards", "package root"),
        ("training.loader", "import streaming_balance", "package root"),
    ],
)
def test_a_module_that_breaks_a_rule_is_named(module: str, source: str, complaint: str) -> None:
    found = problems(module, source)
    assert any(complaint in problem for problem in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("storage.codecs", "def f():\n    from numcodecs import blosc"),
        ("training.loader", "import torch\nfrom streaming_balance.plan.epoch import BalancedPlan"),
        ("plan.epoch", "import numpy as np\nfrom collections.abc import Sequence"),
        ("cli.app", "import typer\nfrom streaming_balance.demo.cohort import make_cohort"),
    ],
)
def test_a_module_that_keeps_the_rules_is_left_alone(module: str, source: str) -> None:
    assert problems(module, source) == []


@pytest.mark.parametrize(
    "path",
    # `stream` is a function of the root, too, and importing the package would hide it.
    [path for path in SOURCES if path.name == "__init__.py" and path.parent.name != "stream"],
    ids=lambda path: str(path.relative_to(PROJECT_ROOT)),
)
def test_a_package_init_holds_its_docstring_and_nothing_else(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        (PACKAGE, ("torch", "pyarrow", "nibabel", "matplotlib", "numcodecs", "yaml", "typer")),
        (f"{PACKAGE}.plan.keys", ("torch", "pyarrow", "yaml")),
        (f"{PACKAGE}.tabular", ("torch", "pyarrow", "imblearn", "sklearn", "scipy")),
        (f"{PACKAGE}.cli.app", ("torch", "pyarrow", "nibabel", "matplotlib", "numcodecs")),
    ],
)
def test_importing_stays_light(module: str, heavy: tuple[str, ...]) -> None:
    program = (
        f"import sys, {module}; print(*sorted(name for name in {heavy!r} if name in sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=PROJECT_ROOT,
    )
    assert answer.stdout.split() == []
