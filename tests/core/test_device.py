from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qadtr_brevitas.core import device as devices
from qadtr_brevitas.core.device import (
    has_compiler,
    has_fast_bf16,
    keep_freed_memory,
    missing_compiler,
    resolve_device,
)
from qadtr_brevitas.core.errors import UsageError


@pytest.fixture
def computer(monkeypatch: pytest.MonkeyPatch):
    """Pretends that the computer has so many GPUs."""

    def pretend(*, cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "mps", "name", "device"),
    [
        (0, False, "auto", "cpu"),
        (2, False, "auto", "cuda:0"),
        (0, True, "auto", "mps"),
        (2, False, "cuda", "cuda:0"),
        (2, False, "cuda:1", "cuda:1"),
        (2, True, "cpu", "cpu"),
        (0, True, "mps", "mps"),
    ],
)
def test_devices_that_exist(computer, cuda: int, mps: bool, name: str, device: str) -> None:
    computer(cuda=cuda, mps=mps)
    assert resolve_device(name) == torch.device(device)


def test_a_missing_device_is_answered_with_those_that_exist(computer) -> None:
    computer(cuda=1)
    with pytest.raises(UsageError, match="'cuda:1': choose auto or cpu, cuda:0"):
        resolve_device("cuda:1")
    computer()
    with pytest.raises(UsageError, match="'mps': choose auto or cpu"):
        resolve_device("mps")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cpu:0", "CPU"])
def test_names_that_cannot_be_read(computer, name: str) -> None:
    computer()
    with pytest.raises(UsageError, match="is not a device: use auto, cpu, cuda, cuda:N or mps"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("device", "amx", "fast"), [("cpu", True, True), ("cpu", False, False), ("cuda:0", True, False)]
)
def test_only_cpus_with_units_for_bfloat16_are_fast_at_it(
    monkeypatch: pytest.MonkeyPatch, device: str, amx: bool, fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    assert has_fast_bf16(device) is fast


# Blocks of 64 MiB, which glibc fetches and returns each time: 16,384 pages, 15 times, make 245,760 page faults.
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


@pytest.mark.slow
def test_blocks_are_used_again() -> None:
    kept, faults = kept_and_faults()
    if not kept:
        pytest.skip("no glibc here")
    assert faults < 120_000


@pytest.mark.slow
def test_environment_variables_of_glibc_are_obeyed() -> None:
    kept, faults = kept_and_faults(MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept
    if keep_freed_memory():
        assert faults > 200_000


def test_what_a_compiler_needs_depends_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(devices, "find_spec", lambda name: object())
    assert "no-such-compiler" in (missing_compiler("cpu") or "")
    assert [has_compiler("cpu"), has_compiler("cuda:1")] == [False, True]
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert "Triton" in (missing_compiler(torch.device("cuda")) or "")
    assert [has_compiler("cpu"), has_compiler("cuda:1")] == [True, False]
