import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.pipeline import checkpoint
from qadtr_brevitas.pipeline.checkpoint import load_model, save_model
from qadtr_brevitas.pipeline.directories import resolve_model_dir
from qadtr_brevitas.quant import SwitchableModel, allowed_precisions, at_precision, calibrate, convert
from qadtr_brevitas.quant.feature_clip import feature_clips
from qadtr_brevitas.quant.model_info import ModelInfo

INFO = ModelInfo(
    name="cifar_resnet20",
    args={"in_chans": 3},
    num_classes=3,
    image_size=(16, 16),
    classes=("a", "b", "c"),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4),
    quant={"precisions": [32, 4, "w2a8"], "first_last": "same", "norm": "switchable", "narrow_range": False},
    source="a-recipe",
)
IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> SwitchableModel:
    """Return a model of which every state has changed: it is calibrated and trained, with statistics per precision."""
    torch.manual_seed(0)
    net = create_float_model(INFO.name, num_classes=INFO.num_classes)
    model = convert(net, mean=INFO.mean, std=INFO.std, image_size=INFO.image_size, **INFO.quant)
    calibrate(model, [IMAGES])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for precision in allowed_precisions(model.train()):
        with at_precision(model, precision):
            model(IMAGES).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def logits(model: SwitchableModel) -> list[torch.Tensor]:
    outputs = []
    for precision in allowed_precisions(model):
        with torch.no_grad(), at_precision(model, precision):
            outputs.append(model(IMAGES))
    return outputs


@pytest.mark.slow
def test_what_ptq_methods_found_is_saved_and_loaded(tmp_path: Path) -> None:
    net = create_float_model(INFO.name, num_classes=INFO.num_classes)
    corrected = convert(net, image_size=INFO.image_size, **INFO.quant).eval()
    calibrate(corrected, [IMAGES], weights=["bias-correction"])
    save_model(tmp_path / "model", corrected, INFO)
    loaded, info = load_model(tmp_path / "model")
    assert info.quant["ptq"] == [{"name": "bias-correction"}]
    assert all(map(torch.equal, logits(loaded), logits(corrected)))
    # An older version wrote the key of the one method that there was.
    config = json.loads((tmp_path / "model/config.json").read_text())
    del config["quant"]["ptq"]
    (tmp_path / "model/config.json").write_text(
        json.dumps(config | {"quant": config["quant"] | {"bias_correction": True}})
    )
    older, info = load_model(tmp_path / "model")
    assert info == loaded.info
    assert all(map(torch.equal, logits(older), logits(corrected)))


def test_levels_of_another_version_are_named(tmp_path: Path) -> None:
    net = create_float_model(INFO.name, num_classes=INFO.num_classes)
    save_model(tmp_path / "model", convert(net, image_size=INFO.image_size, ptq=["gptq"], **INFO.quant), INFO)
    file = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    key = "net.conv1.weight_quant.tensor_quant.rounding.4"
    safetensors.torch.save_file({**tensors, key: tensors[key][:-1].clone()}, file)
    with pytest.raises(CheckpointError, match=rf"size mismatch for {key}"):
        load_model(tmp_path / "model")


@pytest.mark.slow
def test_clipped_features_are_saved_and_loaded(tmp_path: Path) -> None:
    net = create_float_model(INFO.name, num_classes=INFO.num_classes)
    settings = {**INFO.quant, "precisions": [32, 4]}
    clipped = convert(net, image_size=INFO.image_size, feature_clip=["layer1", "layer3.0"], **settings).eval()
    calibrate(clipped, [IMAGES])
    # What the model was made of need not say so.
    save_model(tmp_path / "model", clipped, INFO)
    loaded, info = load_model(tmp_path / "model")
    assert info.quant["feature_clip"] == {"after": ["layer1", "layer3.0"], "percentile": 90.0}
    assert [float(buffer) for clip in feature_clips(loaded) for buffer in clip.buffers()] == [
        float(buffer) for clip in feature_clips(clipped) for buffer in clip.buffers()
    ]


