"""Everything that can go wrong on purpose.

    BalanceError
    ├── ConfigError(ValueError)   a setting, an argument or a YAML key is wrong
    ├── ShardError(OSError)       bytes on disk are missing, damaged or not what the table says
    ├── SplitError(ValueError)    a patient, or the same voxels, would stand in two splits
    └── ResumeError(ValueError)   a saved state does not belong to this run

A message names the setting or the place, the value found, what is allowed, and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BalanceError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(BalanceError, ValueError):
    """A setting is wrong: `train_loader(shards, global_batch_size=0)`."""


class ShardError(BalanceError, OSError):
    """Stored bytes are missing or damaged: opening a data set whose shard was cut short."""


class SplitError(BalanceError, ValueError):
    """One patient, or the same voxels, in two splits: packing a table with a patient twice."""


class ResumeError(BalanceError, ValueError):
    """A state of another run: `loader.load_state_dict(state_of_a_run_with_another_seed)`."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Give ` Did you mean 'x'?` for the known word nearest to `word`, or nothing.

    Examples:
        >>> did_you_mean("class_balance", ["class_balanced", "power"])
        " Did you mean 'class_balanced'?"
        >>> did_you_mean("lgg", ["HGG", "LGG"])
        " Did you mean 'LGG'?"
        >>> did_you_mean("zzz", ["power"])
        ''
    """
    by_folded: dict[str, str] = {}
    for name in known:
        by_folded.setdefault(name.casefold(), name)
    matches = difflib.get_close_matches(str(word).casefold(), list(by_folded), n=1, cutoff=0.6)
    return f" Did you mean {by_folded[matches[0]]!r}?" if matches else ""
