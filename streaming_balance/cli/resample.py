"""`streaming-balance resample`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from streaming_balance.cli.answers import print_json, print_table, print_warning, with_unit
from streaming_balance.cli.options import AsJson
from streaming_balance.cli.resample_options import (
    COUNT,
    UNIFORM,
    Wishes,
    one_stage,
    read_shares,
    read_size,
)
from streaming_balance.errors import ConfigError

if TYPE_CHECKING:
    from streaming_balance.ingest.index_builder import IndexBuilder
    from streaming_balance.stream.names import KeyRule
    from streaming_balance.stream.rules import OnError

# As in `stream`; repeated so that showing the help loads nothing. A test compares them.
DEFAULT_SHARD_BYTES = 268_435_456
DEFAULT_BUFFER_BYTES = 268_435_456
DEFAULT_WINDOW = 1000
RECORD_NAME = "resample.json"


def resample(
    urls: Annotated[
        list[str],
        typer.Argument(
            metavar="URL...",
            help="Tars: paths, {000..012}, {a,b}, *, http(s) addresses, - for standard input.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the new shards.", show_default=False)
    ],
    accept: Annotated[bool, typer.Option("--accept", help="Thin out frequent classes.")] = False,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="Repeat rare classes; no sample is lost.")
    ] = False,
    reservoir: Annotated[
        bool, typer.Option("--reservoir", help="Keep up to --size samples of every class.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS=SHARE,...|uniform",
            help="Shares of what is written; uniform counts the classes first, if need be.",
        ),
    ] = None,
    frequencies: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS=COUNT,...|count",
            help="How frequent classes are; count: read all labels first. [estimated on the way]",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="N|CLASS=N,...",
            help="Samples the reservoir keeps of every class; of all, with --target.",
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(metavar="R", help="Smallest class : largest class the reservoir gives."),
    ] = None,
    label: Annotated[str, typer.Option(metavar="cls|json:FIELD", help="Where labels are.")] = "cls",
    keys: Annotated[
        str,
        typer.Option(
            metavar="webdataset|last_dot", help="Cut names at the first dot, or at the last."
        ),
    ] = "webdataset",
    unknown: Annotated[
        str, typer.Option(metavar="error|drop", help="What becomes of classes --target lacks.")
    ] = "error",
    seed: Annotated[int, typer.Option(help="Keys every choice.")] = 0,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Shuffle shards and samples before choosing.")
    ] = False,
    window: Annotated[
        int, typer.Option(metavar="N", help="Samples between two looks at estimated frequencies.")
    ] = DEFAULT_WINDOW,
    buffer_bytes: Annotated[
        int, typer.Option(metavar="N", help="Most memory of --repeat and of --shuffle, each.")
    ] = DEFAULT_BUFFER_BYTES,
    shard_bytes: Annotated[
        int, typer.Option(metavar="N", help="Bytes at which the next shard begins.")
    ] = DEFAULT_SHARD_BYTES,
    on_error: Annotated[
        str, typer.Option(metavar="raise|skip", help="Stop at damage, or leave it out, counted.")
    ] = "raise",
    allow_pipe: Annotated[
        bool, typer.Option("--allow-pipe", help="Let pipe: start programs.")
    ] = False,
    tee_index: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Index the shards that are read, too, in the same pass, as `index` does.",
        ),
    ] = None,
    patient: Annotated[
        str | None,
        typer.Option(metavar="json:FIELD", help="With --tee-index: where patients are."),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="With --tee-index: the image, or none."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier resample wrote.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write shards with other shares of classes, for training only.

    Reads any WebDataset tars once and writes standard ones; members are copied as they are. A copy
    of a repeated sample has the key KEY__copy1, KEY__copy2, ... Beside the shards, resample.json
    says what they were made of; `streaming-balance index` makes a sample table. Shards of a split
    for evaluation are refused.

    \b
    Examples:
      streaming-balance resample 'tars/*.tar' --accept --target LGG=1,HGG=1 --out even
      streaming-balance resample 'tars/*.tar' --repeat --target uniform --out all --label json:g
      cat a.tar | streaming-balance resample - --reservoir --size 100 --out hundred
    """
    from streaming_balance.stream.resampling import resample as write_resampled

    wishes = Wishes(
        stage=one_stage(accept=accept, repeat=repeat, reservoir=reservoir),
        target=read_shares("--target", target, UNIFORM),
        frequencies=read_shares("--frequencies", frequencies, COUNT),
        size=read_size(size),
        ratio=ratio,
        shuffle=shuffle,
        window=window,
        buffer_bytes=buffer_bytes,
        unknown=unknown,
    )
    reading = Reading(
        label=label,
        on_error=cast("OnError", on_error),
        keys=cast("KeyRule", keys),
        allow_pipe=allow_pipe,
    )
    if tee_index is None and (patient is not None or image is not None):
        raise ConfigError("--patient and --image are for the index: name it with --tee-index DIR.")
    with _index_builder(
        tee_index, reading, patient=patient, image=image, overwrite=overwrite
    ) as builder:
        wishes = _with_classes(wishes, urls, reading)
        record = write_resampled(
            urls,
            wishes.chain,
            out=out,
            label=label,
            seed=seed,
            on_error=reading.on_error,
            keys=reading.keys,
            allow_pipe=allow_pipe,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            observer=builder,
            settings=wishes.record,
        )
    _say_what_was_left_out(record)
    if as_json:
        print_json(record)
    else:
        _print_tables(record, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the shards are read."""

    label: str
    """Where labels are."""
    on_error: OnError
    """`raise` or `skip`."""
    keys: KeyRule
    """Where names are cut."""
    allow_pipe: bool
    """Whether programs may be started."""


def _with_classes(wishes: Wishes, urls: Sequence[str], reading: Reading) -> Wishes:
    """Put in the names of classes that the options left open."""
    from streaming_balance.stream.label_counts import count_labels
    from streaming_balance.stream.rules import TarRules
    from streaming_balance.stream.sources import expand

    counts: Mapping[str, float] = {}
    if wishes.needs_counts:
        counts = count_labels(
            expand(urls, allow_pipe=reading.allow_pipe),
            label=reading.label,
            rules=TarRules(on_error=reading.on_error, keys=reading.keys),
        )
    elif wishes.target != UNIFORM:
        return wishes
    return wishes.with_counts(counts)


def _index_builder(
    folder: Path | None,
    reading: Reading,
    *,
    patient: str | None,
    image: str | None,
    overwrite: bool,
) -> AbstractContextManager[IndexBuilder | None]:
    """Give what makes an index of the shards that are read, or nothing where none is wanted."""
    from streaming_balance.ingest.index_builder import IndexBuilder
    from streaming_balance.ingest.index_rules import IndexRules

    if folder is None:
        return nullcontext()
    rules = IndexRules(label=reading.label, patient=patient, image=image, keys=reading.keys)
    return IndexBuilder(folder, rules, overwrite=overwrite)


def _say_what_was_left_out(record: Mapping[str, Any]) -> None:
    """Warn of everything that is not in the new shards because it could not be read."""
    counts = record["counts"]
    lost = {name: counts[name] for name in ("damaged", "unlabelled", "shards_lost")}
    if any(lost.values()):
        print_warning(
            f"left out {lost['damaged']:,} damaged and {lost['unlabelled']:,} samples without a "
            f"class; the rest of {lost['shards_lost']:,} shards could not be read. "
            f"{RECORD_NAME} lists them."
        )


def _print_tables(record: Mapping[str, Any], out: Path) -> None:
    """Print what was written for people."""
    shards = record["shards"]
    stored = with_unit(sum(shard["bytes"] for shard in shards))
    print_table(
        f"{out}: {len(shards):,} shard(s), {stored}, for training only",
        ("class", "read", "rejected", "copies", "written", "share", "wanted"),
        (
            (
                name,
                entry["read"],
                entry["rejected"],
                entry["copies"],
                entry["delivered"] + entry["copies"],
                entry["realised_share"],
                "-" if entry["wanted_share"] is None else f"{entry['wanted_share']:.3f}",
            )
            for name, entry in record["classes"].items()
        ),
    )
    counts = record["counts"]
    print(
        f"read {counts['read']:,} = delivered {counts['delivered']:,} + rejected "
        f"{counts['rejected']:,}; written {counts['written']:,} with {counts['copies']:,} copies"
    )
    print(f"These are tars without a sample table: streaming-balance index '{out}/*.tar' --out ...")
