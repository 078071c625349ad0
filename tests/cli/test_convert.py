from __future__ import annotations

import json
import re
from copy import copy
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from brevitas.nn import QuantConv2d, QuantLinear
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file
from timm import create_model

from qadtr_brevitas.cli.common import command_of
from qadtr_brevitas.cli.conversion_table import percent
from qadtr_brevitas.cli.convert import _ConvertOptions, _make_recipe, command
from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.precision import parse_precisions
from qadtr_brevitas.data.shapes import Shapes
from qadtr_brevitas.pipeline.checkpoint import load_model
from qadtr_brevitas.pipeline.datasets import find_dataset
from qadtr_brevitas.pipeline.directories import name_of_model
from qadtr_brevitas.quant import allowed_precisions, at_precision, get_precision
from tests.evaluation.models import make_model_dir, train_split

SMALL = ["data.dataset.train_images=40", "data.dataset.test_images=10", "quant.calibration.samples=20"]
PHOTOS = 24


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["convert", "cifar_resnet8", *map(str, arguments)])


def test_a_model_for_a_compiler_says_so_and_loads_again(tmp_path: Path) -> None:
    output = tmp_path / "model"
    result = convert("--data", "shapes", *SMALL, "quant.precisions=[32,4]", "--target", "finn", "-o", output)
    assert result.exit_code == 0, result.output
    assert "both sides of a sum by one signed quantizer" in result.stdout
    _, info = load_model(output)
    assert info.quant["target"] == "finn"
    twice = convert("--data", "shapes", "--target", "finn", "quant.target=hls4ml", "--dry-run")
    assert "quant.target=hls4ml is also set by an option" in twice.stderr


def test_a_ptq_method_that_cannot_be_is_refused_with_the_nearest() -> None:
    result = convert("--data", "shapes", "--weights", "channel-splitting", "--dry-run")
    assert result.exit_code == 2
    assert "equalize" in result.stderr


def test_levels_that_a_ptq_method_chose_are_in_the_model_directory(tmp_path: Path) -> None:
    plain, chosen = tmp_path / "plain", tmp_path / "chosen"
    common = ["--data", "shapes", *SMALL, "quant.precisions=[32,3]", "--seed", 1]
    for output, options in ((plain, []), (chosen, ["--weights", "gptq", "-w", "coordinate-descent"])):
        result = convert(*common, *options, "-o", output)
        assert result.exit_code == 0, result.output
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits: dict[tuple[Path, int], torch.Tensor] = {}
    for output in (plain, chosen):
        model, _ = load_model(output)
        for bits in (32, 3):
            with at_precision(model, bits), torch.no_grad():
                logits[output, bits] = model(images)
    assert torch.equal(logits[plain, 32], logits[chosen, 32])
    assert not torch.allclose(logits[plain, 3], logits[chosen, 3])
    layers = [module for module in load_model(chosen)[0].modules() if isinstance(module, QuantConv2d | QuantLinear)]
    weights = sum(layer.weight.numel() for layer in layers)
    grown = (chosen / "model.safetensors").stat().st_size - (plain / "model.safetensors").stat().st_size
    # Offsets of 3-bit weights take 4 bits, those of the first and last layer 9.
    assert weights / 2 < grown < weights / 2 * 1.3


def test_writes_a_calibrated_model_and_says_what_was_done(tmp_path: Path) -> None:
    output = tmp_path / "model"
    result = convert("--data", "shapes", *SMALL, "quant.precisions=[32,4]", "-o", output)
    assert result.exit_code == 0, result.output
    assert "stays float: a sum of quantized values" in result.stdout
    assert "residual stream, at least 8 bit" in result.stdout
    assert re.search(r"quantized: \d+\.\d% of the parameters, \d+\.\d% of [\d.]+ M multiply-acc", result.stdout)
    assert re.search(r"not quantized: *\n +\d+ x float, statistics per precision", result.stdout)
    assert re.search(r"weights: .* MB at 32, .* MB at 4", result.stdout)
    assert f"wrote {output}; next: the same command with --pretrained or --checkpoint" in result.stderr
    model, info = load_model(output)
    assert allowed_precisions(model) == parse_precisions([32, 4])
    assert get_precision(model).is_float
    assert info.source == "convert"
    thresholds = [p for name, p in model.named_parameters() if "thresholds" in name]
    assert thresholds
    assert all((p != 1).all() for p in thresholds)


