"""A chain of stages over tars: what goes on, restored at any sample, counted to the last one."""

from __future__ import annotations

import io
import itertools
import json
import os
import shlex
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streaming_balance as sb
from streaming_balance.errors import ConfigError, ResumeError, ShardError
from streaming_balance.stream.pipeline import Stream
from tests.stream.tars import put, tar_of

LABELS = {"HGG": 18, "LGG": 6}


def write_tar(path: Path, samples: list[tuple[str, str]], *, side: int = 8) -> None:
    """Write a tar of volumes, each of which no other has, with label and JSON."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, label in samples:
            volume = io.BytesIO()
            np.save(volume, np.full((side, side, side), int(key[1:]), np.int64))
            for name, stored in (
                ("image.npy", volume.getvalue()),
                ("cls", str(["HGG", "LGG"].index(label)).encode()),
                ("json", json.dumps({"grade": label}).encode()),
            ):
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(stored)
                tar.addfile(info, io.BytesIO(stored))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples in four tars, classes in blocks."""
    folder = tmp_path_factory.mktemp("stream")
    labels = [label for label, count in LABELS.items() for _ in range(count)]
    samples = [(f"P{n:02d}", label) for n, label in enumerate(labels)]
    for number in range(4):
        write_tar(folder / f"s-{number}.tar", samples[number * 6 : number * 6 + 6])
    return folder


def stream_of(shards: Path, **options: Any) -> Stream:
    """Stream all tars."""
    return sb.stream(f"{shards}/s-*.tar", label="json:grade", seed=3, **options)


CHAINS: dict[str, Callable[[Stream], Stream]] = {
    "plain": lambda stream: stream,
    "accept": lambda stream: stream.accept({"HGG": 1, "LGG": 1}, frequencies=LABELS),
    "repeat": lambda stream: stream.repeat(
        {"HGG": 1, "LGG": 1}, frequencies=LABELS, buffer_bytes=1 << 20
    ),
    "replay": lambda stream: stream.replay(
        {"HGG": 1, "LGG": 1}, batch_size=4, buffer_bytes=60_000, per_read=2.0
    ),
    "reservoir": lambda stream: stream.reservoir({"HGG": 4, "LGG": 4}),
    "windows": lambda stream: stream.reservoir({"HGG": 2, "LGG": 2}, window=7),
    "shuffle": lambda stream: stream.shuffle(40_000),
    "batch": lambda stream: stream.decode().batch(5),
    "four": lambda stream: (
        stream.shuffle(30_000)
        .accept({"HGG": 3, "LGG": 2}, frequencies=LABELS)
        .repeat({"HGG": 1, "LGG": 1}, frequencies={"HGG": 3, "LGG": 2}, buffer_bytes=40_000)
        .replay({"HGG": 1, "LGG": 1}, batch_size=3, buffer_bytes=60_000)
        .decode()
    ),
    "four, then batches": lambda stream: (
        stream.shuffle(30_000)
        .repeat({"HGG": 1, "LGG": 1}, frequencies=LABELS, buffer_bytes=50_000)
        .shuffle(20_000)
        .reservoir({"HGG": 9, "LGG": 9}, window=11)
        .decode()
        .batch(4)
    ),
}


def keys(item: dict[str, Any]) -> Any:
    """Say which samples went on."""
    return item["__key__"]


def passes(stream: Stream, count: int) -> list[Any]:
    """Give what goes on in some passes, a mark between them."""
    got: list[Any] = []
    for _ in range(count):
        got += [keys(item) for item in stream]
        got.append("end")
    return got


def reconcile(stream: Stream) -> None:
    """Check that whatever each stage read is accounted for, and is what the one before gave."""
    stats = stream.stats()
    assert stats["read"]["samples_read"] == stats["read"]["samples_delivered"]
    for stage in stats["stages"]:
        assert stage["read"] == stage["delivered"] + stage["rejected"] + stage["buffered"]


