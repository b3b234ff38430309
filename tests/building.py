"""Small data sets of random arrays, packed by the real writer, for tests that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streaming_balance.storage.layout import MANIFEST_NAME, TABLE_NAME
from streaming_balance.storage.manifest import Manifest, manifest_text, read_manifest
from streaming_balance.storage.table_file import write_table
from streaming_balance.storage.writer import EncodedSample, PackWriter, encode_array

AXES = {2: "HW", 3: "DHW", 4: "CDHW"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample to pack."""

    key: str
    """Its key."""
    image: NDArray[Any]
    """Its image."""
    axes: str | None = None
    """Letters of the image's axes; by the number of its sides where None."""
    seg: NDArray[Any] | None = None
    """Its segmentation, where it has one."""
    patient: str | None = None
    """Its patient; its key where None."""
    label: str = "HGG"
    """Its class, or its findings joined by `|`."""
    split: str = "train"
    """Its split."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Its strata."""


def random_samples(
    count: int,
    *,
    shape: tuple[int, ...] = (2, 6, 5, 4),
    dtype: str = "int16",
    split: str = "train",
    seed: int = 0,
) -> list[Sample]:
    """Make samples of random voxels, every third of class LGG, keys split-000, split-001, ..."""
    generator = np.random.default_rng(seed)
    return [
        Sample(
            key=f"{split}-{number:03d}",
            image=generator.integers(0, 200, shape).astype(dtype),
            label="LGG" if number % 3 == 0 else "HGG",
            split=split,
        )
        for number in range(count)
    ]


def pack(
    folder: Path,
    samples: Sequence[Sample],
    *,
    codec: str = "npy",
    shard_bytes: int = 1 << 20,
    classes: Sequence[str] = ("HGG", "LGG"),
    multi_label: bool = False,
) -> Manifest:
    """Pack samples into `folder`, split after split, in the order given."""
    splits = list(dict.fromkeys(sample.split for sample in samples))
    writer = PackWriter(
        folder,
        classes=classes,
        splits=splits,
        train_splits=splits[:1],
        codec=codec,
        columns=sorted({name for sample in samples for name in sample.columns}),
        shard_bytes=shard_bytes,
        settings={"codec": codec, "shard_bytes": shard_bytes},
        overwrite=False,
        multi_label=multi_label,
    )
    with writer:
        for split in splits:
            for sample in samples:
                if sample.split == split:
                    writer.add(_encoded(sample, codec))
        return writer.finish(found=len(samples), rejected=())


def by_key(samples: Sequence[Sample]) -> dict[str, Sample]:
    """Index samples by key."""
    return {sample.key: sample for sample in samples}


def table_column(folder: Path, name: str) -> list[Any]:
    """Give the values of one column of a data set's sample table."""
    table = pa.ipc.open_file((folder / TABLE_NAME).read_bytes()).read_all()
    return list(table.column(name).to_pylist())


def rewrite_column(
    folder: Path, name: str, values: Sequence[object], *, kind: pa.DataType | None = None
) -> None:
    """Replace one column of a sample table and let the manifest vouch for the result."""
    table = pa.ipc.open_file((folder / TABLE_NAME).read_bytes()).read_all()
    place = table.schema.names.index(name)
    field = table.schema.field(place) if kind is None else pa.field(name, kind)
    if pa.types.is_dictionary(field.type):
        words = table.column(place).chunk(0).dictionary
        codes = [words.to_pylist().index(value) for value in values]
        indices = pa.array(codes, field.type.index_type)
        column = pa.DictionaryArray.from_arrays(indices, words)
    else:
        column = pa.array(values, field.type)
    entry = write_table(folder / TABLE_NAME, table.set_column(place, field, column))
    manifest = read_manifest(folder)
    (folder / MANIFEST_NAME).write_text(manifest_text(replace(manifest, table=entry)))


def open_files() -> set[str]:
    """Give what the descriptors of this process point at, by the system's own list."""
    places = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            places.add(str(entry.readlink()))
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
    return places


def _encoded(sample: Sample, codec: str) -> EncodedSample:
    """Encode a sample's arrays as the packer does."""
    axes = sample.axes or AXES[sample.image.ndim]
    arrays = [encode_array("image", sample.image, axes=axes, codec=codec)]
    if sample.seg is not None:
        seg_axes = AXES[sample.seg.ndim]
        arrays.append(encode_array("seg", sample.seg, axes=seg_axes, codec=codec))
    return EncodedSample(
        key=sample.key,
        patient=sample.patient or sample.key,
        label=sample.label,
        split=sample.split,
        columns=dict(sample.columns),
        arrays=tuple(arrays),
        details={"source": "a test"},
    )
