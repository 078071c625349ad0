"""Levels of weights chosen layer by layer: the errors they are chosen by, GPTQ and coordinate descent."""

import itertools

import pytest
import torch
from brevitas.graph.gptq import gptq_mode
from brevitas.nn import QuantLinear
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.registry import PTQ_METHODS
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze, layer_inputs
from qadtr_brevitas.quant.coordinate_descent import CoordinateDescent
from qadtr_brevitas.quant.gptq import Gptq
from qadtr_brevitas.quant.layer_inputs import LayerCalls
from qadtr_brevitas.quant.layerwise import LayerwiseRounding, RoundingProblem

METHODS = (Gptq(), CoordinateDescent())


def problem(channels: int = 6, n: int = 20, *, seed: int = 0, levels: tuple[int, int] = (-4, 3)) -> RoundingProblem:
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=rng)
    inputs = torch.randn(200, n, generator=rng) @ mixing
    target = torch.randn(channels, n, generator=rng)
    step = torch.rand(channels, 1, generator=rng).add(0.3).expand(channels, n)
    start = (target / step).round().clamp(*levels)
    return RoundingProblem(target, step, start, levels, inputs.T @ inputs)


@pytest.mark.parametrize("method", METHODS)
def test_levels_are_better_than_the_nearest_ones(method: LayerwiseRounding) -> None:
    given = problem()
    levels = method.choose(given)
    assert torch.equal(levels, levels.round().clamp(*given.levels))
    assert given.error(levels).sum() < 0.6 * given.error(given.start).sum()


@pytest.mark.parametrize("seed", range(5))
def test_coordinate_descent_ends_where_no_weight_alone_can_get_better(seed: int) -> None:
    given = problem(channels=3, n=6, seed=seed, levels=(-2, 1))
    levels = CoordinateDescent().choose(given)
    error = given.error(levels)
    for j, level in itertools.product(range(6), range(-2, 2)):
        moved = levels.clone()
        moved[:, j] = level
        assert (given.error(moved) >= error * (1 - 1e-5)).all()


def test_two_methods_come_close_to_the_best_of_all_levels() -> None:
    given = problem(channels=8, n=5, levels=(-2, 1))
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=5)), dtype=torch.float32)
    best = torch.stack([given.error(levels.expand(8, 5)) for levels in every]).amin(0)
    after = CoordinateDescent().choose(
        RoundingProblem(given.target, given.step, Gptq().choose(given), given.levels, given.moments)
    )
    assert (given.error(after) >= best * (1 - 1e-5)).all()
    assert given.error(after).sum() < 1.3 * best.sum()


def test_inputs_that_are_always_zero_leave_their_weights_at_the_nearest_level() -> None:
    given = problem()
    given.moments[3], given.moments[:, 3] = 0, 0
    for method in METHODS:
        assert torch.equal(method.choose(given)[:, 3], given.start[:, 3])


