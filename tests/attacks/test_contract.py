"""Every registered attack fulfills the contract, and the contract check finds attacks that do not."""

from typing import Annotated, ClassVar

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.attacks.a_qapa import AQapa
from qadtr_brevitas.attacks.base import ImageAttack, TargetedAttack, TrainingAttack
from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.attacks.patch_settings import PatchSettings
from qadtr_brevitas.core.errors import PluginError
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.registry import ATTACKS, check_contract
from qadtr_brevitas.testing.attacks import check_attack, quadrant_images, switchable_model

FAST = {
    # Nothing withstands so large a distance, so the slow last attacks have nothing left to do.
    "autoattack": {"eps": 0.5},
    "dpr": {"steps": 4},
    "gap": {"steps": 3},
    "lavan": {"steps": 3},
    "location-patch": {"steps": 3},
    "patch-auto": {"version": "fast", "size": 8},
    "pgd": {"steps": 3},
    "random-patch": {"draws": 5},
    "sparse-rs": {"queries": 30},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*ATTACKS.names()} - {"adaptive-patch"}))
def test_every_registered_attack_fulfills_the_contract(name: str) -> None:
    if name == "autoattack":
        pytest.importorskip("pyautoattack")
    check_attack(ATTACKS.load(name)(**FAST.get(name, {})))


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack",
    [
        AQapa(universal=0.5, steps=2),
        AQapa(quantize_image=False, keep_best=True, restarts=2, steps=2),
        AQapa(targeted=True, steps=1, patch_bits="random"),
        Lavan(target=None, steps=2, restarts=2, keep_out=(6, 6, 4, 4)),
    ],
    ids=["memory", "best", "drawn targets", "untargeted"],
)
def test_other_settings_fulfill_it_too(attack: ImageAttack) -> None:
    check_attack(attack)


def test_the_model_of_the_contract_knows_its_images_at_the_precision_it_is_attacked_at() -> None:
    images, labels = quadrant_images(40)
    with torch.no_grad():
        assert (switchable_model()(images).argmax(1) == labels).float().mean() > 0.9


class Whiten(ImageAttack):
    """Turns a corner white; the base of attacks that break the contract in one way each."""

    def run(self, model, images, labels, *, generator, precision=None):
        return self.white(images, generator)

    def white(self, images: Tensor, generator: torch.Generator) -> Tensor:
        changed = images.clone()
        changed[:, :, :2, :2] = torch.rand(len(images), 3, 2, 2, generator=generator)
        return changed


@plugin
class Sound(Whiten):
    pass


@plugin
class TooBright(Whiten):
    def white(self, images, generator):
        return super().white(images, generator) + 1


@plugin
class InPlace(Whiten):
    def white(self, images, generator):
        images[:, :, 0, 0] = 1
        return images


@plugin
class GlobalSeed(Whiten):
    def white(self, images, generator):
        torch.rand(1, generator=generator)
        return torch.rand_like(images)


@plugin
class IgnoresSeed(Whiten):
    def white(self, images, generator):
        torch.rand(1, generator=generator)
        return images.clone()


@plugin
class Gradients(Whiten):
    def run(self, model, images, labels, *, generator, precision=None):
        model(images).sum().backward()
        return self.white(images, generator)


@plugin
class NotBlack(Whiten):
    black_box: ClassVar[bool] = True

    def run(self, model, images, labels, *, generator, precision=None):
        pixels = images.clone().requires_grad_()
        torch.autograd.grad(model(pixels).sum(), pixels)
        return self.white(images, generator)


@plugin
class Trains(Whiten):
    def run(self, model, images, labels, *, generator, precision=None):
        model.train()
        return self.white(images, generator)


@plugin
class TooLarge(PatchSettings, Whiten):
    size: int = 1


@plugin
class AnyTarget(Whiten, TargetedAttack):
    target: int | None = None


@plugin
class WholeShare(Whiten, TrainingAttack):
    share: Annotated[float, Field(description="share")] = 1.5


def test_a_sound_toy_fulfills_it() -> None:
    check_attack(Sound())


@pytest.mark.parametrize(
    ("attack", "fact"),
    [
        (TooBright(), r"in \[0, 1\]"),
        (InPlace(), "changed the images"),
        (GlobalSeed(), "same seed"),
        (IgnoresSeed(), "another seed"),
        (Gradients(), "gradient on parameter"),
        (NotBlack(), "black_box"),
        (Trains(), "mode"),
        (TooLarge(), "4 pixels.*budget.* 1"),
        (AnyTarget(), "target=4"),
        (WholeShare(), "share is 1.5"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ImageAttack) else "",
)
def test_an_attack_that_breaks_the_contract_fails_with_the_reason(attack: ImageAttack, fact: str) -> None:
    model = switchable_model()
    try:
        with pytest.raises(AssertionError, match=fact):
            check_attack(attack)
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)


@plugin
class WithoutRun(ImageAttack):
    pass


@plugin
class WithoutTarget(Whiten, TargetedAttack):
    pass


@plugin
class WithoutShare(Whiten, TrainingAttack):
    pass


@pytest.mark.parametrize(
    ("broken", "facts"),
    [
        (WithoutRun, "run.*ImageAttack|run.*Attack"),
        (WithoutTarget, "TargetedAttack.*target"),
        (WithoutShare, "TrainingAttack.*share"),
    ],
)
def test_a_missing_method_or_key_is_named(broken: type, facts: str) -> None:
    with pytest.raises(PluginError, match=facts):
        check_contract(broken, ImageAttack, what="attack 'broken'")
