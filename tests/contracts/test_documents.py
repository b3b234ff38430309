"""Every block of README and docs runs, in order, as a reader would run it; the file map is true.

A document's blocks share a folder that holds `patients/` (a generated cohort), `cohort/` (the same,
packed), `brats.yaml` and nothing else. Blocks marked `python` and `bash` are run; whatever cannot
be run here (torchrun, git clone) is marked `text`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from streaming_balance.cli.app import run
from streaming_balance.demo.cohort import make_cohort
from streaming_balance.ingest.pack import write_shards

PROJECT_ROOT = Path(__file__).resolve().parents[2]
README = PROJECT_ROOT / "README.md"
DOCUMENTS = [README, *sorted((PROJECT_ROOT / "docs").glob("*.md"))]
PROGRAM = "streaming-balance"

# In the order of the file map; `*.md` and the like stand for themselves.
FILES_WORTH_A_LINE = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt"),
    *("pyproject.toml", ".ci/run", "docs/*.md", "shards/*.md", "examples/*", "tools/*.py"),
    *("streaming_balance/*.py", "streaming_balance/plan/*.py", "streaming_balance/storage/*.py"),
    *("streaming_balance/stream/*.py", "streaming_balance/ingest/*.py"),
    "streaming_balance/training/*.py",
    *("streaming_balance/report/*.py", "streaming_balance/demo/*.py", "streaming_balance/cli/*.py"),
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MAP_HEADING = "## Files"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block of a document."""

    language: str
    """What stands after the opening fence."""
    text: str
    """Its lines."""
    line: int
    """Line of the document its text begins on, from 1."""


def blocks_of(document: Path) -> Iterator[Block]:
    text = document.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        yield Block(language=match[1], text=match[2], line=line)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    make_cohort(folder / "patients", patients=57, shape=(16, 16, 16))
    split = "train=0.7,val=0.15,test=0.15"
    write_shards(folder / "patients", folder / "cohort", split=split)
    return folder


# torchdata 0.11 calls what newer releases of torch would rather not have called.
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
# webdataset leaves the shards it read open.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_runs(
    document: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(prepared, folder)
    shutil.copy(PROJECT_ROOT / "examples" / "brats.yaml", folder)
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(document):
        place = f"{document.name}:{block.line}"
        assert block.language, f"{place}: a block without a language; write text if it cannot run"
        if block.language == "python":
            # Line numbers of a traceback are those of the document.
            exec(compile("\n" * (block.line - 1) + block.text, str(document), "exec"), names)
        elif block.language == "bash":
            run_commands(block, place, capsys)
    capsys.readouterr()


def test_the_example_trains_and_goes_on_where_it_stopped(prepared: Path, tmp_path: Path) -> None:
    example = [sys.executable, str(PROJECT_ROOT / "examples" / "train_ddp.py")]
    told = []
    for epochs in ("1", "3"):
        answer = subprocess.run(
            [*example, str(prepared / "cohort"), "--epochs", epochs],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr
        told += [line.partition(":")[0] for line in answer.stdout.splitlines()]
    assert told == ["epoch 1 of 1", "epoch 2 of 3", "epoch 3 of 3"]


def test_the_packing_tool_is_the_command(prepared: Path, tmp_path: Path) -> None:
    tool = [sys.executable, str(PROJECT_ROOT / "tools" / "pack_shards.py")]
    answer = subprocess.run(
        [*tool, str(prepared / "patients"), "--out", str(tmp_path / "out"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(answer.stdout)["packed"] == 57
    wrong = subprocess.run([*tool, "--no-such-option"], capture_output=True, check=False)
    assert wrong.returncode == 2


def run_commands(block: Block, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the program's commands; check that make's targets are there."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] in (PROGRAM, "make"), f"{place}: {words[0]!r} is not run here; mark it text"
        if words[0] == PROGRAM:
            status = run(words[1:])
            assert status == 0, f"{place}: {line}\n{capsys.readouterr().err}"
        else:
            targets = re.findall(r"^(\w+):", (PROJECT_ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(words[1:]) <= set(targets), f"{place}: {line}: no such target"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing == []


def mapped_files() -> dict[str, str]:
    """README's file map: path -> what it says about it."""
    lines = [line.partition(" ") for line in map_block()[2].splitlines() if line.strip()]
    return {name: said.strip() for name, _, said in lines}


def map_block() -> re.Match[str]:
    """The fenced block under README's heading of the file map."""
    text = README.read_text(encoding="utf-8")
    match = _FENCE.search(text, text.index(_MAP_HEADING))
    assert match is not None
    return match


def true_files() -> dict[str, str]:
    """What a newcomer may open: modules by their docstrings, other files as README has them."""
    said = mapped_files()
    files = {}
    for pattern in FILES_WORTH_A_LINE:
        for path in sorted(PROJECT_ROOT.glob(pattern)):
            name = path.relative_to(PROJECT_ROOT).as_posix()
            is_bare = path.name == "__init__.py" and path.parent.parent != PROJECT_ROOT
            if path.suffix == ".py" and not is_bare:
                files[name] = first_sentence(path)
            elif path.is_file() and not is_bare:
                files[name] = said.get(name, "?")
    return files


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "?"
    return re.split(r"\.(?:\s|$)|\n\n", docstring)[0].replace("\n", " ")


def test_the_file_map_has_a_true_line_for_every_file() -> None:
    files = true_files()
    if os.environ.get("UPDATE_GOLDEN") == "1":
        width = max(map(len, files)) + 2
        lines = "".join(f"{name:{width}}{said}\n" for name, said in files.items())
        text = README.read_text(encoding="utf-8")
        start, stop = map_block().span(2)
        README.write_text(text[:start] + lines + text[stop:], encoding="utf-8")
    assert mapped_files() == files, (
        "README's file map is not what lies here; run `UPDATE_GOLDEN=1 .venv/bin/python -m pytest "
        "tests/contracts/test_documents.py` and commit README.md"
    )
    unsaid = [name for name, said in files.items() if said == "?"]
    assert unsaid == [], "say in README's file map what these are"
