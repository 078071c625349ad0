from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qadtr_brevitas.core.errors import CheckpointError, DataError, UsageError
from qadtr_brevitas.evaluation import evaluate
from qadtr_brevitas.evaluation.entries import LoadedModel, NamedPatch
from qadtr_brevitas.evaluation.grid import controls
from qadtr_brevitas.evaluation.report import AttackCell, EvaluationReport
from tests.evaluation.fakes import Reader, coded_split, make_grid, reader, small_report, white_patch


def run(loaded_models: list[LoadedModel], patches: list[NamedPatch], output: Path, **settings: Any) -> EvaluationReport:
    progress = settings.pop("progress", None)
    return evaluate(make_grid(loaded_models, patches, **settings), output=output, progress=progress)


def cell(
    report: EvaluationReport, *, patch: str, precision: str, target: int | None = 2, model: str = "reader"
) -> AttackCell:
    where = (model, precision, patch, target)
    return next(c for c in report.cells if (c.model, c.precision, c.attack, c.target) == where)


def test_patch_that_always_wins_has_asr_one_without_the_images_of_its_target(tmp_path: Path) -> None:
    report = run([reader()], [white_patch()], tmp_path)
    found = cell(report, patch="white", precision="4")
    assert (found.asr.value, found.asr.count, found.asr.n) == (1.0, 30, 30)
    assert (found.asr_all.count, found.asr_all.n) == (40, 40)
    assert (found.untargeted.count, found.untargeted.n) == (30, 40)
    assert (found.clean_accuracy.count, found.robust_accuracy.count) == (40, 10)
    assert found.asr.low == pytest.approx(0.886, abs=1e-3)


def test_noise_of_the_same_size_is_the_control_for_every_target(tmp_path: Path) -> None:
    patches = [white_patch("a", target=2), white_patch("b", target=None), white_patch("c", side=3, target=1)]
    report = run([reader()], patches, tmp_path)
    noise = [patch for patch in report.patches if patch.control]
    assert [(patch.name, patch.height) for patch in noise] == [("noise 2x2", 2), ("noise 3x3", 3)]
    scored = [(c.attack, c.target) for c in report.cells if c.threat == "control" and c.precision == "8"]
    assert scored == [("noise 2x2", 2), ("noise 2x2", None), ("noise 3x3", 1)]
    assert cell(report, patch="noise 2x2", precision="8").asr.count == 0


def test_control_has_the_shape_of_its_patch_and_depends_on_the_seed() -> None:
    patch = white_patch()
    disc = NamedPatch("disc", type(patch.patch)(texture=torch.ones(3, 2, 2), mask=torch.eye(2).bool()))
    square, round_ = controls([patch, disc, white_patch("same")], seed=0)
    assert (square.name, round_.name) == ("noise 2x2", "noise 2x2 (2)")
    assert torch.equal(round_.patch.mask, disc.patch.mask)
    (beside,) = controls([NamedPatch("beside", replace(patch.patch, keep_out=(0, 0, 1, 1)))], seed=0)
    assert beside.patch.keep_out == (0, 0, 1, 1)
    assert torch.equal(square.patch.texture, controls([patch], seed=0)[0].patch.texture)
    assert not torch.equal(square.patch.texture, controls([patch], seed=1)[0].patch.texture)


def test_white_box_is_same_weights_and_same_precision(tmp_path: Path) -> None:
    twin = reader("twin", fingerprint="reader-weights")
    report = run([reader(), reader("other"), twin], [white_patch(precision=4)], tmp_path)
    threats = {(c.model, c.precision): c.threat for c in report.cells if c.attack == "white"}
    white_box = {where for where, threat in threats.items() if threat == "white-box"}
    assert white_box == {("reader", "4"), ("twin", "4")}
    assert threats["reader", "8"] == threats["other", "4"] == "transfer"


def test_each_precision_is_judged_at_that_precision(tmp_path: Path) -> None:
    report = run([reader(model=Reader(fooled_at=(4,)))], [white_patch()], tmp_path)
    assert cell(report, patch="white", precision="4").asr.value == 1
    assert cell(report, patch="white", precision="8").asr.value == 0
    assert {c.precision: c.accuracy.value for c in report.clean} == {"8": 1.0, "4": 1.0}


def test_model_that_is_never_right_has_no_asr(tmp_path: Path) -> None:
    report = run([reader(model=Reader(always=3))], [white_patch(target=3)], tmp_path)
    found = cell(report, patch="white", precision="4", target=3)
    assert (found.asr.value, found.asr.n, found.asr_all.value) == (None, 0, 1.0)


def test_precision_is_restored_and_given_precisions_are_kept_in_order(tmp_path: Path) -> None:
    loaded = reader()
    report = run([loaded], [white_patch()], tmp_path, precisions=["4"])
    assert report.models[0].precisions == ("4",)
    assert str(loaded.model.switch.precision) == "8"


