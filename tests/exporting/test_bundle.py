"""The folder of an export is all that is needed to run the network, without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.data.image_folder import ImageFolder
from qadtr_brevitas.exporting import export, find_format
from qadtr_brevitas.quant.model_info import ModelInfo
from tests.exporting.networks import loaded, plain

pytestmark = pytest.mark.slow
# What a machine that runs the network does not have.
ABSENT = ("torch", "brevitas", "timm", "qadtr_brevitas", "onnx")
CLASSES = ("10", "bird", "cat", "naïve dog")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of other sizes than the network takes, of every mode that is common."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(24):
        folder = root / "test" / CLASSES[number % 4]
        folder.mkdir(parents=True, exist_ok=True)
        height, width = 20 + number, 31 + number % 7
        coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3)).astype(np.uint8))
        image = coarse.resize((width, height), Image.Resampling.BILINEAR)
        image.convert(("RGB", "L", "P", "RGBA")[number % 3]).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def bundle(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(pictures, tmp_path_factory.mktemp("exports") / "out", "qcdq", batch=5, baseline=True)


def make_bundle(pictures: Path, output: Path, form: str, **settings: Any) -> Path:
    data = ImageFolder(root=str(pictures), image_size=16, crop=0.875, class_order="name")
    given = loaded(plain())
    facts = {**vars(given.info), "classes": CLASSES}
    given = type(given)(given.name, given.model, given.fingerprint, ModelInfo(**facts))
    texture = torch.randint(256, (3, 5, 5), generator=torch.Generator().manual_seed(2)) / 255
    patch = Patch(texture=texture, mask=torch.ones(5, 5, dtype=torch.bool), meta={"target": 1})
    split, patches = data.load("test"), [("sticker", patch)]
    export(given, Precision(4, 4), find_format(form), output, split=split, patches=patches, resize=18, **settings)
    return output


def run(
    bundle: Path, tmp_path: Path, *arguments: object, absent: tuple[str, ...] = ABSENT
) -> subprocess.CompletedProcess[str]:
    for name in absent:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')\n")
    command = [sys.executable, "-W", "error", str(bundle / "run.py"), *map(str, arguments)]
    return subprocess.run(
        command, env={"PYTHONPATH": str(tmp_path), "PATH": ""}, capture_output=True, text=True, check=False
    )


def test_the_accuracy_is_reproduced_to_the_image(bundle: Path, pictures: Path, tmp_path: Path) -> None:
    report = json.loads((bundle / "export-report.json").read_text())
    for file, accuracy in (
        ("model.onnx", report["agreement"]["exported_accuracy"]),
        ("float.onnx", report["baseline"]),
    ):
        found = run(bundle, tmp_path, "--images", pictures / "test", "--model", file, "--json")
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout) == {
            "images": 24,
            "correct": round(24 * accuracy),
            "accuracy": pytest.approx(accuracy),
        }


def test_a_file_of_quantizers_needs_onnx_and_onnxruntime_alone(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("qonnx")
    bundle = make_bundle(pictures, tmp_path / "out", "qonnx")
    report = json.loads((bundle / "export-report.json").read_text())
    absent = (*(name for name in ABSENT if name != "onnx"), "qonnx")
    found = run(bundle, tmp_path, "--images", pictures / "test", "--json", absent=absent)
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout)["accuracy"] == pytest.approx(report["agreement"]["exported_accuracy"])
    assert "pip install numpy pillow onnx onnxruntime" in (bundle / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["PIL", "onnxruntime"])
def test_a_package_that_is_missing_is_named(bundle: Path, tmp_path: Path, package: str) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('{package} is not installed')\n")
    found = run(bundle, tmp_path, "--check")
    assert found.returncode == 1
    assert f"{package} is not installed" in found.stderr
    assert "pip install" in found.stderr
    assert "Traceback" not in found.stderr


def test_vectors_pass_and_find_another_file(bundle: Path, tmp_path: Path) -> None:
    vectors = np.load(bundle / "test_vectors.npz")
    assert list(vectors["patches"]) == ["clean"] * 4 + ["sticker"] * 4
    assert vectors["images"].shape == (8, 3, 16, 16)
    found = run(bundle, tmp_path, "--check")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "8 of 8 test vectors" in found.stdout
    other = tmp_path / "other"
    other.mkdir()
    for file in bundle.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    np.savez(other / "test_vectors.npz", images=vectors["images"], logits=-vectors["logits"])
    assert run(other, tmp_path, "--check").returncode == 1


def test_a_picture_gets_the_names_of_classes(bundle: Path, pictures: Path, tmp_path: Path) -> None:
    picture = next((pictures / "test" / "bird").iterdir())
    found = run(bundle, tmp_path, picture)
    assert found.returncode == 0, found.stderr
    assert any(name in found.stdout for name in CLASSES)
    (tmp_path / "strange" / "zebra").mkdir(parents=True)
    refused = run(bundle, tmp_path, "--images", tmp_path / "strange")
    assert (refused.returncode, "zebra" in refused.stderr) == (1, True)


def test_the_folder_says_how_to_feed_the_file(bundle: Path) -> None:
    settings = json.loads((bundle / "preprocess.json").read_text())
    assert (settings["height"], settings["width"], settings["channels"], settings["batch"]) == (16, 16, 3, 5)
    assert settings["resize_shorter"] == 18
    assert settings["files"]["model.onnx"] == {
        "input": "images",
        "output": "logits",
        "range": [0, 1],
        "opset": 21,
        "runtime": "onnxruntime",
    }
    assert (bundle / "labels.txt").read_text(encoding="utf-8").splitlines() == list(CLASSES)
    readme = (bundle / "README.md").read_text(encoding="utf-8")
    report = json.loads((bundle / "export-report.json").read_text())
    for words in ("(5, 3, 16, 16)", "`images`", "`logits`", "OpenVINO", "float.onnx", "sticker", "opset 21"):
        assert words in readme
    assert set(report["files"]) == {path.name for path in bundle.iterdir()} - {"export-report.json"}
