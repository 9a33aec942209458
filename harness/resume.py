"""The state of a run that can be killed: its plan, what its devices wrote, and which epoch counts.

A folder holds the plan, the devices' files of one or two epochs (`harness.engine.checkpoint`), and `committed.json`,
which names the last epoch that every device has written. A crash at any instant leaves the old commit or the new one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.errors import OrreryError
from harness.store import write_whole

FORMAT = 1
PLAN, COMMITTED, CACHE = "plan.json", "committed.json", "cache"
#: What must be the same when a run goes on, in the order in which differences are named.
NOUNS = {
    "format": "version of the state's format",
    "config_hash": "question",
    "code_digest": "code",
    "weights": "initial weights",
    "samples": "data",
}


@dataclass(frozen=True)
class Committed:
    """The last epoch that counts. `about`: what the run is of; `digests`: of each device's file."""

    about: Mapping[str, str | int]
    epochs: int
    digests: Mapping[str, str]


class Journal:
    """The state of one run in its folder. `about` as in `NOUNS`; a testbed adds what only it knows."""

    def __init__(self, folder: Path, about: Mapping[str, str]) -> None:
        self.folder = folder
        self.about: dict[str, str | int] = {"format": FORMAT, **about}
        self.plan, self.cache = folder / PLAN, folder / CACHE

    def committed(self) -> Committed | None:
        """Where the run can go on; None: it begins. OrreryError where the state is damaged, or of something else."""
        path = self.folder / COMMITTED
        try:
            found = Committed(**json.loads(path.read_text(encoding="utf-8")))
            theirs, _ = dict(found.about), dict(found.digests)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise OrreryError(
                f"The state of a killed run in {path} can't be read: {error}. {self._remedy()}"
            ) from error
        for key, ours in self.about.items():
            if theirs.get(key) != ours:
                raise OrreryError(
                    f"The killed run in {self.folder} was of another {NOUNS[key]}: {theirs.get(key)} there, {ours} "
                    f"now, so it can't go on after epoch {found.epochs}. {self._remedy()}"
                )
        return found

    def add(self, about: Mapping[str, str]) -> None:
        """What else the run is of."""
        self.about |= about

    def keep_plan(self, text: str) -> None:
        write_whole(self.plan, lambda part: part.write_text(text, encoding="utf-8"))

    def commit(self, epochs: int, digests: Mapping[str, str]) -> None:
        """From now on the run goes on after so many epochs. Files of earlier ones go."""
        text = json.dumps(asdict(Committed(self.about, epochs, digests)))
        write_whole(self.folder / COMMITTED, lambda part: part.write_text(text, encoding="utf-8"))
        for path in self.folder.glob("epoch-*"):
            if int(path.name.split("-")[1]) < epochs:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """The run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # it was the last one

    def _remedy(self) -> str:
        return f"Remove {self.folder} to begin anew, run without --resume, or bring back what it was of."
