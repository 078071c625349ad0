from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qadtr_brevitas.cli.main import main
from qadtr_brevitas.core.files import write_json


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    quant = {"precisions": [32, 4], "first_last": "8bit", "narrow_range": True, "args": {}}
    write_json(tmp_path / "config.json", {"name": "toy", "source": None, "quant": quant})
    return tmp_path


def test_info_is_read_by_people(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(model)]) == 0
    assert capsys.readouterr().out.splitlines()[:8] == [
        "kind: model",
        f"path: {model}",
        "name: toy",
        "source: none",
        "quant:",
        "  precisions: 32, 4",
        "  first_last: 8bit",
        "  narrow_range: yes",
    ]


def test_info_is_read_by_programs(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quant"]["precisions"] == [32, 4]


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "x")]) == 2
    assert f"{tmp_path / 'x'} does not exist" in capsys.readouterr().err
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04pickle")
    assert main(["info", str(tmp_path / "x.safetensors")]) == 1
    assert "not a complete safetensors file" in capsys.readouterr().err
