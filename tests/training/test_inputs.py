"""The state that adversarial images of a training step are made in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant import SwitchableModel, calibrate, convert, set_precision
from qadtr_brevitas.quant.folding import Foldable
from qadtr_brevitas.quant.norm import norms
from qadtr_brevitas.quant.switch import switch_of
from qadtr_brevitas.training import inputs
from qadtr_brevitas.training.inputs import TrainingInputs
from tests.quant.conftest import randomize_norms
from tests.training.support import make_recipe

FOUR = Precision(4, 4)
IMAGES = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(16) % 3


def model_with_norms() -> SwitchableModel:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    blocks += [nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    net = randomize_norms(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)))
    model = convert(net, [32, 4], image_size=(8, 8))
    calibrate(model, [IMAGES])
    set_precision(model, FOUR)
    return model.train()


def attacked(model: SwitchableModel, *, steps: int = 1) -> Tensor:
    recipe = make_recipe(attack={"name": "pgd", "share": 0.5, "steps": 2})
    source = TrainingInputs(recipe, 0, 1)
    for step in range(steps):
        found = source.attack(model, IMAGES, LABELS, step=step, precision=FOUR)
    return found.images


@pytest.mark.parametrize("amp", [False, True])
def test_images_are_made_with_folded_norms_and_frozen_weights(amp: bool) -> None:
    model = model_with_norms()
    states: list[tuple[object, bool, bool]] = []

    def note(net: SwitchableModel, _: object) -> None:
        now = switch_of(net).states.now
        if now.observer is None:
            folded = frozenset() if now.folding is None else now.folding.norms
            states.append((folded, now.frozen is not None, net.training))

    model.register_forward_pre_hook(note)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        attacked(model, steps=2)
    assert set(states) == {(frozenset(norms(model)), True, False)}
    assert len(norms(model)) == 2
    assert model.training
    assert switch_of(model).folding is None


def test_they_are_those_of_the_network_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found = attacked(model_with_norms())
    monkeypatch.setattr(inputs, "find_foldable", lambda *_: Foldable({}, in_place=False))
    expected = attacked(model_with_norms())
    assert torch.equal(found[8:], IMAGES[8:])
    assert not torch.equal(found[:8], IMAGES[:8])
    # The sign of a gradient of almost 0 may turn.
    assert (found == expected).float().mean() > 0.99
