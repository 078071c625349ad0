"""Stopping a run in an orderly way: a signal is only noted, and the loop stops once its step is done."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from qadtr_brevitas.core.errors import TrainingError


class Interrupted(TrainingError):
    """Training was stopped by Ctrl-C or a signal, after its state was saved."""


class StopRequest:
    """Notes the first Ctrl-C or SIGTERM inside its `with` block; a second one of its kind stops at once.

    Attributes:
        asked: somebody wants this process to stop.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        except ValueError:
            # Only the main thread may catch signals; elsewhere they end the program as always.
            self._before.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        # Only this one: torchrun answers a Ctrl-C with a SIGTERM, too.
        signal.signal(number, self._before[number])
