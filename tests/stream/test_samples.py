"""Samples are whole, come once, and whatever is left out is counted with its place and reason."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.stream.counts import MAX_SKIPS_KEPT, StreamCounts
from streaming_balance.stream.local import ShardFiles
from streaming_balance.stream.rules import MissingEnd, TarRules
from streaming_balance.stream.sources import expand
from streaming_balance.stream.tarstream import SampleReader, read_place, read_samples
from tests.stream.tars import (
    COHORT,
    END,
    contents,
    header,
    member,
    pax,
    put,
    read_all,
    tar_of,
    zipped,
)

SKIP = TarRules(on_error="skip")


def test_members_of_one_key_become_one_sample(tmp_path: Path) -> None:
    samples, counts = read_all(put(tmp_path, tar_of(COHORT)))
    assert [(sample.key, sorted(sample.members)) for sample in samples] == [
        (key, ["cls", "image.npb"]) for key in ("P1", "P2", "P3")
    ]
    assert contents(samples) == COHORT
    assert samples[0].field_bytes("cls") == b"1"
    assert samples[0].num_bytes == 1281
    assert samples[0].to_dict() == {
        "__key__": "P1",
        "__url__": str(tmp_path / "shard.tar"),
        "cls": b"1",
        "image.npb": COHORT["P1.image.npb"],
    }
    assert (counts.samples_delivered, counts.bytes_delivered) == (3, 1281 + 901 + 1)
    assert counts.bytes_read == len(tar_of(COHORT))
    assert counts.shards_read == 1


def test_an_unknown_field_is_named_with_those_there(tmp_path: Path) -> None:
    sample = read_all(put(tmp_path, tar_of(COHORT)))[0][0]
    with pytest.raises(ConfigError, match=r"no field 'clss'; .*cls, image.npb.*Did you mean 'cls'"):
        sample.field_bytes("clss")


def test_folders_notes_and_files_without_a_key_are_passed_over_and_counted(tmp_path: Path) -> None:
    content = (
        member(b"P/", kind=b"5")
        + member(b"README", b"read me")
        + member(b"P/1.cls", b"1")
        + member(b"P/._1.cls", b"mac")
        + member(b"__info__", b"notes")
        + member(b"__meta__/P1.json", b"{}")
        + member(b"P/1.json", b"{}")
        + END
    )
    samples, counts = read_all(put(tmp_path, content))
    assert [(sample.key, sorted(sample.members)) for sample in samples] == [
        ("P/1", ["cls", "json"])
    ]
    assert counts.passed_over == {"folder": 1, "no key": 2, "metadata": 2}
    assert (counts.bytes_delivered, counts.bytes_skipped) == (3, 7 + 3 + 5 + 2)
    assert counts.bytes_read == len(content)


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        (["P1.cls", "P2.cls", "P1.json"], 0, 2048),
        (["P1.cls", "P2.cls", "P3.cls", "P2.cls"], 1024, 3072),
    ],
)
def test_a_key_that_comes_again_is_an_error_that_names_both_places(
    tmp_path: Path, names: list[str], first: int, second: int
) -> None:
    path = put(tmp_path, tar_of([(name, b"1") for name in names]))
    with pytest.raises(ShardError, match=f"stands at byte {second}, and stood at byte {first} of"):
        read_all(path)
    samples, counts = read_all(path, SKIP)
    assert len(samples) == len(names) - 1
    assert [(skip.key, skip.offset) for skip in counts.skips] == [(names[-1][:2], second)]
    assert (counts.samples_read, counts.samples_skipped) == (len(names), 1)


def test_a_key_of_another_shard_is_an_error_unless_shards_count_for_themselves(
    tmp_path: Path,
) -> None:
    urls = [
        put(tmp_path, tar_of({"0.cls": b"1", "1.cls": b"0"}), "a.tar"),
        put(tmp_path, tar_of({"2.cls": b"1", "1.cls": b"0"}), "b.tar"),
    ]
    with pytest.raises(ShardError, match=r"b\.tar: sample '1': .*byte 1024 of .*a\.tar before"):
        read_all(urls)
    samples, _ = read_all(urls, TarRules(unique_keys="shard"))
    assert [sample.key for sample in samples] == ["0", "1", "2", "1"]
    assert [sample.shard for sample in samples] == [0, 0, 1, 1]


def test_keys_that_differ_only_in_case_are_two_samples(tmp_path: Path) -> None:
    samples, _ = read_all(put(tmp_path, tar_of({"P1.cls": b"1", "p1.cls": b"0"})))
    assert [sample.key for sample in samples] == ["P1", "p1"]


@pytest.mark.parametrize("second", ["P1.cls", "P1.CLS"])
def test_a_member_that_comes_twice_is_an_error(tmp_path: Path, second: str) -> None:
    pairs = [("P0.cls", b"0"), ("P1.cls", b"1"), (second, b"2"), ("P2.cls", b"1")]
    path = put(tmp_path, tar_of(pairs))
    with pytest.raises(ShardError, match=rf"'P1': member '{second}' at byte 2048 is the second"):
        read_all(path)
    samples, counts = read_all(path, SKIP)
    assert [sample.key for sample in samples] == ["P0", "P2"]
    assert [skip.key for skip in counts.skips] == ["P1"]
    assert counts.bytes_skipped == 2


def test_fields_that_readers_add_themselves_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path, tar_of({"P1.__key__": b"P2"}))
    with pytest.raises(ShardError, match="two underscores"):
        read_all(path)


def test_a_sample_without_what_is_wanted_is_an_error(tmp_path: Path) -> None:
    names = ["P1.image.npb", "P1.cls", "P2.image.npb", "P3.image.npy", "P3.cls"]
    path = put(tmp_path, tar_of([(name, b"1") for name in names]))
    wanted = frozenset({"image", "cls"})
    with pytest.raises(ShardError, match=r"'P2': the sample at byte 2048 has no cls, only image"):
        read_all(path, TarRules(wanted=wanted))
    with pytest.raises(ShardError, match="has no cls"):
        list(read_samples(path, wanted={"image", "cls"}))
    samples, counts = read_all(path, TarRules(wanted=wanted, on_error="skip"))
    assert [sample.key for sample in samples] == ["P1", "P3"]
    assert [(skip.key, skip.offset, skip.stop) for skip in counts.skips] == [("P2", 2048, 3072)]


def test_a_refused_member_takes_its_sample_along_and_nothing_else(tmp_path: Path) -> None:
    content = (
        member(b"P1.cls", b"1")
        + member(b"P2.image", kind=b"2")
        + member(b"P2.cls", b"0")
        + member(b"P3.cls", b"1")
        + member(b"latest", kind=b"2")
        + END
    )
    path = put(tmp_path, content)
    with pytest.raises(ShardError, match=r"member 'P2\.image' at byte 1024 is a symbolic link"):
        read_all(path)
    samples, counts = read_all(path, SKIP)
    assert [sample.key for sample in samples] == ["P1", "P3"]
    assert [(skip.key, skip.rest_of_shard) for skip in counts.skips] == [
        ("P2", False),
        (None, False),
    ]
    assert (counts.samples_read, counts.samples_skipped) == (3, 1)
    assert counts.bytes_read == len(content)


def test_samples_over_the_cap_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path, tar_of({"P1.a": bytes(60), "P1.b": bytes(60), "P2.a": bytes(60)}))
    with pytest.raises(
        ShardError, match=r"'P1\.b' at byte 1024 makes its sample larger than max_sam"
    ):
        read_all(path, TarRules(max_sample_bytes=100))
    samples, _ = read_all(path, TarRules(max_sample_bytes=100, on_error="skip"))
    assert [sample.key for sample in samples] == ["P2"]


def test_a_sample_of_ten_thousand_members_is_the_largest(tmp_path: Path) -> None:
    few = b"".join(member(b"P.%d" % number) for number in range(10_000))
    assert len(read_all(put(tmp_path, few + END))[0][0].members) == 10_000
    with pytest.raises(ShardError, match="one more than the 10,000"):
        read_all(put(tmp_path, few + member(b"P.x") + END))


def test_after_damage_the_open_sample_and_the_rest_are_lost_and_the_next_shard_goes_on(
    tmp_path: Path,
) -> None:
    damaged = bytearray(tar_of({"P1.cls": b"1", "P2.a": b"1", "P2.b": b"1", "P3.cls": b"1"}))
    damaged[2048 + 100] ^= 1  # in the header of P2.b
    urls = [
        put(tmp_path, tar_of({"P0.cls": b"1"}), "a.tar"),
        put(tmp_path, bytes(damaged), "b.tar"),
        put(tmp_path, tar_of({"P4.cls": b"1"}), "c.tar"),
    ]
    with pytest.raises(
        ShardError, match=r"b\.tar: at byte 2048: checksum.*'P2', begun at byte 1024"
    ):
        read_all(urls)
    samples, counts = read_all(urls, SKIP)
    assert [sample.key for sample in samples] == ["P0", "P1", "P4"]
    (skip,) = counts.skips
    assert (skip.shard, skip.offset, skip.stop, skip.key) == (1, 1024, len(damaged), "P2")
    assert skip.rest_of_shard
    assert (counts.shards_read, counts.shards_lost) == (2, 1)
    assert counts.bytes_read == sum(Path(url).stat().st_size for url in urls)
    assert counts.bytes_skipped == len(damaged) - 1024


def test_a_stream_of_unknown_length_that_breaks_is_lost_to_its_end() -> None:
    content = tar_of(COHORT)[:5000]
    samples, counts = read_all([io.BytesIO(content), io.BytesIO(tar_of({"Q.cls": b"1"}))], SKIP)
    assert [sample.key for sample in samples] == ["P1", "Q"]
    (skip,) = counts.skips
    assert (skip.key, skip.stop, skip.rest_of_shard) == ("P2", 5000, True)
    assert "ends at byte 5000" in skip.reason
    assert counts.shards_lost == 1


def test_a_sample_is_never_handed_over_before_it_is_known_to_be_whole() -> None:
    content = tar_of(COHORT)
    cut = content[: 512 + 1536]  # behind P1.image.npb, whose P1.cls is missing
    reader = iter(SampleReader(expand(io.BytesIO(cut))))
    with pytest.raises(ShardError, match=r"Sample 'P1', begun at byte 0, may lack members"):
        next(reader)


def test_a_shard_that_cannot_be_opened_is_lost_as_a_whole(tmp_path: Path) -> None:
    urls = [str(tmp_path / "absent.tar"), put(tmp_path, tar_of({"P1.cls": b"1"}))]
    with pytest.raises(ShardError, match=r"absent\.tar cannot be opened: No such file"):
        read_all(urls)
    samples, counts = read_all(urls, SKIP)
    assert [sample.key for sample in samples] == ["P1"]
    assert (counts.shards_read, counts.shards_lost, counts.samples_read) == (1, 1, 1)


def test_every_skip_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_all(put(tmp_path, tar_of({"P1.cls": b"1", "P1.CLS": b"1"})), SKIP)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "'P1'" in caplog.text


def test_counts_survive_json_and_keep_the_first_thousand_skips(tmp_path: Path) -> None:
    many = [(f"{n}.{name}", b"1") for n in range(MAX_SKIPS_KEPT + 50) for name in ("cls", "CLS")]
    _, counts = read_all(put(tmp_path, tar_of(many)), SKIP)
    assert (len(counts.skips), counts.skips_not_kept) == (MAX_SKIPS_KEPT, 50)
    assert counts.samples_skipped == MAX_SKIPS_KEPT + 50
    assert StreamCounts.from_dict(json.loads(json.dumps(counts.to_dict()))) == counts


FIELDS = st.sampled_from(["cls", "CLS", "json", "image.npb", ""])
KINDS = st.sampled_from([b"0"] * 8 + [b"5", b"2", b"7"])
NAMES = st.sampled_from(["P1", "P2", "P3", "P4", "a/P1", "README", "/abs", ".hidden"])


@given(st.lists(st.tuples(NAMES, FIELDS, KINDS, st.integers(0, 1100)), min_size=1, max_size=12))
def test_counts_reconcile_whatever_a_tar_holds(
    members: list[tuple[str, str, bytes, int]],
) -> None:
    content = b""
    for key, name, kind, size in members:
        payload = bytes(size) if kind in b"07" else b""
        content += member(f"{key}.{name}".removesuffix(".").encode(), payload, kind)
    samples, counts = read_all(io.BytesIO(content + END), SKIP)
    assert counts.bytes_read == len(content + END)
    assert counts.bytes_delivered == sum(sample.num_bytes for sample in samples)
    with tarfile.open(fileobj=io.BytesIO(content + END)) as archive:
        payloads = sum(info.size for info in archive if info.isreg())
    assert counts.bytes_delivered + counts.bytes_skipped == payloads
    assert counts.bytes_headers == len(content + END) - payloads
    assert counts.shards_read == 1
    assert len(samples) == counts.samples_delivered
    assert len({sample.key for sample in samples}) == len(samples)


def resized(number: int) -> bytes:
    """A tar whose sizes stand in a global header at its beginning, and are wrong elsewhere."""
    members = [
        header(f"P{at}.cls".encode(), 9) + (b"%d" % at).ljust(512, b"\0") for at in range(number)
    ]
    return pax({"size": "1"}, b"g") + b"".join(members) + END


@pytest.mark.parametrize(
    ("content", "name", "can_seek"),
    [
        (tar_of(COHORT), "a.tar", True),
        (resized(5), "b.tar", True),
        (zipped(tar_of(COHORT)), "c.tar.gz", False),
        (zipped(resized(5)), "d.tar.gz", False),
    ],
    ids=["plain", "with a global header", "gzip", "gzip with a global header"],
)
def test_reading_goes_on_behind_any_sample(
    tmp_path: Path, content: bytes, name: str, can_seek: bool
) -> None:
    url = put(tmp_path, content, name)
    whole, _ = read_all(url)
    for at, sample in enumerate(whole):
        rest = list(SampleReader(expand(url)).shard(0, start=sample.stop))
        assert contents(rest) == contents(whole[at + 1 :])
        assert [after.stop for after in rest] == [after.stop for after in whole[at + 1 :]]
        assert (sample.place is not None) == can_seek


def test_a_sample_is_read_again_from_its_place(tmp_path: Path) -> None:
    for content in (tar_of(COHORT), resized(2)):
        url = put(tmp_path, content)
        samples, _ = read_all(url)
        with ShardFiles() as files:
            for sample in samples:
                assert sample.place is not None
                again = read_place(sample.place, files)
                assert again.to_dict() == sample.to_dict()
                assert again.place == sample.place


def test_a_place_that_holds_another_sample_now_is_an_error(tmp_path: Path) -> None:
    url = put(tmp_path, tar_of(COHORT))
    place = read_all(url)[0][1].place
    assert place is not None
    put(tmp_path, tar_of({"P1.image.npb": bytes(100), "P1.cls": b"1", "P2.cls": b"0", "P3.a": b""}))
    with ShardFiles() as files, pytest.raises(ShardError):
        read_place(place, files)


def test_held_samples_outlive_their_shard(tmp_path: Path) -> None:
    volume = {"P1.image.npb": bytes(range(256)) * 4096, "P1.cls": b"1"}
    url = put(tmp_path, tar_of(volume))
    (sample,), _ = read_all(url)
    sample.label = "1"
    held = sample.held()
    Path(url).unlink()
    assert contents([held]) == volume
    assert (held.key, held.label, held.place) == (sample.key, "1", sample.place)


def test_keys_with_dots_are_kept_whole_when_asked(tmp_path: Path) -> None:
    path = put(tmp_path, tar_of({"1.2.3.dcm": b"a", "1.2.3.json": b"b", "1.2.4.dcm": b"c"}))
    samples = list(read_samples(path, keys="last_dot"))
    assert [(sample.key, sorted(sample.members)) for sample in samples] == [
        ("1.2.3", ["dcm", "json"]),
        ("1.2.4", ["dcm"]),
    ]
    assert [sample.key for sample in read_samples(path)] == ["1"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"on_error": "ignore"}, "on_error is 'ignore'; it must be one of raise, skip"),
        ({"keys": "first"}, "keys is 'first'"),
        ({"unique_keys": "Shard"}, "Did you mean 'shard'"),
        ({"missing_end": None}, "missing_end is None"),
        ({"max_member_bytes": 0}, "max_member_bytes is 0"),
        ({"max_sample_bytes": True}, "max_sample_bytes is True"),
        ({"wanted": "cls"}, "must be a set"),
    ],
)
def test_settings_that_are_none_are_named(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TarRules(**setting)  # type: ignore[arg-type]


PASSED_OVER = tar_of({"P1.cls": b"1", "README": bytes(5000), "P2.cls": b"2"})


@pytest.mark.parametrize("length", [1536, 1537, 3000, 6535])
@pytest.mark.parametrize("missing_end", ["refuse", "accept"])
def test_a_stream_cut_within_a_member_that_makes_no_sample_is_cut_there(
    length: int, missing_end: MissingEnd
) -> None:
    # README's payload is bytes 1536 to 6536; nobody takes it, and P2 behind it is lost.
    with pytest.raises(ShardError, match=f"the tar ends at byte {length}, where .* it was cut"):
        read_all(io.BytesIO(PASSED_OVER[:length]), TarRules(missing_end=missing_end))
    samples, counts = read_all(
        io.BytesIO(PASSED_OVER[:length]), TarRules(missing_end=missing_end, on_error="skip")
    )
    assert (samples, counts.samples_skipped, counts.shards_lost) == ([], 1, 1)
    assert counts.bytes_read == length


def test_a_stream_that_lacks_its_end_and_padding_is_read_when_asked() -> None:
    rules = TarRules(missing_end="accept")
    samples, counts = read_all(io.BytesIO(PASSED_OVER[:6536]), rules)
    assert ([sample.key for sample in samples], counts.bytes_read) == (["P1"], 6536)


def test_a_stream_counts_the_bytes_that_came_whatever_a_header_claims() -> None:
    huge = tarfile.TarInfo("P2.cls")
    huge.size = 1 << 80
    content = tar_of({"P1.cls": b"1"})[:1024] + huge.tobuf(tarfile.GNU_FORMAT) + bytes(3000)
    samples, counts = read_all(io.BytesIO(content), TarRules(on_error="skip"))
    assert [sample.key for sample in samples] == ["P1"]
    assert (counts.bytes_read, counts.skips[0].stop) == (len(content), len(content))
    assert "ends at byte 4536" in counts.skips[0].reason
