"""Networks converted for onnxruntime: a tensor is quantized once for all that read it at the same bit-width."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.pipeline.checkpoint import load_model, save_model
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze
from qadtr_brevitas.quant.layers import SwitchableReLU, switchable_layers
from qadtr_brevitas.quant.model_info import ModelInfo
from qadtr_brevitas.quant.products import QuantizedSum
from qadtr_brevitas.quant.switchable_quant import SwitchableActQuant
from tests.quant.conftest import randomize_norms

SIZE = (16, 16)
IMAGES = torch.rand(4, 3, *SIZE, generator=torch.Generator().manual_seed(5))


class Meeting(nn.Module):
    """A ReLU that a layer and a sum read, a sum that no ReLU follows, and two branches that are concatenated.

    Args:
        factor: of one branch.
    """

    def __init__(self, factor: float | None = None) -> None:
        super().__init__()
        self.factor = factor
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.left, self.left_act = nn.Conv2d(8, 4, 1), nn.ReLU()
        self.right, self.right_act = nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()
        self.mix, self.last_act, self.head = nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = x + self.first(x)
        x = self.second(x) + x
        left, right = self.left_act(self.left(x)), self.right_act(self.right(x))
        x = torch.cat([left, right if self.factor is None else self.factor * right], 1)
        return self.head(self.last_act(self.mix(x)).mean((2, 3)))


def switchable(net: nn.Module, **settings: object) -> SwitchableModel:
    torch.manual_seed(0)
    model = convert(randomize_norms(net).eval(), [32, 8, 4], image_size=SIZE, target="ort", **settings)
    calibrate(model, [IMAGES])
    return model.eval()


def changed_by(model: SwitchableModel, bits: int) -> dict[str, bool]:
    """Whether each quantizer of a layer's input or of a side of a sum changes what another one quantized."""
    found: dict[str, bool] = {}
    outputs: list[Tensor] = []

    def note(name: str, given: Tensor, result: Tensor) -> None:
        if any(given is other for other in outputs):
            found[name] = not torch.equal(given, result)
        outputs.append(result)

    for name, module in model.named_modules():
        if isinstance(module, SwitchableReLU) or name.endswith(("operands.left", "operands.right")):
            module.register_forward_hook(lambda _, given, y, name=name: note(name, given[0], y))
    for name, layer in switchable_layers(model).items():
        layer.register_forward_hook(
            lambda module, given, _, name=name: (
                note(name, given[0], module.input_quant.quantize(given[0]))
                if hasattr(module.input_quant, "quantize")
                else None
            )
        )
    with torch.no_grad(), at_precision(model, bits):
        model(IMAGES)
    return found


def test_at_8_bit_nothing_is_quantized_twice_and_at_4_bit_layers_read_fewer_levels() -> None:
    model = switchable(Meeting())
    again = changed_by(model, 8)
    assert not any(again.values())
    assert "net.first" in again
    model = switchable(Meeting())
    assert changed_by(model, 4)["net.first"]
    seen: dict[str, int] = {}
    with torch.no_grad(), at_precision(model, 4):
        for name, layer in switchable_layers(model).items():
            if layer.input_quant.is_quant_enabled:
                layer.register_forward_hook(
                    lambda module, given, _, name=name: seen.update(
                        {name: module.input_quant.quantize(given[0]).unique().numel()}
                    )
                )
        model(IMAGES)
    middle = {name: levels for name, levels in seen.items() if name not in ("net.stem", "net.head")}
    assert {"net.first", "net.second", "net.mix"} <= set(middle)
    assert max(middle.values()) <= 16


def test_both_sides_of_a_sum_have_steps_of_their_own_or_are_quantized_already() -> None:
    model = switchable(Meeting())
    first, second = (module for module in model.modules() if isinstance(module, QuantizedSum))
    assert list(first.operands) == ["right"]
    assert list(second.operands) == ["left", "right"]
    # The layer before it reads the same tensor.
    layer = model.net.second.input_quant.quantizer
    assert second.operands["right"].act_quant.quantizer.thresholds["8"] is layer.thresholds["8"]
    assert second.operands["left"].act_quant.quantizer.thresholds["8"] is not layer.thresholds["8"]


