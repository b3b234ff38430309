"""Where the tour keeps its files, and the check that it overwrites nobody else's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from streaming_balance.errors import ConfigError

MARKER = ".streaming-balance-demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The files of one tour."""

    out: Path
    """The folder that holds all of them."""

    @classmethod
    def claim(cls, out: Path) -> Self:
        """Take a folder for a tour.

        Raises:
            ConfigError: it holds something that no tour put there.
        """
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out} is a file; give a folder for the demo to work in.")
        out.mkdir(parents=True, exist_ok=True)
        marker = out / MARKER
        if not marker.exists() and any(out.iterdir()):
            raise ConfigError(
                f"{out} is not empty and not of an earlier demo, which overwrites its files. Give "
                f"a new folder with --out."
            )
        marker.touch()
        places = cls(out=out)
        places.checkpoint.mkdir(exist_ok=True)
        return places

    @property
    def patients(self) -> Path:
        """The generated cohort."""
        return self.out / "patients"

    @property
    def cohort(self) -> Path:
        """The packed data set."""
        return self.out / "cohort"

    @property
    def checkpoint(self) -> Path:
        """What was saved in mid-epoch: `state.json` and `network.npz`."""
        return self.out / "checkpoint"

    @property
    def state(self) -> Path:
        """The loader's state at the end of the resumed run."""
        return self.out / "state.json"

    @property
    def picture(self) -> Path:
        """Class counts per batch, before and after."""
        return self.out / "batches.png"
