"""Contract checks of quantizers, for this package's own and for those of other packages.

from qadtr_brevitas.testing.quantizers import check_quantizer

def test_mine():
check_quantizer(MyQuantizer())
"""

from __future__ import annotations

import torch
from torch import Tensor

from qadtr_brevitas.quant.quantizer import Levels, Quantizer

_BITS = (2, 3, 4, 8)


def check_quantizer(quantizer: Quantizer) -> None:
    """Check levels, rounding, thresholds and gradients of a quantizer at several bit-widths.

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


def _values(count: int = 4001) -> Tensor:
    """Return values on a fine grid from -3 to 3, and some at random."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.linspace(-3, 3, count), drawn])


def _check_levels(quantizer: Quantizer, levels: Levels, bits: int, *, signed: bool) -> None:
    lo, hi = levels
    assert hi > 0, f"at {bits} bit the highest level is {hi}: it must be above 0"
    assert lo < 0 if signed else lo == 0, f"at {bits} bit the lowest level is {lo} with signed={signed}"
    assert hi - lo + 1 <= 2**bits, f"{hi - lo + 1} levels do not fit into {bits} bit"
    assert quantizer.steps_per_threshold(levels) >= 1, "the threshold must be at least one step"
    assert quantizer.reach(levels) > 0, "the reach must be positive"


def _check_rounding(quantizer: Quantizer, levels: Levels, bits: int, *, signed: bool) -> None:
    scaled = _values() * quantizer.steps_per_threshold(levels)
    before = scaled.clone()
    rounded = quantizer.round(scaled, levels)
    assert torch.equal(scaled, before), "round() changed its input"
    count = len(rounded.unique())
    assert count <= 2**bits, f"{count} levels do not fit into {bits} bit"
    assert signed or float(rounded.min()) >= 0, "unsigned levels must not be negative"
    assert torch.equal(quantizer.round(rounded, levels), rounded), "rounding what is rounded must change nothing"
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
    for name in ("quantize_activation", "quantize_weight"):
        x = _values(101).requires_grad_()
        scale = torch.tensor(1 / steps, requires_grad=True)
        if name == "quantize_weight":
            y = quantizer.quantize_weight(x, scale, levels)
        else:
            y = quantizer.quantize_activation(x, scale, levels, keep_input=True)
        expected = quantizer.round(x.detach() / scale.detach(), levels) * scale.detach()
        torch.testing.assert_close(y.detach(), expected, msg=f"{name} must give what round() gives, times the step")
        dx, dscale = torch.autograd.grad(y.sum(), (x, scale), create_graph=True)
        assert (dx.detach()[x.detach() > 1] == 0).all(), f"{name} passes gradients to clipped values"
        inside = (x.detach() > 0) & (x.detach() < 0.9 * expected.max())
        assert (dx.detach()[inside] == 1).all(), f"{name} must pass gradients straight through inside the range"
        assert torch.isfinite(dscale), f"the gradient of the step of {name} is not finite"
