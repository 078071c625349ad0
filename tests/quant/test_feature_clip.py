"""Features whose norms are clipped."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import parse_precisions
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze
from qadtr_brevitas.quant.feature_clip import FeatureClip, feature_clips
from qadtr_brevitas.quant.switch import Switch

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def clip(threshold: float, **settings: Any) -> FeatureClip:
    made = FeatureClip(Switch(parse_precisions([32])), "layer1", percentile=99.0, **settings)
    made.get_buffer("32").fill_(threshold)
    return made


def clipped_model(net: nn.Module, *after: str, percentile: float = 50.0) -> SwitchableModel:
    model = convert(net, [32, 8, 2], image_size=(16, 16), feature_clip={"after": after, "percentile": percentile})
    calibrate(model, [IMAGES])
    return model


@given(seed=st.integers(0, 1000), threshold=st.floats(1e-3, 1e3))
def test_norms_are_bounded_and_shorter_vectors_stay_bit_for_bit(seed: int, threshold: float) -> None:
    scale = 10 ** torch.empty(2, 1, 3, 4).uniform_(-4, 4, generator=torch.Generator().manual_seed(seed))
    features = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(seed)) * scale
    found = clip(threshold)(features)
    norms = features.norm(dim=1, keepdim=True)
    assert (found.norm(dim=1) <= threshold * (1 + 1e-5)).all()
    assert torch.equal(
        found.where(norms <= threshold, torch.zeros(())), features.where(norms <= threshold, torch.zeros(()))
    )
    # Directions do not change.
    torch.testing.assert_close(found * norms, features * found.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize(
    ("settings", "shape", "dim"), [({}, (2, 7, 3), -1), ({"channels_last": True}, (2, 4, 4, 3), -1)]
)
def test_channels_are_found(settings: dict[str, Any], shape: tuple[int, ...], dim: int) -> None:
    found = clip(1.0, **settings)(torch.full(shape, 5.0))
    torch.testing.assert_close(found.norm(dim=dim), torch.ones(shape[:-1]))


def test_gradients_pass_through_the_clip() -> None:
    features = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    layer = clip(1.0)
    # Some norms are above and some below.
    assert 0 < (features.norm(dim=1) > 1).sum() < 9 or (features.norm(dim=1) > 1).all()
    assert torch.autograd.gradcheck(lambda x: layer.double()(x), (features,))
    zeros = torch.zeros(1, 4, 1, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(clip(1.0)(zeros).sum(), zeros)
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_thresholds_are_percentiles_of_each_precision(float_net: nn.Module) -> None:
    model = clipped_model(float_net, "layer1", "layer2.0")
    first, second = feature_clips(model)
    seen: list[Tensor] = []
    plain = convert(float_net, [32, 8, 2], image_size=(16, 16))
    calibrate(plain, [IMAGES])
    plain.net.get_submodule("layer1").register_forward_hook(lambda module, args, output: seen.append(output))
    with at_precision(plain, 32), torch.no_grad():
        plain(IMAGES)
    expected = seen[0].norm(dim=1).flatten().quantile(0.5)
    torch.testing.assert_close(first.get_buffer("32"), expected)
    values = [float(buffer) for layer in (first, second) for buffer in layer.buffers()]
    assert len(set(values)) == 6
    # A clip that all norms are below changes nothing.
    loose = clipped_model(float_net, "layer1", percentile=100.0)
    with torch.no_grad():
        assert torch.equal(loose(IMAGES), plain(IMAGES))
        assert not torch.equal(model(IMAGES), plain(IMAGES))
    calibrate(model, [IMAGES])
    assert [float(buffer) for layer in (first, second) for buffer in layer.buffers()] == values


def test_what_is_clipped_is_quantized_again_where_it_is_read(float_net: nn.Module) -> None:
    model = clipped_model(float_net, "act1" if hasattr(float_net, "act1") else "layer1.0")
    reader = "layer1.0.conv1" if hasattr(float_net, "act1") else "layer1.1.conv1"
    (note,) = (row.note for row in model.report.layers if row.name == reader)
    assert "own" in note
    assert "input quantizer" in note


def test_copies_frozen_models_and_pickles_clip_too(float_net: nn.Module) -> None:
    model = clipped_model(float_net, "layer2")
    with torch.no_grad(), at_precision(model, 8):
        expected = model(IMAGES)
        frozen = freeze(model, 8)
        torch.testing.assert_close(frozen(IMAGES), expected, rtol=1e-4, atol=1e-4)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(IMAGES), expected)
            feature_clips(other)[0].get_buffer("8").fill_(1e-6)
            assert not torch.equal(other(IMAGES), expected)
        assert torch.equal(model(IMAGES), expected)


@pytest.mark.parametrize(
    ("feature_clip", "words"),
    [
        ({"after": ["layr1"]}, "no module 'layr1'.*layer1"),
        ({"after": []}, "names no module"),
        ({"after": ["layer1"], "percentile": 0}, "percentile=0"),
        ({"afer": ["layer1"]}, "'afer'.*after"),
        (["fc"], "(?s)fc.*positions|no module 'fc'"),
    ],
)
def test_bad_settings_are_named(float_net: nn.Module, feature_clip: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        convert(float_net, image_size=(16, 16), feature_clip=feature_clip)


@pytest.mark.parametrize("target", ["finn", "hls4ml"])
def test_compilers_refuse_it_by_name(float_net: nn.Module, target: str) -> None:
    with pytest.raises(UsageError, match=f"{target} .*feature_clip .*layer1"):
        convert(float_net, image_size=(16, 16), feature_clip=["layer1"], target=target)
