"""The Python section of README runs as it stands, on a small network that knows digits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import qadtr_brevitas.models  # registers cifar_resnet8
from qadtr_brevitas.data.digits import Digits


def trained_network() -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model("cifar_resnet8", num_classes=10)
    split = Digits().load("train")
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(60):
        images, labels = split.batch(torch.arange(64 * step, 64 * (step + 1)) % len(split))
        loss = cross_entropy(net((images - 0.45) / 0.22), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


# The calls of README stand as they are written; only what they spend is less.
BUDGETS = {"audit": {"images": 20}, "certify": {"masks": 2}, "defend": {"masks": 2}}
TRAINING = {"train.float_epochs": 1, "data.train_limit": 160, "data.test_limit": 40, "quant.calibration.samples": 32}


def spend_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the public functions smaller budgets, where README sets none."""
    qb, train, lavan = qadtr_brevitas, qadtr_brevitas.train, qadtr_brevitas.attacks.Lavan
    for name, budget in BUDGETS.items():
        original = getattr(qb, name)
        monkeypatch.setattr(qb, name, lambda *given, f=original, b=budget, **more: f(*given, **{**b, **more}))

    def short(recipe: str, output: str, *, overrides: dict[str, Any]) -> Any:
        return train(recipe, output, overrides={**TRAINING, **overrides})

    monkeypatch.setattr(qb, "train", short)
    monkeypatch.setattr(qb.attacks, "Lavan", lambda **settings: lavan(**{"steps": 20, "batch_size": 32, **settings}))


@pytest.mark.slow
def test_python_section(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("qonnx")
    (code,) = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    net, create = trained_network(), timm.create_model

    def stand_in(name: str, **settings: Any) -> nn.Module:
        return net if name == "resnet18" else create(name, **settings)

    monkeypatch.setattr(timm, "create_model", stand_in)
    spend_less(monkeypatch)
    monkeypatch.chdir(tmp_path)
    images, labels = Digits().load("train").batch(torch.arange(200))
    test = Digits().load("test").batch(torch.arange(10))
    names: dict[str, Any] = {
        "loader": DataLoader(TensorDataset(*test), batch_size=5),
        "images": images,
        "labels": labels,
    }
    exec(code, names)
    result = names["result"]
    assert set(result.clean_accuracy) == {"32", "4"}
    assert result.asr["lavan-8x8"]["4"].n > 0
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert (tmp_path / "model" / "config.json").is_file()
    assert names["run"].recipe.train.epochs == 3
    assert set(names["run"].accuracy) == {str(p) for p in qadtr_brevitas.allowed_precisions(names["model"])}
