"""Each task in a process of its own, so that none can take too long, too much memory, or the others down with it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

Record = dict[str, Any]
# Is given the record so far and gives its parts as it finds them, the one with "result" last.
Task = Callable[[Record], Iterator[Record]]


@dataclass
class _Run:
    record: Record
    process: BaseProcess
    receiver: Connection
    deadline: float

    def finish(self) -> Record:
        """Takes what there is, if anything is, and ends the process once the record is complete."""
        try:
            while "result" not in self.record and self.receiver.poll():
                self.record |= self.receiver.recv()
        except EOFError:
            self.process.join()
            status = self.process.exitcode
            self.record |= {"result": "failed", "reason": f"its process ended with status {status}"}
        if "result" not in self.record and time.monotonic() > self.deadline:
            self.record |= {"result": "failed", "reason": "took too long"}
        if "result" in self.record:
            self.process.kill()
            self.process.join()
        return self.record


def run_all(task: Task, records: Iterable[Record], *, jobs: int, timeout: float) -> Iterator[Record]:
    """Runs a task for each record.

    Args:
        task: what to do; it runs in a copy of this process, which has imported everything already.
        records: where each starts from.
        jobs: processes at a time.
        timeout: seconds for each.

    Yields:
        The completed records, in the order in which they are done. "result" is "failed" where the task gave none.
    """
    waiting, running = deque(records), list[_Run]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_start(task, waiting.popleft(), timeout))
        wait([run.receiver for run in running], timeout=1.0)
        for run in list(running):
            if "result" in (record := run.finish()):
                running.remove(run)
                yield record


def _start(task: Task, record: Record, timeout: float) -> _Run:
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_all, args=(task, record, sender), daemon=True)
    process.start()
    sender.close()
    return _Run(record, process, receiver, time.monotonic() + timeout)


def _send_all(task: Task, record: Record, sender: Connection) -> None:
    for part in task(record):
        sender.send(part)
