"""Contract checks of attacks, for this package's own and for those of other packages.

```python
from qadtr_brevitas.testing.attacks import check_attack

def test_my_attack():
    check_attack(MyAttack(steps=3))
```
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.attacks.base import (
    Attack,
    ImageAttack,
    Memory,
    Model,
    PatchAttack,
    PixelAttack,
    RememberingAttack,
    TargetedAttack,
    TrainingAttack,
)
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.attacks.patch_settings import PatchSettings
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.registry import check_contract
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.quant import SwitchableModel, calibrate, convert, get_precision, set_precision

CLASSES, SIDE = 4, 16
_COUNT, _PRECISION, _TOLERANCE = 8, Precision(4, 4), 1e-5


def check_attack(attack: Attack) -> None:
    """Run an attack on a small quantized network with 4 classes and images of 16x16, and check what it does.

    Checked are what comes back, its dependence on seeds, what is left behind on the model, and that the attack does
    what it declares: `black_box`, targets, budgets, shares and memory. Choose settings that are fast.

    Raises:
        PluginError: a method is missing, or the key of a declared ability.
        AssertionError: the attack breaks the contract; the message says how.
    """
    check_contract(attack, Attack, what=f"attack {type(attack).__name__}")
    assert is_dataclass(attack), "an attack must be a dataclass: decorate it with @plugin"
    assert isinstance(attack, ImageAttack | PatchAttack), "an attack must derive from ImageAttack or PatchAttack"
    if isinstance(attack, ImageAttack):
        check_image_attack(attack)
    if isinstance(attack, PatchAttack):
        check_patch_attack(attack)


def check_image_attack(attack: ImageAttack) -> None:
    """Check an attack that makes adversarial images; see `check_attack`."""
    images, labels = quadrant_images(_COUNT)
    with _left_as_found():
        first, has_drawn = _run(attack, images, labels, seed=0)
        again, _ = _run(attack, images, labels, seed=0)
        other, _ = _run(attack, images, labels, seed=1)
        single, _ = _run(attack, images[:1], labels[:1], seed=0)
    _check_images(attack, first, images)
    _check_images(attack, single, images[:1])
    assert torch.equal(first, again), "the same seed must give the same images, whatever the global seed is"
    assert not has_drawn or not torch.equal(first, other), "another seed gives the same images"
    if attack.black_box:
        _run(attack, images, labels, seed=0, model=_without_backward(switchable_model()))
    if isinstance(attack, TargetedAttack):
        _check_target(attack, lambda aimed: _run(aimed, images, labels, seed=0))
    if isinstance(attack, TrainingAttack):
        assert 0 < attack.share <= 1, f"share is {attack.share}: it must be above 0 and at most 1"
    if isinstance(attack, RememberingAttack):
        _check_memory(attack, images, labels)


def check_patch_attack(attack: PatchAttack) -> None:
    """Check an attack that makes a universal patch; see `check_attack`."""
    progress: list[tuple[int, int]] = []

    def note(done: int, total: int, text: str = "", /) -> None:
        progress.append((done, total))

    with _left_as_found():
        first, again = (_fit(attack, seed=0, progress=note) for _ in range(2))
        other = _fit(attack, seed=1)
    mask = attack.mask((SIDE, SIDE))
    assert mask.dtype == torch.bool, f"the mask has type {mask.dtype}: it must be boolean"
    if attack.searches_shape:
        assert first.pixels <= int(mask.sum()), f"the patch covers {first.pixels} pixels, its budget is {mask.sum()}"
    else:
        assert torch.equal(first.mask.cpu(), mask.cpu()), "the patch has another mask than `mask` announced"
    assert torch.equal(first.texture, again.texture), "the same seed must give the same patch"
    assert torch.equal(first.mask, again.mask), "the same seed must give the same shape"
    assert not _are_equal(first, other), "another seed gives the same patch"
    _check_meta(first)
    dones = [done for done, _ in progress[: len(progress) // 2]]
    assert dones == sorted(set(dones)), f"progress must grow with each call, it was {dones}"
    assert progress[-1][0] == progress[-1][1], f"progress must end at its total, it ended at {progress[-1]}"
    if attack.black_box:
        _fit(attack, seed=0, model=_without_backward(switchable_model()))
    if isinstance(attack, TargetedAttack):
        _check_target(attack, lambda aimed: _fit(aimed, seed=0))


@cache
def switchable_model() -> SwitchableModel:
    """Return a network that tells which quadrant of an image is the brightest, at 32 and 4 bit, in eval mode."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )
    convolution, linear = net[0], net[-1]
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(linear, nn.Linear)
    draws = generator(0, "contract model")
    with torch.no_grad():
        convolution.weight.copy_(torch.rand(convolution.weight.shape, generator=draws) / 10)
        convolution.bias = None
        quadrants = torch.arange(16) % CLASSES
        linear.weight.copy_(2.0 * (quadrants == torch.arange(CLASSES)[:, None]) - 0.5)
        linear.weight.add_(torch.randn(linear.weight.shape, generator=draws) / 20)
        linear.bias.zero_()
    model = convert(net.eval(), (32, 4), mean=(0.0,) * 3, std=(1.0,) * 3, image_size=(SIDE, SIDE), first_last="same")
    calibrate(model, [quadrant_images(64)[0]])
    set_precision(model, _PRECISION)
    return model.eval()


