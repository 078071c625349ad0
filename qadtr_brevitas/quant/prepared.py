"""What a network computes with while its weights do not change, as plain tensors.

A compiled graph that reads them instead of parameters serves all precisions that quantize: only the values differ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qadtr_brevitas.quant.integer_layers import integer_products
from qadtr_brevitas.quant.layers import switchable_layers
from qadtr_brevitas.quant.norm import SwitchableBatchNorm, norms
from qadtr_brevitas.quant.proxies import SwitchableActProxy
from qadtr_brevitas.quant.switch import SwitchState, switch_of
from qadtr_brevitas.quant.tensor_levels import Affine, Prepared, Statistics, TensorLevels


@torch.no_grad()
def prepare(model: nn.Module, images: Tensor | None = None) -> Prepared:
    """Return the tensors of a switchable model at its current precision.

    Args:
        model: in evaluation mode, within `frozen_weights` and perhaps `folded_norms`.
        images: a few images, for passes without gradients, whose convolutions may be those of integers; None for
            passes with gradients.
    """
    now = switch_of(model).states.now
    folded = frozenset[nn.Module]() if now.folding is None else now.folding.norms
    proxies = [module for module in model.modules() if isinstance(module, SwitchableActProxy)]

    def at(norm: SwitchableBatchNorm) -> Statistics | Affine:
        # A graph with the statistics takes a root for every value.
        return norm.at(now.precision) if images is None else norm.affine_at(now.precision)

    acts = {id(proxy.quantizer): levels for proxy in proxies if (levels := _levels(proxy, now)) is not None}
    return Prepared(
        {id(layer): _detached(layer.fixed(now)) for layer in switchable_layers(model).values()},
        acts,
        {id(norm): None if norm in folded else at(norm) for norm in norms(model)},
        {} if images is None else integer_products(model, images, acts),
    )


def _levels(proxy: SwitchableActProxy, now: SwitchState) -> TensorLevels | None:
    return proxy.quantizer.fixed_levels(now) if proxy.is_quant_enabled else None


def _detached(pair: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    weight, bias = pair
    return weight.detach(), None if bias is None else bias.detach()
