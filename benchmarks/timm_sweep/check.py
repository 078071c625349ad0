"""Checks of a conversion: exact at 32 bit, few levels below, trainable, and the same when frozen or loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timm_sweep.levels import Seen, seen_levels
from qadtr_brevitas.quant import ConversionReport, SwitchableModel, at_precision, calibrate, convert, freeze
from qadtr_brevitas.quant.layers import SwitchableConv2d, SwitchableLinear, SwitchableReLU
from qadtr_brevitas.quant.products import ROWS_ARE_CHANNELS, QuantizedProduct
from qadtr_brevitas.quant.switch import observing
from qadtr_brevitas.quant.switchable_quant import SwitchableQuant

BITS = (8, 4, 2)
# Parameters.
_LARGE = 150_000_000


class WrongResult(Exception):
    """The conversion went through, but the converted network is not what it should be."""


def check_conversion(build: Callable[[], nn.Module], image_size: tuple[int, int]) -> ConversionReport:
    """Converts a network and checks the result at 32, 8, 4 and 2 bit.

    Args:
        build: makes the float network, with other random weights each time.
        image_size: height and width of the two images that are put in.

    Returns:
        The conversion's report.

    Raises:
        UsageError: the network is refused.
        WrongResult: the converted network is wrong; the message says what and where.
    """
    net = build().eval()
    model = convert(net, image_size=image_size)
    report = model.report
    images = torch.rand(2, model.mean.shape[1], *image_size, generator=torch.Generator().manual_seed(1))
    _check_float(net, model, images)
    del net
    _check_signs(model, images)
    calibrate(model, [images], method="minmax")
    for bits in BITS:
        _check_levels(model, images, bits)
    for bits in BITS:
        _check_frozen(model, images, bits)
    _check_loading(build, model, report, images)
    _check_gradients(model, images)
    return report


@torch.no_grad()
def _check_float(net: nn.Module, model: SwitchableModel, images: Tensor) -> None:
    expected = net((images - model.mean) / model.std)
    for name, candidate in (("converted", model), ("frozen", freeze(model, 32))):
        if not _same(candidate(images), expected):
            raise WrongResult(f"at 32 bit the {name} network does not equal the float one")


def _check_signs(model: SwitchableModel, images: Tensor) -> None:
    """What is quantized without a sign must have none, unless quantizing is the ReLU itself."""
    relus = {module.act_quant.quantizer for module in model.modules() if isinstance(module, SwitchableReLU)}
    names = {module: name for name, module in model.named_modules()}

    def look(quantizer: SwitchableQuant, x: Tensor) -> None:
        if not quantizer.signed and quantizer not in relus and x.min() < 0:
            raise WrongResult(f"{names[quantizer].removeprefix('net.')} is unsigned and is given {x.min():.2g}")

    with observing(model, look):
        model(images)


def _check_levels(model: SwitchableModel, images: Tensor, bits: int) -> None:
    with at_precision(model, bits):
        logits, seen = seen_levels(model, images)
    if not all(part.isfinite().all() for part in _tensors(logits)):
        raise WrongResult(f"the output at {bits} bit is not finite")
    modules = dict(model.named_modules())
    wrong = [(call, fault) for call in seen if (fault := _fault(call, modules[call.owner], bits))]
    if wrong:
        # A product that is the same for every image need not be computed, and may stay float.
        with at_precision(model, bits):
            _, others = seen_levels(model, 1 - images)
        wrong = [(call, fault) for call, fault in wrong if call.operands is None or call not in others]
    for call, fault in wrong[:1]:
        raise WrongResult(f"at {bits} bit {call.kernel} in {call.owner.removeprefix('net.')} {fault}")


@torch.no_grad()
def _check_frozen(model: SwitchableModel, images: Tensor, bits: int) -> None:
    with at_precision(model, bits):
        if not _same(freeze(model, bits)(images), model(images)):
            raise WrongResult(f"at {bits} bit the frozen network does not equal the switchable one")


def _fault(call: Seen, owner: nn.Module, bits: int) -> str | None:
    """What is wrong with the operands of a product, if anything is."""
    if call.operands is None:
        return "cannot be looked into"
    quantizers = [module for module in owner.modules() if isinstance(module, SwitchableQuant)]
    limit = 2 ** max([bits, *(quantizer.min_bits for quantizer in quantizers)])
    for index, operand in enumerate(call.operands):
        levels = operand.row_levels if index == 1 and _has_rows(owner) else operand.levels
        if levels > limit:
            return f"computes on operand {index} {operand.shape} of {levels} levels or more"
    return None


def _has_rows(owner: nn.Module) -> bool:
    if isinstance(owner, QuantizedProduct):
        return owner.function in ROWS_ARE_CHANNELS
    return isinstance(owner, SwitchableConv2d | SwitchableLinear)


def _check_loading(
    build: Callable[[], nn.Module], model: SwitchableModel, report: ConversionReport, images: Tensor
) -> None:
    """What the conversion decides must not depend on weights, so that saved weights fit the network built anew."""
    other = convert(build().eval(), image_size=tuple(images.shape[2:]), in_place=True)
    other_report = other.report
    if other_report != report:
        raise WrongResult("a network with other weights is converted in another way")
    other.load_state_dict(model.state_dict())
    for bits in (32, 4):
        with at_precision(model, bits), at_precision(other, bits), torch.no_grad():
            if not _same(other(images), model(images)):
                raise WrongResult(f"saved and loaded, the network does not give the same at {bits} bit")


def _check_gradients(model: SwitchableModel, images: Tensor) -> None:
    if sum(parameter.numel() for parameter in model.parameters()) > _LARGE:
        # So that its activations fit into memory, they are computed again in the backward pass.
        model.net.set_grad_checkpointing()
    expected = _with_gradient(model, images, 32)
    for bits in BITS:
        found = _with_gradient(model, images, bits)
        if missing := sorted(expected - found):
            raise WrongResult(f"at {bits} bit {missing[0]} and {len(missing) - 1} more get no gradient")
        if missing := sorted(_thresholds(model, bits) - found):
            raise WrongResult(f"at {bits} bit the threshold {missing[0]} and {len(missing) - 1} more get no gradient")


def _with_gradient(model: SwitchableModel, images: Tensor, bits: int) -> set[str]:
    """Names of the parameters that get a gradient in training."""
    model.train()
    model.zero_grad()
    with at_precision(model, bits):
        sum(part.square().sum() for part in _tensors(model(images))).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            raise WrongResult(f"at {bits} bit the gradient of {name} is not finite")
    return set(gradients)


def _thresholds(model: SwitchableModel, bits: int) -> set[str]:
    return {
        f"{name}.thresholds.{max(bits, module.min_bits)}"
        for name, module in model.named_modules()
        if isinstance(module, SwitchableQuant)
    }


def _same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))


def _tensors(values: Any) -> Iterator[Tensor]:
    """The output's tensors: distilled networks give two in training."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Iterable):
        for value in values:
            yield from _tensors(value)
