"""The parts of a study: each makes one thing, into a folder of its own, unless it is there."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.core.files import fingerprint_facts, read_json, write_json
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.reproduce.study.resources import StudyResources

_KEY_LENGTH = 12


@dataclass(frozen=True)
class StudyStep(ABC):
    """One thing to make.

    Args:
        name: what it is, for people.
        folder: where it goes.
        made_of: JSON-like facts that decide what comes out, but for the parts it needs.
        needs: parts that have to be made before.
    """

    name: str
    folder: Path
    made_of: object
    needs: tuple[StudyStep, ...]

    @cached_property
    def key(self) -> str:
        """Of everything that decides what comes out."""
        return fingerprint_facts([type(self).__name__, self.made_of, [part.key for part in self.needs]])

    @property
    def note(self) -> Path:
        """The file that says that the part is finished, beside what it made."""
        return self.folder / f"made-{self.key[:_KEY_LENGTH]}.json"

    def is_made(self) -> bool:
        """True where it is finished."""
        try:
            return read_json(self.note)["key"] == self.key
        # A damaged note costs a look at what is there, which is not made twice.
        except (CheckpointError, KeyError, TypeError):
            return False

    def make(self, resources: StudyResources, progress: Progress) -> None:
        """Makes it, or goes on with it, and notes that it is finished."""
        # What is there of other settings is overwritten: its note must not call it finished any more.
        self._forget()
        started = time.monotonic()
        self.work(resources, progress)
        seconds = round(time.monotonic() - started, 1)
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        # Another process may have made it of other settings at the same time: what is there now is this.
        self._forget()
        write_json(self.note, {"key": self.key, "part": self.name, "seconds": seconds, "finished": finished})

    def _forget(self) -> None:
        """Removes the notes of all parts of this kind in the folder; a report and its audit share theirs."""
        for note in self.folder.glob("made-*.json"):
            if _kind(note) in (_first_word(self.name), None):
                note.unlink(missing_ok=True)

    @abstractmethod
    def work(self, resources: StudyResources, progress: Progress) -> None:
        """Makes what is missing of it."""
        ...


def _kind(note: Path) -> str | None:
    """What was done, `evaluate` or `audit` for instance; None where the note does not say."""
    try:
        return _first_word(read_json(note)["part"])
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None


def _first_word(name: str) -> str:
    return name.partition(" ")[0]
