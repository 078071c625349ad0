"""Images read from their files as they are used: the figures, ranges and patches of the same images in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.attacks.location_patch import LocationPatch
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.config import CalibrationSection
from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.data.image_folder import ImageFolder
from qadtr_brevitas.data.shapes import Shapes
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation import Grid, NamedAttack, evaluate
from qadtr_brevitas.evaluation.craft import CraftSetup, craft, divide_for_crafting
from qadtr_brevitas.evaluation.entries import LoadedModel, NamedPatch, load_models
from qadtr_brevitas.pipeline.calibration import calibrate_on
from qadtr_brevitas.viewing import Scene
from tests.evaluation.models import CLASSES, SIDE, make_model_dir, make_switchable

pytestmark = pytest.mark.slow

# No more than a few pixels: whoever asks for all images of a split at once is refused.
TOO_LITTLE = 1e-7


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The procedural shapes as files: 60 for training, 30 for tests."""
    folder = tmp_path_factory.mktemp("shapes")
    for name in ("train", "test"):
        split = Shapes(image_size=SIDE, classes=CLASSES, train_images=60, test_images=30).load(name)
        for index, label in enumerate(split.labels.tolist()):
            place = folder / name / split.classes[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.pixels(index).permute(1, 2, 0).numpy()).save(place / f"{index:02}.png")
    return folder


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    (model,) = load_models([make_model_dir(tmp_path / "model")])
    # Folders are classes in the order of their names.
    return replace(model, info=replace(model.info, classes=tuple(sorted(model.info.classes))))


def held(root: Path, split: str) -> Split:
    return ImageFolder(root=str(root), stream=False).load(split)


def streamed(root: Path, split: str, *, max_gb: float = TOO_LITTLE) -> Split:
    return ImageFolder(root=str(root), max_gb=max_gb).load(split)


def noise(side: int = 5) -> NamedPatch:
    texture = torch.randint(256, (3, side, side), generator=torch.Generator().manual_seed(0)) / 255
    return NamedPatch("noise", Patch(texture=texture, mask=torch.ones(side, side, dtype=torch.bool)))


def test_the_splits_are_no_copies_in_memory(root: Path) -> None:
    for name in ("train", "test"):
        with pytest.raises(DataError, match="max_gb"):
            _ = streamed(root, name).images


def test_an_evaluation_has_the_same_figures(root: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    attack = NamedAttack.of(LocationPatch(size=4, steps=2))

    def figures(split: Split, folder: str) -> list[object]:
        grid = Grid(
            loaded_models=[loaded], patches=[noise()], split=split, data_name="shapes", attacks=[attack], batch_size=8
        )
        report = evaluate(grid, output=tmp_path / folder)
        return [*report.clean, *report.cells]

    expected = figures(held(root, "test"), "held")
    assert len({cell.model_dump_json() for cell in expected}) > 4
    assert figures(streamed(root, "test"), "streamed") == expected


def test_calibration_sets_the_same_ranges(root: Path) -> None:
    models = []
    for split in (held(root, "train"), streamed(root, "train")):
        model = make_switchable()
        calibrate_on(model, split, CalibrationSection(samples=24), seed=3)
        models.append(model.state_dict())
    before = make_switchable().state_dict()
    assert any(not torch.equal(value, before[key]) for key, value in models[0].items())
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())


def test_crafting_makes_the_same_patch_of_as_many_images_as_fit(
    root: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    def crafted(split: Split, folder: str) -> Patch:
        train, held_out = divide_for_crafting(split, seed=1, train=20, held_out=10)
        setup = CraftSetup(train=train, held_out=held_out, output=tmp_path / folder, seed=1)
        attack = Lavan(size=5, steps=4, batch_size=8)
        (made,) = craft(loaded, attack, setup, name="lavan", precisions=[4], targets=[1])
        return Patch.load(made.path)

    # Of the 60 images 20 fit, which is all that the patch needs.
    some = streamed(root, "train", max_gb=20 * 3 * SIDE * SIDE / 1e9)
    one, other = crafted(held(root, "train"), "held"), crafted(some, "streamed")
    assert torch.equal(one.texture, other.texture)
    assert one.meta == other.meta
    with pytest.raises(DataError, match="choose fewer images"):
        crafted(streamed(root, "train"), "refused")


def test_a_scene_reads_the_images_it_shows(root: Path, loaded: LoadedModel) -> None:
    scenes = [Scene(loaded, split) for split in (held(root, "test"), streamed(root, "test"))]
    assert scenes[0].patches[0].patch.texture.equal(scenes[1].patches[0].patch.texture)
    assert scenes[0].facts() == scenes[1].facts()
