"""What a study costs: the images that its steps take through networks, times how long an image takes here."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qadtr_brevitas.attacks.base import ImageAttack, RememberingAttack
from qadtr_brevitas.attacks.universal import UniversalPatch
from qadtr_brevitas.config import Recipe
from qadtr_brevitas.config.slots import slot_name
from qadtr_brevitas.data.split import Split, numbered
from qadtr_brevitas.models.create import model_config, own_image_size
from qadtr_brevitas.pipeline.build import build_switchable
from qadtr_brevitas.quant import at_precision, calibrate, frozen_weights
from qadtr_brevitas.reproduce.study.attack_steps import EvaluationStep, PatchStep
from qadtr_brevitas.reproduce.study.model_steps import ModelStep
from qadtr_brevitas.reproduce.study.plan import StudyPlan
from qadtr_brevitas.reproduce.study.steps import StudyStep

# Training and test images of data sets, where a recipe sets no limit; an image folder is taken for ImageNet.
_IMAGES = {
    "image-folder": (1_281_167, 50_000),
    "cifar10": (50_000, 10_000),
    "gtsrb": (39_209, 12_630),
    "digits": (1_437, 360),
}
_COUNTED_ON, _CLASSES = 2, 1000
_KINDS: Mapping[type[StudyStep], str] = {ModelStep: "train", PatchStep: "make patches", EvaluationStep: "evaluate"}


@dataclass(frozen=True)
class Work:
    """Images that go through a network.

    Args:
        forward: forward.
        attack: forward, and back to the images, under frozen weights.
        training: forward, back to all parameters, and an update.
    """

    forward: float = 0.0
    attack: float = 0.0
    training: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.attack + other.attack, self.training + other.training)

    def __mul__(self, factor: float) -> Work:
        return Work(self.forward * factor, self.attack * factor, self.training * factor)

    def seconds(self, each: Work) -> float:
        """Return the time it takes, where `each` has the seconds of one image of each kind."""
        return self.forward * each.forward + self.attack * each.attack + self.training * each.training


@dataclass(frozen=True)
class CostRow:
    """The work of a kind of steps on one architecture.

    Args:
        kind: train, make patches, or evaluate.
        network: name of the architecture and side of its images.
        steps: number of steps.
        work: what they do.
        seconds: on the device that was measured.
    """

    kind: str
    network: str
    steps: int
    work: Work
    seconds: float


def estimate(
    plan: StudyPlan, *, device: torch.device, measure: Callable[[Recipe, torch.device], Work] | None = None
) -> tuple[list[CostRow], list[str]]:
    """Return what the unfinished steps of a plan cost, and the names of those that are not counted.

    Args:
        plan: the steps.
        device: where an image of each architecture is timed.
        measure: returns the seconds of one image; None for `seconds_per_image`.
    """
    measure = measure or seconds_per_image
    recipes = {step.folder: step.network.recipe for step in plan.steps if isinstance(step, ModelStep)}
    found: defaultdict[tuple[str, str], list[Work]] = defaultdict(list)
    by_network: dict[str, Recipe] = {}
    left_out: list[str] = []
    for step in plan.steps:
        recipe = _recipe_of(step, recipes)
        if step.is_finished():
            continue
        work = None if recipe is None else work_of(step, recipe)
        if recipe is None or work is None:
            left_out.append(step.name)
            continue
        network = f"{recipe.model.name}, {_side(recipe)} px"
        by_network[network] = recipe
        found[_KINDS[type(step)], network].append(work)
    times = {network: measure(recipe, device) for network, recipe in by_network.items()}
    rows = [
        CostRow(kind, network, len(parts), total := sum(parts, Work()), total.seconds(times[network]))
        for (kind, network), parts in found.items()
    ]
    return rows, left_out


def work_of(step: StudyStep, recipe: Recipe) -> Work | None:
    """Return what a step does, on networks of a recipe; None if it makes patches in a way whose cost is not known."""
    if isinstance(step, ModelStep):
        return _training(recipe) if step.network.section.train else Work()
    if isinstance(step, PatchStep):
        return _patches(step)
    assert isinstance(step, EvaluationStep)
    return _evaluation(step, recipe)


def _recipe_of(step: StudyStep, recipes: Mapping[Any, Recipe | None]) -> Recipe | None:
    if isinstance(step, ModelStep):
        return step.network.recipe
    return recipes.get(step.model) if isinstance(step, PatchStep | EvaluationStep) else None


def _training(recipe: Recipe) -> Work:
    train, count = recipe.train, _images(recipe)[0]
    passes = len(train.precision.precisions(0, seed=0, epoch=0, epochs=train.epochs))
    work = Work(training=count * train.float_epochs) + Work(training=count * passes * train.epochs)
    if train.attack is not None:
        attacked = count * passes * train.epochs * train.attack.share
        work += attack_work(cast("ImageAttack", train.attack), _side(recipe)) * attacked
    if train.masks is not None:
        searched = train.masks.search_passes(train.attack.share if train.attack else 0.0)
        work += Work(forward=count * passes * train.epochs * searched)
    return work


def _patches(step: PatchStep) -> Work | None:
    attack, images = step.attack, step.budget.held_out
    if not isinstance(attack, UniversalPatch):
        return None
    checks = attack.steps // attack.check_every + 2
    one = Work(forward=checks * images, attack=attack.steps * attack.batch_size) * attack.restarts
    return one * (len(step.targets) * len(step.mode.precisions))


def _evaluation(step: EvaluationStep, recipe: Recipe) -> Work:
    """Return the passes of an evaluation; of certificates those that proved images take, which is the most."""
    images = _images(recipe)[1] if step.budget.images == "all" else step.budget.images
    modes = sum(len(mode.precisions) for mode in step.scored)
    # Beside the patches, clean images and a patch of noise.
    patches = sum(len(made.targets) for made in step.patches) + 2
    work = Work(forward=images * patches * modes)
    for attack in step.attacks:
        sources = (1 + len(step.surrogates)) * modes
        work += (attack_work(attack.plugin, _side(recipe)) + Work(forward=modes)) * (images * sources)
    if certify := step.evaluation.certify:
        side = (_side(recipe), _side(recipe))
        passes = sum(certification.passes_to_prove(side) for certification in certify.certifications)
        work += Work(forward=certify.count(images) * modes * passes)
    return work


def _images(recipe: Recipe) -> tuple[int, int]:
    dataset = recipe.data.dataset
    own = getattr(dataset, "train_images", None), getattr(dataset, "test_images", None)
    known = _IMAGES.get(slot_name(dataset), own)
    limits = recipe.data.train_limit, recipe.data.test_limit
    return tuple(min(filter(None, pair), default=0) for pair in zip(known, limits, strict=True))  # pyright: ignore


def _side(recipe: Recipe) -> int:
    given = getattr(recipe.data.dataset, "image_size", None)
    return given or own_image_size(recipe.model.name, recipe.model.args)[0]


class _Counter(nn.Module):
    """A model that counts the images that go through it, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.forward_only = self.both = 0

    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad and torch.is_grad_enabled():
            self.both += len(images)
        else:
            self.forward_only += len(images)
        return images.mean((1, 2, 3))[:, None] * torch.linspace(-1, 1, _CLASSES)


