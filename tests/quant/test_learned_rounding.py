"""Rounding that is learned, layer by layer (AdaRound) and block by block (BRECQ, QDrop)."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert
from qadtr_brevitas.quant.adaround import AdaRound
from qadtr_brevitas.quant.blocks import blocks_of, calls_of, order_of_calls
from qadtr_brevitas.quant.brecq import Brecq
from qadtr_brevitas.quant.layers import switchable_layers
from qadtr_brevitas.quant.layerwise import RoundingProblem
from qadtr_brevitas.quant.relaxed_rounding import RelaxedLevels, distance_from_levels, rectified_sigmoid
from tests.quant.test_layerwise import problem

IMAGES = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_rectified_sigmoid_is_the_published_one() -> None:
    v = torch.tensor([-10.0, -1.0, 0.0, 0.5, 10.0])
    # Nagel et al. 2020, equation 23: clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1) with zeta 1.1 and gamma -0.1.
    expected = [0.0, 0.222730, 0.5, 0.646951, 1.0]
    torch.testing.assert_close(rectified_sigmoid(v), torch.tensor(expected), atol=1e-5, rtol=0)
    # Equation 24.
    assert distance_from_levels(torch.tensor([0.0, 1.0]), 2.0) == 0
    torch.testing.assert_close(distance_from_levels(torch.tensor([0.5, 0.75]), 2.0), torch.tensor(1.75))


def test_weights_begin_where_they_are_between_the_levels_around_them() -> None:
    wanted = torch.tensor([0.3, -1.2, 2.0, 9.0, -9.0])
    relaxed = RelaxedLevels(wanted, wanted.round().clamp(-4, 3), (-4, 3))
    torch.testing.assert_close(relaxed.relaxed().detach(), torch.tensor([0.3, -1.2, 2.01, 2.99, -3.99]))
    assert relaxed.rounded().tolist() == [0, -1, 2, 3, -4]


def test_weights_that_an_earlier_method_moved_begin_nearer_to_their_level() -> None:
    wanted, start = torch.tensor([0.3, 0.3, -0.4]), torch.tensor([1.0, 2.0, -1.0])
    relaxed = RelaxedLevels(wanted, start, (-4, 3))
    torch.testing.assert_close(relaxed.relaxed().detach(), torch.tensor([0.65, 1.5, -0.7]))
    assert relaxed.lower.tolist() == [0, 1, -1]


def test_learned_levels_come_near_to_the_best_of_all_roundings() -> None:
    given = problem(channels=8, n=3, levels=(-2, 1))
    floor = (given.target / given.step).floor()
    roundings = [(floor + torch.tensor(up)).clamp(-2, 1) for up in itertools.product((0.0, 1.0), repeat=3)]
    best = torch.stack([given.error(levels) for levels in roundings]).amin(0)
    found = given.error(AdaRound().choose(given))
    assert (found >= best * (1 - 1e-5)).all()
    assert found.sum() < 1.3 * best.sum() < given.error(given.start).sum()


def test_learned_levels_are_levels_and_better_than_the_nearest_ones() -> None:
    given = problem()
    levels = AdaRound(steps=200).choose(given)
    assert torch.equal(levels, levels.round().clamp(*given.levels))
    assert ((levels - given.target / given.step).abs() < 1 + 1e-5)[levels.abs() < 3].all()
    assert given.error(levels).sum() < 0.6 * given.error(given.start).sum()


def test_after_another_method_levels_get_better_still() -> None:
    given = problem()
    first = AdaRound(steps=50).choose(given)
    again = RoundingProblem(given.target, given.step, first, given.levels, given.moments)
    assert given.error(AdaRound(steps=200).choose(again)).sum() < given.error(first).sum()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.relu(x + scale * self.second(self.act(self.first(x))))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.Sequential(nn.Sequential(Residual(), Residual()), nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
        self.shared = nn.ModuleList([Residual()])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        x = self.shared[0](x, scale=0.5)
        return self.head(self.shared[0](x, 0.5).mean((2, 3)))


@pytest.fixture
def model() -> SwitchableModel:
    model = convert(Blocks(), [32, 4, 3], image_size=(8, 8), first_last="same").eval()
    calibrate(model, IMAGES)
    return model


def test_blocks_are_the_items_of_sequences_and_single_layers(model: SwitchableModel) -> None:
    names = {module: name for name, module in model.net.named_modules()}
    blocks = blocks_of(model.net)
    expected = {"stages.0.0", "stages.0.1", "shared.0", "stem", "stages.1.0", "head"}
    assert {names[block] for block in blocks} == expected
    ordered = [names[block] for block in order_of_calls(model, blocks, IMAGES[:1])]
    # One block runs twice, and so do its layers.
    assert ordered == ["stem", "stages.0.0", "stages.0.1", "stages.1.0", "head"]


def test_calls_hold_quantized_inputs_and_float_outputs(model: SwitchableModel) -> None:
    block = model.net.get_submodule("stages.0.1")
    calls = calls_of(model, block, Precision(3, 3), IMAGES.split(33), lambda: None)
    assert [call.images for call in calls] == [32, 1, 7]
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        seen.extend((args[0], y))

    handle = block.register_forward_hook(note)
    for bits in (3, 32):
        with at_precision(model, bits), torch.no_grad():
            model(IMAGES)
    handle.remove()
    torch.testing.assert_close(torch.cat([call.args[0] for call in calls]), seen[0])
    torch.testing.assert_close(torch.cat([call.output for call in calls]), seen[3])


def error(model: SwitchableModel, bits: int) -> float:
    with torch.no_grad():
        with at_precision(model, 32):
            wanted = model(IMAGES)
        with at_precision(model, bits):
            return float((model(IMAGES) - wanted).square().mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "bits"),
    [
        (Brecq(steps=60, range_learning_rate=0), 3),
        (Brecq(steps=60), 4),
        (Brecq(steps=60, drop=0.5), 4),
        (AdaRound(steps=100), 3),
    ],
)
def test_outputs_come_nearer_to_those_of_the_float_network(
    model: SwitchableModel, method: Brecq | AdaRound, bits: int
) -> None:
    before = error(model, bits)
    calibrate(model, IMAGES, weights=[method])
    assert error(model, bits) < before
    quantizers = [layer.weight_quant.quantizer for layer in switchable_layers(model).values()]
    assert all(each.rounding is not None and each.rounding.learned is None for each in quantizers)


@pytest.mark.slow
def test_dropped_activations_are_restored_and_give_other_levels(model: SwitchableModel) -> None:
    found: list[list[Tensor]] = []
    for drop in (0.0, 0.5):
        calibrate(model, IMAGES[:8], weights=[Brecq(steps=20, drop=drop)])
        found.append([b.clone() for name, b in model.named_buffers() if "rounding" in name])
    assert any(not torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not [name for each in model.modules() for name in vars(each) if name == "quantize"]
    with at_precision(model, 3), torch.no_grad():
        assert torch.equal(model(IMAGES), model(IMAGES))


def test_the_defaults_are_those_that_figures_were_measured_with() -> None:
    assert (Brecq().drop, Brecq().range_learning_rate) == (0.0, 0.002)


@pytest.mark.slow
def test_ranges_are_learned_at_bit_widths_that_one_precision_alone_has() -> None:
    model = convert(Blocks(), [32, 8, "w4a8", 3], image_size=(8, 8)).eval()
    calibrate(model, IMAGES)
    nearest = error(model, 3)
    found: list[dict[str, Tensor]] = []
    for rate in (0.0, 0.01):
        calibrate(model, IMAGES, weights=[Brecq(steps=40, range_learning_rate=rate)])
        found.append({name: p.detach().clone() for name, p in model.named_parameters() if "thresholds" in name})
    moved = {name for name, threshold in found[0].items() if not torch.equal(threshold, found[1][name])}
    assert not [name for name in moved if "weight_quant" in name]
    assert {name.rpartition(".")[2] for name in moved} == {"3"}
    assert error(model, 3) < nearest
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_block_of_zeros_keeps_its_levels(model: SwitchableModel) -> None:
    with torch.no_grad():
        for parameter in model.net.get_submodule("stages.0.0").parameters():
            parameter.zero_()
    calibrate(model, torch.zeros(2, 3, 8, 8), weights=[Brecq(steps=2)])
    assert error(model, 4) == error(model, 4)