def test_branches_share_a_quantizer_only_where_they_are_concatenated_as_they_are() -> None:
    joined, apart = switchable(Meeting()), switchable(Meeting(factor=1.0))
    quantizers = [
        [net.left_act.act_quant.quantizer, net.right_act.act_quant.quantizer] for net in (joined.net, apart.net)
    ]
    assert quantizers[0][0] is quantizers[0][1]
    assert quantizers[1][0] is not quantizers[1][1]
    # Its threshold suits the wider branch.
    outputs: list[Tensor] = []
    for act in (joined.net.left_act, joined.net.right_act):
        act.register_forward_hook(lambda _, __, y: outputs.append(y))
    with torch.no_grad():
        joined(IMAGES)
    largest = max(float(y.max()) for y in outputs)
    assert 0.5 * largest < quantizers[0][0].threshold(8).item() <= 1.01 * largest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "cifar_resnet8", "squeezenet1_1", "mobilenetv2_050"])
def test_exact_at_32_bit_and_frozen_equal_below(name: str) -> None:
    net = randomize_norms(Meeting() if name == "own" else create_float_model(name, num_classes=3, args={})).eval()
    images = IMAGES if name in ("own", "cifar_resnet8") else IMAGES.repeat(1, 1, 4, 4)[:2]
    model = convert(net, [32, 8, 4], image_size=tuple(images.shape[2:]), target="ort")
    calibrate(model, [images])
    with torch.no_grad():
        assert torch.equal(model(images), net((images - model.mean) / model.std))
        for bits in (8, 4):
            frozen = freeze(model, bits)
            with at_precision(model, bits):
                torch.testing.assert_close(frozen(images), model(images), rtol=1e-5, atol=1e-5)


def test_shared_thresholds_learn_from_all_that_read_them_and_stay_shared_in_copies() -> None:
    model = switchable(Meeting()).train()
    with at_precision(model, 8):
        model(IMAGES).square().sum().backward()
    shared = model.net.second.input_quant.quantizer.thresholds["8"]
    assert shared.grad is not None
    assert shared.grad.abs() > 0
    names = [name for name, parameter in model.named_parameters() if parameter is shared]
    assert len(names) == 1
    copied = copy.deepcopy(model)
    quantizers = [module for module in copied.modules() if isinstance(module, SwitchableActQuant)]
    assert sum(each.thresholds["8"] is copied.get_parameter(names[0]) for each in quantizers) == 2


def test_models_of_earlier_versions_are_loaded_as_they_were(tmp_path: Path) -> None:
    for once in (False, True):
        net = timm.create_model("cifar_resnet8", num_classes=10)
        settings = {"precisions": [32, 8, 4], "target": "ort"}
        model = convert(net, mean=[0.5] * 3, std=[0.25] * 3, image_size=SIZE, quantize_once=once, **settings).eval()
        calibrate(model, [IMAGES])
        info = ModelInfo(
            name="cifar_resnet8",
            args={},
            num_classes=10,
            image_size=SIZE,
            classes=tuple("abcdefghij"),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            quant=settings,
        )
        save_model(tmp_path / "model", model, info)
        loaded, stored = load_model(tmp_path / "model")
        assert stored.quant.get("quantize_once", False) == loaded.quantize_once == once
        for bits in (8, 4):
            with torch.no_grad(), at_precision(model, bits), at_precision(loaded, bits):
                assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_no_other_target_shares() -> None:
    for target in (None, "finn", "hls4ml"):
        model = convert(Meeting().eval(), [32, 8, 4], image_size=SIZE, target=target)
        assert not model.quantize_once
        quantizers = [module for module in model.modules() if isinstance(module, SwitchableActQuant)]
        assert not any(each.held_bits for each in quantizers)
        assert model.net.left_act.act_quant.quantizer is not model.net.right_act.act_quant.quantizer