def test_models_of_older_versions_keep_the_inputs_of_their_last_layer(tmp_path: Path) -> None:
    net = create_float_model("alexnet", num_classes=3)
    info = replace(INFO, name="alexnet", args={}, image_size=(64, 64), quant={"precisions": [32, 4]})
    images = torch.rand(2, 3, 64, 64)
    for is_wide in (False, True):
        model = convert(net, image_size=(64, 64), wide_head_input=is_wide, **info.quant).eval()
        calibrate(model, [images])
        save_model(tmp_path / "model", model, info)
        loaded, stored = load_model(tmp_path / "model")
        assert stored.quant.get("wide_head_input", False) == loaded.wide_head_input == is_wide
        with torch.no_grad(), at_precision(model, 4), at_precision(loaded, 4):
            assert torch.equal(loaded(images), model(images))


@pytest.mark.slow
def test_round_trip_is_exact_at_every_precision(model: SwitchableModel, tmp_path: Path) -> None:
    save_model(tmp_path / "model", model, INFO)
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    loaded, info = load_model(tmp_path / "model")
    assert info == INFO
    assert not loaded.training
    assert allowed_precisions(loaded) == allowed_precisions(model)
    for before, after in zip(logits(model), logits(loaded), strict=True):
        assert torch.equal(before, after)
    assert len({output.sum().item() for output in logits(model)}) == 3


@pytest.mark.slow
def test_a_config_from_before_the_data_set_was_kept(model: SwitchableModel, tmp_path: Path) -> None:
    save_model(tmp_path / "model", model, replace(INFO, data={"name": "shapes", "seed": 3}))
    assert load_model(tmp_path / "model")[1].data == {"name": "shapes", "seed": 3}
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    del config["data"]
    file.write_text(json.dumps(config))
    assert load_model(tmp_path / "model")[1] == INFO


def test_saving_leaves_the_model_alone(model: SwitchableModel, tmp_path: Path) -> None:
    before = logits(model)
    save_model(tmp_path / "model", model, INFO)
    assert all(torch.equal(x, y) for x, y in zip(before, logits(model), strict=True))


def test_a_run_directory_means_its_last_model(model: SwitchableModel, tmp_path: Path) -> None:
    save_model(tmp_path / "run" / "last", model, INFO)
    assert resolve_model_dir(tmp_path / "run") == tmp_path / "run" / "last"
    assert load_model(str(tmp_path / "run"))[1] == INFO


def test_saving_again_replaces(model: SwitchableModel, tmp_path: Path) -> None:
    for source in ("first", "second"):
        save_model(tmp_path / "model", model, replace(INFO, source=source))
    assert load_model(tmp_path / "model")[1].source == "second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), safetensors.SafetensorError("I/O error: No space left on device")],
    ids=["os", "safetensors"],
)
def test_a_full_disk_keeps_the_old_model(
    error: Exception, model: SwitchableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", model, INFO)

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*model: .*Free some space or choose another --output"):
        save_model(tmp_path / "model", model, replace(INFO, source="second"))
    assert load_model(tmp_path / "model")[1].source == INFO.source
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"there is no model in .*nowhere: give a run or model directory, or make"
    ):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("config.json", "has a model.safetensors but no config.json: copy both files of the model"),
        ("model.safetensors", "has a config.json but no model.safetensors: copy both"),
    ],
)
def test_a_missing_file(gone: str, message: str, model: SwitchableModel, tmp_path: Path) -> None:
    save_model(tmp_path / "model", model, INFO)
    (tmp_path / "model" / gone).unlink()
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2, but this version reads up to 1: pip install -U qadtr-brevitas"),
        ({"format": None}, "is not the config of a switchable model"),
        ({"classes": None}, r"config.json lacks a key or has a wrong value \(.*classes.*\): save the model again"),
        ({"image_size": 32}, r"config.json lacks a key or has a wrong value"),
        ({"quant": {"first_last": "8bit"}}, r"config.json lacks a key or has a wrong value \('precisions'\)"),
        ({"quant": {"precisions": [32, 8]}}, "config.json and model.safetensors do not fit"),
        ({"quant": {"precisions": [32, 4], "unknown": 1}}, "config.json and model.safetensors do not fit"),
        ({"num_classes": 5}, "config.json and model.safetensors do not fit"),
        ({"name": "cifar_resnet_20"}, "config.json and model.safetensors do not fit .*did you mean cifar_resnet20"),
    ],
)
def test_a_config_that_does_not_fit(
    changes: dict[str, object], message: str, model: SwitchableModel, tmp_path: Path
) -> None:
    save_model(tmp_path / "model", model, INFO)
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_truncated_files(name: str, model: SwitchableModel, tmp_path: Path) -> None:
    save_model(tmp_path / "model", model, INFO)
    file = tmp_path / "model" / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load_model(tmp_path / "model")
