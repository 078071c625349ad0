"""Freed memory is kept, which page faults show, and the user has the last word."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qadtr_brevitas.core.device import keep_freed_memory

# Blocks of 64 MiB, which glibc fetches and gives back each time: 16,384 pages, 15 times, 245,760 faults.
PROGRAM = """
import resource, torch
from qadtr_brevitas.core.device import keep_freed_memory
kept = keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for number in range(16):
    torch.ones(1 << 24)
    if not number:
        before = faults()
print(kept, faults() - before)
"""


def kept_and_faults(**environment: str) -> tuple[bool, int]:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    kept, faults = run.stdout.split()
    return kept == "True", int(faults)


def test_blocks_are_used_again() -> None:
    kept, faults = kept_and_faults()
    if not kept:
        pytest.skip("no glibc here")
    assert faults < 120_000


def test_environment_variables_of_glibc_are_obeyed() -> None:
    kept, faults = kept_and_faults(MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept
    if keep_freed_memory():
        assert faults > 200_000
