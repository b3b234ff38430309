"""How foreign shards are indexed: the choices, and which members they make image and mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.ingest.foreign_members import is_array
from streaming_balance.storage.layout import AXES, CODEC_EXTENSIONS, check_split_name
from streaming_balance.storage.manifest import JSON
from streaming_balance.stream.names import KeyRule
from streaming_balance.stream.rules import TarRules, UniqueKeys

NO_IMAGE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexRules:
    """What an index is asked for.

    Raises:
        ConfigError: a value is none of those allowed.
    """

    label: str = "cls"
    """`cls`, `json:FIELD` or `csv:FILE`."""
    patient: str | None = None
    """`json:FIELD`; None: the column patient of a table, else every key is its own patient."""
    split: str = "train"
    """The split of all samples, where no table says it."""
    classes: tuple[str, ...] | None = None
    """Every label in class order; None orders those found."""
    image: str | None = None
    """Field of the image; `none` for no image; None: `image`, or the only array there is."""
    seg: str | None = None
    """Field of the mask; None: `seg`, where it is an array."""
    axes: str | None = None
    """Meaning of the arrays' axes, such as `CHW`; None goes by their number."""
    keys: KeyRule = "webdataset"
    """Where a name is cut into key and field: at the first dot of its base name, or the last."""
    unique_keys: UniqueKeys = "stream"
    """`shard`: keys start anew in each shard and get its name: `train-000001/P1`."""
    train_splits: tuple[str, ...] | None = None
    """Splits that may be balanced; None takes those whose name begins with "train"."""

    def __post_init__(self) -> None:
        """Check every choice that needs no shard."""
        check_split_name(self.split)
        if self.axes is not None and self.axes not in AXES:
            raise ConfigError(
                f"axes is {self.axes!r}; it must be one of {', '.join(AXES)}."
                + did_you_mean(self.axes, AXES)
            )
        for name in ("label", "image", "seg"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} is empty; name a field or leave it out.")
        assert set(get_args(UniqueKeys)) == {"stream", "shard"}
        self.tar_rules()

    def tar_rules(self) -> TarRules:
        """Give how strictly the tars are read."""
        return TarRules(keys=self.keys, unique_keys=self.unique_keys)

    @property
    def settings(self) -> dict[str, JSON]:
        """List what decides the content of an index, but for labels and shards."""
        return {
            "split": self.split,
            "classes": None if self.classes is None else list(self.classes),
            "image": self.image,
            "seg": self.seg,
            "axes": self.axes,
            "keys": self.keys,
            "unique_keys": self.unique_keys,
            "train_splits": None if self.train_splits is None else list(self.train_splits),
            **({"classes_declared": True} if self.classes is not None else {}),
        }


def array_fields(rules: IndexRules, samples: Iterable[Sequence[str]]) -> Mapping[str, str]:
    """Say which fields hold the image and the mask.

    Args:
        rules: what was asked for.
        samples: the fields of every sample.

    Returns:
        `image` or `seg` by field; `image.npb` and `image.npy` may both be the image.

    Raises:
        ConfigError: a field that was asked for is no array or not there, or several may be meant.
    """
    counts: Counter[str] = Counter()
    for fields in samples:
        counts.update(fields)
    seg = _asked("seg", rules.seg, counts) or _spelled("seg", counts)
    chosen = dict.fromkeys(seg, "seg")
    if rules.image == NO_IMAGE:
        if rules.seg is not None:
            raise ConfigError("seg names a mask, and image is 'none'; a mask needs an image.")
        return {}
    image = _asked("image", rules.image, counts) or _spelled("image", counts)
    if not image:
        # `cls.npy` is how our own shards write several labels.
        image = [name for name in counts if is_array(name) and name not in {*chosen, "cls.npy"}]
        if len(image) > 1:
            raise ConfigError(
                f"samples have the arrays {', '.join(sorted(image))}; say which one is the image: "
                f"image={sorted(image)[0]!r} (--image {sorted(image)[0]}), or image='none'."
            )
    return {**chosen, **dict.fromkeys(image, "image")} if image else {}


def _spelled(name: str, counts: Mapping[str, int]) -> list[str]:
    """Give the array fields of this name that there are."""
    spellings = (f"{name}.{extension}" for extension in CODEC_EXTENSIONS.values())
    return [spelling for spelling in spellings if spelling in counts]


def _asked(role: str, field: str | None, counts: Mapping[str, int]) -> list[str]:
    """Give the array fields that were asked for, none where nothing was."""
    if field is None:
        return []
    found = [field] if field in counts and is_array(field) else _spelled(field, counts)
    if found:
        return found
    if field in counts:
        raise ConfigError(
            f"{role} is {field!r}, and no decoder reads {field}: only .npy and .npb are arrays. "
            f"Leave {role} out: {field} is kept as bytes, for a transform to decode."
        )
    raise ConfigError(
        f"{role} is {field!r}; fields there: {', '.join(sorted(counts))}."
        + did_you_mean(field, counts)
    )
