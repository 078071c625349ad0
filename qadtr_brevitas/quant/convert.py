"""Conversion of a float network to a switchable model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import DEFAULT_BITS, PrecisionLike
from qadtr_brevitas.core.registry import PTQ_METHODS
from qadtr_brevitas.models.channels import ImageFormat, image_format
from qadtr_brevitas.quant.conversion_report import ConversionReport, LayerReport
from qadtr_brevitas.quant.feature_clip import FeatureClipping, insert_feature_clips
from qadtr_brevitas.quant.layer_reports import (
    clip_reports,
    layer_report,
    loose_parameters,
    packed_size,
    uncalled_layers,
)
from qadtr_brevitas.quant.layers import keep_hooks
from qadtr_brevitas.quant.mixed import mixed_precisions, set_layers, with_mixed
from qadtr_brevitas.quant.model import SwitchableModel
from qadtr_brevitas.quant.norm import BATCH_NORMS
from qadtr_brevitas.quant.plan import (
    Activations,
    AttentionScales,
    ConversionPlan,
    FirstLast,
    Norm,
    Residual,
    mark_first_and_last,
)
from qadtr_brevitas.quant.probe import Probe, probe
from qadtr_brevitas.quant.ptq import PtqMethod
from qadtr_brevitas.quant.quantizer import Quantizer
from qadtr_brevitas.quant.refusals import check_convertible
from qadtr_brevitas.quant.rules import converted
from qadtr_brevitas.quant.settings import check_target, chosen_quantizers
from qadtr_brevitas.quant.sharing import pass_wide_values, share_quantizers, share_thresholds
from qadtr_brevitas.quant.switch import Switch
from qadtr_brevitas.quant.targets import find_target
from qadtr_brevitas.quant.verification import check_images_apart, check_same_function


@torch.inference_mode(False)
def convert(
    model: nn.Module,
    precisions: Sequence[PrecisionLike] = DEFAULT_BITS,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: tuple[int, int] | None = None,
    first_last: FirstLast = "8bit",
    residual: Residual = "8bit",
    norm: Norm = "statistics",
    narrow_range: bool = True,
    per_channel: bool = True,
    activations: Activations = "static",
    attention_scales: AttentionScales = "tensor",
    target: str | None = None,
    weight_quantizer: Quantizer | str | Mapping[str, Any] | None = None,
    act_quantizer: Quantizer | str | Mapping[str, Any] | None = None,
    softmax_quantizer: Quantizer | str | Mapping[str, Any] | None = None,
    gelu_quantizer: Quantizer | str | Mapping[str, Any] | None = None,
    ptq: Sequence[PtqMethod | str | Mapping[str, Any]] = (),
    wide_head_input: bool = True,
    quantize_once: bool = True,
    feature_clip: FeatureClipping | Mapping[str, Any] | Sequence[str] | None = None,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    in_place: bool = False,
) -> SwitchableModel:
    """Convert a float network to a switchable model.

    Below 32 bit every product (convolution, linear layer, matrix product, attention) computes on quantized operands,
    wherever the network computes it:

    - Weights of convolutions and linear layers are quantized per output channel, symmetric.
    - ReLU and ReLU6 become unsigned per-tensor quantizers.
    - An operand that is not the output of such an activation (the image, a sum, the output of a LayerNorm or GELU,
      attention probabilities) gets a quantizer of its own.
    - Operations between products (sums, norms, pools, softmax) are computed in float.
    - An activation that a residual sum or a concatenation reads (the residual stream) keeps 8 bit or more, and the
      layers that read it quantize it further. At 2 bit the stream would otherwise have 4 levels in every block.

    Thresholds are 1 until `calibrate()` or training sets them. The network is traced in eval mode on two images of
    noise, whatever its mode; the switchable model gets the mode of the network.

    Args:
        model: a network from images (N, C, H, W) to logits (N, classes), in any mode and on any device. It is copied,
            and not changed.
        precisions: the precisions to switch between; the first one is the current one at the start.
        mean: mean per channel of pixels in [0, 1]; None for that of timm's pretrained_cfg, or 0. It also says how many
            channels images have; without it and std, the first convolution does.
        std: standard deviation per channel; None for that of timm's pretrained_cfg, or 1.
        image_size: height and width of images in pixels; None for those of timm's pretrained_cfg, or 224.
        first_last: first and last layer at 8 bit or more, at the same precision as the others, or float.
        residual: residual streams at 8 bit or more, or at the same precision as the others.
        norm: running statistics per precision with a shared affine, or a whole BatchNorm per precision.
        narrow_range: symmetric weight levels (ternary at 2 bit); otherwise one more level below 0.
        per_channel: a weight threshold per output channel, or one for all.
        activations: thresholds of activations that are calibrated or learned, or ranges measured on every image.
        attention_scales: one threshold for each operand of attention, or one per head of (images, heads, tokens,
            features); with static activations.
        target: name of the compiler that is to accept a frozen copy (`quant/targets.py`). Sums of activations are then
            quantized, by one signed quantizer for both sides where the target requires it; a target may also require a
            quantizer and linear layers with a single weight threshold.
        weight_quantizer: the quantizer of weights: an object, its name, or its name and keys; None for the target's
            default, or `uniform`.
        act_quantizer: the quantizer of activations, which have one threshold per tensor; likewise.
        softmax_quantizer: the quantizer of attention probabilities, `log2` for instance; None for act_quantizer.
        gelu_quantizer: the quantizer of the outputs of GELUs, `twin` for instance; None for act_quantizer.
        ptq: PTQ methods whose states are added, as objects or by name; they change nothing until `calibrate()` sets
            them.
        wide_head_input: with `first_last="8bit"`, keep 8 bit or more for a ReLU that the last layer reads directly too;
            false for models of versions before 0.2.
        quantize_once: with a target that does (`ort`), quantize each side of a sum by itself, what ReLUs give to a
            concatenation by one quantizer, and what a ReLU quantized not again for a reader of the same bit-width;
            false for models of earlier versions.
        feature_clip: clip the norm of each position's features (`FeatureClipping`): the names of the modules after
            which, or `{"after": [...], "percentile": 99}`; `calibrate()` sets the thresholds. At 32 bit too the model
            is then another function than the float network.
        layers: mixed precisions, by name: bit-widths by pattern of module names, `{"edge": {"*": 4, "layer4.*": 8,
            "fc": {"weight": 8}}}`; the last pattern that matches counts. Each is a precision more, `mixed:edge`. What
            `first_last` and `residual` keep at 8 bit or more stays there.
        in_place: use the modules of the float network instead of copies, which saves the memory of its weights. The
            float network cannot be used afterwards.

    Returns:
        The switchable model, on the device of the float one. Its `report` describes every layer.

    Raises:
        UsageError: a precision is not possible; the network has no parameters or products to quantize, is converted
            already, is scripted or not in float32, does not run on such images, does not return logits, or computes in
            a way that cannot be followed; a quantizer or PTQ method is unknown or not possible; or the target does not
            support a product or setting.
    """
    check_convertible(model)
    compiler = find_target(target)
    quantizers = chosen_quantizers(
        compiler, weights=weight_quantizer, acts=act_quantizer, softmax=softmax_quantizer, gelu=gelu_quantizer
    )
    methods: list[PtqMethod] = [PTQ_METHODS.make(value) for value in ptq]
    if attention_scales == "head" and activations == "dynamic":
        raise UsageError(
            "dynamic ranges are those of an image: choose attention_scales 'tensor', or activations 'static'"
        )
    net = model if in_place else copy.deepcopy(model)
    training = model.training
    mixed = mixed_precisions(layers)
    switch = Switch(with_mixed(precisions, mixed))
    device = next(net.parameters()).device
    clipping = None if feature_clip is None else FeatureClipping.parse(feature_clip)
    # Before the network is traced: what is clipped has other levels, and is quantized again where it is read.
    clips = None if clipping is None else insert_feature_clips(net, switch, clipping).to(device)
    once = quantize_once and compiler is not None and compiler.quantizes_once
    images, found = _probed(
        net, device, mean=mean, std=std, image_size=image_size, sums=compiler is not None, joins=once
    )
    _check_products(net, found)
    if compiler is not None:
        check_target(compiler, found, first_last, activations, clipping, quantizers.after)
    mark_first_and_last(net, found)
    plan = ConversionPlan(
        switch=switch,
        first_last=first_last,
        residual=residual,
        norm=norm,
        narrow_range=narrow_range,
        per_channel=per_channel,
        activations=activations,
        attention_scales=attention_scales,
        target=compiler,
        weight_quantizer=quantizers.weights,
        act_quantizer=quantizers.acts,
        quantizers_after=quantizers.after,
        wide_head_input=wide_head_input,
        quantizes_once=once,
        probe=found,
    )
    modules = dict(net.named_modules())
    by_name = {one.precision: one for one in mixed}
    sizes = {str(precision): packed_size(net, plan, precision, by_name.get(precision)) for precision in switch.allowed}
    replaced: dict[nn.Module, str] = {}
    reports = [*_convert_called(net, modules, plan, replaced), *uncalled_layers(modules, found)]
    if once:
        share_quantizers(net, found)
        pass_wide_values(net, plan)
        share_thresholds(net, found)
    set_layers(net, mixed, found.calls)
    switchable = SwitchableModel(net, switch, mean=images.mean, std=images.std, feature_clips=clips).to(device)
    switchable.train(training)
    if not in_place:
        replaced |= {module: name or "the network" for name, module in model.named_modules()}
    held = set(switchable.modules())
    pixels, _ = _noise(images, device)
    check_same_function(switchable, pixels, found.logits, {m: name for m, name in replaced.items() if m not in held})
    if activations == "dynamic":
        check_images_apart(switchable, torch.cat([pixels, 1 - pixels[:1]]))
    for method in methods:
        method.prepare(switchable)
    switchable.image_size, switchable.num_classes = images.size[1:], found.logits.shape[1]
    switchable.wide_head_input = any(map(plan.is_wide_end, found.calls))
    switchable.quantize_once = plan.quantizes_once
    switchable.report = ConversionReport((*reports, *clip_reports(switchable)), sizes)
    return switchable


def _probed(
    net: nn.Module,
    device: torch.device,
    *,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    image_size: tuple[int, int] | None,
    sums: bool,
    joins: bool,
) -> tuple[ImageFormat, Probe]:
    """Return the images that a network takes, and the record of its forward on two of them."""

    def run(images: ImageFormat) -> tuple[ImageFormat, Probe]:
        _, normalized = _noise(images, device)
        return images, probe(net, normalized, nonnegative=not any(images.mean), sums=sums, joins=joins)

    images, certain = (
        image_format(net, mean=mean, std=std, image_size=image_size, guess=guess) for guess in (True, False)
    )
    try:
        return run(images)
    except UsageError:
        if images == certain:
            raise
        try:
            return run(certain)
        except UsageError:
            pass
        raise


def _noise(images: ImageFormat, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two images of pixel noise, (2, C, H, W) in [0, 1], and the same normalized."""
    pixels = torch.rand(2, *images.size, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (images.mean, images.std))
    return pixels.to(device), ((pixels - mean) / std).to(device)


