"""The counts of readers that share a stream, put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_COUNTED = ("read", "delivered", "copies", "rejected")


def summed(readers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up what several readers of one stream say.

    Args:
        readers: what `Stream.stats` gives of each.

    Returns:
        `readers`, as given; `totals`, their sums; `classes`, label -> what the last stage read,
        delivered, copied and rejected in all of them, `wanted_share`, and the `realised_share` of
        all that went on. Without a stage there are no classes.

    Examples:
        >>> counts = {"read": 3, "delivered": 1, "copies": 0, "rejected": 2, "wanted_share": 0.5}
        >>> reader = {"totals": {"read": 3}, "stages": [{"classes": {"HGG": counts}}]}
        >>> both = summed([reader, reader])
        >>> both["totals"], both["classes"]["HGG"]["rejected"]
        ({'read': 6}, 4)
    """
    totals: Counter[str] = Counter()
    classes: dict[str, dict[str, Any]] = {}
    for reader in readers:
        totals.update(reader["totals"])
        last = reader["stages"][-1]["classes"] if reader["stages"] else {}
        for label, counts in last.items():
            found = classes.setdefault(
                label, {**dict.fromkeys(_COUNTED, 0), "wanted_share": counts["wanted_share"]}
            )
            for name in _COUNTED:
                found[name] += counts[name]
    went_on = sum(found["delivered"] + found["copies"] for found in classes.values())
    for found in classes.values():
        found["realised_share"] = (found["delivered"] + found["copies"]) / max(went_on, 1)
    return {"readers": list(readers), "totals": dict(totals), "classes": classes}
