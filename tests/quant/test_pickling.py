"""Whole models in pickles: torch.save, and processes that are spawned."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, multiprocessing, nn

from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze, get_precision, set_precision

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Attending(nn.Module):
    """Convolution, norm, ReLU, and attention that the network computes itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.act, self.head = nn.Conv2d(3, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.act(self.norm(self.conv(x))).flatten(2).mT
        return self.head(nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).mean(1))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def made(make: Callable[[], nn.Module], **settings: str) -> SwitchableModel:
    model = convert(make().eval(), [32, 8, 4], image_size=(8, 8), **settings).eval()
    calibrate(model, IMAGES, weights=["bias-correction"])
    return model


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_a_model_from_a_file_is_equal_and_independent(activations: str) -> None:
    model = made(Attending, activations=activations)
    set_precision(model, 8)
    loaded = through_a_file(model)
    assert get_precision(loaded) == Precision(8, 8)
    for bits in (32, 8, 4):
        with torch.no_grad(), at_precision(model, bits), at_precision(loaded, bits):
            assert torch.equal(loaded(IMAGES), model(IMAGES))
            torch.testing.assert_close(through_a_file(freeze(model, bits))(IMAGES), model(IMAGES))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    loaded.load_state_dict(model.state_dict())
    with at_precision(loaded.train(), 4):
        loaded(IMAGES).sum().backward()
    assert loaded.net.conv.weight.grad is not None
    assert model.net.conv.weight.grad is None


@pytest.mark.parametrize("target", ["finn", "hls4ml"])
def test_models_for_targets(target: str) -> None:
    model = made(plain, target=target)
    loaded = through_a_file(model)
    with torch.no_grad(), at_precision(model, 4), at_precision(loaded, 4):
        assert torch.equal(loaded(IMAGES), model(IMAGES))
        torch.testing.assert_close(freeze(loaded, 4)(IMAGES), freeze(model, 4)(IMAGES))
        assert loaded.net[0].quant_weight().bit_width == model.net[0].quant_weight().bit_width


def _run(model: SwitchableModel, results: multiprocessing.SimpleQueue) -> None:
    torch.set_num_threads(1)
    with torch.no_grad(), at_precision(model, 4):
        results.put(model(IMAGES).tolist())


@pytest.mark.slow
def test_a_spawned_process_gets_the_model() -> None:
    model = made(Attending)
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_run, args=(model, results))
    process.start()
    found = results.get()
    process.join()
    with torch.no_grad(), at_precision(model, 4):
        torch.testing.assert_close(torch.tensor(found), model(IMAGES))
