import pytest
import torch

from qadtr_brevitas.core.device import has_fast_bf16, resolve_device
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
    with pytest.raises(UsageError, match="there is no device 'cuda:1' here: choose auto or cpu, cuda:0"):
        resolve_device("cuda:1")
    computer()
    with pytest.raises(UsageError, match="there is no device 'mps' here: choose auto or cpu"):
        resolve_device("mps")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cpu:0", "CPU"])
def test_names_that_cannot_be_read(computer, name: str) -> None:
    computer()
    with pytest.raises(UsageError, match="cannot be read: use auto, cpu, cuda, cuda:N or mps"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("device", "amx", "fast"), [("cpu", True, True), ("cpu", False, False), ("cuda:0", True, False)]
)
def test_only_cpus_with_units_for_bfloat16_are_fast_at_it(
    monkeypatch: pytest.MonkeyPatch, device: str, amx: bool, fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    assert has_fast_bf16(device) is fast
