"""Calibration: thresholds from data, by definition and at every bit-width at once."""

import math
import weakref
from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.data.batches import Loader
from qadtr_brevitas.quant import (
    SwitchableModel,
    calibrate,
    convert,
    get_precision,
    recalibrate_norms,
    set_precision,
)
from qadtr_brevitas.quant.bias_correction import BiasCorrection
from qadtr_brevitas.quant.proxies import SwitchableActProxy
from qadtr_brevitas.quant.quantize_weight import quantize_weight
from qadtr_brevitas.quant.switch import observing
from qadtr_brevitas.quant.switchable_quant import (
    SwitchableActQuant,
    SwitchablePixelQuant,
    SwitchableQuant,
    SwitchableWeightQuant,
)
from tests.quant.conftest import SIZE


def act_thresholds(model: nn.Module, bits: str) -> list[float]:
    return [
        m.quantizer.thresholds[bits].item()
        for m in model.modules()
        if isinstance(m, SwitchableActProxy) and bits in m.quantizer.thresholds
    ]


def test_minmax_clips_nothing_and_serves_all_bit_widths(model: SwitchableModel, images: Tensor) -> None:
    seen: list[float] = []
    calibrate(model, [images[:2], images[2:]], method="minmax")
    relu = model.net.layer1[0].act1
    relu.register_forward_hook(lambda _, __, y: seen.append(y.max().item()))
    with torch.no_grad():
        model(images)
    for bits in ("8", "5", "4", "2"):
        assert relu.act_quant.quantizer.thresholds[bits].item() == pytest.approx(seen[0])
    layer = model.net.layer2[0].conv1
    expected = layer.weight.abs().amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(layer.weight_quant.quantizer.thresholds["4"].detach(), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_mse_is_better_than_any_other_threshold_tried(model: SwitchableModel) -> None:
    layer = model.net.layer3[0].conv2
    rows = layer.weight.detach().flatten(1)

    def error(threshold: Tensor, bits: int) -> Tensor:
        top = 2 ** (bits - 1) - 1
        return (quantize_weight(rows, threshold / top, -top, top) - rows).square().sum()

    for bits in (8, 4, 2):
        chosen = layer.weight_quant.quantizer.thresholds[str(bits)].detach().view(-1, 1)
        for share in (0.2, 0.4, 0.6, 0.8, 1.0):
            assert error(chosen, bits) <= 1.02 * error(rows.abs().amax(1, keepdim=True) * share, bits)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_minmax_puts_no_image_off_by_more_than_half_a_step(float_net: nn.Module, bits: int) -> None:
    model = convert(float_net, [32, bits], image_size=SIZE, narrow_range=False)
    images = torch.rand(6, 3, *SIZE, generator=torch.Generator().manual_seed(4))
    calibrate(model, [images[:1], images[1:5], images[5:]], method="minmax")
    checked: set[nn.Module] = set()

    def check(quantizer: SwitchableQuant, x: Tensor) -> None:
        held = quantizer.scale(max(bits, quantizer.min_bits))
        lo, hi = quantizer.levels(max(bits, quantizer.min_bits))
        wanted = x if quantizer.signed else x.clamp_min(0)
        off = ((x / held).round().clamp(lo, hi) * held - wanted).abs()
        assert (off <= 0.5001 * held).all()
        checked.add(quantizer)

    with observing(model, check):
        model(images)
    assert {type(quantizer) for quantizer in checked} == {
        SwitchableActQuant,
        SwitchablePixelQuant,
        SwitchableWeightQuant,
    }
    assert len(checked) == len([m for m in model.modules() if isinstance(m, SwitchableQuant)])


def test_fewer_bits_clip_more(model: SwitchableModel) -> None:
    at_8, at_4, at_2 = (torch.tensor(act_thresholds(model, b)) for b in ("8", "4", "2"))
    # First and last layer and the residual stream have a threshold at 8 bit only.
    assert len(at_8) == len(at_4) + 11
    assert (at_4 > at_2).all()


def test_percentile_lies_below_the_maximum(model: SwitchableModel, images: Tensor) -> None:
    calibrate(model, [images], method={"name": "percentile", "percentile": 90})
    clipped = act_thresholds(model, "4")
    calibrate(model, [images], method="minmax")
    assert all(low < high for low, high in zip(clipped, act_thresholds(model, "4"), strict=True))


def test_the_default_percentile_clips_little(model: SwitchableModel, images: Tensor) -> None:
    calibrate(model, [images], method="percentile")
    clipped = torch.tensor(act_thresholds(model, "8"))
    calibrate(model, [images], method="minmax")
    largest = torch.tensor(act_thresholds(model, "8"))
    assert (clipped <= largest).all()
    assert (clipped < largest).any()
    assert (clipped > 0.7 * largest).all()


@pytest.mark.slow
def test_any_loader_of_the_same_images_gives_the_same_thresholds(float_net: nn.Module, images: Tensor) -> None:
    labeled = TensorDataset(images, torch.arange(len(images)))
    loaders: dict[str, Loader] = {
        "list": list(images.split(2)),
        "tuple": images.split(2),
        "generator": (batch for batch in images.split(2)),
        "pairs": [(batch, torch.zeros(len(batch))) for batch in images.split(2)],
        "mappings": [{"image": batch} for batch in images.split(2)],
        "DataLoader": DataLoader(labeled, batch_size=2),
        "DataLoader without labels": DataLoader(TensorDataset(images), batch_size=2),
    }
    thresholds = {}
    for name, loader in loaders.items():
        model = convert(float_net, [32, 4], image_size=SIZE)
        calibrate(model, loader, weights=["bias-correction"])
        recalibrate_norms(model, loader if name != "generator" else images.split(2), precisions=[4])
        thresholds[name] = act_thresholds(model, "4"), model.net.bn1.branch(Precision(4, 4)).running_mean.tolist()
    assert all(found == thresholds["list"] for found in thresholds.values()), thresholds


@pytest.mark.slow
def test_a_tensor_a_dataset_and_bytes_are_batched(float_net: nn.Module, images: Tensor) -> None:
    pixels = (images * 255).round().to(torch.uint8)
    thresholds = []
    for loader in (pixels, pixels / 255, TensorDataset(pixels, torch.zeros(len(pixels)))):
        model = convert(float_net, [32, 4], image_size=SIZE)
        calibrate(model, loader)
        thresholds.append(act_thresholds(model, "4"))
    assert thresholds[0] == thresholds[1] == thresholds[2]


@pytest.mark.slow
def test_one_batch_of_a_sequence_is_in_memory_at_a_time(model: SwitchableModel, images: Tensor) -> None:
    class Lazy(Sequence[Tensor]):
        made: ClassVar[list[weakref.ref[Tensor]]] = []

        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Tensor:
            if index >= len(self):
                raise IndexError
            self.made.append(weakref.ref(batch := images.clone()))
            assert sum(ref() is not None for ref in self.made) <= 2
            return batch

    calibrate(model, Lazy())
    assert len(Lazy.made) == 5


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "passes"), [([], 1), (["bias-correction"], 5)])
def test_progress_counts_the_batches_of_all_passes(
    model: SwitchableModel, images: Tensor, weights: list[str], passes: int
) -> None:
    told: list[tuple[int, int]] = []
    calibrate(model, images.split(2), weights=weights, progress=lambda done, of: told.append((done, of)))
    assert told == [(done, 2 * passes) for done in range(1, 2 * passes + 1)]


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_a_float_model_has_nothing_to_calibrate_and_trains(float_net: nn.Module, images: Tensor, method: str) -> None:
    model = convert(float_net, [32], image_size=SIZE)
    calibrate(model, [images], method=method, weights=["bias-correction"])
    assert model.net.conv1.weight_quant.per_channel
    model.train()(images).sum().backward()
    assert model.net.conv1.weight.grad.any()


