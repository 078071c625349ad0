"""Every registered range method and PTQ method fulfills its contract, which names what a method breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.core import registry
from qadtr_brevitas.core.errors import PluginError
from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.core.registry import PTQ_METHODS, RANGE_METHODS, Registry
from qadtr_brevitas.quant import SwitchableModel, calibrate, convert
from qadtr_brevitas.quant.bias_correction import BiasCorrection
from qadtr_brevitas.quant.layers import SwitchableConv2d
from qadtr_brevitas.quant.ptq import PtqMethod, PtqRun
from qadtr_brevitas.quant.quantizer import Levels
from qadtr_brevitas.quant.range_methods import LevelGrid, MinMax, Mse, Percentile, RangeMethod
from qadtr_brevitas.quant.ranges import Sample, all_of
from qadtr_brevitas.quant.uniform import PowerOfTwo, Uniform
from qadtr_brevitas.testing.calibration import check_ptq_method, check_range_method

SEVEN: Levels = (-7, 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", RANGE_METHODS.names())
def test_every_registered_range_method_fulfills_the_contract(name: str) -> None:
    check_range_method(RANGE_METHODS.load(name)())


@pytest.mark.slow
@pytest.mark.parametrize("name", PTQ_METHODS.names())
def test_every_registered_ptq_method_fulfills_the_contract(name: str) -> None:
    method = PTQ_METHODS.load(name)()
    # Methods that learn fulfill it in a few steps too.
    check_ptq_method(replace(method, steps=3) if hasattr(method, "steps") else method)


def test_thresholds_of_known_values() -> None:
    rows = torch.tensor([[-3.0, 1.0, 2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0, 0.25]])
    grid = LevelGrid(Uniform(), SEVEN)
    assert MinMax().thresholds(all_of(rows), grid).tolist() == [3.0, 0.25]
    halves = Percentile(percentile=50)
    # Half of the magnitudes of the second row are 0, and so its largest one counts.
    assert halves.thresholds(halves.reduced(all_of(rows)), grid).tolist() == [1.0, 0.25]
    # Steps 0.5 and 0.0625 are the lowest powers of two that clip nothing.
    assert MinMax().thresholds(all_of(rows), LevelGrid(PowerOfTwo(), SEVEN)).tolist() == [3.5, 0.4375]
    assert Mse().thresholds(all_of(rows), LevelGrid(Uniform(), (0, 3), 6.0)).max() <= 6.0


@plugin
class Halved(RangeMethod):
    """Says that it clips nothing, and does."""

    clips = False

    def thresholds(self, sample: Sample, grid: LevelGrid) -> Tensor:
        return grid.above(sample.largest / 2)


@plugin
class Drawn(RangeMethod):
    def thresholds(self, sample: Sample, grid: LevelGrid) -> Tensor:
        return grid.above(sample.largest * (1 + torch.rand(1)))


@plugin
class OneForAll(RangeMethod):
    def thresholds(self, sample: Sample, grid: LevelGrid) -> Tensor:
        return grid.above(sample.largest.amax())


@plugin
class WithZeros(RangeMethod):
    def thresholds(self, sample: Sample, grid: LevelGrid) -> Tensor:
        return sample.largest


@plugin
class Overwriting(RangeMethod):
    def thresholds(self, sample: Sample, grid: LevelGrid) -> Tensor:
        return grid.above(sample.rows.abs_().amax(1))


@plugin
class OffTheGrid(RangeMethod):
    def thresholds(self, sample: Sample, grid: LevelGrid) -> Tensor:
        return torch.where(sample.largest > 0, sample.largest, 1.0).clamp(max=grid.limit or torch.inf)


@pytest.mark.parametrize(
    ("broken", "fact"),
    [
        (Halved, "clips"),
        (Drawn, "asked for again"),
        (OneForAll, "thresholds for 5 rows"),
        (WithZeros, "not positive"),
        (Overwriting, "sample is changed"),
        (OffTheGrid, "none that the quantizer can have"),
    ],
)
def test_the_contract_names_what_a_range_method_breaks(broken: type[RangeMethod], fact: str) -> None:
    with pytest.raises(AssertionError, match=fact):
        check_range_method(broken())


class _Run(PtqRun):
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def improve(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
        raise NotImplementedError


@plugin
class ChangingWeights(PtqMethod):
    def start(self, model: nn.Module) -> PtqRun:
        class Run(_Run):
            def improve(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
                for module in self.model.modules():
                    if isinstance(module, SwitchableConv2d):
                        module.weight.data.mul_(1.001)

        return Run(model)


@plugin
class LeavingHooks(PtqMethod):
    def start(self, model: nn.Module) -> PtqRun:
        class Run(_Run):
            def improve(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
                self.model.register_forward_hook(lambda module, args, y: None)

        return Run(model)


@plugin
class CountingWrongly(PtqMethod):
    def start(self, model: nn.Module) -> PtqRun:
        class Run(_Run):
            passes = 2

            def improve(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
                for _ in batches:
                    count_batch()

        return Run(model)


@plugin
class DrawnOffsets(BiasCorrection):
    def start(self, model: nn.Module) -> PtqRun:
        class Run(_Run):
            def improve(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
                for name, offset in model.named_buffers():
                    if "bias_correction" in name:
                        offset.copy_(torch.randn_like(offset))

        return Run(model)


@plugin
class Unforgetting(PtqMethod):
    """Keeps what it found in the thresholds' module, where no reset finds it."""

    def start(self, model: nn.Module) -> PtqRun:
        class Run(_Run):
            def improve(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
                norm = next(m for m in self.model.modules() if hasattr(m, "branches") or hasattr(m, "twice"))
                norm.register_buffer("found", torch.ones(1))

        return Run(model)


@pytest.mark.parametrize(
    ("broken", "fact"),
    [
        (ChangingWeights, "32 bit"),
        (LeavingHooks, "hooks are left"),
        (CountingWrongly, "were announced"),
        (DrawnOffsets, "again"),
    ],
)
def test_the_contract_names_what_a_ptq_method_breaks(broken: type[PtqMethod], fact: str) -> None:
    with pytest.raises(AssertionError, match=fact):
        check_ptq_method(broken())


def test_a_state_that_preparing_does_not_add_cannot_be_loaded() -> None:
    with pytest.raises(RuntimeError, match="found"):
        check_ptq_method(Unforgetting())


@plugin
class Unfinished(PtqMethod):
    """Lacks `start`."""


@pytest.fixture
def add_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Declares an entry point `mine` of a group, which names a class of this file."""

    def add(group: str, name: str) -> None:
        points = EntryPoints([EntryPoint("mine", f"{__name__}:{name}", f"qadtr_brevitas.{group}")])
        monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))
        registry._external.cache_clear()

    yield add
    registry._external.cache_clear()


@pytest.mark.parametrize(
    ("found", "group", "name", "fact"),
    [
        (RANGE_METHODS, "range_method", "Unfinished", "RangeMethod.*base class"),
        (PTQ_METHODS, "ptq_method", "Unfinished", "start"),
        (PTQ_METHODS, "ptq_method", "Absent", "Absent"),
    ],
)
def test_a_method_that_cannot_be_used_is_named(
    add_plugin: Callable[[str, str], None], found: Registry, group: str, name: str, fact: str
) -> None:
    add_plugin(group, name)
    with pytest.raises(PluginError, match=rf"'mine'.*{fact}"):
        found.load("mine")


def test_methods_of_other_packages_are_taken_by_name_and_as_objects(add_plugin: Callable[[str, str], None]) -> None:
    add_plugin("range_method", "Halved")
    thresholds = [_stem_threshold(method) for method in ("mine", Halved(), {"name": "mine"}, "minmax")]
    assert thresholds[0] == thresholds[1] == thresholds[2] == thresholds[3] / 2


def _stem_threshold(method: object) -> float:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    model: SwitchableModel = convert(net, [32, 4], image_size=(8, 8), per_channel=False)
    calibrate(model, torch.rand(2, 3, 8, 8), method=method)
    return model.net[0].weight_quant.quantizer.thresholds["8"].item()
