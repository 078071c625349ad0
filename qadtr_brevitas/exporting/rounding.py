"""How far a network is from itself when its sums round otherwise: the measure of what a correct file may differ by."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.quant.switch import SwitchState
from qadtr_brevitas.quant.switchable_quant import SwitchableActQuant

# In shares of the largest value. On ResNet-20, EfficientNet-Lite0 and DeiT-T this moves logits on as many images as
# onnxruntime does, or on more.
_SHARE = 3e-7


@contextmanager
def rounded_otherwise(model: nn.Module, *, seed: int = 0) -> Generator[None]:
    """Move what every quantizer of activations reads by as much as another order of additions may, within a block.

    Args:
        model: a switchable model.
        seed: of the movements.
    """
    random = generator(seed, "rounding")
    quantizers = [module for module in model.modules() if isinstance(module, SwitchableActQuant)]
    try:
        for quantizer in quantizers:
            quantizer.__dict__["quantize"] = _moved(quantizer.quantize, random)
        yield
    finally:
        for quantizer in quantizers:
            quantizer.__dict__.pop("quantize", None)


def _moved(quantize: Callable[..., Tensor], random: RandomGenerator) -> Callable[..., Tensor]:
    def moved(x: Tensor, *now: SwitchState) -> Tensor:
        # The functions called here are not part of a module that quantizes its own products.
        with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
            noise = 2 * torch.rand(x.shape, generator=random) - 1
            x = x + noise.to(x.device) * (_SHARE * x.abs().amax())
        return quantize(x, *now)

    return moved
