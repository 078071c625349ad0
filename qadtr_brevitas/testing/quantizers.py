"""Contract checks of quantizers, for this package's own and for those of other packages.

They need no test framework:

    from qadtr_brevitas.testing.quantizers import check_quantizer

    def test_mine():
        check_quantizer(MyQuantizer())
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze
from qadtr_brevitas.quant.quantizer import Granularity, Levels, Quantizer
from qadtr_brevitas.quant.switchable_quant import SwitchableActQuant, SwitchableWeightQuant

_BITS = (2, 3, 4, 8)
_IMAGE_SIZE = (6, 6)
_GROUP = 4


def check_quantizer(quantizer: Quantizer) -> None:
    """Check a quantizer by itself and in small networks, at several bit-widths.

    Raises:
        AssertionError: the quantizer breaks the contract; the message says how.
    """
    for bits in _BITS:
        for signed in (True, False):
            for narrow_range in (True, False):
                levels = quantizer.levels(bits, signed=signed, narrow_range=narrow_range)
                _check_levels(quantizer, levels, bits, signed=signed)
                _check_rounding(quantizer, levels, bits, signed=signed)
                _check_threshold(quantizer, levels)
                _check_gradients(quantizer, levels)
                _check_second_gradients(quantizer, levels)
                _check_images(quantizer, levels)
    if quantizer.for_weights:
        for granularity in get_args(Granularity):
            _check_weights(replace(quantizer, granularity=granularity, group_size=_GROUP))
        _check_range_search(replace(quantizer, granularity="tensor"))
    for dynamic in (False, True):
        _check_activations(replace(quantizer, granularity=None), dynamic=dynamic)


def _values(count: int = 4001) -> Tensor:
    """Return values on a fine grid from -3 to 3, and some at random."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.linspace(-3, 3, count), drawn])


