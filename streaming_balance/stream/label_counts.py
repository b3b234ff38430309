"""How often each class comes in some shards: a pass over the labels alone, before the real one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from streaming_balance.errors import BalanceError, ConfigError
from streaming_balance.stream.local import ShardFiles
from streaming_balance.stream.rules import TarRules
from streaming_balance.stream.sample_labels import check_label, label_field, label_of_fields
from streaming_balance.stream.sources import ShardSource
from streaming_balance.stream.tallies import MOST_CLASSES
from streaming_balance.stream.tarstream import SampleReader


def count_labels(
    sources: Sequence[ShardSource], *, label: str, rules: TarRules | None = None
) -> dict[str, int]:
    """Count the classes of some shards; of plain tars only headers and labels are read.

    Args:
        sources: the shards, as `expand` gives them; all of them must be there a second time.
        label: where the class stands: a field, or `json:FIELD`.
        rules: how strictly to read. With `on_error="skip"` samples without a class are passed over.

    Returns:
        label -> samples, sorted by label.

    Raises:
        ConfigError: a shard passes by once, a sample has no class, or there are too many classes.
        ShardError: a shard is damaged.

    Examples:
        >>> from streaming_balance.stream.sources import expand
        >>> count_labels(expand("shards/demo/train-*.tar"), label="cls")
        {'0': 4, '1': 10}
    """
    check_label(label)
    for source in sources:
        if not source.can_repeat:
            raise ConfigError(
                f"{source.shown} passes by once, so its classes cannot be counted before. Say how "
                f"frequent they are, or which there are, by name: LGG=75,HGG=210."
            )
    chosen = TarRules() if rules is None else rules
    field = label_field(label)
    strict = replace(chosen, wanted=chosen.wanted | {field})
    counts: Counter[str] = Counter()
    with ShardFiles() as files:
        for sample in SampleReader(sources, rules=strict, files=files):
            try:
                fields = {"__key__": sample.key, field: sample.field_bytes(field)}
                counts[label_of_fields(fields, label)] += 1
            except BalanceError as error:
                if chosen.on_error == "raise":
                    error.add_note(f"in {sample.url}, at byte {sample.offset}")
                    raise
            if len(counts) > MOST_CLASSES:
                raise ConfigError(
                    f"label {label!r} has over {MOST_CLASSES:,} values, such as "
                    f"{', '.join(sorted(counts)[:3])}: it names no class. Name another field."
                )
    return dict(sorted(counts.items()))
