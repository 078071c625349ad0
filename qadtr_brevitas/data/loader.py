"""Batches of training images, read and changed ahead of their use by worker processes.

A batch is a function of the seed, its epoch and the indices of its images: any number of workers makes the same, and a
resumed run goes on with the batch that an uninterrupted one would have seen.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from qadtr_brevitas.core.errors import DataError, QadtrError
from qadtr_brevitas.core.seeding import derive_seed
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.data.streamed import StreamedSplit
from qadtr_brevitas.data.transform import TrainingTransform, own_random_streams

MOST_WORKERS = 8


class Request(NamedTuple):
    """Which images a batch is made of: indices int64 (n,) into the split, and the epoch that decides their changes."""

    epoch: int
    indices: Tensor


class Loaded(NamedTuple):
    """A batch as a worker hands it over: uint8 (n, C, H, W), what was wrong with skipped images, and an error."""

    pixels: Tensor
    damaged: list[str]
    error: str


class BatchLoader:
    """Makes batches by step.

    Args:
        split: the images.
        transform: changes each of them; None to leave them as they are.
        request: says what the batch of a step consists of.
        seed: source of the random changes.
        workers: processes that read ahead; 0 to read in this one, when a batch is asked for.
        pin: whether batches are on their way to a GPU.
    """

    def __init__(
        self,
        split: Split,
        transform: TrainingTransform | None,
        request: Callable[[int], Request],
        *,
        seed: int,
        workers: int,
        pin: bool = False,
    ) -> None:
        self._split, self._request = split, request
        self._reader = _Reader(split, transform, seed)
        self._workers, self._pin = workers, pin
        self._batches: Iterator[Loaded] | None = None
        self._next = 0

    def pixels(self, step: int) -> Tensor:
        """Return the images of a step, uint8 (n, C, H, W); steps that follow each other are read ahead.

        Raises:
            DataError: an image cannot be read, or a worker process was killed.
        """
        if self._batches is None or step != self._next:
            self._batches = self._start(step)
        try:
            batch = next(self._batches)
        # The end of a process shows in PyTorch's own check of it, or in the pipe that it was writing into.
        except (RuntimeError, ConnectionError, EOFError) as error:
            self.close()
            if not self._workers:
                raise
            raise _killed(error) from error
        except BaseException:
            self.close()
            raise
        self._next = step + 1
        return self._checked(batch)

    def read(self, request: Request) -> Tensor:
        """Return images that belong to no step, uint8 (n, C, H, W), read in this process.

        Raises:
            DataError: an image cannot be read.
        """
        return self._checked(self._reader[request])

    def close(self) -> None:
        """End the worker processes."""
        self._batches = None

    def _start(self, step: int) -> Iterator[Loaded]:
        loader: DataLoader[Any] = DataLoader(
            self._reader,
            batch_size=None,
            sampler=_Requests(self._request, step),
            num_workers=self._workers,
            collate_fn=cast(Any, _as_it_is),
            # Its own stream, from which nothing is drawn here: the global one is left as it is.
            generator=torch.Generator(),
            worker_init_fn=_leave_signals_to_the_main_process,
            pin_memory=self._pin,
        )
        with _children_signal_nothing():
            return iter(loader)

    def _checked(self, batch: Loaded) -> Tensor:
        if batch.error:
            self.close()
            raise DataError(batch.error)
        if batch.damaged and isinstance(self._split, StreamedSplit):
            self._split.tell(batch.damaged)
        return batch.pixels


def worker_count(wanted: int | None, processes: int = 1) -> int:
    """Return how many worker processes read ahead for one process of a run.

    Args:
        wanted: what the user wants; None for as many as there are cores for each process of the run, at most 8.
        processes: processes of the run on this machine.
    """
    if wanted is not None:
        return wanted
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // processes))


class _Requests(Sampler[Request]):
    """The requests of all steps from one on, without an end."""

    def __init__(self, request: Callable[[int], Request], first: int) -> None:
        self._request, self._first = request, first

    def __iter__(self) -> Iterator[Request]:
        step = self._first
        while True:
            yield self._request(step)
            step += 1


class _Reader(Dataset[Loaded]):
    """Makes batches from requests, in whichever process it is asked."""

    def __init__(self, split: Split, transform: TrainingTransform | None, seed: int) -> None:
        self._split, self._transform, self._seed = split, transform, seed

    def __getitem__(self, request: Request) -> Loaded:
        split, size = self._split, self._split.image_size
        pixels = torch.empty(len(request.indices), split.channels, *size, dtype=torch.uint8)
        error = ""
        try:
            with own_random_streams():
                for place, index in enumerate(request.indices.tolist()):
                    pixels[place] = self._image(request.epoch, index)
        # An error of another process arrives as a text that holds its traceback.
        except QadtrError as problem:
            error = str(problem)
        return Loaded(pixels, split.pop_damaged(), error)

    def _image(self, epoch: int, index: int) -> Tensor:
        if self._transform is None:
            return self._split.pixels(index)
        seed = derive_seed(self._seed, "transform", epoch, index)
        crops = self._transform.scale is not None
        return self._transform((self._split.whole_picture if crops else self._split.picture)(index), seed=seed)


def _as_it_is(batch: Loaded) -> Loaded:
    return batch


@contextmanager
def _children_signal_nothing() -> Generator[None]:
    """Undo that PyTorch raises the end of a worker by a signal: wherever the main process is, in the midst of a step.

    The loader itself looks for workers that have ended when it waits for a batch.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _leave_signals_to_the_main_process(worker: int) -> None:
    # A Ctrl-C reaches every process of a terminal; the main process saves its state and ends the workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _killed(error: Exception) -> DataError:
    cause = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(
        f"a process that reads training images ahead has ended ({cause}), often because memory is short: give a "
        "smaller data.workers, or 0 to read in the process that trains"
    )
