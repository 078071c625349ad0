"""The patches of the protocol, made for one model by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.cli.main import main
from qadtr_brevitas.pipeline.checkpoint import read_info
from tests.evaluation.models import make_model_dir


@pytest.mark.slow
def test_each_kind_is_made_once_and_can_be_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model_dir(tmp_path / "net")
    options = ["--protocol", "unseen", "--precision", "4", "--target", "0", "--train-images", "30", "--held-out", "20"]
    command = ["attack", str(model), "steps=1", "size=4", *options, "--device", "cpu", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [patch["kind"] for patch in found] == [
        "unseen-6x6-3x3",
        "unseen-10x10-5x5",
        "unseen-12x12-6x6",
        "unseen-disc-5x5",
        found[4]["kind"],  # the box around a shape that is searched
        "unseen-other-target-4x4",
        "unseen-gap-4x4",
        "unseen-left-out-bits-4x4",
    ]
    assert found[4]["kind"].startswith("unseen-dpr-")
    assert [patch["precision"] for patch in found] == ["4"] * 7 + ["3"]
    assert [patch["target"] for patch in found] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert len({patch["file"] for patch in found}) == 8
    folder = model / "patches" / "unseen"
    (wider,) = (folder / "left-out-bits").iterdir()
    assert set(read_info(wider).quant["precisions"]) == {32, 4, 3}
    last = Patch.load(Path(found[-1]["file"]))
    assert last.meta["precision"] == "3"

    assert main(command) == 0
    assert all(patch["kept"] for patch in json.loads(capsys.readouterr().out))
    scored = ["evaluate", str(model), "--patches", str(folder), "--precision", "4", "-o", str(tmp_path / "report")]
    assert main([*scored, "--images", "9", "--device", "cpu", "-q"]) == 0
