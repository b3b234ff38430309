"""A loader's state as it lies in a file: read, recognised, and named by a digest of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from streaming_balance.errors import ConfigError, ResumeError
from streaming_balance.training.state import LoaderState

# A state is a few hundred bytes; one with thousands of substitutions still fits easily.
MAX_STATE_BYTES = 64 * 2**20
# What tells a state from other documents, and how deep inside one it is looked for.
STATE_NAMES = frozenset({"plan_digest", "shards_digest", "position"})
MAX_DEPTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """A state and the digest of the document that holds it."""

    state: LoaderState
    """The state."""
    digest: str
    """BLAKE2b-256 of its canonical JSON: whoever has the file can compute it again."""

    @classmethod
    def of(cls, state: LoaderState) -> SavedState:
        """Take a state that lies in no file, as `state_dict` would give it."""
        return cls(state=state, digest=document_digest(state.to_dict()))


def document_digest(document: Mapping[str, object]) -> str:
    """Digest a JSON document, whatever the order of its names and the spaces between them.

    Returns:
        64 hex digits: BLAKE2b-256 of the document with sorted names and no spaces.

    Examples:
        >>> document_digest({"a": 1, "b": 2}) == document_digest({"b": 2, "a": 1})
        True
    """
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def read_state(path: Path) -> LoaderState:
    """Read a loader's state saved as JSON.

    Args:
        path: what `json.dump(loader.state_dict(), file)` wrote.

    Raises:
        ConfigError: the file cannot be read.
        ResumeError: it is not JSON, or no state.
    """
    return read_saved_state(path).state


def read_saved_state(path: Path) -> SavedState:
    """Read a loader's state saved as JSON, with the digest of what was read.

    Args:
        path: what `json.dump(loader.state_dict(), file)` wrote.

    Raises:
        ConfigError: the file cannot be read.
        ResumeError: it is not JSON, or no state.
    """
    document = _read_document(path)
    try:
        _check_is_state(document)
        return SavedState(state=LoaderState.from_dict(document), digest=document_digest(document))
    except ResumeError as error:
        raise ResumeError(f"{path}: {error}") from error


def check_is_of_training(state: LoaderState) -> None:
    """Refuse the state of an evaluation loader.

    Raises:
        ResumeError: it is one.
    """
    if "balance" not in state.settings and {"batch_size", "rank"} <= state.settings.keys():
        raise ResumeError(
            f"this is the state of an evaluation over {state.settings.get('split')!r}: it delivers "
            f"every sample once, in packed order, so there is nothing to audit. Give the state of "
            f"a training loader."
        )


def _read_document(path: Path) -> dict[str, object]:
    """Read a JSON document of a bearable size; what it is is not looked at."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_STATE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the state {path}: {error.strerror}.") from error
    try:
        if len(content) > MAX_STATE_BYTES:
            raise ValueError(f"it is larger than {MAX_STATE_BYTES} bytes")
        document: dict[str, object] = json.loads(content)
        return document
    except (ValueError, RecursionError) as error:
        raise ResumeError(
            f"{path} is not a state saved as JSON ({error}). Save one in the training loop with "
            f"json.dump(loader.state_dict(), file)."
        ) from error


def _check_is_state(document: object) -> None:
    """Refuse a document that is something else, saying where in it a state is, if it holds one."""
    if not isinstance(document, Mapping) or STATE_NAMES & document.keys():
        return
    place = next(_states_in(document, ""), None)
    if place is not None:
        raise ResumeError(
            f"this is not the state of a loader, but holds one at {place}. Save that entry alone "
            f"with json.dump(loader.state_dict(), file)."
        )
    if "version" not in document:
        raise ResumeError(
            "this is not the state of a loader: it has none of a state's entries, such as "
            "'plan_digest'. Save one with json.dump(loader.state_dict(), file)."
        )


def _states_in(content: object, place: str, depth: int = 0) -> Iterator[str]:
    """Give the places of loaders' states inside a document, written as Python reaches them."""
    if isinstance(content, Mapping) and content.keys() >= STATE_NAMES:
        yield place
    elif depth < MAX_DEPTH and isinstance(content, Mapping | list):
        pairs = content.items() if isinstance(content, Mapping) else enumerate(content)
        for name, inner in pairs:
            yield from _states_in(inner, f"{place}[{name!r}]", depth + 1)
