"""Families of networks in miniature, converted and checked as the sweep over all of timm does it."""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import ConvNormAct, GroupNormAct
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.densenet import DenseNet
from timm.models.inception_v3 import InceptionA
from timm.models.mlp_mixer import MlpMixer
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.nfnet import NfCfg, NormFreeNet
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.vgg import VGG
from timm.models.xcit import Xcit
from torch import Tensor, nn

from benchmarks.timm_sweep.check import WrongResult, check_conversion
from benchmarks.timm_sweep.choose import all_modules, smallest_input, smallest_model
from benchmarks.timm_sweep.levels import count_levels, seen_levels
from benchmarks.timm_sweep.processes import Record, run_all
from benchmarks.timm_sweep.table import markdown
from qadtr_brevitas.quant import freeze
from qadtr_brevitas.quant.quantize_weight import quantize_weight

pytestmark = pytest.mark.slow

CLASSES = 5
TOKENS: dict[str, Any] = {"num_classes": CLASSES, "img_size": 32, "embed_dim": 16}
ATTENTION: dict[str, Any] = {**TOKENS, "patch_size": 8, "depth": 1, "num_heads": 2}


def named(name: str, **args: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=CLASSES, **args)


class Inception(nn.Sequential):
    """A block of Inception-v3 between a convolution and a classifier."""

    def __init__(self) -> None:
        stem = ConvNormAct(3, 8, 3, stride=2)
        block = InceptionA(8, pool_features=4)
        super().__init__(stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64 + 64 + 96 + 4, CLASSES))


