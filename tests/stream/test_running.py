"""Streams where something goes wrong: nothing is lost, nothing comes twice, all is counted."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streaming_balance as sb
from streaming_balance.errors import BalanceError, ConfigError, ResumeError, ShardError
from streaming_balance.stream.pipeline import Stream
from streaming_balance.stream.rules import OnError
from streaming_balance.stream.samples import StreamSample
from tests.stream.tars import member, tar_of
from tests.stream.test_pipeline import CHAINS, shards, stream_of, write_tar

__all__ = ["shards"]  # a fixture that both files use


def check_totals(stream: Stream, *, delivered: int, taken: int | None = None) -> None:
    """Compare the counts of the whole chain with each other, and with what was seen."""
    stats = stream.stats()
    totals, stages = stats["totals"], stats["stages"]
    assert totals["delivered"] == delivered
    assert totals["read"] + totals["copies"] == sum(
        totals[name] for name in ("delivered", "rejected", "buffered")
    )
    left_out = totals["unlabelled"] + totals["left_to_others"]
    assert stats["read"]["samples_delivered"] == totals["read"] + left_out
    assert taken is None or totals["read"] == taken
    for one, following in itertools.pairwise(stages):
        assert 0 <= one["delivered"] + one["copies"] - following["read"] <= totals["buffered"]


def num_samples(item: dict[str, Any]) -> int:
    """Count the samples of an output."""
    key = item["__key__"]
    return len(key) if isinstance(key, list) else 1


@pytest.mark.parametrize("name", CHAINS)
def test_counts_of_the_whole_chain_reconcile_at_every_output(shards: Path, name: str) -> None:
    stream = CHAINS[name](stream_of(shards))
    seen = 0
    for number in range(1, 4):
        for item in stream:
            seen += num_samples(item)
            check_totals(stream, delivered=seen)
        check_totals(stream, delivered=seen, taken=24 * number)


@pytest.mark.parametrize("name", CHAINS)
def test_a_resumed_stream_has_the_counts_of_one_that_never_stopped(shards: Path, name: str) -> None:
    def stats_at_every_output(stream: Stream) -> list[dict[str, Any]]:
        return [stream.stats() for _ in range(2) for _ in stream]

    straight = stats_at_every_output(CHAINS[name](stream_of(shards)))
    stream = CHAINS[name](stream_of(shards))
    number = 0
    for _ in range(2):
        for _ in stream:
            number += 1
            resumed = CHAINS[name](stream_of(shards))
            resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
            assert resumed.stats() == straight[number - 1]
            assert resumed.state_dict() == stream.state_dict()
            if next(iter(resumed), None) is not None:
                assert resumed.stats() == straight[number]


def test_after_damage_a_stream_raises_again_and_never_ends_as_if_it_were_whole(
    tmp_path: Path,
) -> None:
    write_tar(tmp_path / "s-0.tar", [(f"P{n:02d}", "HGG") for n in range(6)])
    stored = (tmp_path / "s-0.tar").read_bytes()
    (tmp_path / "s-0.tar").write_bytes(stored[: len(stored) // 2 // 512 * 512])
    stream = stream_of(tmp_path)
    got: list[str] = []
    for _ in range(3):
        with pytest.raises(ShardError, match="cut"):
            got.extend(item["__key__"] for item in stream)
    assert got == ["P00", "P01"]


def test_a_passing_source_that_failed_is_not_taken_for_one_that_ended(shards: Path) -> None:
    stored = (shards / "s-0.tar").read_bytes()
    stream = sb.stream(io.BytesIO(stored[:-20480]))
    with pytest.raises(ShardError, match="cut"):
        list(stream)
    with pytest.raises(ConfigError, match="passed by once"):
        list(stream)


def test_a_key_that_comes_again_after_a_resume_is_noticed_as_it_would_have_been(
    tmp_path: Path,
) -> None:
    write_tar(tmp_path / "s-0.tar", [(f"P{n:02d}", "HGG") for n in range(4)])
    write_tar(tmp_path / "s-1.tar", [(f"P{n:02d}", "HGG") for n in (4, 5, 1, 4)])
    for on_error in ("raise", "skip"):
        stream = stream_of(tmp_path, on_error=on_error)
        next(iter(stream))
        for _ in range(4):
            next(iter(stream))
        resumed = stream_of(tmp_path, on_error=on_error)
        resumed.load_state_dict(stream.state_dict())
        if on_error == "raise":
            assert next(iter(resumed))["__key__"] == "P05"
            with pytest.raises(ShardError, match=r"'P01'.*stood at byte"):
                next(iter(resumed))
        else:
            assert [item["__key__"] for item in resumed] == ["P05"]
            assert [skip["key"] for skip in resumed.stats()["read"]["skips"]] == ["P01", "P04"]


def test_a_sample_whose_class_cannot_be_read_comes_again_or_is_counted(tmp_path: Path) -> None:
    files = [
        (f"P{n}.{kind}", b"{" if n == 2 else b'{"grade": "HGG"}')
        for n in range(4)
        for kind in ("json",)
    ]
    (tmp_path / "s-0.tar").write_bytes(tar_of(files))
    strict = stream_of(tmp_path).shuffle(1 << 20)
    for _ in range(2):
        with pytest.raises(ShardError, match=r"'P2' at byte 2048.*json"):
            list(strict)
        check_totals(strict, delivered=0, taken=3)
    lax = stream_of(tmp_path, on_error="skip").shuffle(1 << 20)
    assert sorted(item["__key__"] for item in lax) == ["P0", "P1", "P3"]
    assert lax.stats()["totals"]["unlabelled"] == 1
    (skip,) = lax.stats()["read"]["skips"]
    assert (skip["key"], skip["offset"], skip["stop"]) == ("P2", 2048, 3072)
    assert "there is no class in its json" in skip["reason"]
    check_totals(lax, delivered=3, taken=3)


def test_a_sample_that_a_stage_refuses_comes_again(shards: Path) -> None:
    stream = stream_of(shards).shuffle(30_000).accept({"HGG": 1})
    for _ in range(2):
        with pytest.raises(ConfigError, match="'LGG', which was not declared"):
            list(stream)
        check_totals(stream, delivered=stream.stats()["totals"]["delivered"])


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_stream_that_cannot_seek_resumes_at_every_sample_of_a_new_copy(
    shards: Path, suffix: str
) -> None:
    stored = (shards / "s-3.tar").read_bytes()
    stored = gzip.compress(stored, 1) if suffix == "tar.gz" else stored

    def chain() -> Stream:
        stream = sb.stream(io.BytesIO(stored), label="json:grade").shuffle(20_000)
        return stream.repeat({"HGG": 1, "LGG": 2}, frequencies={"HGG": 2, "LGG": 1})

    straight = [item["__key__"] for item in chain()]
    assert len(straight) == 6 * 4
    for stop in range(len(straight) + 1):
        stream = chain()
        got = [item["__key__"] for item in itertools.islice(stream, stop)]
        resumed = chain()
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert got + [item["__key__"] for item in resumed] == straight
        # Whatever is held stands once in the state, however many copies are to come.
        assert len(stream.state_dict()["run"]["samples"]) <= 6


def test_a_state_opens_no_file_but_the_shards_of_the_stream(shards: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "secret.tar", [("P00", "HGG")])
    stream = stream_of(shards).shuffle(40_000)
    next(iter(stream))
    state = stream.state_dict()
    assert str(tmp_path) not in json.dumps(state)
    assert {name for sample in state["run"]["samples"] for name in sample} == {
        *("key", "shard", "offset", "stop", "label")
    }


SPOILED: dict[str, Callable[[Any], object]] = {
    "no chain": lambda run: run.pop("chain"),
    "no such shard": lambda run: run["reading"].update(place=9),
    "no samples": lambda run: run["samples"].clear(),
    "no stages": lambda run: run["chain"]["stages"].clear(),
    "no beginning": lambda run: run.update(first_epoch="0"),
    "no such byte": lambda run: run["reading"].update(offset=512),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_damaged_state_is_refused(shards: Path, what: str) -> None:
    stream = stream_of(shards).shuffle(40_000)
    next(iter(stream))
    state = json.loads(json.dumps(stream.state_dict()))
    SPOILED[what](state["run"])

    def go_on() -> None:
        other = stream_of(shards).shuffle(40_000)
        other.load_state_dict(state)
        list(other)

    with pytest.raises(ResumeError):
        go_on()


def test_a_stream_moved_while_it_is_iterated_is_an_error(shards: Path) -> None:
    stream = stream_of(shards)
    iterator = iter(stream)
    next(iterator)
    stream.set_epoch(3)
    with pytest.raises(BalanceError, match="moved this stream"):
        next(iterator)
    assert len(list(stream)) == 24
    assert stream.epoch == 4


@pytest.mark.parametrize("size", [1, 4])
def test_what_a_function_failed_on_is_in_the_state_and_comes_again_after_a_resume(
    shards: Path, size: int
) -> None:
    def chain(failing_on: str | None) -> Stream:
        def flaky(sample: dict[str, Any]) -> dict[str, Any]:
            if sample["__key__"] == failing_on:
                raise ValueError("no atlas")
            return sample

        return stream_of(shards).shuffle(30_000).map(flaky).batch(size)

    straight = [item["__key__"] for item in chain(None)]
    stream, got = chain(straight[3][-1]), list[Any]()
    with pytest.raises(ValueError, match="no atlas"):
        got.extend(item["__key__"] for item in stream)
    check_totals(stream, delivered=3 * size)
    resumed = chain(None)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert got + [item["__key__"] for item in resumed] == straight


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_plain_arrays_are_read_into_memory_of_their_own(
    tmp_path: Path, version: tuple[int, int]
) -> None:
    stored = io.BytesIO()
    made = np.arange(30_000, dtype=np.float64).reshape(3, 100, 100)
    np.lib.format.write_array(stored, made, version=version)
    # A header as others write them: valid, and not padded to any alignment.
    shape = b"{'descr': '<f8', 'fortran_order': False, 'shape': (3, 100, 100), }\n"
    bare = b"\x93NUMPY\x01\x00" + len(shape).to_bytes(2, "little") + shape + made.tobytes()
    assert (len(bare) - made.nbytes) % 8
    tar = tar_of([("P1.npy", stored.getvalue()), ("P2.npy", bare)])
    (tmp_path / "s-0.tar").write_bytes(tar)
    for source in (tmp_path / "s-0.tar", io.BytesIO(tar)):
        for sample in sb.stream(source, label=None).decode():
            np.testing.assert_array_equal(sample["npy"], made)
            assert sample["npy"].flags.writeable
            assert sample["npy"].flags.aligned


def test_a_stream_that_begins_with_a_later_pass_shuffles_otherwise(shards: Path) -> None:
    def order(epoch: int) -> list[str]:
        stream = stream_of(shards).shuffle(1 << 20, shards=False)
        stream.set_epoch(epoch)
        return [item["__key__"] for item in stream]

    assert order(0) != order(5)
    assert order(5) == order(5)


class Builder:
    """Writes down what it is shown, as the builder of an index does."""

    def __init__(self) -> None:
        self.shards: list[str] = []
        self.keys: list[str] = []
        self.num_finished = 0

    def begin(self, shards: Sequence[str]) -> None:
        self.shards += shards

    def add(self, sample: StreamSample) -> None:
        self.keys.append(sample.key)

    def finish(self) -> None:
        self.num_finished += 1


def test_an_observer_sees_every_sample_of_the_first_pass_and_its_end(shards: Path) -> None:
    builder = Builder()
    stream = (
        stream_of(shards)
        .tee(builder)
        .accept({"HGG": 0, "LGG": 1}, frequencies={"HGG": 1, "LGG": 1})
    )
    iterator = iter(stream)
    next(iterator)
    assert builder.num_finished == 0
    list(iterator)
    list(stream)
    assert builder.keys == [f"P{n:02d}" for n in range(24)]
    assert builder.num_finished == 1
    assert builder.shards == sorted(str(path) for path in shards.glob("*.tar"))


def test_an_observer_is_refused_where_it_could_not_see_everything(shards: Path) -> None:
    half_way = stream_of(shards)
    next(iter(half_way))
    with pytest.raises(ResumeError, match="tee"):
        stream_of(shards).tee(Builder()).load_state_dict(half_way.state_dict())
    with pytest.raises(ConfigError, match="tee: 2 readers"):
        stream_of(shards).tee(Builder()).share(0, 2)
    with pytest.raises(ConfigError, match="tee: on_error='skip' leaves samples out"):
        sb.stream(str(shards / "*.tar"), on_error="skip").tee(Builder())
    with pytest.raises(ConfigError, match=r"tee: .*passes by"):
        sb.stream(io.BytesIO(b"")).tee(Builder())


def test_a_chain_without_shards_says_what_it_is_for() -> None:
    with pytest.raises(ConfigError, match="no shards; call it with samples"):
        iter(sb.stream([]))
    with pytest.raises(ConfigError, match="dicts with '__key__'"):
        list(sb.stream([])([("a", 1)]))  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"no shards.*To resume, stream the shards themselves"):
        sb.stream([]).state_dict()


def test_an_applied_chain_keeps_its_buffers_from_call_to_call_unless_left_early() -> None:
    samples = [{"__key__": f"P{n}", "cls": n % 2} for n in range(8)]
    chain = sb.stream([]).replay({0: 1, 1: 1}, batch_size=6, buffer_bytes=1 << 20)
    assert [len(list(chain(samples))) for _ in range(3)] == [1, 1, 2]
    fresh = sb.stream([]).replay({0: 1, 1: 1}, batch_size=6, buffer_bytes=1 << 20)
    for _ in range(3):
        assert len(next(fresh(samples))["__key__"]) == 6


def test_a_sample_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    (tmp_path / "s-0.tar").write_bytes(member(b"P1.json", b"{") + bytes(1024))
    with pytest.raises(ShardError, match=r"s-0\.tar: sample 'P1' cannot be decoded"):
        list(sb.stream(tmp_path / "s-0.tar", label=None).decode())
    (tmp_path / "s-0.tar").write_bytes(member(b"P1.npy", b"no array") + bytes(1024))
    with pytest.raises(ShardError) as raised:
        list(sb.stream(tmp_path / "s-0.tar", label=None).decode())
    assert "sample 'P1'" in raised.value.__notes__[0]


def test_an_observer_sees_a_sample_once_however_often_it_comes_again(tmp_path: Path) -> None:
    tar = tar_of({"a.cls": b"0", "b.cls": b" ", "c.cls": b"1"})
    (tmp_path / "a.tar").write_bytes(tar)
    builder = Builder()
    stream = sb.stream(tmp_path / "a.tar").accept({0: 1, 1: 1}).tee(builder)
    for _ in range(3):
        with pytest.raises(ShardError, match="sample 'b'"):
            list(stream)
    assert builder.keys == ["a", "b"]


def test_an_observer_of_a_pass_that_was_left_sees_no_other_pass(shards: Path) -> None:
    builder = Builder()
    stream = stream_of(shards).tee(builder)
    next(iter(stream))
    stream.set_epoch(2)
    assert len(list(stream)) == 24
    assert builder.keys == ["P00"]
    assert builder.num_finished == 0


def test_an_observer_waits_for_the_pass_that_comes_first(shards: Path) -> None:
    builder = Builder()
    stream = stream_of(shards).tee(builder)
    stream.set_epoch(2)
    list(stream)
    stream.set_epoch(0)
    list(stream)
    assert (len(builder.keys), builder.num_finished) == (24, 1)


def test_an_iterator_ends_with_its_pass_though_another_one_ended_it(shards: Path) -> None:
    stream = stream_of(shards)
    first = iter(stream)
    next(first)
    assert len(list(stream)) == 23
    assert list(first) == []
    assert len(list(stream)) == 24


def test_an_iterator_made_before_a_move_gives_nothing_of_what_follows(shards: Path) -> None:
    stream = stream_of(shards)
    before = iter(stream)
    stream.set_epoch(1)
    with pytest.raises(BalanceError, match="moved this stream"):
        next(before)
    assert len(list(stream)) == 24


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_what_passed_by_stays_so_whatever_pass_is_set(shards: Path, on_error: OnError) -> None:
    stream = sb.stream(io.BytesIO((shards / "s-0.tar").read_bytes()), on_error=on_error)
    assert len(list(stream)) == 6
    stream.set_epoch(5)
    with pytest.raises(ConfigError, match="passed by once"):
        list(stream)


def stored(array: np.ndarray[Any, Any]) -> bytes:
    """What numpy writes of an array."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_a_batch_is_filled_sample_by_sample(tmp_path: Path) -> None:
    volume = stored(np.zeros((512, 1024), np.int16))
    tar = tar_of({f"P{n}.npy": volume for n in range(8)})
    (tmp_path / "s-0.tar").write_bytes(tar)
    tracemalloc.start()
    try:
        batch = next(iter(sb.stream(tmp_path / "s-0.tar", label=None).decode().batch(8)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert batch["npy"].shape == (8, 512, 1024)
    # The batch, the sample that is being read, and the one that was copied last.
    assert peak < (8 + 3) * len(volume)


@pytest.mark.parametrize("odd", [0, 1, 3])
@pytest.mark.parametrize("value", [np.ones((2, 3), np.int16), np.ones((2, 2), np.int32), 5, None])
def test_arrays_that_differ_stay_apart_in_a_batch(odd: int, value: Any) -> None:
    samples = [
        {"__key__": f"P{n}", "cls": n, "npy": np.full((2, 2), n, np.int16)} for n in range(4)
    ]
    samples[odd]["npy"] = value
    batch = next(iter(sb.stream([]).batch(4)(samples)))
    assert isinstance(batch["npy"], list)
    given: list[Any] = [sample["npy"] for sample in samples]
    for one, found in zip(given, batch["npy"], strict=True):
        assert np.array_equal(found, one)
        assert not isinstance(found, np.ndarray) or found.base is None
    assert batch["cls"].tolist() == [0, 1, 2, 3]


def test_a_batch_has_the_byte_order_of_the_machine() -> None:
    samples = [{"__key__": f"P{n}", "cls": n, "npy": np.array([n], ">i2")} for n in range(2)]
    batch = next(iter(sb.stream([]).batch(2)(samples)))
    assert batch["npy"].dtype.isnative
    assert batch["npy"].tolist() == [[0], [1]]
