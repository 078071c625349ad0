"""What a worker of a study does: it runs one step, notes how far it is, and says what became of it."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError

from qadtr_brevitas.core.document import Document
from qadtr_brevitas.core.errors import QadtrError
from qadtr_brevitas.core.files import write_json
from qadtr_brevitas.reproduce.study.locks import LOCKS_FOLDER, step_lock
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.steps import StudyStep
from qadtr_brevitas.training.stop import Interrupted

# Network file systems remember for up to a minute that a file is not there.
_SEE_SECONDS = 60.0
_NOTE_SECONDS = 2.0


class TaskSettings(NamedTuple):
    """What a task needs besides its step.

    Args:
        work: the folder that studies share, which all nodes see.
        device: name of the device; Ray shows a task its own GPUs only.
        processes: processes of a training.
        command: command line, for reports.
        compiles: whether the passes of attacks run through torch.compile.
        threads: CPU threads of each process.
        current: the current folder of the command, which relative paths of recipes start from.
        environment: variables that are set where the node does not set them itself.
        witness: a file in the shared folder that shows that a node sees it; None on the machine of the command.
    """

    work: Path
    device: str
    processes: int
    command: str
    compiles: bool
    threads: int
    current: Path
    environment: Mapping[str, str]
    witness: Path | None

    @classmethod
    def of(cls, resources: StudyResources, *, device: str, threads: int, witness: Path | None = None) -> TaskSettings:
        """Return the settings of tasks that run with some resources."""
        return cls(
            work=resources.work,
            device=device,
            processes=resources.processes,
            command=resources.command,
            compiles=resources.compiles,
            threads=threads,
            current=Path.cwd(),
            environment={name: value for name, value in os.environ.items() if name.startswith("QADTR_BREVITAS_")},
            witness=witness,
        )


class StepResult(NamedTuple):
    """What became of a step.

    Args:
        host: the machine that ran it.
        error: why it failed; empty if it did not.
        is_stopped: whether a signal stopped it, after its state was saved.
    """

    host: str
    error: str = ""
    is_stopped: bool = False


class StepNote(Document):
    """How far a running step is: its machine, parts done and in all (0 if that is not known), and a remark."""

    host: str
    done: int = 0
    total: int = 0
    note: str = ""


def run_step(step: StudyStep, settings: TaskSettings) -> StepResult:
    """Run a step here, unless another process finishes it first, and return what became of it."""
    host = socket.gethostname()
    if settings.witness is not None and not _is_seen(settings.witness):
        return StepResult(host, f"{host} does not see {settings.work}: put it on a path that all nodes see (--work)")
    _prepare(settings)
    note = note_file(settings.work, step)
    try:
        with step_lock(settings.work, step):
            if not step.is_finished():
                progress = _Notes(note, host)
                progress(0, 0)
                step.run(_resources(settings), progress)
    except Interrupted:
        return StepResult(host, is_stopped=True)
    except QadtrError as error:
        return StepResult(host, str(error))
    except Exception as error:
        # The other steps go on, and Ray keeps the output of its workers.
        traceback.print_exc()
        return StepResult(host, f"{type(error).__name__} on {host}: {error}")
    finally:
        note.unlink(missing_ok=True)
    return StepResult(host)


def note_file(work: Path, step: StudyStep) -> Path:
    """Return the file in which a running step notes how far it is."""
    return work / LOCKS_FOLDER / f"{step.key}.note"


def read_note(work: Path, step: StudyStep) -> StepNote | None:
    """Return how far a step is; None if it does not run yet."""
    try:
        return StepNote.model_validate_json(note_file(work, step).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


class _Notes:
    """Progress that is written to a file every few seconds."""

    def __init__(self, file: Path, host: str) -> None:
        self._file, self._host, self._next = file, host, 0.0

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _NOTE_SECONDS
        # A step does not fail because nobody can be told how far it is.
        with suppress(OSError, QadtrError):
            write_json(self._file, StepNote(host=self._host, done=done, total=total, note=note).model_dump())


def _is_seen(witness: Path, seconds: float = _SEE_SECONDS) -> bool:
    end = time.monotonic() + seconds
    while not witness.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def _prepare(settings: TaskSettings) -> None:
    for name, value in settings.environment.items():
        os.environ.setdefault(name, value)
    # Ray sets this to the CPUs of the task, which may have several processes.
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    torch.set_num_threads(settings.threads)
    if settings.current.is_dir():
        os.chdir(settings.current)


@lru_cache(maxsize=1)
def _loaded(work: Path, device: str, processes: int, command: str, compiles: bool) -> StudyResources:
    return StudyResources(work, device, processes, command, compiles)


def _resources(settings: TaskSettings) -> StudyResources:
    """Return the resources of this process, which keep models and images from one step to the next."""
    return _loaded(settings.work, settings.device, settings.processes, settings.command, settings.compiles)
