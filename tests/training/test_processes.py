"""Processes of a run, and several runs in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor, nn

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant import convert
from qadtr_brevitas.training import processes
from qadtr_brevitas.training.images import ImageSource
from qadtr_brevitas.training.inputs import TrainingInputs
from qadtr_brevitas.training.processes import check_agreement, started_processes
from qadtr_brevitas.training.setup import check_precisions
from tests.training.support import make_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    return convert(net, mean=(0.0,) * 3, std=(1.0,) * 3, image_size=(8, 8), precisions=[32, 16, 8])


@pytest.mark.parametrize(("batch_size", "count", "share"), [(16, 16, 0.5), (8, 4, 0.25), (12, 4, 0.5), (12, 1, 0.4)])
def test_as_many_images_are_attacked_whatever_the_number_of_processes(
    batch_size: int, count: int, share: float, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(batch_size=batch_size, attack={"name": "pgd", "share": share})
    split = recipe.data.dataset.load("train")
    monkeypatch.setattr(type(recipe.train.attack), "run", lambda self, model, images, labels, **_: images)
    counts = []
    for rank in range(count):
        source = TrainingInputs(recipe, rank, count)
        images, labels, _ = ImageSource(recipe, split, rank, count).batch(0)
        attacked = source.attack(model, images, labels, step=0, precision=recipe.quant.precisions[0])[1]
        counts.append(attacked)
    assert sum(counts) == round(batch_size * share)
    assert max(counts) - min(counts) <= 1


@dataclass
class OtherRanks:
    """The states that the processes of a group found, this one first."""

    found: list[tuple[int, bool, bool]]
    device: torch.device = CPU

    def gather(self, own: Tensor) -> Tensor:
        assert torch.equal(own, torch.tensor(self.found[:1]).long())
        return torch.tensor([list(map(int, each)) for each in self.found])


def test_processes_that_find_different_states_do_not_start() -> None:
    same: Any = OtherRanks([(12, False, True)] * 2)
    check_agreement(Path("run"), (12, False, True), same)
    other: Any = OtherRanks([(12, False, True), (-1, False, False)])
    with pytest.raises(UsageError, match=r"run .*12, none.*disk"):
        check_agreement(Path("run"), (12, False, True), other)


@dataclass
class TwoProcesses:
    """An accelerator of one of two processes."""

    num_processes: int = 2


@pytest.mark.parametrize("made_by_the_caller", [True, False])
def test_only_a_process_group_made_here_is_ended(made_by_the_caller: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(processes.atexit, "register", at_exit.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: made_by_the_caller)
    monkeypatch.setattr(processes, "_start_processes", lambda train, device: TwoProcesses())
    with started_processes(make_recipe().train, "cpu"):
        pass
    assert len(at_exit) == (0 if made_by_the_caller else 1)


def test_each_run_has_the_mixed_precision_and_device_it_asks_for() -> None:
    for amp in ("bf16", "no"):
        with started_processes(make_recipe(amp=amp).train, "cpu") as accelerator:
            assert (accelerator.mixed_precision, accelerator.device) == (amp, CPU)
    PartialState().device = torch.device("meta")
    with started_processes(make_recipe().train, "cpu") as accelerator:
        assert accelerator.device == CPU


def test_under_torchrun_no_single_gpu_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UsageError, match=r"cuda:1.*single GPU.*torchrun.*use cuda"):
        processes._start_processes(make_recipe().train, "cuda:1")


def test_float16_holds_the_levels_of_11_bit(model: nn.Module) -> None:
    def recipe(*choices: int) -> Recipe:
        keys = {"float_epochs": 0, "regularizers": [], "amp": "fp16"}
        train = make_recipe().train.model_dump() | keys | {"precision": {"schedule": "uniform", "choices": choices}}
        return Recipe.model_validate({"quant": {"precisions": [32, 16, 8]}, "train": train})

    check_precisions(model, recipe(32, 8))
    with pytest.raises(UsageError, match=r"11 bit.*16"):
        check_precisions(model, recipe(32, 16))