class Transformer(nn.Module):
    """A network of PyTorch's own transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
        self.pool = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.embed(x).flatten(2).mT)
        # With weights asked for, it multiplies by hand.
        return self.head(self.pool(x[:, :1], x, x, need_weights=True)[0][:, 0])


def small_mobilenet() -> nn.Module:
    blocks = decode_arch_def([["ds_r1_k3_s2_e1_c16_se0.25_nre"], ["ir_r1_k5_s2_e3_c24_se0.25"]])
    return MobileNetV3(blocks, CLASSES, stem_size=16, num_features=32, act_layer=nn.Hardswish)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet": named("test_resnet", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8)),
    "vgg": partial(VGG, [8, "M", 16, "M"], CLASSES, mlp_ratio=0.01),
    "densenet": partial(DenseNet, 8, (2, 1), CLASSES, bn_size=2),
    "inception_v3": Inception,
    "mobilenetv3": small_mobilenet,
    "tf_efficientnet": named("test_efficientnet", pad_type="same"),
    "regnet": partial(
        RegNet, RegNetCfg(depth=4, w0=16, wa=8, wm=1.2, group_size=8, se_ratio=0.25), num_classes=CLASSES
    ),
    "convnext": named("test_convnext", depths=(1, 1, 1, 1), dims=(8, 16, 16, 24)),
    "nfnet": partial(NormFreeNet, NfCfg((1, 1, 0, 0), (16, 16, 16, 16), stem_chs=16), CLASSES),
    "resnetv2": partial(ResNetV2, [1, 1], (16, 32), CLASSES, norm_layer=partial(GroupNormAct, num_groups=8)),
    "vit": named("test_vit", img_size=32, depth=1),
    "vit_relpos": named("test_vit_relpos", img_size=32, depth=1),
    "deit_distilled": partial(VisionTransformerDistilled, **ATTENTION),
    "swin": partial(SwinTransformer, **TOKENS, patch_size=4, depths=(2, 1), num_heads=(2, 2), window_size=4),
    "beit": partial(Beit, **ATTENTION, use_shared_rel_pos_bias=True),
    "mixer": partial(MlpMixer, **TOKENS, patch_size=8, num_blocks=1),
    "xcit": partial(Xcit, **ATTENTION, cls_attn_layers=1),
    "mambaout": named("test_mambaout", depths=(1, 1), dims=(16, 24)),
    "torch_transformer": Transformer,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_converts_fully(family: str) -> None:
    report = check_conversion(FAMILIES[family], (32, 32))
    assert report.quantized_macs == report.macs > 0
    assert report.quantized_share > 0.8


class Plain(nn.Module):
    """Products whose operands no activation has quantized, and one of constants."""

    def __init__(self, act: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.inner = nn.Conv2d(8, 8, 3)
        self.act = act()
        self.scale = nn.Parameter(torch.rand(1, 8))
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.inner(self.conv(x))).mean((2, 3)) * self.mix(self.scale))


def test_constant_products_may_stay_float() -> None:
    report = check_conversion(Plain, (8, 8))
    notes = {layer.name: layer.note for layer in report.layers}
    assert notes["mix"] == "stays float: the same for every image, and so a constant"


BREAKS: dict[str, tuple[str, Any, str]] = {
    "weights": (
        "qadtr_brevitas.quant.switchable_quant.SwitchableWeightQuant.quantize",
        lambda quantizer, w, now=None: w,
        r"at 4 bit convolution in inner computes on operand 1 \(8, 8, 3, 3\) of 72 levels",
    ),
    "inputs": (
        "qadtr_brevitas.quant.switchable_quant.SwitchableActQuant.quantize",
        lambda quantizer, x, now=None: x,
        r"at 8 bit convolution in conv computes on operand 0 \(2, 3, 8, 8\) of 257 levels",
    ),
    "signs": (
        "qadtr_brevitas.quant.provenance.TensorFacts.result_is_nonnegative",
        True,
        r"inner.input_quant.* is unsigned and is given -\d",
    ),
    "gradients": (
        "qadtr_brevitas.quant.uniform.quantize_weight",
        lambda w, scale, lo, hi: quantize_weight(w, scale, lo, hi).detach(),
        "at 8 bit net.conv.weight and 2 more get no gradient",
    ),
    "freezing": (
        "benchmarks.timm_sweep.check.freeze",
        lambda model, bits: freeze(model, 32 if bits == 32 else 8),
        "at 4 bit the frozen network does not equal the switchable one",
    ),
    "exactness": (
        "benchmarks.timm_sweep.check.freeze",
        lambda model, bits: freeze(model, 8),
        "at 32 bit the frozen network does not equal the float one",
    ),
}


@pytest.mark.parametrize("part", BREAKS)
def test_wrong_results_are_found(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, what, message = BREAKS[part]
    monkeypatch.setattr(where, what)
    with pytest.raises(WrongResult, match=message):
        check_conversion(Plain, (8, 8))


def test_a_conversion_that_depends_on_weights_is_found() -> None:
    acts = iter([nn.GELU, nn.ReLU])
    with pytest.raises(WrongResult, match="other weights"):
        check_conversion(lambda: Plain(next(acts)), (8, 8))


@given(st.integers(1, 400), st.integers(1, 20_000), st.integers(0, 9))
def test_levels_are_counted_exactly(levels: int, values: int, seed: int) -> None:
    x = torch.randint(levels, (values,), generator=torch.Generator().manual_seed(seed)) * 0.37
    assert count_levels(x) == min(257, x.unique().numel())


def test_levels_of_a_plain_network_are_those_of_its_weights() -> None:
    net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2, 3, 3], [4, 4, 4, 4]]))
    _, seen = seen_levels(net, torch.tensor([[1.0, 1, 1, 2]]))
    assert [call.owner for call in seen] == ["0", "1"]
    assert seen[0].operands is not None
    image, weight = seen[0].operands
    assert (image.levels, weight.levels, weight.row_levels) == (2, 4, 3)


def outcome(record: Record) -> Iterator[Record]:
    """A stand-in for the check of a module."""
    yield {"model": record["model"] or f"small_{record['module']}"}
    if record["module"] == "crash":
        os._exit(3)
    if record["module"] == "hang":
        time.sleep(60)
    yield {"result": "converts", "reason": ""}


# Newer Pythons warn of any fork while PyTorch's threads are about.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_each_module_has_a_process_of_its_own() -> None:
    tasks: list[Record] = [{"module": name, "model": None} for name in ("crash", "fine", "hang")]
    found = {record["module"]: record for record in run_all(outcome, tasks, jobs=2, timeout=1.5)}
    assert found["fine"] == {"module": "fine", "model": "small_fine", "result": "converts", "reason": ""}
    assert found["crash"]["reason"] == "its process ended with status 3"
    assert found["hang"] == {"module": "hang", "model": "small_hang", "result": "failed", "reason": "took too long"}


def test_the_table_gives_reasons() -> None:
    good = {"module": "vgg", "model": "vgg11", "image_size": 64, "result": "converts", "reason": ""}
    good |= {"macs": 2_000_000, "quantized_macs": 1_000_000, "parameters": 5_000, "quantized_share": 0.5}
    bad = {"module": "rnn", "model": "rnn_s", "image_size": 32, "result": "refused", "reason": "it is recurrent"}
    page = markdown([good, bad], date="2000-01-01")
    assert "- timm: **1 of 2 modules convert fully** (50.0%), 1 refused\n- torchvision: **0 of 0" in page
    assert "| vgg | `vgg11` | 64 | 2.0 | 50.0% | 5 | 50.0% | converts |" in page
    assert "| rnn | `rnn_s` | 32 |  |  |  |  | refused |" in page
    assert "- rnn (`rnn_s`), refused: it is recurrent" in page


def test_the_smallest_model_is_chosen_at_the_smallest_size() -> None:
    assert smallest_model("sknet") == "skresnet18"
    assert smallest_input("test_vit") == ((64, 64), {})
    assert smallest_input("deit_tiny_patch16_224") == ((64, 64), {"img_size": 64})
    assert "torchvision.alexnet" in all_modules()
    assert smallest_model("torchvision.alexnet") == "alexnet"