def _functions(quantizer: Quantizer, levels: Levels) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the functions of values and step that quantize, by name."""
    return {
        "quantize_weight": lambda w, scale: quantizer.quantize_weight(w, scale, levels),
        "quantize_activation": lambda x, scale: quantizer.quantize_activation(x, scale, levels, keep_input=True),
    }


def _check_levels(quantizer: Quantizer, levels: Levels, bits: int, *, signed: bool) -> None:
    lo, hi = levels
    assert hi > 0, f"at {bits} bit the highest level is {hi}: it must be above 0"
    assert lo < 0 if signed else lo == 0, f"at {bits} bit the lowest level is {lo} with signed={signed}"
    assert hi - lo + 1 <= 2**bits, f"{hi - lo + 1} levels do not fit into {bits} bit"
    assert quantizer.steps_per_threshold(levels) >= 1, "the threshold must be at least one step"
    assert quantizer.reach(levels) > 0, "the reach must be positive"


def _check_rounding(quantizer: Quantizer, levels: Levels, bits: int, *, signed: bool) -> None:
    steps = quantizer.steps_per_threshold(levels)
    scaled = _values() * steps
    before = scaled.clone()
    rounded = quantizer.round(scaled, levels)
    assert torch.equal(scaled, before), "round() changed its input"
    count = len(rounded.unique())
    assert count <= 2**bits, f"{count} levels do not fit into {bits} bit"
    assert signed or float(rounded.min()) >= 0, "unsigned levels must not be negative"
    assert float(rounded.abs().max()) <= steps, "no level may exceed the threshold"
    assert torch.equal(quantizer.round(rounded, levels), rounded), "rounding a level must return it"
    assert float(quantizer.round(torch.zeros(1), levels)) == 0, "0 must be a level"
    order = scaled.argsort()
    assert (rounded[order].diff() >= 0).all(), "rounding must keep the order of values"
    out = torch.empty_like(scaled)
    assert quantizer.round(scaled, levels, out=out) is out, "round() must return out"
    assert torch.equal(out, rounded), "round() must write the same values to out"


def _check_threshold(quantizer: Quantizer, levels: Levels) -> None:
    thresholds = torch.tensor([0.013, 0.5, 1.0, 1.37, 6.0])
    for limit in (None, 6.0):
        for above in (True, False):
            found = quantizer.nearest_threshold(thresholds, levels, limit=limit, above=above)
            assert (found > 0).all(), "thresholds must be positive"
            assert limit is None or (found <= limit).all(), f"thresholds must not exceed the limit {limit}"
            again = quantizer.nearest_threshold(found, levels, limit=limit, above=above)
            torch.testing.assert_close(again, found, msg="a possible threshold must stay as it is")
            if above and limit is None:
                assert (found >= thresholds * (1 - 1e-5)).all(), "above=True must not clip more"


def _check_gradients(quantizer: Quantizer, levels: Levels) -> None:
    steps = quantizer.steps_per_threshold(levels)
    for name, quantize in _functions(quantizer, levels).items():
        x = _values(101).requires_grad_()
        scale = torch.tensor(1 / steps, requires_grad=True)
        y = quantize(x, scale)
        expected = quantizer.round(x.detach() / scale.detach(), levels) * scale.detach()
        torch.testing.assert_close(y.detach(), expected, msg=f"{name} must return what round() returns, times the step")
        dx, dscale = torch.autograd.grad(y.sum(), (x, scale), allow_unused=True)
        assert dx is not None, f"no gradient passes through {name}"
        assert dscale is not None, f"the step gets no gradient through {name}"
        assert (dx[x.detach() > 1] == 0).all(), f"{name} passes gradients to clipped values"
        inside = (x.detach() > 0) & (x.detach() < 0.9 * expected.max())
        assert (dx[inside] == 1).all(), f"{name} must pass gradients straight through inside the range"
        assert torch.isfinite(dscale), f"the gradient of the step of {name} is not finite"
        (dscale,) = torch.autograd.grad(quantize(torch.tensor([3.0]), scale).sum(), scale)
        top = float(expected.max()) * steps
        assert abs(float(dscale) - top) <= 1e-4 * top, f"in {name} a clipped value must move the step by {top}"


def _check_second_gradients(quantizer: Quantizer, levels: Levels) -> None:
    """Check against finite differences, at values that these move neither to another level nor over a border."""
    step = torch.tensor(1 / quantizer.steps_per_threshold(levels), dtype=torch.float64)
    values = torch.tensor([-2.0, -0.61, -0.2, 0.0, 0.2, 0.61, 2.0], dtype=torch.float64)
    x = quantizer.round(values / step, levels) * step * 1.001 + 0.0013 * step
    for name, quantize in _functions(quantizer, levels).items():
        inputs = (x.clone().requires_grad_(), step.clone().requires_grad_())
        try:
            torch.autograd.gradgradcheck(quantize, inputs, atol=1e-4)
        except GradcheckError as error:
            raise AssertionError(f"second derivatives of {name} differ from finite differences: {error}") from error


def _check_images(quantizer: Quantizer, levels: Levels) -> None:
    x = _values(8).view(4, 4).requires_grad_()
    scale = torch.tensor([0.3, 0.2])
    y = quantizer.quantize_images(x, scale, levels, low=-1.5, high=2.0)
    step = scale.repeat_interleave(2)[:, None]
    expected = quantizer.round(x.detach() / step, levels) * step
    torch.testing.assert_close(y.detach(), expected, msg="quantize_images must quantize each image with its own step")
    (dx,) = torch.autograd.grad(y.sum(), x)
    inside = (x.detach() > -1.5) & (x.detach() < 2.0)
    assert torch.equal(dx, inside.float()), "quantize_images must pass gradients between low and high only"


def _check_weights(quantizer: Quantizer) -> None:
    what = f"weights with a threshold per {quantizer.granularity}"
    net, images = _network(), _images()
    model = convert(net, [32, *_BITS], image_size=_IMAGE_SIZE, first_last="same", weight_quantizer=quantizer)
    calibrate(model, images)
    with torch.no_grad():
        assert torch.equal(model(images), net(images)), f"{what}: 32 bit must be the float network"
    conv = model.net.get_submodule("2")
    weight_quant: SwitchableWeightQuant = conv.weight_quant.quantizer  # pyright: ignore
    weight: Tensor = conv.weight.detach()  # pyright: ignore
    shape = {"tensor": (1, 1, 1, 1), "channel": (12, 1, 1, 1), "group": (12, 2, 1, 1, 1)}[str(quantizer.granularity)]
    for bits in _BITS:
        threshold = weight_quant.threshold(bits)
        assert threshold.shape == shape, f"{what}: thresholds have the shape {tuple(threshold.shape)}, not {shape}"
        with at_precision(model, bits), torch.no_grad():
            most = max(len(row.unique()) for row in weight_quant.quantize(weight).reshape(threshold.numel(), -1))
            assert most <= 2**bits, f"{what}: {most} levels do not fit into {bits} bit"
            _check_frozen(model, images, bits, what)


def _check_range_search(quantizer: Quantizer) -> None:
    """Check that the search for the least squared error finds no threshold worse than one that clips nothing."""
    models = {}
    for method in ("mse", "minmax"):
        models[method] = convert(_network(), [32, *_BITS], image_size=_IMAGE_SIZE, weight_quantizer=quantizer)
        calibrate(models[method], _images(), method=method)
    for bits in _BITS:
        errors: dict[str, float] = {}
        for method, model in models.items():
            conv = model.net.get_submodule("2")
            with at_precision(model, bits), torch.no_grad():
                errors[method] = float((conv.weight_quant.quantize(conv.weight) - conv.weight).norm())  # pyright: ignore
        assert errors["mse"] <= errors["minmax"] * (1 + 1e-5), f"at {bits} bit the range search is worse: {errors}"


def _check_activations(quantizer: Quantizer, *, dynamic: bool) -> None:
    what = f"{'dynamic' if dynamic else 'static'} activations"
    net, images = _Attending().eval(), _images()
    activations = "dynamic" if dynamic else "static"
    model = convert(net, [32, *_BITS], image_size=_IMAGE_SIZE, activations=activations, act_quantizer=quantizer)
    calibrate(model, images)
    relu: SwitchableActQuant = model.net.get_submodule("relu").act_quant.quantizer  # pyright: ignore
    for bits in _BITS:
        with at_precision(model, bits):
            x = images.clone().requires_grad_()
            logits = model(x)
            (gradient,) = torch.autograd.grad(logits.square().sum(), x)
            assert logits.isfinite().all(), f"{what}: logits at {bits} bit are not finite"
            assert gradient.isfinite().all(), f"{what}: gradients at {bits} bit are not finite"
            assert gradient.any(), f"{what}: no gradient reaches the images at {bits} bit"
            quantized = relu.quantize(torch.rand(len(images), 2000))
            most = max(len(row.unique()) for row in quantized)
            assert 1 < most <= 2**bits, f"{what}: {most} levels of an image at {bits} bit"
            with torch.no_grad():
                _check_frozen(model, images, bits, what)


def _check_frozen(model: SwitchableModel, images: Tensor, bits: int, what: str) -> None:
    """Check that a frozen model is equal, or is refused with an error that says so."""
    try:
        frozen = freeze(model, bits)
    except UsageError as error:
        if "cannot be frozen" not in str(error):
            raise AssertionError(f"{what}: freezing is refused without saying so: {error}") from error
        return
    found, expected = frozen(images), model(images)
    # Float rounding may move single values to the next level.
    off = float((found - expected).abs().max() / expected.abs().max())
    assert off < 1e-4, f"{what}: at {bits} bit the frozen model differs by {off:.2%}"


def _images() -> Tensor:
    return torch.rand(4, 3, *_IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 4, 5))
    return nn.Sequential(*layers).eval()


class _Attending(nn.Module):
    """Convolutions, a ReLU, and attention over the places of an image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3)
        self.relu = nn.ReLU()
        self.body = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.body(self.relu(self.stem(x))).flatten(2).transpose(1, 2)
        return self.head(nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).mean(1))
