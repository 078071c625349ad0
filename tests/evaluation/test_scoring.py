"""The worst case over attacks, against what counting by hand gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.evaluation import CellStore, Grid, NamedAttack, compute, make_report
from qadtr_brevitas.evaluation.jobs import ChunkJob, PatchJob
from qadtr_brevitas.evaluation.report import EvaluationReport, WorstCase
from qadtr_brevitas.evaluation.variants import PatchVariants
from qadtr_brevitas.quant.inference import parse_mode
from tests.evaluation.fakes import CLASSES, Whiten, coded_split, make_grid, reader, white_patch

IMAGES = 40


def random_report(output: Path) -> tuple[Grid, dict[str, dict[str, Tensor]], EvaluationReport]:
    """A grid whose cells hold random predictions, and these by victim and by attack."""
    # Of different sizes: patches alike in every pixel share their cells.
    patches = [white_patch("own", precision=4), white_patch("mean", side=3), white_patch("foreign", side=4, model="x")]
    patches[1] = replace(patches[1], patch=patches[1].patch.with_meta(precision="8+4"))
    moved = PatchVariants(at=(1, 1)).variants(patches, (8, 8))
    attack = NamedAttack("whiten", Whiten())
    grid = make_grid([reader()], [*patches, *moved], attacks=[attack], eot=[parse_mode("8+4")], batch_size=15)
    store, known = CellStore.open(output), {victim.name: {} for victim in grid.victims}
    for job in grid.jobs():
        if isinstance(job, PatchJob):
            found = torch.randint(CLASSES, (IMAGES,))
            # Mostly right, or nothing would be left of the worst case.
            found = torch.where(torch.rand(IMAGES) < 0.8, coded_split().labels, found)
            store.write(job.key, found)
            known[job.victim.name][job.patch_entry.name if job.patch_entry else "clean"] = found
        elif isinstance(job, ChunkJob):
            chunk = {victim.name: torch.randint(CLASSES, (len(job.chunk),)) for victim in job.victims}
            right = coded_split().labels[list(job.chunk)]
            chunk = {name: torch.where(torch.rand(len(right)) < 0.9, right, found) for name, found in chunk.items()}
            store.write_chunk(job.key, chunk)
            for name, found in chunk.items():
                before = known[name].get(job.attack.facts.name, found[:0])
                known[name][job.attack.facts.name] = torch.cat([before, found])
    return grid, known, make_report(grid, store, device="cpu")


def test_worst_case_is_what_counting_gives(tmp_path: Path) -> None:
    grid, known, report = random_report(tmp_path)
    labels = coded_split().labels.tolist()
    own = {
        "8": ["mean", "whiten on reader at 8", "whiten on reader at 8+4"],
        "4": ["own", "mean", "whiten on reader at 4", "whiten on reader at 8+4"],
    }
    everything = ["own", "mean", "foreign", *(f"whiten on reader at {bits}" for bits in ("8", "4", "8+4"))]
    for victim in grid.victims:
        predictions = known[victim.name]
        for scope, names in (("own", own[str(victim.precision)]), ("all", everything)):
            count, single = 0, dict.fromkeys(names, 0)
            for index, label in enumerate(labels):
                right = {name: bool(predictions[name][index] == label) for name in names}
                clean = bool(predictions["clean"][index] == label)
                count += clean and all(right.values())
                for name in names:
                    single[name] += clean and right[name]
            case = found(report, str(victim.precision), scope)
            assert (case.robust_accuracy.count, case.robust_accuracy.n, case.attacks) == (count, IMAGES, len(names))
            assert case.mean == pytest.approx(sum(single.values()) / len(names) / IMAGES)
            cells = {c.attack: c.robust_accuracy.count for c in report.cells if c.precision == str(victim.precision)}
            assert {name: cells[name] for name in names} == single
            assert count <= min(single.values())


def found(report: EvaluationReport, precision: str, scope: str) -> WorstCase:
    return next(case for case in report.worst_case if (case.precision, case.scope) == (precision, scope))


def test_without_attacks_there_is_no_worst_case(tmp_path: Path) -> None:
    grid, store = make_grid([reader()]), CellStore.open(tmp_path)
    compute(grid.jobs(), store)
    assert make_report(grid, store, device="cpu").worst_case == ()


def test_foreign_attacks_alone_have_no_case_of_their_own(tmp_path: Path) -> None:
    grid, store = make_grid([reader()], [white_patch(model="x")]), CellStore.open(tmp_path)
    compute(grid.jobs(), store)
    report = make_report(grid, store, device="cpu")
    assert {(case.scope, case.attacks, case.robust_accuracy.count) for case in report.worst_case} == {("all", 1, 10)}
