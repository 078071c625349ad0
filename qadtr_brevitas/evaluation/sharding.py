"""Dividing an evaluation among machines (`--shard`) or among the processes of torchrun."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.cells import CellStore
from qadtr_brevitas.evaluation.jobs import Job

_Item = TypeVar("_Item")

# Shares differ in length by hours, and the end of another process ends the waiting one under torchrun.
_LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Shard:
    """One of several shares of the same work.

    Args:
        number: which, from 1.
        of: how many there are.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read 2/3.

        Raises:
            UsageError: anything else.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip(), flags=re.ASCII)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"--shard {text!r} cannot be read: give k/n with k from 1 to n, for instance 2/3")
        return cls(int(match[1]), int(match[2]))

    def pick(self, items: Sequence[_Item]) -> list[_Item]:
        """Every n-th item: what is alike stands side by side in a grid, so that shares take equally long."""
        return list(items[self.number - 1 :: self.of])

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def missing_by_share(jobs: Sequence[Job], store: CellStore, of: int) -> dict[Shard, int]:
    """How many cells of which shares are not in the store; shares that are complete are left out."""
    shares = [Shard(number, of) for number in range(1, of + 1)]
    counts = {share: sum(not job.is_done(store) for job in share.pick(jobs)) for share in shares}
    return {share: count for share, count in counts.items() if count}


def process_share(environment: Mapping[str, str] = os.environ) -> Shard:
    """Return the share of this process under torchrun; everything where there is no other process."""
    return Shard(int(environment.get("RANK", "0")) + 1, int(environment.get("WORLD_SIZE", "1")))


def local_device(name: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the device of this process: under torchrun each has a GPU of its own, as far as there are enough."""
    gpus = torch.cuda.device_count()
    if name not in ("auto", "cuda") or gpus == 0 or "LOCAL_RANK" not in environment:
        return name
    return f"cuda:{int(environment['LOCAL_RANK']) % gpus}"


@contextmanager
def together(share: Shard) -> Generator[None]:
    """Let no process of torchrun leave the block before all have come to its end."""
    if share.of == 1:
        yield
        return

    distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    try:
        yield
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
