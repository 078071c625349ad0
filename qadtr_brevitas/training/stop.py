"""Orderly interruption of a run: a signal sets a flag, and the loop stops after the current step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from qadtr_brevitas.core.errors import TrainingError


class Interrupted(TrainingError):
    """Training was interrupted by Ctrl-C or SIGTERM, after its state was saved."""


class StopRequest:
    """Records the first Ctrl-C or SIGTERM inside its `with` block; a second one of its kind ends the program at once.

    Attributes:
        requested: whether a signal has arrived.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._record)
        except ValueError:
            # Only the main thread may catch signals; in other threads they end the program as usual.
            self._previous_handlers.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        # Only this signal's handler is restored: torchrun answers a Ctrl-C with a SIGTERM.
        signal.signal(number, self._previous_handlers[number])
