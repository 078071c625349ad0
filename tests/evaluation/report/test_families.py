"""Patches that were made otherwise are not averaged over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qadtr_brevitas.evaluation import CellStore, compute, make_report
from qadtr_brevitas.evaluation.report import PatchFacts
from qadtr_brevitas.evaluation.report.markdown import markdown
from qadtr_brevitas.evaluation.report.views import disambiguate_patches
from tests.evaluation.fakes import make_grid, reader, white_patch


def facts(name: str, *, side: int = 2, **settings: Any) -> PatchFacts:
    patch_entry = white_patch(name, side=side)
    return patch_entry.facts.model_copy(update={"attack": "lavan", "settings": settings})


def test_settings_in_which_patches_differ_make_families() -> None:
    made = [
        facts("a", init="image", steps=100, target=1, scale=(0.9, 1.1)),
        facts("b", init="image", steps=100, target=2, scale=[0.9, 1.1]),
        facts("c", init="uniform", steps=100, target=1, scale=(0.9, 1.1)),
        facts("d", init="uniform", steps=300, target=1, side=3),
    ]
    families = [patch.family for patch in disambiguate_patches(made)]
    assert families == ["lavan 2x2 init=image", "lavan 2x2 init=image", "lavan 2x2 init=uniform", "lavan 3x3"]


def test_patches_made_alike_are_one_family() -> None:
    made = [facts(name, steps=100, target=target) for target, name in enumerate("abc")]
    assert {patch.family for patch in disambiguate_patches(made)} == {"lavan 2x2"}


def test_the_report_has_a_table_for_each(tmp_path: Path) -> None:
    patches = [white_patch("picture"), white_patch("noise", target=1)]
    for patch_entry, init in zip(patches, ("image", "uniform"), strict=True):
        patch_entry.patch.meta["settings"] = {"init": init, "steps": 5}
    grid, store = make_grid([reader()], patches), CellStore.open(tmp_path / "cells")
    compute(grid.jobs(), store)
    text = markdown(make_report(grid, store, device="cpu"))
    titles = [line for line in text.splitlines() if line.startswith("## ") and "clean accuracy and ASR" in line]
    assert [title.split(":")[0] for title in titles] == ["## lavan 2x2 init=image", "## lavan 2x2 init=uniform"]
