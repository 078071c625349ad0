"""The steps that make models: training, conversion without training, and adding a precision."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.errors import TrainingError
from qadtr_brevitas.core.files import write_atomically
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.exporting import check_for_target
from qadtr_brevitas.pipeline.add_precision import add_precision
from qadtr_brevitas.pipeline.build import build_split, build_switchable, fit_data
from qadtr_brevitas.pipeline.calibration import DEFAULT_IMAGES, calibrate_on
from qadtr_brevitas.pipeline.checkpoint import save_model
from qadtr_brevitas.reproduce.study.networks import StudyNetwork
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.steps import StudyStep
from qadtr_brevitas.training.log import StepRecord, TrainingObserver
from qadtr_brevitas.training.loop import train


@dataclass(frozen=True)
class ModelStep(StudyStep):
    """Train a network, or convert and calibrate it.

    Args:
        network: the network.
    """

    network: StudyNetwork

    def processes(self, resources: StudyResources) -> int:
        """Return the number of processes of a training; one process converts."""
        return resources.processes if self.network.section.train else 1

    def execute(self, resources: StudyResources, progress: Progress) -> None:
        """Train the network, resuming an interrupted run; or convert it, completely or not at all."""
        recipe = self._recipe()
        if not self.network.section.train:
            _convert(recipe, self.folder)
        elif resources.processes > 1:
            _train_with_torchrun(recipe, self.folder, resources)
        else:
            check = partial(check_for_target, target=recipe.quant.target)
            observer = TrainingProgress(progress)
            train(recipe, self.folder, device=resources.device_name, observer=observer, check=check)

    def _recipe(self) -> Recipe:
        """Return the recipe with the weights to start from."""
        recipe = self.network.recipe
        assert recipe is not None
        if not self.needs:
            return recipe
        (start,) = self.needs
        section = recipe.model.model_copy(update={"checkpoint": str(start.folder), "pretrained": False})
        return recipe.model_copy(update={"model": section})


@dataclass(frozen=True)
class ExistingModelStep(StudyStep):
    """A finished network, for which there is nothing to do."""

    def is_finished(self) -> bool:
        return True

    def execute(self, resources: StudyResources, progress: Progress) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class AddPrecisionStep(StudyStep):
    """Add a precision to a copy of a network that was not trained for it.

    Args:
        source: folder of the network.
        precision: the precision.
        images: number of calibration images.
        seed: decides which images.
    """

    source: Path
    precision: Precision
    images: int
    seed: int

    def execute(self, resources: StudyResources, progress: Progress) -> None:
        """Calibrate the network at the precision."""
        images = resources.images(self.source, "train", limit=self.images, seed=self.seed)
        add_precision(self.source, self.folder, self.precision, images, seed=self.seed)


class TrainingProgress(TrainingObserver):
    """An observer that reports the steps of a training as progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._total = progress, 0

    def on_start(self, *, step: int, total_steps: int, epochs: int) -> None:
        self._total = total_steps
        self._progress(step, total_steps)

    def on_step(self, record: StepRecord) -> None:
        self._progress(record.step, self._total, f"loss {record.loss:.3f}")


def _convert(recipe: Recipe, folder: Path) -> None:
    fitted = fit_data(recipe)
    section = fitted.quant.calibration
    images = build_split(fitted.data, "train", seed=fitted.seed, limit=section.samples or DEFAULT_IMAGES)
    model, info = build_switchable(fitted, images)
    check_for_target(model, fitted.quant.target)
    calibrate_on(model, images, section, seed=fitted.seed)
    save_model(folder, model, replace(info, source="convert"))


def _train_with_torchrun(recipe: Recipe, folder: Path, resources: StudyResources) -> None:
    """Train in several processes, which torchrun starts."""
    file = resources.work / "recipes" / f"{folder.name}.yaml"
    write_atomically(file, lambda path: path.write_text(recipe.dump_yaml(), encoding="utf-8"))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(resources.processes)]
    training = ["-m", "qadtr_brevitas", "train", str(file), "-o", str(folder), "--device", resources.device_name, "-q"]
    finished = subprocess.run([sys.executable, "-m", *torchrun, *training], check=False, stdout=sys.stderr)
    if finished.returncode:
        raise TrainingError(
            f"torchrun ended with code {finished.returncode} while training {folder}; its messages are above. Give the "
            "same command to resume"
        )
