"""Runs on data of every kind, and of a network that is not quantized."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm import create_model

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.pipeline.checkpoint import load_model
from qadtr_brevitas.training.loop import train
from tests.training.support import Recorder, make_recipe


def changed(recipe: Recipe, section: str, **keys: object) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(), section: {**getattr(recipe, section).model_dump(), **keys}})


def quick_recipe(**train_keys: object) -> Recipe:
    plain = {"epochs": 1, "float_epochs": 0, "attack": None, "gradient": None, "regularizers": [], "norm_batches": 0}
    return make_recipe(**{**plain, **train_keys})


@pytest.mark.slow
def test_a_network_of_32_bit_alone_trains_and_is_saved(tmp_path: Path) -> None:
    recipe = quick_recipe(epochs=8, precision={"schedule": "fixed", "choice": 32}, norm_batches=2)
    recorder = Recorder()
    run = train(changed(recipe, "quant", precisions=[32]), tmp_path / "run", device="cpu", observer=recorder)
    model, info = load_model(run)
    assert [str(precision) for precision in model.switch.allowed] == ["32"]
    assert not [name for name, _ in model.named_parameters() if "threshold" in name]
    assert info.quant["precisions"] == [32]
    accuracy = recorder.epochs[-1].val_accuracy
    assert accuracy is not None
    assert list(accuracy) == ["32"]
    losses = [record.loss for record in recorder.steps]
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])


def test_the_model_records_its_data_set(tmp_path: Path) -> None:
    recipe = quick_recipe()
    run = train(recipe, tmp_path / "run", device="cpu")
    assert load_model(run)[1].data == recipe.data.model_dump(mode="json")["dataset"]


def test_a_checkpoint_of_other_classes_gives_all_but_the_last_layer(tmp_path: Path) -> None:
    weights = create_model("test_resnet", num_classes=7).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    recipe = quick_recipe(precision={"schedule": "fixed", "choice": 4}, optimizer={"name": "sgd", "lr": 1e-9})
    recipe = changed(recipe, "model", name="test_resnet", checkpoint=str(tmp_path / "weights.safetensors"))
    recorder = Recorder()
    first = train(recipe, tmp_path / "first", device="cpu", observer=recorder)
    assert any("has weights for 7 classes" in message and "is new" in message for message in recorder.messages)
    model, info = load_model(first)
    assert info.num_classes == 3
    # Its first convolution, where the learning rate changes next to nothing.
    first_weight = next(iter(model.net.parameters())).detach()
    assert torch.allclose(first_weight, next(iter(weights.values())), atol=1e-5)
    # A model directory is as good.
    shapes = {**recipe.data.model_dump(mode="json")["dataset"], "classes": 4}
    other = changed(changed(recipe, "model", name="test_resnet", checkpoint=str(first)), "data", dataset=shapes)
    assert load_model(train(other, tmp_path / "second", device="cpu"))[1].num_classes == 4


@pytest.mark.slow
def test_photos_are_resized_for_the_model_and_the_run_is_recognized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(60):
        folder = tmp_path / "photos" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = numpy.random.default_rng(number).integers(0, 256, (36 + number, 48, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    dataset = {"name": "image-folder", "root": str(tmp_path / "photos")}
    recipe = changed(quick_recipe(), "data", dataset=dataset)
    recipe = changed(recipe, "model", name="cifar_resnet8")
    recorder = Recorder()
    run = train(recipe, tmp_path / "run", device="cpu", observer=recorder)
    assert any("every 5th image is kept for tests" in message for message in recorder.messages)
    _, info = load_model(run)
    assert info.image_size == (32, 32)
    assert info.data is not None
    assert (info.data["image_size"], info.data["crop"], info.data["holdout"]) == (32, 1.0, 5)
    # The recipe without the size and the holdout is the same recipe.
    recorder = Recorder()
    train(recipe, run, device="cpu", observer=recorder)
    assert "is finished" in recorder.messages[0]


def test_too_few_images_to_calibrate_are_reported_before_training(tmp_path: Path) -> None:
    recipe = quick_recipe(float_epochs=1)
    recipe = changed(recipe, "quant", calibration={"samples": 200})
    with pytest.raises(DataError, match=r"200.*96"):
        train(recipe, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