class Layers(nn.Module):
    """Convolutions of several kinds, one layer that is called twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=4, padding_mode="reflect")
        self.tokens = nn.Linear(8, 6)
        self.head = nn.Linear(6, 4)
        self.unused = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return self.head(torch.relu(self.tokens(x.flatten(2).mT)).mean(1))


@pytest.fixture
def model() -> SwitchableModel:
    torch.manual_seed(0)
    return convert(Layers(), [32, 8, 4, 3], image_size=(12, 12)).eval()


IMAGES = torch.rand(12, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_moments_give_the_error_of_real_outputs(model: SwitchableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_inputs, "_INPUTS_PER_WEIGHT", 10**6)
    calibrate(model, IMAGES)
    calls = LayerCalls(model)
    with calls.watching(), torch.no_grad():
        model(IMAGES)
    layers = dict(model.net.named_children())
    assert [part[0] for part in calls.parts(1)] == [layers[name] for name in ("stem", "twice", "tokens", "head")]
    found = calls.moments(list(layers.values())[:4], Precision(4, 4), [IMAGES], lambda: None, mixed=True)
    inputs: dict[str, dict[int, list[Tensor]]] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, {}).setdefault(bits[0], []).append(args[0])
        )
        for name, layer in layers.items()
    ]
    bits = [0]
    for bits[0] in (32, 4):
        with at_precision(model, bits[0]), torch.no_grad():
            model(IMAGES)
    for handle in handles:
        handle.remove()
    for name in ("stem", "twice", "tokens", "head"):
        layer, moments = layers[name], found[layers[name]]
        change = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(3))
        rows = change.reshape(len(moments.quantized), -1, moments.quantized.shape[-1])
        by_moments = ((rows @ moments.quantized) * rows).sum()
        total, mixed = torch.zeros(()), torch.zeros(())
        for x, exact in zip(inputs[name][4], inputs[name][32], strict=True):
            with at_precision(model, 4), torch.no_grad():
                quant = layer.input_quant
                x = quant.quantize(x) if hasattr(quant, "quantize") else x
                out, float_out = (nn.Module.__call__(_as_float(layer, change), each) for each in (x, exact))
            total, mixed = total + out.square().sum(), mixed + (out * float_out).sum()
        torch.testing.assert_close(by_moments, total, rtol=1e-4, atol=1e-3)
        assert moments.mixed is not None
        torch.testing.assert_close(((rows @ moments.mixed) * rows).sum(), mixed, rtol=1e-4, atol=1e-3)


def _as_float(layer: nn.Module, weight: Tensor) -> nn.Module:
    """Return a float layer of the same geometry with another weight and no bias."""
    if isinstance(layer, nn.Linear):
        plain: nn.Module = nn.Linear(layer.in_features, layer.out_features, bias=False)
    else:
        assert isinstance(layer, nn.Conv2d)
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
        plain = nn.Conv2d(**{name: getattr(layer, name) for name in names}, bias=False)
    plain.weight = nn.Parameter(weight)
    return plain


def test_gptq_is_that_of_brevitas() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 7))
    model = convert(net, [32, 4], image_size=(4, 4), first_last="same").eval()
    images = torch.rand(400, 3, 4, 4)
    calibrate(model, images)
    stock = freeze(model, 4)
    with torch.no_grad(), gptq_mode(stock, act_order=True, num_blocks=1) as gptq:
        for _ in range(gptq.num_layers):
            gptq.model(images)
            gptq.update()
    with at_precision(model, 4), torch.no_grad():
        nearest = model.net[1].weight_quant.quantize(model.net[1].weight)  # pyright: ignore
    calibrate(model, images, weights=[Gptq(target="quantized")])
    linear = stock.net[1]  # pyright: ignore
    assert isinstance(linear, QuantLinear)
    theirs = linear.quant_weight().value
    with at_precision(model, 4), torch.no_grad():
        ours = model.net[1].weight_quant.quantize(model.net[1].weight)  # pyright: ignore
    assert (ours - theirs).abs().gt(1e-6).float().mean() < 0.01
    assert (ours - nearest).abs().gt(1e-6).float().mean() > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_outputs_come_nearer_to_those_of_the_float_network(model: SwitchableModel, method: LayerwiseRounding) -> None:
    def error(bits: int) -> float:
        with torch.no_grad():
            with at_precision(model, 32):
                wanted = model(IMAGES)
            with at_precision(model, bits):
                return float((model(IMAGES) - wanted).square().mean())

    calibrate(model, IMAGES)
    before = error(3)
    calibrate(model, IMAGES, weights=[method])
    assert error(3) < before


@pytest.mark.parametrize("method", ["gptq", "coordinate-descent"])
def test_several_layers_at_once_do_not_make_up_for_each_other(method: str) -> None:
    with pytest.raises(UsageError, match="target=quantized"):
        PTQ_METHODS.make({"name": method, "parallel": 4})
    assert PTQ_METHODS.make({"name": method, "parallel": 4, "target": "quantized"}) is not None


def test_levels_that_are_not_equally_spaced_are_refused() -> None:
    model = convert(Layers(), [32, 4], image_size=(12, 12), weight_quantizer="log2")
    with pytest.raises(UsageError, match="Log2"):
        calibrate(model, IMAGES, weights=["gptq"])


def test_algorithms_of_brevitas_that_would_change_the_shared_weights_are_refused(model: SwitchableModel) -> None:
    before = model.net.stem.weight.clone()  # pyright: ignore
    with at_precision(model, 4), pytest.raises(UsageError, match="gptq"), gptq_mode(model):
        pass
    assert model(IMAGES).shape == (12, 4)
    assert torch.equal(model.net.stem.weight, before)  # pyright: ignore
