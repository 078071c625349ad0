"""The steps of a study: each makes one thing in a folder, unless it is finished already."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from qadtr_brevitas.core.document import Document
from qadtr_brevitas.core.files import fingerprint_facts, write_json
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.reproduce.study.resources import StudyResources

_KEY_LENGTH = 12


class StepMarker(Document, extra="ignore"):
    """The file that marks a finished step, beside what it made.

    `key` is the key of the step, `part` its name, `seconds` the time it took, and `finished` when it ended.
    """

    key: str
    part: str
    seconds: float
    finished: str


@dataclass(frozen=True)
class StudyStep(ABC):
    """A step: one thing to make.

    Args:
        name: its name for people, which starts with a verb.
        folder: where its files go.
        settings: JSON-like facts that decide the result, besides the steps it needs.
        needs: steps that have to be finished before it.
    """

    name: str
    folder: Path
    settings: object
    needs: tuple[StudyStep, ...]

    @cached_property
    def key(self) -> str:
        """The fingerprint of everything that decides the result."""
        return fingerprint_facts([type(self).__name__, self.settings, [step.key for step in self.needs]])

    @property
    def marker(self) -> Path:
        """The file that marks it as finished."""
        return self.folder / f"made-{self.key[:_KEY_LENGTH]}.json"

    def is_finished(self) -> bool:
        """Return whether the step is finished; with a damaged marker it runs again and reuses its files."""
        return self.seconds_taken() is not None

    def seconds_taken(self) -> float | None:
        """Return the seconds that the step took; None if it is not finished."""
        found = _read_marker(self.marker)
        return found.seconds if found is not None and found.key == self.key else None

    def run(self, resources: StudyResources, progress: Progress) -> None:
        """Run the step, or resume it, and mark it as finished."""
        # The files of other settings are overwritten, so their marker must not stay.
        self._remove_markers()
        started = time.monotonic()
        self.execute(resources, progress)
        marker = StepMarker(
            key=self.key,
            part=self.name,
            seconds=round(time.monotonic() - started, 1),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        # Another process may have run the step with other settings meanwhile; the files are those of this run.
        self._remove_markers()
        write_json(self.marker, marker.model_dump())

    def processes(self, resources: StudyResources) -> int:
        """Return the number of processes that the step computes in, each with threads and a GPU of its own."""
        return 1

    @abstractmethod
    def execute(self, resources: StudyResources, progress: Progress) -> None:
        """Make what is missing of the step's result."""

    def _remove_markers(self) -> None:
        """Remove the markers of all steps with the same verb in the folder; a report and its audit share a folder."""
        for file in self.folder.glob("made-*.json"):
            found = _read_marker(file)
            if found is None or _verb(found.part) == _verb(self.name):
                file.unlink(missing_ok=True)


def _read_marker(file: Path) -> StepMarker | None:
    """Return the contents of a marker; None if it is missing or damaged."""
    try:
        return StepMarker.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _verb(name: str) -> str:
    return name.partition(" ")[0]
