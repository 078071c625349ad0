"""Learned rounding, block by block: BRECQ (Li et al. 2021), and QDrop (Wei et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.quant.blocks import Call, blocks_of, calls_of, order_of_calls
from qadtr_brevitas.quant.layers import SwitchableLayer, switchable_layers
from qadtr_brevitas.quant.model import SwitchableModel
from qadtr_brevitas.quant.ptq import PtqRun, quantized_precisions
from qadtr_brevitas.quant.relaxed_rounding import RelaxedLevels, distance_from_levels, exponent_at
from qadtr_brevitas.quant.rounding_method import RoundingMethod, set_levels, wanted_weight
from qadtr_brevitas.quant.switch import at_precision, evaluating, frozen_weights
from qadtr_brevitas.quant.switchable_quant import SwitchableActQuant

# The mean squared rounding error of a weight, in steps, if it is rounded to the nearest level.
_NEAREST = 1 / 12


@plugin
class Brecq(RoundingMethod):
    """Learn whether each weight is rounded up or down, by the error of the outputs of residual or transformer blocks.

    The layers of a block are learned together, on the inputs that quantized blocks before it give, so that they make up
    for each other's errors. Layers outside of blocks are learned one by one. It starts from the levels that are there.
    Layers that run several times keep theirs. The inputs and outputs of one block, on all images, are in memory.

    The thresholds of the activations inside a block are learned too, by the gradient of LSQ, at bit-widths of
    activations that one precision alone has: precisions share thresholds by bit-width.

    Sources: BRECQ (Li et al. 2021, https://arxiv.org/abs/2102.05426) without its Fisher information, and QDrop (Wei et
    al. 2022, https://arxiv.org/abs/2203.05740).
    """

    steps: Annotated[int, Field(ge=1, description="optimizer steps for each block, of 32 images or fewer")] = 300
    learning_rate: Annotated[float, Field(gt=0, description="of Adam, for the position between two levels")] = 0.05
    weight: Annotated[float, Field(gt=0, description="of the regularizer that drives weights to levels")] = 0.2
    drop: Annotated[
        float,
        Field(
            ge=0, lt=1, description="share of activations that are not quantized while levels are learned: QDrop 0.5"
        ),
    ] = 0.0
    range_learning_rate: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="of Adam, for the thresholds of activations, as a share of each; falls to 0 by a cosine; "
            "0: they stay",
        ),
    ] = 0.002

    def start(self, model: nn.Module) -> PtqRun:
        return _Run(self, next(module for module in model.modules() if isinstance(module, SwitchableModel)))


class _Run(PtqRun):
    def __init__(self, method: Brecq, model: SwitchableModel) -> None:
        self._method = method
        self._model = model
        blocks = blocks_of(model.net)
        black = torch.zeros(1, model.channels, *model.image_size, device=model.mean.device)
        with evaluating(model):
            whole = order_of_calls(model, blocks, black)
            # Layers one by one, of blocks that do not run exactly once.
            parts = [part for block in blocks if block not in whole for part in switchable_layers(block).values()]
            self._blocks = order_of_calls(model, [*whole, *dict.fromkeys(parts)], black)
        self.passes = len(quantized_precisions(model)) * len(self._blocks)

    def improve(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
        for precision in quantized_precisions(self._model):
            # One block per precision, so that quantized weights of one precision only are in memory.
            with evaluating(self._model), frozen_weights(self._model):
                for index, block in enumerate(self._blocks):
                    calls = calls_of(self._model, block, precision, batches, count_batch)
                    with at_precision(self._model, precision):
                        self._learn(block, calls, precision, index)

    def _learn(self, block: nn.Module, calls: Sequence[Call], precision: Precision, index: int) -> None:
        layers = [each for each in switchable_layers(block).values() if each.weight_quant.quantizer.is_active]
        relaxed = {layer: _relaxed(layer) for layer in layers}
        thresholds = _own_thresholds(self._model, block, precision) if self._method.range_learning_rate else []
        error = self._error(block, calls)
        if not relaxed or not error > 0:
            return
        levels_before = {layer: _levels(layer) for layer in layers}
        thresholds_before = [each.detach().clone() for each in thresholds]
        with _learning(relaxed), _taking_gradients(thresholds):
            self._optimize(block, calls, list(relaxed.values()), thresholds, error, index)
        for layer, levels in relaxed.items():
            set_levels(self._model, layer, precision, levels.rounded())
        if self._error(block, calls) > error:
            for layer, levels in levels_before.items():
                set_levels(self._model, layer, precision, levels)
            for threshold, before in zip(thresholds, thresholds_before, strict=True):
                threshold.copy_(before)

    def _optimize(
        self,
        block: nn.Module,
        calls: Sequence[Call],
        relaxed: list[RelaxedLevels],
        thresholds: list[nn.Parameter],
        error: float,
        index: int,
    ) -> None:
        method = self._method
        # In squared steps of one weight, as in AdaRound, so that one weight of the regularizer suits all blocks.
        unit = error / (_NEAREST * sum(levels.v.numel() for levels in relaxed))
        weights = {"params": [levels.v for levels in relaxed], "lr": method.learning_rate}
        optimizer = torch.optim.Adam([weights, *_range_groups(thresholds, method.range_learning_rate)])
        falling = partial(_cosine, method.steps)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, *(falling for _ in thresholds)])
        drawn = generator(0, "brecq", index)
        with torch.enable_grad(), _dropping(block, method.drop, drawn):
            for step in range(method.steps):
                call = calls[int(torch.randint(len(calls), (), generator=drawn))]
                optimizer.zero_grad(set_to_none=True)
                loss = self._difference(block, call) / (call.images * unit)
                if (beta := exponent_at(step, method.steps)) is not None:
                    loss = loss + method.weight * sum(distance_from_levels(each.share(), beta) for each in relaxed)
                loss.backward()
                optimizer.step()
                rates.step()

    def _difference(self, block: nn.Module, call: Call) -> Tensor:
        """Return the squared difference of a block's outputs from those of the float network, summed over all."""
        with self._model.switch.having(images=call.images):
            return (call.run(block) - call.output).square().sum()

    @torch.no_grad()
    def _error(self, block: nn.Module, calls: Sequence[Call]) -> float:
        """Return the squared error of the outputs of a block, per image."""
        return sum(float(self._difference(block, call)) for call in calls) / sum(call.images for call in calls)


@torch.no_grad()
def _levels(layer: SwitchableLayer) -> Tensor:
    """Return the levels of a layer at the current precision, in the shape of the weight."""
    quantizer = layer.weight_quant.quantizer
    return (quantizer.quantize(layer.weight) / quantizer.step_of_each(layer.weight, quantizer.bits)).round()


def _relaxed(layer: SwitchableLayer) -> RelaxedLevels:
    quantizer = layer.weight_quant.quantizer
    step = quantizer.step_of_each(layer.weight, quantizer.bits)
    return RelaxedLevels((wanted_weight(layer) / step).detach(), _levels(layer), quantizer.levels(quantizer.bits))


def _own_thresholds(model: SwitchableModel, block: nn.Module, precision: Precision) -> list[nn.Parameter]:
    """Return the thresholds of a block's activations that no other precision and no other part of the network uses."""
    inside = dict.fromkeys(each for each in block.modules() if isinstance(each, SwitchableActQuant))
    outside = [each for each in model.modules() if isinstance(each, SwitchableActQuant) and each not in inside]
    used = {id(threshold) for each in outside for threshold in each.thresholds.values()}
    others = [each for each in quantized_precisions(model) if each != precision]
    found: dict[int, nn.Parameter] = {}
    for quantizer in inside:
        bits = quantizer.bits
        shared = any(quantizer.is_active_at(other) and quantizer.bits_at(other) == bits for other in others)
        if quantizer.is_active and not quantizer.dynamic and not shared:
            threshold = quantizer.thresholds[str(bits)]
            found[id(threshold)] = threshold
    return [threshold for key, threshold in found.items() if key not in used]


def _range_groups(thresholds: list[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """Return groups of an optimizer, whose steps are a share of the largest element of each threshold."""
    return [{"params": [each], "lr": rate * float(each.detach().abs().max())} for each in thresholds]


def _cosine(steps: int, step: int) -> float:
    """Return the share of a learning rate that is left at a step: it falls from 1 to 0."""
    return (1 + math.cos(math.pi * step / steps)) / 2


@contextmanager
def _taking_gradients(thresholds: list[nn.Parameter]) -> Generator[None]:
    """Let thresholds take gradients inside a block, in which frozen weights otherwise take none."""
    for threshold in thresholds:
        threshold.requires_grad_(True)
    try:
        yield
    finally:
        for threshold in thresholds:
            threshold.requires_grad_(False)
            threshold.grad = None


@contextmanager
def _learning(relaxed: dict[SwitchableLayer, RelaxedLevels]) -> Generator[None]:
    """Let layers compute with weights between levels inside a block."""
    roundings = [layer.weight_quant.quantizer.rounding for layer in relaxed]
    for (layer, levels), rounding in zip(relaxed.items(), roundings, strict=True):
        quantizer = layer.weight_quant.quantizer
        step = quantizer.step_of_each(layer.weight, quantizer.bits).detach()
        assert rounding is not None
        rounding.learned = partial(_weight, levels, step)
    try:
        yield
    finally:
        for rounding in roundings:
            assert rounding is not None
            rounding.learned = None


def _weight(levels: RelaxedLevels, step: Tensor) -> Tensor:
    return levels.relaxed() * step


@contextmanager
def _dropping(block: nn.Module, share: float, drawn: torch.Generator) -> Generator[None]:
    """Let a share of the activations, at random, pass the quantizers of a module as they are (QDrop)."""
    with ExitStack() as stack:
        if share:
            for quantizer in {each for each in block.modules() if isinstance(each, SwitchableActQuant)}:
                quantizer.quantize = partial(_dropped, quantizer, quantizer.quantize, share, drawn)  # pyright: ignore
                stack.callback(delattr, quantizer, "quantize")
        yield


def _dropped(
    quantizer: SwitchableActQuant,
    quantize: Callable[..., Tensor],
    share: float,
    drawn: torch.Generator,
    x: Tensor,
    now: object = None,
) -> Tensor:
    unchanged = x if quantizer.signed else x.clamp(0, quantizer.max_threshold)
    # With 0 and 1, `lerp` is exact, and on a CPU several times as fast as `where`.
    return torch.lerp(quantize(x, now), unchanged, _drawn_mask(x, share, drawn))


def _drawn_mask(x: Tensor, share: float, drawn: torch.Generator) -> Tensor:
    """Return 1 for a share of the elements at random, to within 1/256, and 0 for the others, like x.

    The bytes of random integers take a third of the time of random floats.
    """
    words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 8),), generator=drawn)
    numbers = words.view(torch.uint8)[: x.numel()].view(x.shape)
    return (numbers < round(256 * share)).to(x.device, x.dtype)
