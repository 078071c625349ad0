"""Further processes on this machine that run steps of a study beside this one."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from qadtr_brevitas.core.errors import QadtrError
from qadtr_brevitas.evaluation.sharding import Shard
from qadtr_brevitas.reproduce.study.locks import StepLocks
from qadtr_brevitas.reproduce.study.plan import StudyPlan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.run import run_study


@contextmanager
def helping_processes(plan: StudyPlan, resources: StudyResources, locks: Path, *, jobs: int) -> Generator[Shard | None]:
    """Run steps in `jobs` - 1 further processes during a block, which receives the share of this process.

    The block runs the study itself: it waits for the steps of the others, and runs what one of them left that was
    killed. Failed steps are tried by each process, and this one tells about them.

    Args:
        plan: the steps.
        resources: what they run with.
        locks: folder of the locks.
        jobs: processes in all; 1 for none but this.
    """
    if jobs == 1:
        yield None
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # A fork would copy the threads of PyTorch in whatever state they are.
    context = get_context("spawn")
    shares = [Shard(number, jobs) for number in range(2, jobs + 1)]
    others = [context.Process(target=_help, args=(plan, resources, locks, share, threads)) for share in shares]
    for process in others:
        process.start()
    try:
        yield Shard(1, jobs)
    finally:
        # They end with the study, and after a Ctrl-C, which all of them receive, with their states saved.
        for process in others:
            process.join()


def _help(plan: StudyPlan, resources: StudyResources, locks: Path, share: Shard, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        run_study(plan, replace(resources, report=None), StepLocks(locks), shard=share)
    except QadtrError:
        # The process that was started first meets the same failures.
        return
