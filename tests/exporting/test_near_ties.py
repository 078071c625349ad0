"""Values within the last bits of floats of halfway between two levels fall to one side, whoever computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.exporting import BuildTarget, find_format
from qadtr_brevitas.exporting.build_files import write_build_files
from qadtr_brevitas.exporting.estimate import compiler_python, run_compiler
from qadtr_brevitas.exporting.hls4ml import Hls4ml
from qadtr_brevitas.exporting.near_ties import clear_near_ties
from qadtr_brevitas.pipeline.directories import ONNX_FILE
from qadtr_brevitas.quant import freeze
from tests.exporting.networks import head, images_of, loaded

pytestmark = pytest.mark.slow

qonnx = pytest.importorskip("qonnx.core.modelwrapper")
executor = pytest.importorskip("qonnx.core.onnx_exec")
CHANNELS = 16
IMAGE = images_of((16, 16))[:1]


class Tied:
    """A file for hls4ml in each of whose first channels one value, of many pixels, is a tie in PyTorch's floats."""

    def __init__(self, folder: Path, *, bias: bool) -> None:
        norm: list[nn.Module] = [] if bias else [nn.BatchNorm2d(CHANNELS)]
        first = [nn.Conv2d(3, CHANNELS, 1, bias=bias), *norm, nn.ReLU(), nn.AvgPool2d(2, divisor_override=8)]
        second = [nn.Conv2d(CHANNELS, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        net = nn.Sequential(*first, *second, *head(12, nn.AdaptiveAvgPool2d(1)))
        # Biases behind weights of several steps become offsets of BatchNorms.
        model = loaded(net, target="hls4ml", per_channel=not bias).model
        self.frozen, self.form = freeze(model, 4), find_format("hls4ml")
        self.file = folder / ONNX_FILE
        self.form.write(self.frozen, IMAGE, self.file)
        self.model: Any = qonnx.ModelWrapper(str(self.file))
        kind = "Conv" if bias else "BatchNormalization"
        self.node = [n for n in self.model.graph.node if n.op_type == kind][0 if bias else 1]
        quant = self.model.find_consumers(self.model.find_consumers(self.node.output[0])[0].output[0])[0]
        self.step, bits = (float(self.model.get_initializer(quant.input[i]).item()) for i in (1, 3))
        self.highest = 2**bits - 1
        self.products = self._products()
        self._tie()

    def levels(self, computed: Any) -> Any:
        return np.clip(np.round(computed / self.step), 0, self.highest)

    def in_pytorch(self) -> Any:
        """What comes out for the products, as PyTorch's floats have it, (channels, pixels)."""
        if self.node.op_type == "Conv":
            return self.products + self._constants()[0][:, None]
        gamma, beta, mean, var = (torch.from_numpy(value.copy()) for value in self._constants())
        return F.batch_norm(torch.from_numpy(self.products)[None], mean, var, gamma, beta)[0].numpy()

    def in_hls4ml(self) -> Any:
        """The same in its fixed point, with 32 bits behind the point: factors are floats that are cut off."""
        gamma, beta, mean, var = self._constants() if self.node.op_type != "Conv" else (1, *self._constants(), 0, 1)
        factor = np.float32(gamma / np.sqrt(var + np.float32(1e-5 if self.node.op_type != "Conv" else 0)))
        offset = np.float32(beta - factor * mean)
        factor, offset = (np.floor(np.float64(value) * 2**32) / 2**32 for value in (factor, offset))
        return self.products * np.reshape(factor, (-1, 1)) + offset[:, None]

    def _constants(self) -> list[Any]:
        names = self.node.input[2:] if self.node.op_type == "Conv" else self.node.input[1:]
        return [self.model.get_initializer(name) for name in names]

    def _products(self) -> Any:
        """Return what the BatchNorm or the bias applies to."""
        given = {self.model.graph.input[0].name: IMAGE.numpy()}
        if self.node.op_type == "Conv":
            bias = self.model.get_initializer(self.node.input[2])
            self.model.set_initializer(self.node.input[2], bias * 0)
            found = executor.execute_onnx(self.model, given, return_full_exec_context=True)[self.node.output[0]]
            self.model.set_initializer(self.node.input[2], bias)
        else:
            found = executor.execute_onnx(self.model, given, return_full_exec_context=True)[self.node.input[0]]
        return found.reshape(CHANNELS, -1)

    def _tie(self) -> None:
        """Move the offset until the median value of each channel is 3.5 levels."""
        middle = np.argsort(self.products, axis=1)[:, self.products.shape[1] // 2]
        for _ in range(50):
            missing = 3.5 * self.step - self.in_pytorch()[range(CHANNELS), middle]
            beta = self.model.get_initializer(self.node.input[2])
            self.model.set_initializer(self.node.input[2], (beta + missing).astype(np.float32))
        self.model.save(str(self.file))


@pytest.mark.parametrize("bias", [False, True], ids=["norm", "bias"])
def test_no_value_is_left_whose_level_the_last_bits_decide(bias: bool, tmp_path: Path) -> None:
    tied = Tied(tmp_path, bias=bias)
    wanted, before = tied.levels(tied.in_pytorch()), tied.in_pytorch()
    if not bias:
        assert (tied.levels(tied.in_hls4ml()) != wanted).any()
    clear_near_ties(tied.model)
    assert np.array_equal(tied.levels(tied.in_hls4ml()), wanted)
    assert np.array_equal(tied.levels(tied.in_pytorch()), wanted)
    # Moved by next to nothing, ties or clear of them by more than what floats and fixed point round.
    assert 0 < np.abs(tied.in_pytorch() - before).max() < 1e-4 * tied.step
    distance = np.abs(tied.in_hls4ml() / tied.step % 1 - 0.5)
    assert distance[distance > 0].min() > 1e-7
    assert bias or distance.min() > 0
    moved = tied.model.get_initializer(tied.node.input[2])
    clear_near_ties(tied.model)
    assert np.array_equal(tied.model.get_initializer(tied.node.input[2]), moved)


@pytest.mark.timeout(600)
def test_hls4ml_itself_rounds_them_like_pytorch(tmp_path: Path) -> None:
    try:
        compiler_python(Hls4ml())
    except UsageError as error:
        pytest.skip(str(error))
    tied = Tied(tmp_path, bias=False)
    wanted = tied.form.load(tied.file)(IMAGE)
    clear_near_ties(tied.model)
    tied.model.save(str(tied.file))
    write_build_files(tmp_path, Hls4ml(), tied.frozen, IMAGE, BuildTarget(), takes_bytes=False)
    np.save(tmp_path / "expected_output.npy", wanted.numpy())
    assert run_compiler(Hls4ml(), tmp_path)["difference"] < 1e-6