def attack_work(attack: ImageAttack, side: int) -> Work:
    """Return the passes of an attack for one image, counted on a stand-in for the network."""
    counter, draws = _Counter(), torch.Generator().manual_seed(0)
    images = torch.rand(_COUNTED_ON, 3, side, side, generator=draws)
    # In training, attacks may keep what they made.
    remembers = isinstance(attack, RememberingAttack) and attack.remembers
    memory: dict[str, Any] = {"memory": {}} if remembers else {}
    attack.run(counter, images, torch.arange(_COUNTED_ON), generator=draws, **memory)
    return Work(forward=counter.forward_only / _COUNTED_ON, attack=counter.both / _COUNTED_ON)


def seconds_per_image(recipe: Recipe, device: torch.device, *, batch: int = 8, repeats: int = 2) -> Work:
    """Return the seconds of one image through the network of a recipe, the mean of its highest and lowest precision.

    Args:
        recipe: the recipe; its weights are not read.
        device: where to compute.
        batch: images at once.
        repeats: of each, after one that does not count; the shortest is taken.
    """
    section = recipe.model.model_copy(update={"pretrained": False, "checkpoint": None})
    classes = section.num_classes or model_config(section.name).get("num_classes", 1000)
    side = _side(recipe)
    draws = torch.Generator().manual_seed(0)
    images = (torch.rand(batch, 3, side, side, generator=draws) * 255).to(torch.uint8)
    split = Split(images, torch.arange(batch) % classes, numbered(classes))
    model, _ = build_switchable(recipe.model_copy(update={"model": section}), split)
    pixels = images.float() / 255
    calibrate(model, [pixels])
    model.to(device)
    pixels, labels = pixels.to(device), split.labels.to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    def training() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(pixels), labels).backward()
        optimizer.step()

    def attack() -> None:
        moving = pixels.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(moving), labels), moving)

    def forward() -> None:
        with torch.no_grad():
            model(pixels)

    found: list[Work] = []
    for precision in (max(recipe.quant.precisions), min(recipe.quant.precisions)):
        with at_precision(model, precision):
            model.train()
            trained = _shortest(training, device, repeats)
            model.eval()
            with frozen_weights(model):
                attacked, scored = _shortest(attack, device, repeats), _shortest(forward, device, repeats)
        found.append(Work(scored, attacked, trained))
    return sum(found, Work()) * (1 / len(found) / batch)


def _shortest(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    return min(list(_times(step, device, repeats + 1))[1:])


def _times(step: Callable[[], None], device: torch.device, count: int) -> Iterable[float]:
    # On CPUs processor time of all threads, which other work does not lengthen, over the threads.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    share = torch.get_num_threads() if device.type == "cpu" else 1
    for _ in range(count):
        start = clock()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield (clock() - start) / share