def _check_products(net: nn.Module, found: Probe) -> None:
    kind = type(net).__name__
    if found.unseen_macs:
        total = found.unseen_macs + sum(product.macs for product in found.products)
        raise UsageError(
            f"{kind} cannot be converted: {found.unseen_macs / total:.1%} of its multiply-accumulates are computed by "
            "functions that cannot be followed, and would stay float: use layers of torch.nn, or matmul"
        )
    if all(product.is_constant for product in found.products):
        raise UsageError(
            f"{kind} has nothing to quantize: no convolution, linear layer or matrix product runs on an image"
        )


def _convert_called(
    net: nn.Module, modules: dict[str, nn.Module], plan: ConversionPlan, replaced: dict[nn.Module, str]
) -> Iterator[LayerReport]:
    """Convert every module that runs, under all of its names; note those that are replaced, and yield what was done."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for name, call in plan.probe.calls.items():
        module, kind = modules[name], type(modules[name]).__name__
        outcome = converted(call, module, plan)
        if outcome is None:
            yield from loose_parameters(name, module)
            continue
        replacement, note = outcome
        if replacement is not None and "forward" in vars(module):
            raise UsageError(
                f"{name or 'the network'} ({kind}) has a forward that was set on it, which its replacement would lose: "
                f"define it in a class that derives from {kind}"
            )
        if replacement is not None and replacement is not module:
            replacement.train(module.training)
            keep_hooks(module, replacement)
            for other in names[module]:
                net.set_submodule(other, replacement)
            replaced[module] = name
        if replacement is not None and call.count > 1:
            note += f"; shared by {call.count} places"
        yield layer_report(call, module, note, plan, quantized=replacement is not None and not _is_norm(module))


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, BATCH_NORMS)