def quadrant_images(count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return noise images (count, 3, 16, 16) in [0, 1] with one brighter quadrant, and its number (count,)."""
    images = 0.3 * torch.rand(count, 3, SIDE, SIDE, generator=generator(seed, "contract images"))
    labels = torch.arange(count) % CLASSES
    rows, columns = (torch.arange(SIDE) >= SIDE // 2).long()[:, None], (torch.arange(SIDE) >= SIDE // 2).long()
    bright = (2 * rows + columns)[None] == labels[:, None, None]
    return images + 0.2 * bright[:, None], labels


def _run(
    attack: ImageAttack, images: Tensor, labels: Tensor, *, seed: int, model: Model | None = None, **memory: Memory
) -> tuple[Tensor, bool]:
    """Return adversarial images, and whether anything was drawn for them; the inputs must stay as they are."""
    draws = generator(seed, "contract run")
    state = draws.get_state()
    # No two runs have the same global seed: all draws have to come from the generator.
    torch.manual_seed(int(torch.seed() % 2**32))
    given = images.clone(), labels.clone()
    if isinstance(attack, RememberingAttack) and attack.remembers:
        memory = memory or {"memory": {}}
    adversarial = attack.run(model or switchable_model(), *given, generator=draws, precision=_PRECISION, **memory)
    assert torch.equal(given[0], images), "the attack changed the images it was given"
    assert torch.equal(given[1], labels), "the attack changed the labels it was given"
    return adversarial, not torch.equal(draws.get_state(), state)


def _fit(
    attack: PatchAttack, *, seed: int, model: Model | None = None, progress: Callable[..., object] | None = None
) -> Patch:
    images, labels = quadrant_images(40)
    held_out = quadrant_images(20, seed=1)
    given = images.clone(), labels.clone()
    torch.manual_seed(int(torch.seed() % 2**32))
    patch = attack.fit(model or switchable_model(), *given, held_out=held_out, seed=seed, progress=progress)
    assert torch.equal(given[0], images), "the attack changed the images it was given"
    assert torch.equal(given[1], labels), "the attack changed the labels it was given"
    assert isinstance(patch, Patch), f"fit returned {type(patch).__name__}: it must be a Patch"
    return patch


def _check_images(attack: ImageAttack, adversarial: Tensor, images: Tensor) -> None:
    assert adversarial.shape == images.shape, f"images of {tuple(images.shape)} became {tuple(adversarial.shape)}"
    assert adversarial.dtype == images.dtype, f"images of {images.dtype} became {adversarial.dtype}"
    low, high = adversarial.min().item(), adversarial.max().item()
    assert low >= -_TOLERANCE, f"a pixel is {low}: all have to be in [0, 1]"
    assert high <= 1 + _TOLERANCE, f"a pixel is {high}: all have to be in [0, 1]"
    assert bool(adversarial.isfinite().all()), "a pixel is not finite"
    change = (adversarial - images).abs()
    if isinstance(attack, PixelAttack):
        assert change.max() <= attack.eps + _TOLERANCE, f"a value changed by {change.max()}, eps is {attack.eps}"
    if isinstance(attack, PatchSettings):
        budget, pixels = int(attack.mask((SIDE, SIDE)).sum()), int((change > 0).any(1).flatten(1).sum(1).max())
        assert pixels <= budget, f"{pixels} pixels of an image changed, the budget of the patch is {budget}"


def _check_target(attack: TargetedAttack, make: Callable[[Any], object]) -> None:
    """Check that an attack can aim at a class of the model, and refuses one that the model lacks."""
    try:
        last, beyond = (attack.with_settings(target=target) for target in (CLASSES - 1, CLASSES))
    except ValueError:
        # The other settings exclude a target.
        return
    make(last)
    message = _refusal(lambda: make(beyond))
    assert message is not None, f"target={CLASSES} must raise UsageError: the model has {CLASSES} classes"
    assert str(CLASSES) in message, f"the error must name the class {CLASSES}, it is: {message}"


def _refusal(make: Callable[[], object]) -> str | None:
    """Return the message of the UsageError that a call raises; None if it raises none."""
    try:
        make()
    except UsageError as error:
        return str(error)
    return None


def _check_memory(attack: RememberingAttack, images: Tensor, labels: Tensor) -> None:
    """Check that an attack which remembers fills its memory, and that the memory decides what it does."""
    if not attack.remembers:
        return
    memory: Memory = {}
    with _left_as_found():
        _run(attack, images, labels, seed=0, memory=memory)
        assert memory, "the attack remembers, but its memory is empty after a step"
        assert not any(kept.requires_grad for kept in memory.values()), "the memory must not hold a graph"
        copy = {name: kept.clone() for name, kept in memory.items()}
        second, third = (_run(attack, images, labels, seed=1, memory=kept)[0] for kept in (memory, copy))
    assert torch.equal(second, third), "the same memory and seed must give the same images"
    assert all(torch.equal(memory[name], copy[name]) for name in memory), "the same step must change memory alike"


def _check_meta(patch: Patch) -> None:
    lacking = sorted({"attack", "settings", "target", "seed"} - patch.meta.keys())
    assert not lacking, f"the meta of the patch lacks {', '.join(lacking)}"
    json.dumps(dict(patch.meta))


def _are_equal(first: Patch, other: Patch) -> bool:
    return first.texture.shape == other.texture.shape and torch.equal(first.texture, other.texture)


@contextmanager
def _left_as_found() -> Generator[None]:
    """Check that a block leaves no traces on the model and on torch's modes."""
    model = switchable_model()
    modes = {name: module.training for name, module in model.named_modules()}
    states = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    yield
    changed = [name for name, module in model.named_modules() if module.training != modes[name]]
    assert not changed, f"the attack changed the mode (train or eval) of module {changed[0]!r}"
    grown = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert not grown, f"the attack left a gradient on parameter {grown[0]!r}"
    changed = [name for name, value in model.named_parameters() if value.requires_grad != trainable[name]]
    assert not changed, f"the attack changed requires_grad of parameter {changed[0]!r}"
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, states[name])]
    assert not changed, f"the attack changed {changed[0]!r} of the model"
    assert get_precision(model) == _PRECISION, f"the attack left the model at {get_precision(model)} bit"
    assert torch.is_grad_enabled(), "the attack left gradients switched off"


def _without_backward(model: Model) -> Model:
    """Return the model as a black box: its outputs, and an error where somebody asks for gradients."""
    return lambda images: _NoBackward.apply(model(images))  # pyright: ignore[reportReturnType]


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        raise AssertionError("the attack declares black_box, but uses gradients of the model")
