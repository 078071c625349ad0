"""Networks in integers: the file alone computes, integer for integer, what the network computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import ExportError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.exporting import export, find_format
from qadtr_brevitas.exporting.deployed.integers import IntegerNetwork, unpack
from qadtr_brevitas.exporting.integer_file import HEADER_FILE, INTEGERS_FILE, write_integers
from qadtr_brevitas.exporting.integer_graph import pack
from qadtr_brevitas.quant import freeze
from tests.exporting.networks import PIXELS, SPLIT, Mobile, loaded, plain, residual, stem

pytestmark = pytest.mark.slow


class Fire(nn.Module):
    """Concatenation of two branches, a padded pool, a group convolution, and a shortcut of option A.

    Padding "same", a convolution of padded channels, and a linear layer without bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*stem(8), nn.MaxPool2d(3, 2, padding=1))
        self.left, self.right = nn.Conv2d(10, 8, 1), nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=4)
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(3))
        self.last = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
        self.head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 4, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        wide = nn.functional.pad(x, (0, 0, 0, 0, 1, 1))
        x = torch.cat([self.relus[0](self.left(wide)), self.relus[1](self.right(x))], 1)
        shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(self.relus[2](self.last(nn.functional.pad(x, (1, 0, 1, 0)))[:, :, :4, :4] + shortcut))


NETS = {"residual": lambda: residual("A"), "plain": plain, "mobile": Mobile, "fire": Fire}


@pytest.fixture(scope="module", params=NETS)
def given(request: pytest.FixtureRequest) -> LoadedModel:
    return loaded(NETS[request.param](), precisions=(32, 8, 4, 2))


def written(given: LoadedModel, bits: int, folder: Path) -> tuple[nn.Module, IntegerNetwork]:
    frozen = freeze(given.model, bits)  # pyright: ignore[reportArgumentType]
    write_integers(frozen, torch.zeros(1, 3, 16, 16), folder / INTEGERS_FILE)
    return frozen, IntegerNetwork(folder / INTEGERS_FILE)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_accumulator_is_that_of_the_network(given: LoadedModel, bits: int, tmp_path: Path) -> None:
    """In float64, the sums of fake-quantized products divided by both steps are whole numbers: those of the file."""
    frozen, network = written(given, bits, tmp_path)
    tensors = network.tensors(PIXELS.numpy())
    sums: dict[str, Tensor] = {}
    biases = {name: module.bias for name, module in frozen.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            bias = biases[name]
            value = getattr(output, "value", output)
            sums[name.removeprefix("net.")] = (
                value if bias is None else value - bias.view(-1, *(1,) * (value.dim() - 2))
            )

        return hook

    frozen = frozen.double()
    for name in biases:
        frozen.get_submodule(name).register_forward_hook(note(name))
    with torch.no_grad():
        logits = frozen(PIXELS.double() / 255).numpy()
    products = [op for op in network.graph["operations"] if op["operation"] in ("conv", "linear")]
    assert len(products) == len(sums)
    for op in products:
        step = _step_behind(network, op["inputs"][0])
        steps = network.stored[network.graph["weights"][op["weight"]]["scale"]] * step
        expected = sums[op["layer"]].numpy() / steps.reshape(-1, *(1,) * (len(op["shape"]) - 1))
        assert np.abs(expected - expected.round()).max() < 1e-2
        assert np.array_equal(tensors[op["output"]], expected.round().astype(np.int64)), op["layer"]
    assert np.abs(network.run(PIXELS.numpy()) - logits).max() < 1e-4 * np.abs(logits).max()
    _check_sizes(network, bits)


def _check_sizes(network: IntegerNetwork, bits: int) -> None:
    widths: set[int] = set()
    for name, facts in network.graph["weights"].items():
        count = int(np.prod(facts["shape"]))
        assert network.stored[name].nbytes == -(-count * facts["bits"] // 8)
        widths.add(facts["bits"])
    # The first and the last layer keep 8 bit.
    assert widths == {8, bits}


def _step_behind(network: IntegerNetwork, tensor: str) -> float:
    """Return the step of levels that passed through pools and the like."""
    by_output = {op["output"]: op for op in network.graph["operations"]}
    while tensor not in network.graph["levels"]:
        tensor = by_output[tensor]["inputs"][0]
    return network.graph["levels"][tensor]["scale"]


def test_packing_is_reversible() -> None:
    random = np.random.default_rng(0)
    for bits in (2, 3, 5, 8, 11):
        levels = random.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 7))
        assert np.array_equal(unpack(pack(levels, bits), bits, [3, 7]), levels)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_header_computes_the_same_integers(given: LoadedModel, tmp_path: Path) -> None:
    _, network = written(given, 4, tmp_path)
    assert (tmp_path / HEADER_FILE).is_file()
    (tmp_path / "main.c").write_text(
        '#define QN_IMPLEMENTATION\n#include "model.h"\n#include <stdio.h>\nint main(void) {\n'
        "  static uint8_t image[QN_INPUTS];\n  int32_t logits[QN_CLASSES];\n"
        "  while (fread(image, 1, QN_INPUTS, stdin) == QN_INPUTS) {\n    qn_classify(image, logits);\n"
        '    for (int i = 0; i < QN_CLASSES; i++) printf("%d ", (int)logits[i]);\n  }\n  return 0;\n}\n'
    )
    subprocess.run(["cc", "-O1", "-Wall", "-Werror", "main.c", "-o", "main"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main"], input=PIXELS.numpy().tobytes(), capture_output=True, check=True)
    expected = network.tensors(PIXELS.numpy())[network.graph["output"]["tensor"]]
    assert [int(word) for word in done.stdout.split()] == expected.reshape(-1).tolist()


def test_the_folder_runs_with_numpy_alone(tmp_path: Path) -> None:
    given = loaded(residual("A"))
    report = export(given, Precision(4, 4), find_format("integers"), tmp_path / "out", split=SPLIT)
    assert report.agreement is not None
    assert report.agreement.same_class == 1
    assert {"model.safetensors", "model.json", "model.h", "integers.py", "run.py"} <= set(report.files)
    for name in ("torch", "onnx", "onnxruntime", "safetensors", "qadtr_brevitas"):
        (tmp_path / f"{name}.py").write_text("raise ImportError\n")
    done = subprocess.run(
        [sys.executable, tmp_path / "out" / "run.py", "--check", "--json"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same_class"] == found["images"] == 4


class _Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*stem(8), nn.Conv2d(8, 8, 1), nn.Hardswish())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def test_what_integers_lack_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"body\.4.*(HardSwish|HardSigmoid|Clip|Mul)"):
        written(loaded(_Gate()), 4, tmp_path)
    assert not any(tmp_path.iterdir())
