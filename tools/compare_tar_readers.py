"""Compare our reader of tar streams with webdataset's: what each notices of damage, and how fast.

    python tools/compare_tar_readers.py damage SHARD... [--headers 16]
    python tools/compare_tar_readers.py speed [--rounds 5]

`damage` cuts each shard at every 512-byte boundary, then flips each bit of its headers, one at a
time, and lets both readers read the result. A reader can raise an error, give exactly the samples
of the sound shard, or lose or change some in silence. Cuts behind the end of the tar lose nothing
and are not counted. `speed` reads a shard of tiny members and one of volumes with both readers in
turn, round after round, with a warm page cache; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_iterator, tarfile_samples

from streaming_balance.errors import ShardError
from streaming_balance.storage.tar import END_OF_TAR, member_header, padding
from streaming_balance.stream.tarstream import read_samples

Reader = Callable[[bytes], list[dict[str, object]]]

BLOCK = 512
TINY_SAMPLES, TINY_BYTES = 50_000, 100
VOLUMES, VOLUME_BYTES = 16, 33 << 20


def ours(content: bytes) -> list[dict[str, object]]:
    """Read all samples with our reader."""
    return [without_url(sample.to_dict()) for sample in read_samples(io.BytesIO(content))]


def theirs(content: bytes) -> list[dict[str, object]]:
    """Read all samples with webdataset's functions, which raise what they notice."""
    files = ({**file, "__url__": ""} for file in tar_file_iterator(io.BytesIO(content)))
    return [without_url(sample) for sample in group_by_keys(files)]


def without_url(sample: object) -> dict[str, object]:
    """Leave out the name of the shard."""
    assert isinstance(sample, dict)
    return {key: value for key, value in sample.items() if key != "__url__"}


def outcome(reader: Reader, content: bytes, whole: list[dict[str, object]]) -> str:
    """Say what a reader makes of a damaged shard."""
    try:
        found = reader(content)
    except (ShardError, tarfile.TarError, ValueError, EOFError, OSError):
        return "error"
    return "unchanged" if found == whole else "silent"


def cuts(content: bytes) -> Iterator[bytes]:
    """Give the shard cut at each block before the end of its end."""
    members = headers(content)[1]
    for end in range(0, members + 2 * BLOCK, BLOCK):
        yield content[:end]


def flips(content: bytes, most_headers: int) -> Iterator[bytes]:
    """Give the shard with each bit of its headers flipped, of `most_headers` spread over it."""
    offsets = headers(content)[0]
    chosen = {offsets[round(at)] for at in np.linspace(0, len(offsets) - 1, most_headers)}
    damaged = bytearray(content)
    for offset in sorted(chosen):
        for bit in range(8 * BLOCK):
            damaged[offset + bit // 8] ^= 1 << bit % 8
            yield bytes(damaged)
            damaged[offset + bit // 8] ^= 1 << bit % 8


def headers(content: bytes) -> tuple[list[int], int]:
    """Say where headers stand, extended ones included, and where the end of the tar starts."""
    offsets, end = set(), 0
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for info in archive:
            offsets |= {info.offset, info.offset_data - BLOCK}
            end = info.offset_data + -(-info.size // BLOCK) * BLOCK
    return sorted(offsets), end


def print_damage(shards: list[Path], most_headers: int) -> None:
    """Print what both readers notice, a row per shard and kind of damage."""
    print("| shard | damage | tried | ours: error / silent | webdataset: error / silent |")
    print("|---|---|---|---|---|")
    for path in shards:
        content = path.read_bytes()
        whole = theirs(content)
        for kind, damaged in (("cut", cuts(content)), ("flip", flips(content, most_headers))):
            counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
            tried = 0
            for changed in damaged:
                tried += 1
                counts[0][outcome(ours, changed, whole)] += 1
                counts[1][outcome(theirs, changed, whole)] += 1
            cells = [f"{found['error']:,} / {found['silent']:,}" for found in counts]
            print(f"| {path.name} | {kind} | {tried:,} | {' | '.join(cells)} |", flush=True)


def write_shard(path: Path, samples: int, sizes: dict[str, int]) -> None:
    """Write a shard of random bytes."""
    noise = np.random.Generator(np.random.Philox(1)).bytes(max(sizes.values()))
    with path.open("wb") as file:
        for number in range(samples):
            for field, size in sizes.items():
                file.write(member_header(f"{number:08d}.{field}", size))
                file.write(noise[:size] + padding(size))
        file.write(END_OF_TAR)


def drain_ours(urls: str) -> None:
    """Read every payload with our reader."""
    for sample in read_samples(urls, allow_pipe=True):
        for payload in sample.members.values():
            payload.read()


def drain_theirs(urls: str) -> None:
    """Read every payload with webdataset."""
    for _ in tarfile_samples([{"url": urls}]):
        pass


def seconds(drain: Callable[[str], None], urls: str) -> float:
    """Time one reading."""
    started = time.perf_counter()
    drain(urls)
    return time.perf_counter() - started


def print_speed(rounds: int) -> None:
    """Print how fast both readers are, a row per kind of shard and source."""
    print("| shard | source | ours | webdataset | ratio, median of rounds |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        tiny, volumes = Path(folder) / "tiny.tar", Path(folder) / "volumes.tar"
        write_shard(tiny, TINY_SAMPLES, {"cls": TINY_BYTES, "json": TINY_BYTES})
        write_shard(volumes, VOLUMES, {"image.npb": VOLUME_BYTES, "cls": 1, "json": 300})
        rows = [
            (tiny, 2 * TINY_SAMPLES, "members/s"),
            (volumes, VOLUMES * VOLUME_BYTES / 1e6, "MB/s"),
        ]
        for path, amount, unit in rows:
            for source in (str(path), f"pipe:cat {path}"):
                pairs = [
                    (seconds(drain_ours, source), seconds(drain_theirs, source))
                    for _ in range(rounds + 1)
                ][1:]
                speeds = [amount / statistics.median(times) for times in zip(*pairs, strict=True)]
                ratio = statistics.median(their / our for our, their in pairs)
                cells = " | ".join(f"{speed:,.0f} {unit}" for speed in speeds)
                print(
                    f"| {path.stem} | {source.split(' ')[0].split('/')[0] or 'path'} | {cells} |"
                    f" {ratio:.1f} |",
                    flush=True,
                )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    kinds = parser.add_subparsers(dest="kind", required=True)
    damage = kinds.add_parser("damage", help="what each reader notices")
    damage.add_argument("shards", nargs="+", type=Path)
    damage.add_argument("--headers", type=int, default=16, help="headers per shard to flip bits of")
    speed = kinds.add_parser("speed", help="how fast each reader is")
    speed.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.kind == "damage":
        print_damage(options.shards, options.headers)
    else:
        print_speed(options.rounds)


if __name__ == "__main__":
    main()