@pytest.mark.parametrize("name", CHAINS)
def test_restoring_anywhere_gives_what_would_have_followed(shards: Path, name: str) -> None:
    straight = passes(CHAINS[name](stream_of(shards)), 2)
    total = sum(entry != "end" for entry in straight)
    for stop in range(total + 1):
        stream = CHAINS[name](stream_of(shards))
        got: list[Any] = []
        while sum(entry != "end" for entry in got) < stop:
            for item in stream:
                got.append(keys(item))
                if sum(entry != "end" for entry in got) == stop:
                    break
            else:
                got.append("end")
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = CHAINS[name](stream_of(shards))
        resumed.load_state_dict(state)
        while got.count("end") < 2:
            got += [*(keys(item) for item in resumed), "end"]
        assert got == straight
        assert resumed.stats()["stages"] == stream_after(shards, name).stats()["stages"]
        reconcile(resumed)


def stream_after(shards: Path, name: str) -> Stream:
    """Give a stream that read two passes without a stop."""
    stream = CHAINS[name](stream_of(shards))
    passes(stream, 2)
    return stream


def test_samples_hold_the_very_bytes(shards: Path) -> None:
    for number, sample in enumerate(stream_of(shards).decode()):
        assert sample["__key__"] == f"P{number:02d}"
        assert sample["image.npy"].tolist() == np.full((8, 8, 8), number).tolist()
        assert (sample["cls"], sample["__label__"]) in ((0, "HGG"), (1, "LGG"))
        assert sample["json"] == {"grade": sample["__label__"]}
    assert number == 23


def test_shares_are_those_asked_for(shards: Path) -> None:
    accepted = Counter(s["__label__"] for s in CHAINS["accept"](stream_of(shards)))
    assert accepted == {"HGG": 6, "LGG": 6}
    repeated = Counter(s["__label__"] for s in CHAINS["repeat"](stream_of(shards)))
    assert repeated == {"HGG": 18, "LGG": 18}
    batches = [batch["__label__"] for batch in CHAINS["replay"](stream_of(shards))]
    assert Counter(batches[-1]) == {"HGG": 2, "LGG": 2}


