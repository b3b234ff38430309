"""What names shards, and how they open: patterns as bash has them, nothing started unasked."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import random
import subprocess
import sys
import threading
import zipfile
from contextlib import suppress
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.stream.patterns import expand_braces
from streaming_balance.stream.rules import TarRules
from streaming_balance.stream.sources import expand
from tests.stream.tars import COHORT, Trickle, contents, put, read_all, tar_of


def shown(urls: Any, *, allow_pipe: bool = False) -> list[str]:
    """What messages call the shards of `urls`."""
    return [source.shown for source in expand(urls, allow_pipe=allow_pipe)]


PATTERNS = [
    *(
        "a",
        "{a,b}",
        "{a,b}{c,d}",
        "x{a,b,}y",
        "{a,{b,c}d}e",
        "{{a,b},c}",
        "{a}",
        "{}",
        "a{b",
        "a}b",
    ),
    *(
        "{0..3}",
        "{3..0}",
        "{000..012}",
        "{8..11}",
        "{08..11}",
        "{0..10..3}",
        "{10..0..-3}",
        "{-2..2}",
    ),
    *(
        "{1..2}{a,b}-{01..02}",
        "{-01..1}",
        "{5..5}",
        "{a..}",
        "{1...3}",
        "{0..4..0}",
        "{a,b}{c",
        "{,}",
    ),
]


def bash_expansion(pattern: str) -> list[str]:
    """What bash makes of a brace pattern."""
    answer = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True
    )
    return answer.stdout.splitlines()


@pytest.mark.skipif(which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_braces_are_expanded_as_bash_does(pattern: str) -> None:
    expected = bash_expansion(pattern)
    # bash leaves out empty words, which can be no shards.
    assert [text for text in expand_braces(pattern) if text] == [text for text in expected if text]


@pytest.mark.skipif(which("bash") is None, reason="bash is not installed")
@settings(max_examples=60)
@given(st.lists(st.from_regex(r"[ab{},0-2.]{1,9}", fullmatch=True), min_size=5, max_size=5))
def test_any_braces_are_expanded_as_bash_does(patterns: list[str]) -> None:
    marked = [f"<{pattern}>" for pattern in patterns if "$" not in pattern]
    quoted = [pattern.replace("<", "\\<").replace(">", "\\>") for pattern in marked]
    expected = bash_expansion(" ".join(quoted))
    assert [text for pattern in marked for text in expand_braces(pattern)] == expected


@pytest.mark.parametrize(
    "pattern", ["{0..9999999}", "{0..999}{0..1000}", "{0..999999999999999999}"]
)
def test_patterns_for_over_a_million_shards_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="over 1,000,000 shards"):
        expand_braces(pattern)


def test_lists_of_over_a_million_shards_are_refused() -> None:
    with pytest.raises(ConfigError, match="names over 1,000,000 shards"):
        expand(["a-{0..600000}.tar", "b-{0..600000}.tar"])


def test_endless_braces_are_refused() -> None:
    with pytest.raises(ConfigError, match="over 100 braces"):
        expand("{1..1}" * 500)
    with pytest.raises(ConfigError, match="over 100 braces"):
        expand("{a," * 500 + "}" * 500)


def test_globs_are_sorted_and_a_list_keeps_its_order(tmp_path: Path) -> None:
    for name in ("b-2.tar", "b-10.tar", "a-1.tar", "deep/er/c.tar", "odd[1].tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [Path(name).name for name in shown(f"{tmp_path}/b-*.tar")]
    assert names == ["b-10.tar", "b-2.tar"]
    assert shown([f"{tmp_path}/b-2.tar", f"{tmp_path}/a-?.tar"]) == [
        f"{tmp_path}/b-2.tar",
        f"{tmp_path}/a-1.tar",
    ]
    assert shown(tmp_path / "a-1.tar") == [f"{tmp_path}/a-1.tar"]
    assert shown(f"{tmp_path}/**/c.tar") == [f"{tmp_path}/deep/er/c.tar"]
    assert shown(f"{tmp_path}/{{b-2,a-1}}.tar") == [f"{tmp_path}/b-2.tar", f"{tmp_path}/a-1.tar"]
    assert shown(f"file://{tmp_path}/a-1.tar") == [f"{tmp_path}/a-1.tar"]
    # A file that exists is taken as it is, whatever its name would mean as a pattern.
    assert shown(f"{tmp_path}/odd[1].tar") == [f"{tmp_path}/odd[1].tar"]


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "urls is empty"),
        ("", "an entry must be a path"),
        ("nowhere/*.tar", "matches no file"),
        (["a.tar", "a.tar"], "names 'a.tar' twice"),
        (["-", "-"], "standard input>' twice"),
        ("s3://bucket/a.tar", r"s3:// is not read directly.*pipe:aws s3 cp"),
        ("pipe:cat a.tar", r"'pipe:cat a.tar', which would start a program.*allow_pipe=True"),
        (None, "urls is None"),
        (b"a.tar", "urls is b'a.tar'"),
        ([3], "urls has 3"),
        ({"a.tar": 1}, "urls is {"),
        ("a\0.tar", "an entry must be"),
        ("\ud800.tar", "half a character"),
        (Path("\ud800.tar"), "half a character"),
        ("pipe:cat \ud800.tar", "half a character"),
        ("file:///%00.tar", "names no file"),
        ("file:", "names no file"),
        ("file://[x/a.tar", "is no URL"),
    ],
)
def test_what_names_no_shard_is_refused(urls: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(urls)


def test_the_same_file_object_twice_is_refused() -> None:
    file = io.BytesIO()
    with pytest.raises(ConfigError, match="twice"):
        expand([file, file])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "without a command"),
        ("cat 'a.tar", "cannot be split"),
        ("cat a.tar.gz | gunzip", r"with '\|', which only a shell understands"),
        ("cat a.tar > /dev/stdout", "only a shell"),
    ],
)
def test_commands_that_need_a_shell_are_refused_with_the_way_to_ask_for_one(
    command: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(f"pipe:{command}", allow_pipe=True)


SECRETS = {
    "https://me:hunter2@host/a.tar?X-Amz-Signature=hunter2": "https://host/a.tar?...",
    "pipe:curl https://me:hunter2@host/a.tar?token=hunter2": "pipe:curl https://host/a.tar?...",
    "pipe:curl -H 'Authorization: hunter2' https://host/a.tar": "pipe:curl ... https://host/a.tar",
    "pipe:fetch --password hunter2": "pipe:fetch ...",
    "pipe:fetch --password ./hunter2": "pipe:fetch ...",
    "pipe:fetch --password hunter2 shards/a.tar": "pipe:fetch ... shards/a.tar",
    "pipe:fetch --password=hunter2/a": "pipe:fetch ...",
    "pipe:fetch hunter2": "pipe:fetch ...",
}


@pytest.mark.parametrize(("url", "expected"), SECRETS.items())
def test_secrets_in_addresses_are_never_shown(url: str, expected: str) -> None:
    (source,) = expand(url, allow_pipe=True)
    assert source.shown == expected
    assert "hunter2" not in repr(source)
    with pytest.raises(ConfigError) as caught:
        expand([url, url], allow_pipe=True)
    assert "hunter2" not in str(caught.value)


def test_schemes_and_pipes_not_allowed_show_no_secrets() -> None:
    for url in ("s3://me:hunter2@bucket/a.tar", "pipe:curl -u me:hunter2 https://host/a.tar"):
        with pytest.raises(ConfigError) as caught:
            expand(url)
        assert "hunter2" not in str(caught.value)


def test_file_objects_are_read_from_where_they_stand_and_left_open(tmp_path: Path) -> None:
    content = tar_of(COHORT)
    with Path(put(tmp_path, b"preface" + content)).open("rb") as file:
        file.seek(7)
        samples, counts = read_all(file)
        assert not file.closed
    assert contents(samples) == COHORT
    assert counts.bytes_read == len(content)
    assert samples[0].url == f"{tmp_path}/shard.tar"
    assert samples[0].place is None


@pytest.mark.parametrize("step", [1, 7, 511, 512, 513, 70_000])
def test_bytes_may_come_in_pieces_of_any_size(step: int) -> None:
    for file in (Trickle(tar_of(COHORT), step), io.BufferedReader(Trickle(tar_of(COHORT), step))):
        assert contents(read_all(file)[0]) == COHORT


def test_text_files_and_files_that_fail_are_refused() -> None:
    with pytest.raises(ConfigError, match="gives str, not bytes"):
        read_all(io.StringIO("P1.cls"))
    closed = io.BytesIO()
    closed.close()
    with pytest.raises(ShardError, match="closed file"):
        read_all(closed)


def test_a_tar_opened_as_text_is_refused_with_how_to_open_it(tmp_path: Path) -> None:
    with (
        Path(put(tmp_path, tar_of({"P1.cls": b"\xff"}))).open(encoding="utf-8") as file,
        pytest.raises(ConfigError, match="open it in binary mode"),
    ):
        read_all(file)


@pytest.mark.parametrize("module", [gzip, lzma], ids=["gzip", "lzma"])
def test_damage_that_a_file_object_finds_is_damage_of_the_shard(module: Any) -> None:
    members = {f"P{number}.cls": random.Random(number).randbytes(9000) for number in range(20)}
    whole = module.compress(tar_of(members))
    # Far back in a stored block or in the index behind: what is read ahead is sound.
    for at in range(20, len(whole), len(whole) // 150):
        damaged = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
        file = module.open(io.BytesIO(damaged))
        with suppress(ShardError):
            assert contents(read_all(file)[0]) == members
        _, counts = read_all(module.open(io.BytesIO(damaged)), TarRules(on_error="skip"))
        assert counts.shards_read + counts.shards_lost == 1


def test_damage_in_a_zip_file_is_damage_of_the_shard() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.tar", tar_of({"P1.cls": b"1" * 9000}))
    damaged = file.getvalue().replace(b"1" * 9000, b"1" * 8999 + b"2")
    with (
        zipfile.ZipFile(io.BytesIO(damaged)) as archive,
        archive.open("a.tar") as file_in_it,
        pytest.raises(ShardError, match="cannot be read: Bad CRC-32"),
    ):
        read_all(file_in_it)


def test_a_file_object_without_a_name_is_called_by_its_kind() -> None:
    file = gzip.open(io.BytesIO(gzip.compress(b"no tar")))  # noqa: SIM115 - of memory
    assert shown(file) == ["<GzipFile>"]


def test_standard_input_is_a_shard(tmp_path: Path) -> None:
    program = (
        "from streaming_balance.stream.tarstream import read_samples\n"
        "print(*[sample.key for sample in read_samples('-')])"
    )
    with Path(put(tmp_path, tar_of(COHORT))).open("rb") as file:
        answer = subprocess.run(
            [sys.executable, "-c", program], stdin=file, capture_output=True, text=True, check=True
        )
    assert answer.stdout.split() == ["P1", "P2", "P3"]
    cut = subprocess.run(
        [sys.executable, "-c", program],
        input=tar_of(COHORT)[:4096],
        capture_output=True,
        check=False,
    )
    assert b"<standard input>: at byte 3072" in cut.stderr


def test_a_fifo_is_read_as_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(tar_of(COHORT),))
    writer.start()
    samples, _ = read_all(str(path))
    writer.join()
    assert contents(samples) == COHORT
    assert samples[0].place is None


def test_a_folder_is_refused_with_what_to_write_instead(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"is a folder. Name the tars in it: .*/\*\.tar"):
        read_all(str(tmp_path))