def test_weights_that_are_computed_are_calibrated_as_plain_ones(images: Tensor) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(StdConv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(784, 3)).eval()
    model = convert(net, [32, 4], image_size=SIZE)
    weights: dict[SwitchableQuant, Tensor] = {}
    with observing(model, lambda quantizer, x: weights.setdefault(quantizer, x)):
        model(images)
    calibrate(model, [images], method="minmax")
    found = {q: w for q, w in weights.items() if isinstance(q, SwitchableWeightQuant)}
    assert len(found) == 3
    for quantizer, weight in found.items():
        rows = weight.reshape(math.prod(quantizer.shape), -1)
        (threshold,) = quantizer.thresholds.values()
        assert torch.equal(threshold.detach().flatten(), rows.abs().amax(1))


def test_calibration_gives_every_precision_the_float_statistics(float_net: nn.Module, images: Tensor) -> None:
    model = convert(float_net, [32, 4], image_size=SIZE)
    with torch.no_grad():
        model.net.bn1.running_mean.fill_(0.25)
    calibrate(model, [images])
    assert (model.net.bn1.branch(Precision(4, 4)).running_mean == 0.25).all()


@pytest.mark.slow
def test_precision_and_mode_are_as_before(model: SwitchableModel, images: Tensor) -> None:
    set_precision(model, 4)
    model.train()
    model.net.bn1.eval()
    calibrate(model, [images], weights=["bias-correction"])
    recalibrate_norms(model, [images])
    assert get_precision(model) == Precision(4, 4)
    assert [m for m in model.modules() if not m.training] == list(model.net.bn1.modules())


def test_a_model_without_32_bit_calibrates(float_net: nn.Module, images: Tensor) -> None:
    model = convert(float_net, [4], image_size=SIZE)
    calibrate(model, [images])
    assert all(t != 1.0 for t in act_thresholds(model, "4"))


def test_a_dead_channel_gets_a_positive_threshold(float_net: nn.Module, images: Tensor) -> None:
    model = convert(float_net, image_size=SIZE)
    with torch.no_grad():
        model.net.layer1[0].conv1.weight[3].zero_()
    calibrate(model, [images])
    assert (model.net.layer1[0].conv1.weight_quant.quantizer.thresholds["2"] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loader": []}, "no images.*one batch"),
        ({"loader": [torch.randn(2, 3, 16, 16)]}, r"pixels.*\[0, 1\]"),
        ({"loader": [{"pixels": None}]}, "batch.*dict.*tensors"),
        ({"method": "kl"}, "range method 'kl'.*minmax, mse, percentile"),
        ({"method": {"name": "percentile", "percentile": 0.0}}, "range method 'percentile'.*0.0"),
        ({"method": {"percentile": 99}}, "range method.*minmax, mse, percentile"),
        ({"method": BiasCorrection()}, "range method.*BiasCorrection"),
        ({"weights": ["bias-corection"]}, "PTQ method 'bias-corection'.*'bias-correction'"),
        ({"weights": [{"name": "bias-correction", "passes": 3}]}, "PTQ method 'bias-correction'.*passes"),
    ],
)
def test_bad_input(model: SwitchableModel, images: Tensor, arguments: dict[str, object], message: str) -> None:
    with pytest.raises((UsageError, DataError), match=message):
        calibrate(model, **{"loader": [images], **arguments})
