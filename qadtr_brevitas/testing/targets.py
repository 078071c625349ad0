"""Contract checks of targets, for this package's own and for those of other packages.

```python
from qadtr_brevitas.testing.targets import check_target

def test_mine():
    check_target(MINE)
```
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.registry import QUANTIZERS
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze
from qadtr_brevitas.quant.products import QuantizedSum
from qadtr_brevitas.quant.quantizer import make_quantizer
from qadtr_brevitas.quant.switchable_quant import SwitchableActQuant
from qadtr_brevitas.quant.targets import Target

BITS, IMAGE_SIZE = (8, 4), (8, 8)
_TOLERANCE = 1e-4


def check_target(target: Target) -> None:
    """Convert a small residual network for a registered target, and check that it gets what the target declares.

    Raises:
        AssertionError: the target breaks the contract; the message says how.
    """
    name = target.name
    assert target.quantizer in QUANTIZERS.names(), f"{name} names the quantizer {target.quantizer!r}, which is unknown"
    assert target.products is None or target.products, f"{name} can compute nothing: products is empty"
    model, images = converted_for(name)
    quantizers = [module for module in model.modules() if isinstance(module, SwitchableActQuant)]
    assert quantizers, f"a network converted for {name} has no quantizer of activations"
    kind = type(make_quantizer(target.quantizer))
    assert all(isinstance(q.scheme, kind) for q in quantizers), f"a quantizer is no {target.quantizer!r}"
    sums = [module for module in model.modules() if isinstance(module, QuantizedSum)]
    assert sums, f"a sum of activations is not quantized for {name}"
    shared = "both sides of a sum need one quantizer" if not target.quantizes_once else "a sum is quantized twice"
    assert all(("both" in found.operands) != target.quantizes_once for found in sums), f"for {name} {shared}"
    for bits in BITS:
        with at_precision(model, bits), torch.no_grad():
            found, expected = freeze(model, bits)(images), model(images)
        off = float((found - expected).abs().max() / expected.abs().max())
        assert off < _TOLERANCE, f"at {bits} bit the frozen model for {name} differs by {off:.2%}"
    try:
        convert(SmallNetwork(), [32, 8], image_size=IMAGE_SIZE, target=name, activations="dynamic")
    except UsageError:
        return
    raise AssertionError(f"{name} must refuse ranges that are measured at run time")


def converted_for(target: str | None) -> tuple[SwitchableModel, Tensor]:
    """Return a small calibrated network for a registered target, and images in whole bytes."""
    images = torch.randint(256, (4, 3, *IMAGE_SIZE), generator=torch.Generator().manual_seed(1)) / 255
    # Of means with which no byte lies halfway between two levels.
    mean, std = (0.4837, 0.4621, 0.4119), (0.2309, 0.2309, 0.2309)
    model = convert(SmallNetwork(), [32, *BITS], image_size=IMAGE_SIZE, target=target, mean=mean, std=std)
    calibrate(model, [images])
    return model.eval(), images


class SmallNetwork(nn.Module):
    """What every target can compute: convolutions, norms, ReLUs, a sum, an average and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        # The caller's random numbers stay as they are.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
            self.act, self.pool, self.flatten = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            self.head = nn.Linear(8, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.flatten(self.pool(self.act(self.body(x) + x))))
