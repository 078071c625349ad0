from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.evaluation import craft, entries
from tests.evaluation.models import make_model_dir

pytestmark = pytest.mark.slow

FAST = ["size=4", "steps=2", "batch_size=16", "check_every=2"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("runs") / "net")


def attack(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["attack", *map(str, arguments)])


def test_makes_a_patch_for_each_precision_and_target(run_dir: Path, tmp_path: Path) -> None:
    result = attack(run_dir, *FAST, "--target", "all", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.glob("*.safetensors")}
    assert names == {f"lavan-4x4-{bits}bit-target{target}.safetensors" for bits in (32, 4) for target in range(3)}
    for words in ("target", "circle", "square", "triangle", "32 bit", "4 bit", "(n="):
        assert words in result.stdout
    assert f"wrote 6 patches to {tmp_path}" in result.stderr
    assert f"next: qadtr-brevitas evaluate {run_dir} --patches {tmp_path}" in result.stderr
    assert Patch.load(tmp_path / "lavan-4x4-4bit-target1").meta["data"]["name"] == "shapes"


def test_bfloat16_serves_at_32_bit_alone_and_can_be_refused(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(craft, "has_fast_bf16", lambda device: True)
    for folder, options in (("rounded", []), ("exact", ["--float32"])):
        result = attack(run_dir, *FAST, "--target", "0", *options, "-o", tmp_path / folder)
        assert result.exit_code == 0, result.output
    made = {
        (folder, bits): Patch.load(tmp_path / folder / f"lavan-4x4-{bits}bit-target0")
        for folder in ("rounded", "exact")
        for bits in (32, 4)
    }
    assert [key for key, patch in made.items() if patch.meta["bf16"]] == [("rounded", 32)]
    assert not torch.equal(made["rounded", 32].texture, made["exact", 32].texture)
    assert torch.equal(made["rounded", 4].texture, made["exact", 4].texture)
    refused = attack(run_dir, *FAST, "--target", "0", "--float32", "-o", tmp_path / "rounded")
    assert refused.exit_code == 2
    assert "made from another model, images, seed or settings" in refused.output


def test_mean_over_precisions_is_attacked_like_a_precision(run_dir: Path, tmp_path: Path) -> None:
    result = attack(run_dir, *FAST, "--target", "0", "--precision", "32,4+32", "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert [patch["precision"] for patch in json.loads(result.stdout)] == ["32", "32+4"]
    assert Patch.load(tmp_path / "lavan-4x4-32+4bit-target0").meta["precision"] == "32+4"


def test_finished_patches_are_kept(run_dir: Path, tmp_path: Path) -> None:
    first = attack(run_dir, *FAST, "--target", "0,square", "--precision", "4", "-o", tmp_path)
    assert first.exit_code == 0, first.output
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = attack(run_dir, *FAST, "--target", "0,1,2", "--precision", "4", "-o", tmp_path, "--json")
    assert "wrote 1 patch to" in result.stderr
    assert "2 were there already" in result.stderr
    assert [patch["kept"] for patch in json.loads(result.stdout)] == [True, True, False]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_quiet_prints_the_table_only(run_dir: Path, tmp_path: Path) -> None:
    result = attack(run_dir, *FAST, "--target", "none", "--precision", "4", "-o", tmp_path, "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "any wrong class" in result.stdout
    assert (tmp_path / "lavan-4x4-4bit-untargeted.png").exists()


def test_model_directory_without_a_run_needs_a_data_set(tmp_path: Path) -> None:
    model = make_model_dir(tmp_path / "model", recipe=False)
    result = attack(model, *FAST)
    assert result.exit_code == 2
    assert "choose one with --data" in result.stderr
    result = attack(tmp_path / "nope", *FAST)
    assert (result.exit_code, "there is no model in" in result.stderr) == (1, True)
    result = attack(model, *FAST, "--data", "shapes")
    assert result.exit_code == 1
    assert "data set shapes has 10 classes and images of 32x32, model model is for 3 classes and 16x16" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["size=40"], 2, "a 40x40 patch is larger than the 16x16 image"),
        (["sise=4"], 2, "command line: sise: unknown key 'sise': did you mean 'size'?"),
        (["steps=0"], 2, "command line: steps: must be at least 1, got 0"),
        (["steps"], 2, "command line: steps: is no setting: write key=value"),
        (["size=[4"], 2, "is not YAML"),
        (["target=1"], 2, "give the target classes with --target"),
        (["--attack", "lavann"], 2, "unknown attack 'lavann': did you mean 'lavan'?"),
        (
            ["--attack", "a-qapa"],
            2,
            "`qadtr-brevitas evaluate MODEL_DIR",
        ),
        (["--precision", "5"], 2, "no precision 5: it was converted for 32, 4"),
        (["--precision", "32+5"], 2, "no precision 5: it was converted for 32, 4"),
        (["--precision", "32+"], 2, "'' is not a precision"),
        (["--precision", "one"], 2, "'one' is not a precision"),
        (["--target", "9"], 2, "'9': 0 to 2, all or none"),
        (["--target", "squar"], 2, "'squar': did you mean 'square'?"),
        (["--train-images", "50", "--held-out", "20"], 2, "more than the 60 images of the training split"),
        (["--data", "nothing"], 2, "unknown dataset 'nothing'"),
        (["--data", "shapes:somewhere"], 2, "give --data shapes"),
        (["--data", "cifar10:/nowhere"], 1, "/nowhere"),
        (["--device", "abacus"], 2, "'abacus' is not a device"),
    ],
)
def test_bad_usage(run_dir: Path, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    result = attack(run_dir, *arguments, "-o", tmp_path / "patches")
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "patches").exists()


def test_missing_model_directory(tmp_path: Path) -> None:
    result = attack(tmp_path / "nowhere", "--data", "shapes")
    assert result.exit_code == 1
    assert "there is no model in" in result.stderr


def test_help() -> None:
    result = attack("--help")
    assert result.exit_code == 0
    for words in ("--precision", "--held-out", "Examples:", "qadtr-brevitas attack runs/qadtr"):
        assert words in result.output


def test_compiled_passes_make_the_same_patch(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    # The default backend takes many seconds.
    monkeypatch.setattr(entries, "compile_passes", partial(entries.compile_passes, backend="aot_eager"))
    for folder, options in (("eager", []), ("compiled", ["--compile"])):
        result = attack(run_dir, *FAST, "--target", "0", "--precision", "4", *options, "-o", tmp_path / folder)
        assert result.exit_code == 0, result.output
    assert "compiled the passes of attacks at 4 bit" in result.stderr
    eager, ours = (Patch.load(tmp_path / folder / "lavan-4x4-4bit-target0").texture for folder in ("eager", "compiled"))
    torch.testing.assert_close(ours, eager, rtol=0, atol=1.5 / 255)
