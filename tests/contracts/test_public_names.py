"""The public names, their signatures and the command line are frozen in a golden file.

A difference is not wrong in itself: it is something users will notice, so it must be meant, be in
CHANGELOG.md, and be written down by running this file with UPDATE_GOLDEN=1 in the environment.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from streaming_balance.cli.app import app

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "public_api.txt"
HOW_TO_UPDATE = """\
The public names or the command line changed. If that is meant, say so in CHANGELOG.md, run
    UPDATE_GOLDEN=1 .venv/bin/python -m pytest tests/contracts/test_public_names.py
and commit tests/golden/public_api.txt with the change."""


def root() -> Any:
    return importlib.import_module("streaming_balance")


def described_names() -> Iterator[str]:
    """One line per public name, and one per public member of a class of ours."""
    for name in sorted(root().__all__):
        value = getattr(root(), name)
        yield f"{name}{signature(value)}"
        if inspect.isclass(value):
            for member in our_members(value):
                yield f"    .{member}{signature(inspect.getattr_static(value, member))}"


def our_members(kind: type) -> list[str]:
    """Public members a class has from this package, not from the libraries it builds on."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("streaming_balance")]
    return sorted({name for base in ours for name in vars(base) if not name.startswith("_")})


def signature(value: Any) -> str:
    """The parameters of whatever can be called, a colon and the type of what cannot."""
    if isinstance(value, property) or inspect.isdatadescriptor(value):
        return ": value"
    if isinstance(value, staticmethod | classmethod):
        return f"{inspect.signature(value.__func__)}  [{type(value).__name__}]"
    if inspect.isclass(value) and issubclass(value, Exception):
        return "(" + ", ".join(base.__name__ for base in value.__bases__) + ")  [error]"
    if callable(value):
        return str(inspect.signature(value))
    return f": {type(value).__name__}"


def commands() -> dict[str, Any]:
    """The commands by name."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def described_commands() -> Iterator[str]:
    """One line per command and one per argument or option."""
    for name, command in sorted(commands().items()):
        yield f"$ streaming-balance {name}"
        for parameter in command.params:
            spelled = ", ".join([*parameter.opts, *parameter.secondary_opts])
            is_option = parameter.param_type_name == "option"
            default = parameter.default
            shown = str(default) if isinstance(default, Path) else repr(default)
            state = "required" if parameter.required else f"default {shown}"
            yield f"    {spelled if is_option else parameter.name.upper()}: {state}"


def test_public_names_and_command_line_are_as_frozen() -> None:
    found = "\n".join([*described_names(), "", *described_commands()]) + "\n"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(found, encoding="utf-8")
    frozen = GOLDEN.read_text(encoding="utf-8")
    difference = list(
        difflib.unified_diff(frozen.splitlines(), found.splitlines(), "frozen", "found", n=0)
    )
    assert not difference, "\n".join([HOW_TO_UPDATE, *difference])


def test_every_public_name_has_a_docstring() -> None:
    silent = [name for name in root().__all__ if not inspect.getdoc(getattr(root(), name))]
    assert silent == []


def test_the_root_lists_its_names_and_refuses_others() -> None:
    assert set(root().__all__) <= set(dir(root()))
    assert not hasattr(root(), "no_such_name")


def test_the_command_line_offers_every_argument_of_its_python_face_with_the_same_default() -> None:
    write_shards = inspect.signature(root().write_shards).parameters
    pack = {parameter.name: parameter for parameter in commands()["pack"].params}
    assert set(write_shards) - {"progress"} == set(pack) - {"as_json"}
    for name in set(pack) - {"as_json", "source", "out"}:
        assert pack[name].default == write_shards[name].default, name
