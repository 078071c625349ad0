"""What works without the extras, and what an error says where one is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.extras import require

REPOSITORY = Path(__file__).parents[1]
# Import names of all packages that only extras install.
EXTRAS = (
    *("accelerate", "tensorboard", "matplotlib", "jinja2", "pandas", "torchattack", "pyautoattack"),
    *("onnx", "onnxoptimizer", "onnxruntime", "qonnx"),
)
# For a fresh interpreter, in which these packages are then not found.
HIDE_EXTRAS = f"""
import sys

class WithoutExtras:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {EXTRAS!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(WithoutExtras, sys.meta_path)
"""


def bare(code: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter without the packages of the extras."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", HIDE_EXTRAS + code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def bare_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return bare(f"from qadtr_brevitas.cli.main import main\nsys.exit(main({list(arguments)!r}))", cwd=cwd)


def test_a_missing_package_is_named_with_the_extra_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test may have imported it.
    monkeypatch.setitem(sys.modules, "qonnx.core.modelwrapper", None)
    with pytest.raises(UsageError, match=r"export needs qonnx.*pip install 'qadtr-brevitas\[export\]'"):
        require("qonnx.core.modelwrapper", extra="export", purpose="export")


def test_a_missing_package_that_no_extra_installs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"push needs huggingface_hub.*pip install huggingface-hub$"):
        require("huggingface_hub", extra=None, purpose="push")


def test_what_a_package_lacks_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halfway.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="export needs not_there_at_all"):
        require("halfway", extra="export", purpose="export")


def test_a_module_that_is_there_is_returned() -> None:
    assert require("os.path", extra="export", purpose="export") is os.path


@pytest.mark.parametrize("command", ["--help", "list attacks", "recipes list", "recipes show digits_qat"])
def test_help_and_lists_need_no_extra(command: str, tmp_path: Path) -> None:
    result = bare_cli(*command.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.slow
def test_converting_calibrating_freezing_saving_and_loading_need_no_extra(tmp_path: Path) -> None:
    code = """
import timm, torch
import qadtr_brevitas as qb

images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
model = qb.convert(timm.create_model("resnet10t"), precisions=[32, 4])
qb.calibrate(model, [images])
qb.save(model, "saved")
loaded = qb.load("saved")
for net in (model, loaded):
    net.eval()
    qb.set_precision(net, 4)
with torch.no_grad():
    assert torch.equal(model(images), loaded(images))
    assert torch.allclose(model(images), qb.freeze(model, 4)(images), atol=1e-4)
"""
    result = bare(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("train digits_qat -o run", "accelerate", "train"),
        ("evaluate model --clean", "matplotlib", "report"),
        ("evaluate model --attack pgd --images 20", "matplotlib", "report"),
        ("analyze pixel model", "matplotlib", "report"),
        ("report model", "jinja2", "report"),
        ("study table11 --scale smoke", "jinja2", "reproduce"),
        ("export model --precision 4 --format qonnx", "onnx", "export"),
    ],
)
def test_other_commands_name_the_extra_at_once(
    digits_model: Path, tmp_path: Path, command: str, package: str, extra: str
) -> None:
    (tmp_path / "model").symlink_to(digits_model)
    result = bare_cli(*command.split(), cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert f"needs {package}" in result.stderr
    assert f"pip install 'qadtr-brevitas[{extra}]'" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated model directory, made without the extras."""
    folder = tmp_path_factory.mktemp("bare")
    result = bare_cli("convert", "cifar_resnet8", "--calibrate", "digits", "-o", "model", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "model"
