"""Contract checks of range methods and PTQ methods, for this package's own and for those of other packages.

They need no test framework:

    from qadtr_brevitas.testing.calibration import check_ptq_method, check_range_method

    def test_mine():
        check_range_method(MyRangeMethod())
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze, get_precision, set_precision
from qadtr_brevitas.quant.log2 import Log2
from qadtr_brevitas.quant.ptq import PtqMethod, ptq_states
from qadtr_brevitas.quant.quantizer import Quantizer
from qadtr_brevitas.quant.range_methods import LevelGrid, RangeMethod
from qadtr_brevitas.quant.ranges import Sample, all_of
from qadtr_brevitas.quant.switchable_quant import SwitchableQuant
from qadtr_brevitas.quant.uniform import PowerOfTwo, Uniform

_BITS = (8, 4, 2)
_IMAGE_SIZE = (8, 8)


def check_range_method(method: RangeMethod) -> None:
    """Check a range method on samples of values, for several quantizers, and in the calibration of a small network.

    Raises:
        AssertionError: the method breaks the contract; the message says how.
    """
    for scheme in (Uniform(), PowerOfTwo(), Log2()):
        for signed in (True, False):
            for bits in _BITS:
                levels = scheme.levels(bits, signed=signed, narrow_range=False)
                for limit in (None, 6.0):
                    _check_thresholds(method, LevelGrid(scheme, levels, limit), f"at {bits} bit")
        _check_calibration(method, scheme)


def check_ptq_method(method: PtqMethod) -> None:
    """Check a PTQ method in small networks: a convolutional one with BatchNorm, and one with attention.

    Raises:
        AssertionError: the method breaks the contract; the message says how.
    """
    for net in (_network(), _Attending().eval()):
        _check_prepared(net, method)
        _check_improved(net, method)
        _check_order(net, method)


def _check_thresholds(method: RangeMethod, grid: LevelGrid, what: str) -> None:
    for sample in _samples(positive=grid.levels[0] >= 0):
        given = sample.rows.clone()
        torch.manual_seed(1)
        found = method.thresholds(method.reduced(sample), grid)
        torch.manual_seed(2)
        again = method.thresholds(method.reduced(sample), grid)
        assert torch.equal(sample.rows, given), "the sample is changed: work on a copy"
        assert found.shape == sample.largest.shape, f"{tuple(found.shape)} thresholds for {len(given)} rows"
        assert found.isfinite().all(), f"{what} thresholds are not finite"
        assert (found > 0).all(), f"{what} thresholds are not positive"
        assert not found.requires_grad, "a gradient is left in the thresholds: compute them without"
        assert torch.equal(found, again), f"{what} the same sample gives other thresholds when it is asked for again"
        assert grid.limit is None or (found <= grid.limit).all(), f"{what} thresholds exceed the limit {grid.limit}"
        stored = grid.scheme.nearest_threshold(found, grid.levels, limit=grid.limit, above=False)
        torch.testing.assert_close(stored, found, msg=f"{what} a threshold is none that the quantizer can have")
        if not method.clips:
            assert (found >= grid.above(sample.largest)).all(), f"{what} values are clipped: set clips = True"


def _samples(*, positive: bool) -> list[Sample]:
    """Return samples of weights, with a channel of zeros, and of activations with a long tail and tiny ones."""
    rng = torch.Generator().manual_seed(0)
    weights, activations = torch.randn(5, 90, generator=rng), torch.randn(1, 40_000, generator=rng)
    weights[2] = 0
    activations /= torch.rand(activations.shape, generator=rng).clamp(min=0.01)
    rows = [weights, activations, activations * 1e-4, torch.zeros(1, 64)]
    return [all_of(row.abs() if positive else row) for row in rows]


def _check_calibration(method: RangeMethod, scheme: Quantizer) -> None:
    net = _network()
    models = [_converted(net, weight_quantizer=scheme, act_quantizer=scheme) for _ in range(2)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        calibrate(model, list(_images().split(4)), method=method)
    model = models[0]
    _check_float(model, net)
    for quantizer in (module for module in model.modules() if isinstance(module, SwitchableQuant)):
        for threshold in quantizer.thresholds.values():
            assert threshold.shape == quantizer.shape, f"a threshold has the shape {tuple(threshold.shape)}"
            assert threshold.grad is None, "a gradient is left in a threshold"
    one, other = (m.state_dict() for m in models)
    assert all(torch.equal(one[key], other[key]) for key in one), "the same images give other thresholds again"


def _check_prepared(net: nn.Module, method: PtqMethod) -> None:
    plain, model = _converted(net), _converted(net, ptq=[method])
    for each in (plain, model):
        calibrate(each, _images())
    for bits in (32, *_BITS):
        assert torch.equal(_logits(plain, bits), _logits(model, bits)), f"preparing changes what {bits} bit computes"
    before = list(model.state_dict())
    method.prepare(model)
    assert list(model.state_dict()) == before, "preparing a second time changes the states"


def _check_improved(net: nn.Module, method: PtqMethod) -> None:
    plain = _converted(net)
    calibrate(plain, _images())
    model = _converted(net)
    hooks = _hooks(model)
    set_precision(model, 4)
    model.train()
    told: list[tuple[int, int]] = []
    calibrate(
        model, list(_images().split(4)), weights=[method], progress=lambda done, of, note="": told.append((done, of))
    )
    assert told[-1][0] == told[-1][1] == len(told), f"{len(told)} batches are counted, {told[-1][1]} were announced"
    assert get_precision(model) == Precision(4, 4), f"the model is left at {get_precision(model)}"
    assert all(module.training for module in model.modules()), "modules are left in evaluation mode"
    assert _hooks(model) == hooks, "hooks are left behind"
    graded = [name for name, p in model.named_parameters() if p.grad is not None or not p.requires_grad]
    assert not graded, f"gradients are left in {graded}, or they take none any more"
    model.eval()
    _check_float(model, net)
    own = dict(net.named_parameters())
    changed = [name for name, p in model.net.named_parameters() if name in own and not _is_scaled(p, own[name])]
    assert not changed, f"the float weights {changed} are changed, by other factors than powers of two"
    _check_repeatable(net, model, method)
    _check_stored(net, model, method)
    calibrate(model, _images())
    left = [name for name, p in model.net.named_parameters() if name in own and not torch.equal(p, own[name])]
    assert not left, f"calibrating without the method leaves the float weights {left} changed: see PtqState.reset"
    for bits in _BITS:
        message = f"calibrating without the method leaves something of it at {bits} bit: see PtqState.reset"
        assert torch.equal(_logits(plain, bits), _logits(model, bits)), message


def _check_repeatable(net: nn.Module, model: SwitchableModel, method: PtqMethod) -> None:
    again = _converted(net)
    torch.manual_seed(5)
    calibrate(again, (batch for batch in _images().split(4)), weights=[method])
    for bits in _BITS:
        assert torch.equal(_logits(model, bits), _logits(again, bits)), f"the same images differ at {bits} bit again"


def _check_stored(net: nn.Module, model: SwitchableModel, method: PtqMethod) -> None:
    """Check that a state dict holds all that the method found, and that a frozen model has it too, or is refused."""
    loaded = _converted(net, ptq=[method])
    loaded.load_state_dict(model.state_dict())
    for bits in (32, *_BITS):
        assert torch.equal(_logits(model, bits), _logits(loaded, bits)), f"a loaded model differs at {bits} bit"
        try:
            frozen = freeze(model, bits)
        except UsageError as error:
            if "cannot be frozen" not in str(error):
                raise AssertionError(f"freezing is refused without saying so: {error}") from error
            continue
        with torch.no_grad():
            torch.testing.assert_close(
                frozen(_images()), _logits(model, bits), msg=f"the frozen model differs at {bits} bit"
            )
    copied = deepcopy(model)
    for state in ptq_states(copied):
        state.reset()
    assert torch.equal(_logits(model, 4), _logits(loaded, 4)), "a copy shares its states with the model"


def _check_order(net: nn.Module, method: PtqMethod) -> None:
    """Check that bias correction can run before and after the method."""
    for order in (["bias-correction", method], [method, "bias-correction"]):
        model = _converted(net)
        calibrate(model, _images(), weights=order)
        _check_float(model, net)
        assert all(_logits(model, bits).isfinite().all() for bits in _BITS), "logits are not finite"


def _check_float(model: SwitchableModel, net: nn.Module) -> None:
    with torch.no_grad():
        assert torch.equal(_logits(model, 32), net(_images())), "32 bit must be the float network, bit for bit"


def _logits(model: SwitchableModel, bits: int) -> Tensor:
    with at_precision(model, bits), torch.no_grad():
        return model(_images())


def _is_scaled(weight: Tensor, original: Tensor) -> bool:
    """Return whether a weight is another one times powers of two."""
    mantissas = [each.detach().frexp().mantissa for each in (weight, original)]
    return torch.equal(*mantissas)


def _hooks(model: nn.Module) -> int:
    # Torch has no public way to list the hooks of a module.
    return sum(len(module._forward_hooks) for module in model.modules())  # pyright: ignore[reportPrivateUsage]


def _converted(net: nn.Module, **settings: object) -> SwitchableModel:
    return convert(net, [32, *_BITS], image_size=_IMAGE_SIZE, **settings).eval()  # pyright: ignore[reportArgumentType]


def _images() -> Tensor:
    return torch.rand(10, 3, *_IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    nn.init.uniform_(norm.running_mean, -0.2, 0.2)  # pyright: ignore[reportArgumentType]
    layers = (nn.Conv2d(3, 6, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(8 * 16, 5)).eval()


class _Attending(nn.Module):
    """Attention over the places of an image, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.LayerNorm(8)
        self.query = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = self.twice(nn.functional.gelu(self.twice(tokens)))
        query = self.query(self.norm(tokens))
        return self.head(nn.functional.scaled_dot_product_attention(query, tokens, tokens).mean(1))
