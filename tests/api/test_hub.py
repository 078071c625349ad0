"""Models on the Hugging Face Hub, against a stand-in of its API in a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub.errors import HFValidationError

import qadtr_brevitas as qb
from qadtr_brevitas.api import hub
from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.core.errors import CheckpointError, UsageError
from tests.api.conftest import TinyNet
from tests.evaluation.models import make_model_dir


def make_net(num_classes: int = 4) -> TinyNet:
    return TinyNet()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a hub that holds what is uploaded, and nothing else."""
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
            if repo.count("/") != 1:
                raise HFValidationError("Repo id must be in the form 'repo_name' or 'namespace/repo_name'")
            (root / repo).mkdir(parents=True, exist_ok=exist_ok)
            return f"https://huggingface.co/{repo}"

        def upload_file(self, *, path_or_fileobj: Path, path_in_repo: str, repo_id: str) -> None:
            shutil.copy(path_or_fileobj, root / repo_id / path_in_repo)

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if not (root / repo).is_dir():
            raise OSError("404 Client Error")
        return str(root / repo)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    return root


def test_a_model_comes_back_as_it_was(served: Path, tmp_path: Path) -> None:
    run = make_model_dir(tmp_path / "run")
    assert qb.push(run, "me/net") == "https://huggingface.co/me/net"
    assert {file.name for file in (served / "me" / "net").iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
    }
    images = torch.rand(4, 3, 16, 16)
    found, there = qb.from_pretrained("me/net"), qb.load(run)
    with torch.no_grad(), qb.at_precision(found, 4), qb.at_precision(there, 4):
        assert torch.equal(found(images), there(images))
    card = (served / "me" / "net" / "README.md").read_text(encoding="utf-8")
    for fact in ("library_name: qadtr-brevitas", "Precisions: 32, 4 bit", "16x16", "Not measured", "name: shapes"):
        assert fact in card


@pytest.mark.slow
def test_the_card_tells_what_was_measured(tmp_path: Path) -> None:
    run = make_model_dir(tmp_path / "run")
    result = CliRunner().invoke(cli, ["evaluate", str(run), "--clean", "--images", "12"])
    assert result.exit_code == 0, result.output
    shown = CliRunner().invoke(cli, ["push", str(run), "me/net", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "of 12 test images; no attack was made" in shown.stdout
    assert "| run | 4 bit |" in shown.stdout


def test_code_of_strangers_is_not_imported(served: Path, tmp_path: Path, net: TinyNet) -> None:
    model = qb.convert(net, [32, 4], image_size=(16, 16), architecture=f"{__name__}:make_net")
    qb.calibrate(model, torch.rand(16, 3, 16, 16))
    qb.push(qb.save(model, tmp_path / "model"), "me/own")
    with pytest.raises(UsageError, match="trust_code=True"):
        qb.from_pretrained("me/own")
    assert isinstance(qb.from_pretrained("me/own", trust_code=True), qb.SwitchableModel)


def test_what_is_wrong_is_named(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"me/nothing.*404"):
        qb.from_pretrained("me/nothing")
    run = make_model_dir(tmp_path / "run")
    with pytest.raises(UsageError, match="OWNER/NAME"):
        qb.push(run, "a/b/c")

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise OSError("403 Forbidden")

    monkeypatch.setattr(hub.HfApi, "upload_file", refuse)
    with pytest.raises(CheckpointError, match=r"403.*HF_TOKEN"):
        qb.push(run, "me/net")
    missing = CliRunner().invoke(cli, ["push", str(tmp_path / "nowhere"), "me/net"])
    assert (missing.exit_code, "there is no model" in missing.stderr) == (1, True)
