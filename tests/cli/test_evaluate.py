from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from qadtr_brevitas.evaluation import entries
from qadtr_brevitas.evaluation.report import EvaluationReport
from tests.cli.evaluation import NOISE, evaluate
from tests.evaluation.models import make_model_dir

pytestmark = pytest.mark.slow


def test_one_model_gives_tables_and_files(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(runs[0], "-o", tmp_path, "--all")
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"report.json", "report.md", "cells.csv", "asr.png", "patches.png", "examples-first.png", "cells"}
    for words in (
        "Trust: not audited",
        "In short",
        "lavan 4x4: clean accuracy",
        "ASR white-box",
        "n of ASR",
        "each precision under what was made at it",
        "made at 32",
        "first to first",
    ):
        assert words in result.stdout
    assert (
        "wrote report.json, report.md, cells.csv, worst_case.csv, asr.png, patches.png, examples-first.png to "
        f"{tmp_path}" in result.stderr
    )
    assert "next: qadtr-brevitas evaluate" in result.stderr
    assert "![examples first](examples-first.png)" in (tmp_path / "report.md").read_text()


def test_two_models_are_compared_in_the_first_table(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(*runs, "-o", tmp_path, "-q", "--all")
    assert (result.exit_code, result.stderr) == (0, "")
    text = result.stdout[result.stdout.index("clean accuracy and ASR at each precision") :]
    assert text.index("first") < text.index("ASR white-box") < text.index("second")
    assert text.count("ASR white-box") == 2
    report = EvaluationReport.model_validate_json((tmp_path / "report.json").read_bytes())
    assert [model.name for model in report.models] == ["first", "second"]
    assert len(report.cells) == 2 * 2 * (8 + 2)
    assert {cell.threat for cell in report.cells} == {"white-box", "transfer", "control"}


def test_json_is_the_report(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(runs[0], "-o", tmp_path, "--json", "--images", "9", "--precision", "4", "--seed", "3")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content == json.loads((tmp_path / "report.json").read_text())
    assert (content["data"]["images"], content["data"]["available"], content["seed"]) == (9, 30, 3)
    assert content["data"]["settings"]["image_size"] == 16
    assert content["command"].startswith(f"qadtr-brevitas evaluate {runs[0]} -o {tmp_path} --json --images 9")
    assert {cell["precision"] for cell in content["cells"]} == {"4"}


def test_killed_evaluation_goes_on(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qadtr_brevitas.evaluation.jobs as module

    calls: list[int] = []
    predict = module.predict

    def counted(*arguments: object, **settings: object) -> object:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return predict(*arguments, **settings)

    monkeypatch.setattr(module, "predict", counted)
    assert evaluate(runs[0], "-o", tmp_path).exit_code == 1
    assert len(list((tmp_path / "cells").iterdir())) == 5
    assert not (tmp_path / "report.json").exists()
    assert evaluate(runs[0], "-o", tmp_path).exit_code == 0
    assert len(calls) == 6 + 2 * (1 + 4 + 1) - 5


def test_patches_of_another_model_are_transferred(runs: list[Path], tmp_path: Path) -> None:
    file = runs[1] / "patches" / "lavan-4x4-4bit-target0.safetensors"
    result = evaluate(runs[0], "--patches", file, "-o", tmp_path, "--json")
    content = json.loads(result.stdout)
    assert {cell["threat"] for cell in content["cells"]} == {"transfer", "control"}
    assert [patch["file"] for patch in content["patches"]] == [str(file), None]


def test_clean_accuracy_alone(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(runs[0], "--clean", "-o", tmp_path, "--json")
    content = json.loads(result.stdout)
    assert [cell["precision"] for cell in content["clean"]] == ["32", "4"]
    assert content["cells"] == content["patches"] == content["attacks"] == []
    assert "Clean accuracy" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--clean", "--attack", "pgd"], 2, "accuracy without an attack: remove --attack or --clean"),
        (["--audit", "--defend", "2"], 2, "leave out --audit and attack through the masks, with --defend 2"),
        (["--precision", "8"], 2, "no precision 8: it was converted for 32, 4"),
        (["--images", "31"], 2, "31 images cannot be drawn from 30"),
        (["--patches", "nowhere"], 2, "there are no patches at nowhere"),
        (["--data", "digits"], 1, "data set digits has 10 classes and images of 32x32, model first is for 3 classes"),
    ],
)
def test_bad_usage(runs: list[Path], tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    result = evaluate(runs[0], "-o", tmp_path / "out", *arguments)
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_models_without_patches_or_without_a_place(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(make_model_dir(tmp_path / "bare"))
    assert result.exit_code == 2
    assert "make some with `qadtr-brevitas attack" in result.stderr
    (tmp_path / "bare" / "patches").mkdir()
    assert "there are no patches in" in evaluate(tmp_path / "bare").stderr
    missing = evaluate(tmp_path / "nowhere", "--data", "shapes")
    assert (missing.exit_code, "there is no model in" in missing.stderr) == (1, True)
    assert evaluate().exit_code == 2
    assert "is given twice" in evaluate(runs[0], runs[0]).stderr


def test_models_trained_on_different_data(runs: list[Path], tmp_path: Path) -> None:
    other = make_model_dir(tmp_path / "other")
    (other / "recipe.yaml").write_text("data:\n  dataset: digits\n")
    result = evaluate(runs[0], other)
    assert result.exit_code == 2
    assert "the models were trained on different data (shapes, digits): choose one with --data" in result.stderr


def test_patch_larger_than_the_images(runs: list[Path], tmp_path: Path) -> None:
    import torch

    from qadtr_brevitas.attacks.patch import Patch

    path = Patch(texture=torch.ones(3, 20, 20), mask=torch.ones(20, 20).bool()).save(tmp_path / "big")
    result = evaluate(runs[0], "--patches", path, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "patch 'big': a 20x20 patch is larger than the 16x16 image" in result.stderr


def test_patch_of_another_channel_count(runs: list[Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"texture": torch.ones(1, 4, 4, dtype=torch.uint8), "mask": torch.ones(4, 4, dtype=torch.uint8)}
    header = {"format": "qadtr_brevitas.patch", "version": "1", "place": '"random"', "meta": "{}"}
    save_file(tensors, tmp_path / "gray.safetensors", metadata=header)
    result = evaluate(runs[0], "--patches", tmp_path, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "patch 'gray'" in result.stderr
    assert "1 channels and the images have 3" in result.stderr


def test_a_sticker_of_ones_own_is_scaled_turned_and_scored(runs: list[Path], tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "sticker.png"
    Image.new("RGBA", (40, 40), (255, 0, 0, 255)).save(picture)
    arguments = [runs[0], "--patches", picture, "--images", 6, "--precision", 4, "-o", tmp_path / "out"]
    result = evaluate(*arguments, "--patch-size", "4,3x6", "--at", "2,2", "--rotate", 45, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    made = [patch for patch in content["patches"] if not patch["variant"] and not patch["control"]]
    assert [(patch["name"], patch["attack"], patch["height"]) for patch in made] == [
        ("sticker 4x4", "sticker", 4),
        ("sticker 3x6", "sticker", 3),
    ]
    assert {patch["variant"]["degrees"] for patch in content["patches"] if patch["variant"]} == {0, 45}
    assert "ASR as given" in (tmp_path / "out" / "report.md").read_text()
    large = evaluate(*arguments)
    assert large.exit_code == 2
    assert "40x40 patch is larger than the 16x16 image" in large.stderr
    assert "--patch-size" in large.stderr


def test_attacks_on_each_image_are_made_on_every_source(runs: list[Path], tmp_path: Path) -> None:
    slot = "{name: a-qapa, steps: 1, sizes: [4], quantize_image: false}"
    arguments = [runs[0], "--surrogate", runs[1], "--attack", slot, "--eot", "4+32", "--images", "6", "-o", tmp_path]
    result = evaluate(*arguments, "--patches", runs[1] / "patches" / "lavan-4x4-4bit-target0.safetensors", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    sources = [(attack["source"]["name"], attack["source"]["precision"]) for attack in content["attacks"]]
    assert sources == [(name, bits) for name in ("first", "second") for bits in ("32", "4", "32+4")]
    assert {attack["family"] for attack in content["attacks"]} == {"a-qapa steps=1 sizes=[4] quantize_image=False"}
    assert [model["name"] for model in content["models"]] == ["first"]
    assert {cell["threat"] for cell in content["cells"]} == {"white-box", "eot", "transfer", "control"}
    assert "worst_case.csv" in result.stderr
    text = (tmp_path / "report.md").read_text()
    for words in ("## Attacks on each image", "Robust accuracy under all attacks together", "model to model"):
        assert words in text


def test_models_without_patches_can_be_attacked(tmp_path: Path) -> None:
    bare = make_model_dir(tmp_path / "bare")
    result = evaluate(
        bare,
        "--attack",
        NOISE,
        "--transfer",
        "none",
        "--images",
        "6",
    )
    assert result.exit_code == 0, result.output
    # Everything but the result in short is left to the report.
    assert "Trust: not audited" in result.stdout
    assert "own attacks: worst case" not in result.stdout
    assert "--all" in result.stderr
    assert "asr.png" in result.stderr


@pytest.mark.slow
def test_the_ensemble_is_added_for_the_worst_case_unless_refused(runs: list[Path], tmp_path: Path) -> None:
    search = "{name: lavan, size: 4, steps: 1, place: [0, 0], target: null}"
    arguments = [runs[0], "--attack", search, "--precision", 4, "--images", 4, "--json", "-o", tmp_path]
    result = evaluate(*arguments)
    assert result.exit_code == 0, result.output
    assert "patch-auto size=4 place=[0, 0] version=fast" in result.stderr
    assert "--ensemble no" in result.stderr
    content = json.loads(result.stdout)
    assert [attack["attack"] for attack in content["attacks"]] == ["lavan", "patch-auto"]
    alone = evaluate(*arguments, "--ensemble", "no")
    without = json.loads(alone.stdout)
    assert [attack["attack"] for attack in without["attacks"]] == ["lavan"]
    counts = [[case["attacks"] for case in document["worst_case"]] for document in (content, without)]
    assert [more - fewer for more, fewer in zip(*counts, strict=True)] == [1, 1]
    assert "patch-auto" not in alone.stderr


def test_patches_that_are_not_scored_are_told(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(runs[0], "--patches", runs[1] / "patches", "--transfer", "none", "--images", 6, "-o", tmp_path)
    assert result.exit_code == 2
    assert "patches was made on what is scored (but at " in result.stderr
    assert "--transfer none" in result.stderr
    both = [arg for run in runs[:2] for arg in ("--patches", run / "patches")]
    result = evaluate(runs[0], *both, "--transfer", "none", "--images", 6, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert "patches were made elsewhere (at " in result.stderr


def test_moved_patches_are_scored(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(
        runs[0], "--at", "1,2", "--shift", "3,10", "--rotate", "90", "--images", "6", "-o", tmp_path, "-q", "--all"
    )
    assert result.exit_code == 0, result.output
    for words in ("moved and turned", "at 1,2 shifted by 10", "at 1,2 rotated by 90 deg", "as made"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attack", "{name: a-qapa"], "command line: --attack: '{name: a-qapa' is not YAML"),
        (["--attack", "{name:a-qapa,steps:3}"], "sets nothing: write {name: NAME, KEY: VALUE}, with a space after"),
        (["--attack", "lavann"], "unknown attack 'lavann': did you mean 'lavan'?"),
        (["--attack", "{name: a-qapa, step: 3}"], "--attack.step: unknown key 'step': did you mean 'steps'?"),
        (
            ["--attack", "a-qapa"],
            "{name: a-qapa, quantize_image: false}",
        ),
        (["--attack", "{name: a-qapa, steps: -1}"], "--attack.steps: must be at least 0, got -1"),
        (["--attack", "gap"], "make it with `qadtr-brevitas attack MODEL_DIR --attack gap`"),
        (["--eot", "32+4"], "--eot 32+4 says what an --attack is made on"),
        (["--attack", "sparse-rs", "--eot", "4"], "--eot 4 is no mean: give several precisions, as 8+4+2"),
        (["--attack", "sparse-rs", "--eot", "8+4"], "no precision 8: it was converted for 32, 4"),
        (["--surrogate", "nowhere", "--transfer", "none"], "there is no model in"),
        (["--at", "1"], "'1' is not a row and a column, such as 2,2"),
        (["--at", "1,-1"], "'1,-1' is not a row and a column"),
        (["--shift", "0,3"], "'0,3' is not pixels, at least 1"),
        (["--shift", "3"], "has no place to be shifted from: give one with --at ROW,COL"),
        (["--at", "4,4", "--shift", "12"], "give --shift up to 8"),
        (["--rotate", "0"], "'0' is not angles other than 0"),
        (["--rotate", "nan"], "'nan' is not angles other than 0"),
        (["--shard", "3/2"], "give k/n with k from 1 to n"),
        (["--cells", "nowhere"], "there are no cells in nowhere"),
    ],
)
def test_bad_usage_of_attacks_moves_and_shares(
    runs: list[Path], tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = evaluate(runs[0], "-o", tmp_path / "out", *arguments)
    assert result.exit_code in (1, 2), result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_help() -> None:
    result = evaluate("--help")
    assert result.exit_code == 0
    for words in ("--patches", "--images", "Examples:", "MODEL_DIR..."):
        assert words in result.output


def test_certification_needs_no_patches_and_its_masks_need_a_certification(tmp_path: Path) -> None:
    model = make_model_dir(tmp_path / "model", precisions=(4,))
    result = evaluate(model, "--certify", "4", "--certify-masks", 2, "--images", 6, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    (cell,) = json.loads(result.stdout)["certified"]
    assert (cell["size"], cell["masks"], cell["certified_accuracy"]["n"]) == (4, 4, 6)
    assert cell["certified_accuracy"]["count"] <= cell["clean_accuracy"]["count"]
    assert "10 passes" in result.stderr
    several = evaluate(
        model, *("--certify", "2,3x1", "--certify-method", "one-round", "--certify-images", 4, "--images", 6, "--json")
    )
    found = [(c["size"], c["method"], c["certified_accuracy"]["n"]) for c in json.loads(several.stdout)["certified"]]
    assert found == [(2, "one round", 4), ("3x1", "one round", 4)]
    behind = evaluate(model, *("--clean", "--defend", "2", "--certify-masks", 3, "--images", 6, "--json"))
    assert [cell["model"] for cell in json.loads(behind.stdout)["clean"]] == [
        "model",
        "model defended (2x2, double masking)",
    ]
    denser = evaluate(model, *("--certify", "4", "--certify-masks", 2, "--certify-overlap", 2, "--images", 6, "--json"))
    (cell,) = json.loads(denser.stdout)["certified"]
    assert (cell["overlap"], cell["masks"] > 4) == (2, True)
    wrong = evaluate(model, "--certify", "2,x")
    assert (wrong.exit_code, "'x'" in wrong.stderr, "3x10" in wrong.stderr) == (2, True, True)
    for option, value in (("--certify-images", 3), ("--certify-method", "one-round")):
        assert f"{option} needs --certify" in evaluate(model, option, value).stderr
    refused = evaluate(model, "--certify-masks", 2)
    assert refused.exit_code == 2
    assert "--certify-masks needs --certify" in refused.stderr


def test_attacks_of_an_evaluation_are_compiled_where_asked(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    # The default backend takes many seconds.
    monkeypatch.setattr(entries, "compile_passes", partial(entries.compile_passes, backend="aot_eager"))
    command = [runs[0], "--attack", "fgsm", "--precision", "4", "--ensemble", "no", "--compile"]
    result = evaluate(*command, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("compiled the passes of attacks") == 1


def test_compiled_certificates_are_those_of_the_network(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(entries, "compile_passes", partial(entries.compile_passes, backend="eager"))
    command = [runs[0], "--clean", "--precision", "4", "--certify", "4", "--certify-masks", 2, "--images", 30, "--json"]
    plain = evaluate(*command, "-o", tmp_path / "plain")
    compiled = evaluate(*command, "--compile", "-o", tmp_path / "compiled")
    assert compiled.stderr.count("compiled the passes without gradients at 4 bit") == 1
    ours, reference = (json.loads(result.stdout)["certified"][0] for result in (compiled, plain))
    assert reference["certified_accuracy"]["count"] > 0
    assert ours == reference