@pytest.mark.parametrize(
    ("transfer", "moved"), [("all", {"made at 4", "made at 32"}), ("float", {"made at 32"}), ("none", set())]
)
def test_moved_patches_are_chosen_and_the_rest_is_not_computed(tmp_path: Path, transfer: str, moved: set[str]) -> None:
    loaded = reader()
    # Of two sizes: patches alike in every pixel share their cells.
    patches = [white_patch("made at 4", precision=4), white_patch("made at 32", precision=32, side=3)]
    report = run([loaded], patches, tmp_path, transfer=transfer)
    assert {c.attack for c in report.cells if c.threat == "transfer"} == moved
    assert [(c.attack, c.precision) for c in report.cells if c.threat == "white-box"] == [("made at 4", "4")]
    assert {c.precision for c in report.cells if c.threat == "control"} == {"8", "4"}
    assert loaded.model.forwards == len({(c.attack, c.precision) for c in report.cells}) + 2


def test_finished_evaluation_is_not_computed_again(tmp_path: Path) -> None:
    first = reader()
    report = run([first], [white_patch()], tmp_path)
    assert first.model.forwards == 2 * (1 + 2)  # two precisions; clean, patch and noise
    again = reader()
    repeated = run([again], [white_patch()], tmp_path)
    assert again.model.forwards == 0
    assert repeated.model_dump(exclude={"created"}) == report.model_dump(exclude={"created"})


def test_killed_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def stop(done: int, total: int, note: str) -> None:
        assert (total, bool(note)) == (6, True)
        if done == 4:
            raise Killed

    killed = reader()
    with pytest.raises(Killed):
        run([killed], [white_patch()], tmp_path, progress=stop)
    assert killed.model.forwards == 4
    loaded, steps = reader(), []
    run([loaded], [white_patch()], tmp_path, progress=lambda done, total, note: steps.append(done))
    assert (loaded.model.forwards, steps) == (2, [1, 2, 3, 4, 5, 6])


def test_cells_follow_content_and_not_names(tmp_path: Path) -> None:
    run([reader()], [white_patch()], tmp_path)
    renamed = reader("renamed", fingerprint="reader-weights")
    run([renamed], [white_patch("renamed")], tmp_path)
    assert renamed.model.forwards == 0
    retrained = reader(fingerprint="other weights")
    run([retrained], [white_patch()], tmp_path)
    assert retrained.model.forwards == 6
    reseeded = reader()
    run([reseeded], [white_patch()], tmp_path, seed=1)
    assert reseeded.model.forwards == 4  # clean images have no placement


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 1}'])
def test_damaged_cell_is_computed_again(tmp_path: Path, damage: str) -> None:
    report = run([reader()], [white_patch()], tmp_path)
    victim = sorted((tmp_path / "cells").iterdir())[0]
    victim.write_text(damage)
    loaded = reader()
    repeated = run([loaded], [white_patch()], tmp_path)
    assert loaded.model.forwards == 1
    assert repeated.cells == report.cells


def test_cell_of_other_images_is_not_taken(tmp_path: Path) -> None:
    run([reader()], [white_patch()], tmp_path)
    loaded = reader()
    run([loaded], [white_patch()], tmp_path, split=coded_split(20))
    assert loaded.model.forwards == 6


def test_cells_of_another_batch_size_are_not_taken(tmp_path: Path) -> None:
    # Rounding differs between batch sizes, and at few bits moves values to other levels.
    run([reader()], [white_patch()], tmp_path)
    for size, forwards in ((20, 12), (20, 0), (40, 0), (1000, 0), (256, 0)):
        loaded = reader()
        run([loaded], [white_patch()], tmp_path, batch_size=size)
        assert loaded.model.forwards == forwards


def test_several_models_and_targets(tmp_path: Path) -> None:
    report = small_report(tmp_path, models=("reader", "other"), targets=(2, 1))
    assert len(report.cells) == 2 * 2 * (8 + 2)
    assert report.patch("other-8-1").source is not None


def test_errors_name_the_rule(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'big'.*9x9.*8x8"):
        run([reader()], [white_patch("big", side=9)], tmp_path)
    with pytest.raises(UsageError, match=r"no precision 2: it was converted for 8, 4"):
        run([reader()], [white_patch()], tmp_path, precisions=[2])
    with pytest.raises(UsageError, match=r"two models are called 'reader'"):
        run([reader(), reader()], [], tmp_path)
    with pytest.raises(UsageError, match=r"two patches are called 'white'"):
        run([reader()], [white_patch(), white_patch()], tmp_path)
    with pytest.raises(UsageError, match=r"aims at class 7, the data set has 4 classes.*--data"):
        run([reader()], [white_patch(target=7)], tmp_path)
    unknown = replace(white_patch(), patch=white_patch().patch.with_meta(precision="4 bits"))
    with pytest.raises(UsageError, match=r"patch 'white': '4 bits' is not a precision"):
        run([reader()], [unknown], tmp_path)
    with pytest.raises(DataError, match=r"coded .*4 classes.*9x9.*reader .*8x8"):
        run([reader()], [], tmp_path, split=coded_split(side=9))


def test_unwritable_output_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "cells").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write"):
        run([reader()], [white_patch()], tmp_path)
