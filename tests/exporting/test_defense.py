"""Masks beside an exported file: its runner answers as the defended classifier in PyTorch does, without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from qadtr_brevitas.api import certification as qb
from qadtr_brevitas.api.exporting import export
from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.one_round import place_kinds
from qadtr_brevitas.evaluation.tta import VIEWS, TtaKind
from qadtr_brevitas.exporting.deployed import defend as deployed
from tests.exporting.networks import PIXELS, loaded, plain

MODELS = {"double masking": 4, "one round": 3}


@pytest.fixture(scope="module")
def given() -> LoadedModel:
    found = loaded(plain(), precisions=(32, 8))
    found.model.info = found.info
    return found


class Colors:
    """A network that shows other classes under some masks, and how often it was asked."""

    def __init__(self, classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(3 * 64, classes, generator=generator)
        self.bias = torch.tensor([1.0, 0.0, 0.0])

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight + self.bias


@pytest.mark.parametrize("tta", ["none", "flip-shift"])
@pytest.mark.parametrize("fill", ["mean", "interpolate"])
@pytest.mark.parametrize(("method", "overlap"), [*((method, 1) for method in MODELS), ("double masking", 2)])
def test_numpy_decides_as_pytorch_does(method: str, overlap: int, fill: str, tta: TtaKind, tmp_path: Path) -> None:
    against = qb.Certification(2, MODELS[method], method, fill, tta, overlap)  # pyright: ignore[reportArgumentType]
    net, color = Colors(), torch.full((3, 1, 1), 0.5)
    # From images of the color under masks, on which they change nothing, to noise.
    count = 80 if overlap == 1 else 20
    strength = torch.linspace(0, 0.4, count).view(-1, 1, 1, 1)
    images = 0.5 + strength * torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = against.run(net, images, color=color, batch_size=64)
    masks = against.covering((8, 8))
    arrays = {"masks": masks.numpy(), "color": color.flatten().numpy()}
    if fill == "interpolate":
        arrays["levels"] = np.float32(255)
    if tta != "none":
        arrays["views"] = np.array(VIEWS[tta])
    if overlap > 1:
        arrays["members"] = against.groups((8, 8)).members.numpy()
    if method == "one round":
        arrays["kinds"] = place_kinds(masks, against.size).numpy()
    np.savez(tmp_path / "masks.npz", **arrays)
    defense = deployed.Defense(lambda x: net(torch.from_numpy(x)).numpy(), tmp_path / "masks.npz")
    answers = [defense(image) for image in images.numpy()]
    assert [one.label for one in answers] == expected.defended.tolist()
    certified = [one.certified for one in answers]
    assert certified == (expected.proved >= 0).tolist()
    assert 0 < sum(certified) < len(certified)
    most = against.passes_to_prove((8, 8))
    assert all(one.passes == most for one in answers if one.certified)
    assert all(one.passes >= len(masks) * against.views for one in answers)


@pytest.mark.slow
@pytest.mark.parametrize(("overlap", "count", "pairs"), [(1, 9, 36), (2, 49, 1176)])
def test_the_runner_gives_the_answers_of_the_defended_classifier(
    given: LoadedModel, tmp_path: Path, overlap: int, count: int, pairs: int
) -> None:
    batches = [(PIXELS.float() / 255, torch.arange(12) % 4)]
    out = tmp_path / "out"
    masks: dict[str, Any] = {"masks": 3, "tta": "flip", "overlap": overlap}
    report = export(given.model, out, precision=8, format="qcdq", loader=batches, batch="dynamic", defend=3, **masks)
    assert report.defense is not None
    assert (report.defense.masks, report.defense.passes_to_certify) == (count, 2 * (count + pairs))
    assert {"masks.npz", "defend.py"} <= set(report.files)
    assert f"{2 * count} forward passes" in (out / "README.md").read_text()
    expected = qb.defend(given.model, 8, patch=3, **masks)(PIXELS.float() / 255)
    for label in range(4):
        (tmp_path / "photos" / str(label)).mkdir(parents=True)
    (out / "labels.txt").write_text("0\n1\n2\n3\n")
    files = [tmp_path / "photos" / str(number % 4) / f"{number}.png" for number in range(12)]
    for pixels, file in zip(PIXELS, files, strict=True):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not installed')\n")

    def run(*arguments: object) -> str:
        command = [sys.executable, str(out / "run.py"), "--defend", *map(str, arguments)]
        done = subprocess.run(
            command, env={"PYTHONPATH": str(tmp_path), "PATH": ""}, capture_output=True, text=True, check=True
        )
        return done.stdout

    lines = run(*files).splitlines()
    words = ["certified" if sure else "not certified" for sure in expected.certified]
    wanted = [f"{label}, {word}" for label, word in zip(expected.classes.tolist(), words, strict=True)]
    assert [line.partition(": ")[2].rpartition(", ")[0] for line in lines] == wanted
    right = expected.classes == torch.arange(12) % 4
    found = json.loads(run("--images", tmp_path / "photos", "--json"))
    assert (found["correct"], found["certified"]) == (int(right.sum()), int((right & expected.certified).sum()))
    assert run("--check").startswith("2 of 2 test vectors")


def test_what_cannot_be_defended_is_refused(given: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="17x17 pixels does not fit on images of 16x16"):
        export(given.model, tmp_path / "out", precision=8, format="qcdq", defend=17)
    assert not list(tmp_path.iterdir())
    for options, words in ((["--defend", "3,5"], "one size"), (["--certify-masks", "4"], "--defend 5")):
        result = CliRunner().invoke(cli, ["export", str(tmp_path), "-p", "8", "-f", "qcdq", *options])
        assert result.exit_code == 2
        assert words in result.stderr
