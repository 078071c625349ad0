"""Standard ONNX loads in OpenVINO too; skipped where it is not installed (requirements/openvino.txt)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qadtr_brevitas.exporting import find_format
from qadtr_brevitas.pipeline.directories import ONNX_FILE
from qadtr_brevitas.quant import freeze
from tests.exporting.networks import images_of, loaded, residual

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("form", "bits"), [("qcdq", 8), ("qcdq", 4), ("ort", 8)])
def test_openvino_gives_the_same_classes(form: str, bits: int, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="pip install -r requirements/openvino.txt")
    given = loaded(residual(), precisions=(bits,), target="ort" if form == "ort" else None)
    frozen, images = freeze(given.model, bits), images_of((16, 16))
    find_format(form).write(frozen, images[:1], tmp_path / ONNX_FILE)
    compiled = openvino.Core().compile_model(str(tmp_path / ONNX_FILE), "CPU")
    found = np.concatenate([compiled(image[None].numpy())[0] for image in images])
    with torch.no_grad():
        expected = frozen(images)
    distance = (torch.from_numpy(found) - expected).abs().amax(1)
    # Its integer kernels round otherwise.
    assert distance.median() < 0.05 * expected.abs().max()
    assert (torch.from_numpy(found).argmax(1) == expected.argmax(1)).float().mean() > 0.8