def test_a_volume_that_is_thinned_out_is_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = [0]

    def counted(read: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            got = read(*arguments)
            total[0] += got if isinstance(got, int) else len(got)
            return got

        return call

    monkeypatch.setattr(os, "pread", counted(os.pread))
    monkeypatch.setattr(os, "preadv", counted(os.preadv))
    samples = [(f"P{n:02d}", "LGG" if n % 4 == 3 else "HGG") for n in range(24)]
    write_tar(tmp_path / "s-0.tar", samples, side=32)
    # Nobody of HGG goes on: 18 of 24 volumes of 256 KiB stay where they are.
    stream = stream_of(tmp_path).accept({"HGG": 0, "LGG": 1}, frequencies=LABELS)
    assert len(list(stream)) == 6
    volume = 32**3 * 8
    assert 6 * volume < total[0] < 8 * volume


def test_every_pass_has_an_order_of_its_own_and_the_seed_counts(shards: Path) -> None:
    def order(seed: int) -> list[Any]:
        return passes(sb.stream(f"{shards}/s-*.tar", seed=seed).shuffle(1 << 20), 2)

    first, second = order(3)[:24], order(3)[25:49]
    assert sorted(first) == sorted(second)
    assert first != second != order(4)[25:49]
    assert order(3) == order(3)


def test_what_a_function_of_the_user_fails_on_comes_again(shards: Path) -> None:
    failing = True

    def flaky(sample: dict[str, Any]) -> dict[str, Any]:
        if failing and sample["__key__"] == "P03":
            raise ValueError("no atlas")
        return sample

    stream = stream_of(shards).map(flaky)
    got: list[str] = []
    with pytest.raises(ValueError, match="no atlas"):
        got.extend(keys(sample) for sample in stream)
    failing = False
    got = ["P00", "P01", "P02"]
    got += [keys(sample) for sample in stream]
    assert got == [f"P{n:02d}" for n in range(24)]


def test_what_passed_by_is_kept_whole_in_the_state_and_not_read_twice(shards: Path) -> None:
    def chain() -> Stream:
        stored = (shards / "s-0.tar").read_bytes()
        return sb.stream(io.BytesIO(stored)).shuffle(20_000)

    straight = passes(chain(), 1)
    stream = chain()
    got = [keys(sample) for sample in itertools.islice(stream, 2)]
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = chain()
    resumed.load_state_dict(state)
    assert [*got, *passes(resumed, 1)] == straight
    with pytest.raises(ConfigError, match="passed by once"):
        passes(resumed, 1)


def test_a_killed_producer_is_an_error_and_not_an_end(shards: Path) -> None:
    script = 'import sys, os, signal; b = open(sys.argv[1], "rb").read(); '
    script += "os.write(1, b[: len(b) // 2 // 512 * 512]); os.kill(os.getpid(), signal.SIGKILL)"
    command = shlex.join([sys.executable, "-c", script, str(shards / "s-0.tar")])
    stream = iter(sb.stream(f"pipe:{command}", allow_pipe=True))
    got: list[str] = []
    # One sentence ends before the next begins.
    with pytest.raises(ShardError, match=r"killed by signal 9[^.]*\. [A-Z]"):
        got.extend(sample["__key__"] for sample in stream)
    assert got[:1] == ["P00"]


def test_a_cut_shard_is_an_error_or_counted(shards: Path, tmp_path: Path) -> None:
    stored = (shards / "s-1.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(stored[: len(stored) // 2 // 512 * 512])
    with pytest.raises(ShardError, match=r"cut\.tar"):
        list(sb.stream(tmp_path / "cut.tar"))
    skipping = sb.stream(tmp_path / "cut.tar", on_error="skip").shuffle(1 << 20)
    got = list(skipping)
    read = skipping.stats()["read"]
    assert read["samples_delivered"] == len(got) < 6
    assert read["shards_lost"] == 1
    assert read["samples_read"] == read["samples_delivered"] + read["samples_skipped"]


def test_a_state_of_another_stream_is_refused_by_field(shards: Path) -> None:
    state = stream_of(shards).shuffle(1 << 20).state_dict()
    with pytest.raises(ResumeError, match=r"seed: state has 3, stream has 4"):
        sb.stream(f"{shards}/s-*.tar", seed=4).shuffle(1 << 20).load_state_dict(state)
    with pytest.raises(ResumeError, match=r"stages: state has \['shuffle'\], stream has \[\]"):
        stream_of(shards).load_state_dict(state)
    with pytest.raises(ResumeError, match="shards"):
        sb.stream(f"{shards}/s-[01].tar", seed=3).shuffle(1 << 20).load_state_dict(state)
    with pytest.raises(ResumeError, match="no state"):
        stream_of(shards).load_state_dict({"version": 7})


def test_a_held_sample_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"P{n:02d}", "HGG") for n in range(6)])
    stream = sb.stream(tmp_path / "a.tar").shuffle(30_000)
    next(iter(stream))
    state = stream.state_dict()
    write_tar(tmp_path / "a.tar", [(f"P{n + 50:02d}", "HGG") for n in range(6)])
    with pytest.raises(ResumeError, match="was changed"):
        sb.stream(tmp_path / "a.tar").shuffle(30_000).load_state_dict(state)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda s: s.decode().shuffle(1 << 20), "before decode"),
        (lambda s: s.batch(2).map(lambda x: x), "before batch"),
        (lambda s: s.batch(2).batch(2), "gives batches already"),
        (lambda s: s.replay({"0": 1}, batch_size=2).batch(2), "gives batches already"),
        (lambda s: s.replay({"0": 1}, batch_size=2).shuffle(1 << 20), "replay gives batches"),
        (lambda s: s.batch(0), "batch_size is 0"),
        (lambda s: s.share(2, 2), "part 2 of 2"),
        (lambda s: s.set_epoch(-1), "epoch is -1"),
    ],
    ids=["decode", "map", "batch", "replay", "shuffle", "size", "part", "epoch"],
)
def test_a_chain_that_makes_no_sense_is_refused(
    shards: Path, build: Callable[[Stream], object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        build(stream_of(shards))


def test_labels_that_are_not_there_are_named_with_sample_and_byte(shards: Path) -> None:
    with pytest.raises(ConfigError, match="no field 'label'"):
        list(sb.stream(f"{shards}/s-0.tar", label="label").accept({"1": 1}))
    with pytest.raises(ShardError, match=r"P00.*byte 0.*'site'"):
        list(sb.stream(f"{shards}/s-0.tar", label="json:site").accept({"1": 1}))
    with pytest.raises(ConfigError, match="asks for labels"):
        sb.stream(f"{shards}/s-0.tar", label=None).accept({"1": 1})


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 7])
def test_readers_share_the_stream_without_reading_anything_twice(
    shards: Path, readers: int
) -> None:
    parts = [stream_of(shards).share(number, readers) for number in range(readers)]
    got = [passes(part, 1)[:-1] for part in parts]
    assert sorted(itertools.chain(*got)) == [f"P{n:02d}" for n in range(24)]
    if readers > 4:
        # Fewer shards than readers: samples are dealt.
        assert {len(part) for part in got} <= {24 // readers, -(-24 // readers)}


def test_pipes_are_not_dealt_sample_by_sample(shards: Path) -> None:
    pipes = sb.stream(f"pipe:cat {shards}/s-0.tar", allow_pipe=True)
    with pytest.raises(ConfigError, match="Use at most 1 readers"):
        pipes.share(0, 2)


@pytest.mark.parametrize(
    "script",
    [
        "import streaming_balance as sb; s = sb.stream",
        "from streaming_balance import stream as s",
        "import streaming_balance.stream.accept, streaming_balance as sb; s = sb.stream",
        "import streaming_balance as sb; sb.stream; import streaming_balance.stream.shuffle as m;"
        " s = sb.stream; assert m.Shuffle",
    ],
)
def test_the_name_is_the_function_and_the_package_in_any_order_of_imports(
    shards: Path, script: str
) -> None:
    use = f"; assert len(list(s({str(shards / 's-0.tar')!r}))) == 6"
    ended = subprocess.run(
        [sys.executable, "-c", script + use], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_a_stream_reads_the_files_it_was_given_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("mine", "others"):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            content = tar_of({f"{name}.cls": folder.encode()})
            put(tmp_path / folder, content, f"{name}.tar")
    monkeypatch.chdir(tmp_path / "mine")
    samples = iter(sb.stream("*.tar"))
    found = [next(samples)]
    before, after = (sb.stream("*.tar").shuffle(1 << 20) for _ in range(2))
    next(iter(before))
    monkeypatch.chdir(tmp_path / "others")
    after.load_state_dict(before.state_dict())
    assert [sample["cls"] for sample in after] == [b"mine"]
    found += samples
    assert [(sample["__url__"], sample["cls"]) for sample in found] == [
        ("a.tar", b"mine"),
        ("b.tar", b"mine"),
    ]


@pytest.mark.parametrize("label", ["", "json:", "jsn:grade", "csv:labels.csv", 3])
def test_a_label_that_names_no_field_is_refused_before_anything_is_read(label: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be a field.*'json:FIELD'"):
        sb.stream([], label=label)


def test_a_held_sample_of_another_class_now_is_noticed(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"P{n:02d}", "HGG") for n in range(6)])
    stream = sb.stream(tmp_path / "a.tar").shuffle(30_000)
    next(iter(stream))
    state = stream.state_dict()
    write_tar(tmp_path / "a.tar", [(f"P{n:02d}", "LGG") for n in range(6)])
    with pytest.raises(ResumeError, match=r"was of class '0', and now is of '1'.*was changed"):
        sb.stream(tmp_path / "a.tar").shuffle(30_000).load_state_dict(state)


@pytest.mark.parametrize("stage", ["accept", "repeat"])
def test_a_class_named_as_text_and_as_a_number_is_refused(shards: Path, stage: str) -> None:
    with pytest.raises(ConfigError, match="class '1' is named twice, as text and as 1"):
        getattr(stream_of(shards), stage)({1: 1, "1": 3, "0": 1})


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
@pytest.mark.parametrize("order", [1, -1])
def test_what_readers_kept_makes_what_one_reader_would_have_kept(
    shards: Path, readers: int, order: int
) -> None:
    kept = stream_of(shards).reservoir(4)
    parts = [kept.share(number, readers) for number in range(readers)]
    samples = [sample for part in parts[::order] for sample in part]
    together = sb.stream([], label="json:grade", seed=3).reservoir(4)
    assert [keys(item) for item in together(samples)] == [keys(item) for item in kept]
