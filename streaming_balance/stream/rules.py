"""How strictly streams are read: the choices, each with its default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.storage.tar import MAX_MEMBER_BYTES
from streaming_balance.stream.names import KeyRule, key_rule

OnError = Literal["raise", "skip"]
UniqueKeys = Literal["stream", "shard"]
MissingEnd = Literal["refuse", "accept"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TarRules:
    """How members become samples, and what happens to damaged ones.

    Raises:
        ConfigError: a value is none of those allowed.
    """

    on_error: OnError = "raise"
    """`raise`: the first damage ends the stream; `skip`: it is left out, counted and logged."""
    keys: KeyRule = "webdataset"
    """Where a name is cut into key and field: at the first dot of its base name, or the last."""
    wanted: frozenset[str] = frozenset()
    """Fields every sample must have: `image` stands for `image`, `image.npb`, `image.npy`."""
    unique_keys: UniqueKeys = "stream"
    """Where a key may come only once: in the whole stream, or in each shard."""
    missing_end: MissingEnd = "refuse"
    """Tars without the two zero blocks at their end; accepting them, a cut between members is not
    seen."""
    max_member_bytes: int = MAX_MEMBER_BYTES
    """Larger members are refused before anything is allocated."""
    max_sample_bytes: int = 2 * MAX_MEMBER_BYTES
    """Larger samples are refused; one sample at a time is in memory where a source cannot seek."""
    max_key_bytes: int = 256 << 20
    """Memory for remembering keys, 16 bytes each; what does not fit is counted."""

    def __post_init__(self) -> None:
        """Check every choice."""
        key_rule(self.keys)
        for name, choices in (
            ("on_error", get_args(OnError)),
            ("unique_keys", get_args(UniqueKeys)),
            ("missing_end", get_args(MissingEnd)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(
                    f"{name} is {value!r}; it must be one of {', '.join(choices)}."
                    + did_you_mean(str(value), choices)
                )
        if isinstance(self.wanted, str):
            raise ConfigError(f"wanted is {self.wanted!r}; it must be a set, {{{self.wanted!r}}}.")
        for name in ("max_member_bytes", "max_sample_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1.")