def test_json_names_every_layer(tmp_path: Path) -> None:
    result = convert("--data", "shapes", *SMALL, "--dry-run", "--json", "-o", tmp_path / "model")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert {"conv1", "bn1", "act1", "avgpool", "linear"} <= layers.keys()
    # 16 filters of 3x3x3 at each of 32x32 places.
    assert layers["conv1"]["macs"] == 16 * 27 * 32 * 32
    assert 0 < report["quantized_macs"] <= report["macs"] == sum(layer["macs"] for layer in layers.values())
    assert list(report["sizes"]) == ["32", "8", "5", "4", "2"]
    assert report["output"] is None
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("arguments", "outputs"), [([], 10), (["model.num_classes=7"], 7)])
def test_a_dry_run_needs_no_data(arguments: list[str], outputs: int) -> None:
    result = convert(*arguments, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    layers = {layer["name"]: layer for layer in json.loads(result.stdout)["layers"]}
    assert layers["conv1"]["macs"] == 16 * 27 * 32 * 32
    assert layers["linear"]["parameters"] == 65 * outputs


@pytest.mark.parametrize(("part", "text"), [(0.99999, "99.9%"), (1.0, "100.0%"), (0.0, "0.0%")])
def test_all_is_said_of_all_only(part: float, text: str) -> None:
    assert percent(part, 1.0) == text
    assert percent(part, 0) == "0.0%"


def recipe_of(*arguments: str, model: str = "resnet18", data: str | None = "digits") -> Recipe:
    """Return the recipe that the command makes of its arguments."""
    given: list[dict[str, Any]] = []
    words = ["convert", model, *(["--calibrate", data] if data else []), *arguments]
    spy = copy(command)
    spy.callback = lambda **options: given.append(options)
    assert spy.main(words[1:], standalone_mode=False) in (None, 0)
    return _make_recipe(_ConvertOptions(**given[0]))[0]


def test_options_are_short_for_keys_of_the_recipe() -> None:
    options = ["--method", "percentile", "--percentile", "99.5", "--samples", "64", "--bias-correction", "--dynamic"]
    calibration = "quant.calibration"
    keys = [
        f"{calibration}.method=percentile",
        f"{calibration}.method.percentile=99.5",
        f"{calibration}.samples=64",
        f"{calibration}.weights=[bias-correction]",
        "quant.activations=dynamic",
    ]
    assert recipe_of(*options) == recipe_of(*keys) != recipe_of()
    assert recipe_of("--pretrained", "--checkpoint", "a.pth") == recipe_of(
        "model.pretrained=true", "model.checkpoint=a.pth"
    )
    assert recipe_of(data="image-folder:photos") == recipe_of(
        "data.dataset={name: image-folder, root: photos}", data=None
    )


def test_bit_widths_per_layer_are_a_precision(tmp_path: Path) -> None:
    (tmp_path / "layers.json").write_text('{"budget": {"*": {"weight": 8, "activation": 8}, "linear": {"weight": 4}}}')
    layers = ["--layers", "edge:*=4,layer2.*=w3a8", "--layers", str(tmp_path / "layers.json")]
    result = convert("--calibrate", "shapes", *SMALL, "quant.precisions=[32,8]", *layers, "-o", tmp_path / "model")
    assert result.exit_code == 0, result.output
    model, info = load_model(tmp_path / "model")
    assert [str(precision) for precision in allowed_precisions(model)] == ["32", "8", "mixed:edge", "mixed:budget"]
    assert info.quant["layers"]["edge"]["layer2.*"] == {"weight": 3, "activation": 8}
    with at_precision(model, "mixed:edge"):
        assert model.net.layer2[0].conv1.weight_quant.quantizer.bits == 3  # pyright: ignore
    result = convert("--layers", "edge:*=4,layer7.*=8", "--dry-run")
    assert result.exit_code == 2
    assert "layer7" in result.output


def test_every_setting_reaches_the_saved_model(tmp_path: Path) -> None:
    options = ["--calibrate", "shapes", "--method", "percentile", "--percentile", "90", "--samples", "20", "--dynamic"]
    result = convert(*options, *SMALL[:2], "quant.precisions=[32,4]", "-o", tmp_path / "model")
    assert result.exit_code == 0, result.output
    _, info = load_model(tmp_path / "model")
    assert info.quant["activations"] == "dynamic"
    assert info.data is not None
    assert (info.data["name"], info.data["train_images"]) == ("shapes", 40)
    # The data set is known from now on.
    assert find_dataset([tmp_path / "model"], None) == Shapes(train_images=40, test_images=10)


@pytest.mark.slow
def test_a_run_is_converted_again_with_its_own_weights_and_data(tmp_path: Path) -> None:
    run = make_model_dir(tmp_path / "run")
    recipe = recipe_of("--method", "minmax", model=str(run), data="shapes")
    assert (recipe.model.name, recipe.model.num_classes, recipe.model.checkpoint) == ("cifar_resnet8", 3, str(run))
    first, second = tmp_path / "first", tmp_path / "second"
    dataset = "data.dataset={name: shapes, image_size: 16, classes: 3, train_images: 60, test_images: 30}"
    quick = ["quant.precisions=[32,3]", "--method", "minmax", "--samples", "20"]
    for arguments in (["convert", run, dataset, *quick, "-o", first], ["convert", first, *quick, "-o", second]):
        result = CliRunner().invoke(cli, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
    images = train_split().batch(torch.arange(8))[0]
    logits = []
    for path in (run, first, second):
        model, _ = load_model(path)
        with torch.no_grad(), at_precision(model, 32):
            logits.append(model(images))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders with images of different sizes."""
    for number in range(PHOTOS):
        folder = tmp_path / "photos" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = numpy.random.default_rng(number).integers(0, 256, (36 + number, 48, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_photos_of_any_size_are_brought_to_that_of_the_model(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "model"
    data = ["--calibrate", f"image-folder:{photos}"]
    arguments = ["convert", "cifar_resnet8", *data, "quant.precisions=[32,8]", "-o", str(output)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "every 5th image is kept for tests" in result.stderr
    _, info = load_model(output)
    assert (info.image_size, info.num_classes) == ((32, 32), 3)
    dataset = find_dataset([output], None)
    assert (dataset.image_size, dataset.crop, dataset.holdout) == (32, 1.0, 5)
    assert len(dataset.load("test")) == 5
    few = ["data.dataset.holdout=3", "--samples", "17"]
    small = CliRunner().invoke(cli, [*arguments[:-1], str(tmp_path / "other"), *few])
    assert small.exit_code == 1
    assert "there are only 16 training images" in small.stderr


def test_a_published_network_keeps_its_classes_and_asks_for_data(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = tmp_path / "weights.safetensors"
    save_file(create_model("cifar_resnet8").state_dict(), weights)
    published = f"model.args.pretrained_cfg_overlay={{file: {weights}}}"
    data = ["--calibrate", f"image-folder:{photos}", "quant.precisions=[32,8]"]
    for name, given in {"model": ["--pretrained", published], "of a file": ["--checkpoint", weights]}.items():
        output = tmp_path / name
        result = convert(*given, *data, "-o", output)
        assert result.exit_code == 0, result.output
        assert "the network keeps its 10 classes: the images, of 3 classes, only serve to choose" in result.stderr
        assert "WARNING" not in result.stderr
        assert f"next: {command_of('attack', output)} --data NAME[:ROOT]" in result.stderr
        _, info = load_model(output)
        assert (info.num_classes, info.data) == (10, None)


def test_random_weights_are_warned_of_whatever_is_asked_for(tmp_path: Path) -> None:
    result = convert("--data", "shapes", *SMALL, "quant.precisions=[32,4]", "-o", tmp_path / "model", "-q", "--json")
    assert result.exit_code == 0, result.output
    assert "WARNING" in result.stderr
    assert "RANDOM weights" in result.stderr
    assert json.loads(result.stdout)["random_weights"] is True


def test_keeps_a_directory_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = convert("--data", "shapes", *SMALL, "-o", tmp_path)
    assert result.exit_code == 2
    assert "already exists: choose another folder with -o, or replace it with --overwrite" in result.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"
    result = convert("--data", "shapes", *SMALL, "-o", tmp_path, "--overwrite")
    assert (result.exit_code, "notes.txt" in result.stderr) == (2, True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "shapez"], 2, "did you mean 'shapes'?"),
        (["--data", "shapes", "quant.frist_last=same"], 2, "first_last"),
        (["--data", "shapes", "quant.first_last=4bit"], 2, "must be one of"),
        (["--data", "shapes", "train.epochs=3"], 2, "train.epochs=3 has no effect"),
        (["--data", "shapes", "--checkpoint", "nowhere.safetensors"], 1, "nowhere.safetensors"),
        ([], 2, "needs images to calibrate on: give --calibrate NAME[:ROOT]"),
        (["--data", "digits:here"], 2, "give --data digits"),
        (["--data", "shapes", "--percentile", "99"], 2, "--percentile 99 needs --method percentile"),
        (["--data", "shapes", "--samples", "3"], 2, "quant.calibration.samples: must be at least 16, got 3"),
        (["--data", "shapes", *SMALL, "--samples", "20"], 2, "samples=20 is also set by an option"),
        (["--data", "shapes", "data.dataset.name=digits"], 2, "data.dataset.name=digits is also set by an option"),
        (["--data", "shapes", *SMALL[:2], "--samples", "50"], 1, "there are only 40 training images"),
        (["--data", "shapes", "data.dataset.train_images=9"], 1, "at least 16 training images, there are 9"),
    ],
)
def test_bad_input(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    result = convert(*arguments, "-o", tmp_path / "model")
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert not (tmp_path / "model").exists()


def test_an_unknown_model_gets_the_nearest_names(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli, ["convert", "cifar_resnet21", "--data", "shapes", *SMALL, "-o", str(tmp_path / "m")]
    )
    assert result.exit_code == 2
    assert "cifar_resnet20" in result.stderr


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    run = make_model_dir(tmp_path / "half")
    (run / "last" / "model.safetensors").unlink()
    for path, option, message in (
        (run, [], "has a config.json but no model.safetensors: copy both files of the model"),
        (tmp_path, [], "there is no model in"),
        (tmp_path / "nowhere", [], "there is no folder"),
        (run, ["--pretrained"], "remove --pretrained"),
    ):
        result = CliRunner().invoke(cli, ["convert", str(path), "--data", "digits", "-o", str(tmp_path / "m"), *option])
        assert result.exit_code in (1, 2)
        assert message in result.stderr


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("resnet18", "resnet18"),
        ("hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("runs/vit", "vit"),
        ("{tmp}/vit/last", "vit"),
        ("{tmp}/vit/best", "vit-best"),
        ("{tmp}/vit", "vit"),
    ],
)
def test_the_name_of_the_output(model: str, name: str, tmp_path: Path) -> None:
    for folder in ("last", "best"):
        (tmp_path / "vit" / folder).mkdir(parents=True)
    assert name_of_model(model.format(tmp=tmp_path)) == name
