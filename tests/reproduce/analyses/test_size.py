from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.reproduce.analyses.size import Size
from tests.reproduce.analyses.support import LAVAN, analyze, patch_folder, select

pytestmark = pytest.mark.slow


def test_every_size_has_patches_of_its_own(models: list[LoadedModel], tmp_path: Path) -> None:
    report = analyze(Size(attack=LAVAN, sizes=(3, 6), targets=(0, 1)), models, tmp_path)
    found = select(report, "asr", precision="4")
    assert [(record.facets["size"], record.facets["attack"]) for record in found] == [
        ("3x3", "lavan"),
        ("6x6", "lavan"),
    ]
    assert len(select(report, "asr of a random patch")) == 2 * 2
    made = sorted(path.name for path in patch_folder(tmp_path).glob("*.safetensors"))
    assert made == [f"lavan-{size}-32bit-target{target}.safetensors" for size in ("3x3", "6x6") for target in (0, 1)]


def test_patches_of_other_settings_have_a_line_of_their_own(models: list[LoadedModel], tmp_path: Path) -> None:
    for steps in (1, 2):
        analyze(Size(attack=replace(LAVAN, steps=steps), sizes=(4,), targets=(0,)), models, tmp_path / f"{steps}")
    patches = tuple(str(patch_folder(tmp_path / f"{steps}")) for steps in (1, 2))
    report = analyze(Size(patches=patches), models, tmp_path / "size")
    found = select(report, "asr", precision="4")
    assert [record.facets["attack"] for record in found] == ["lavan steps=1", "lavan steps=2"]


def test_an_attack_without_a_single_size_is_refused(models: list[LoadedModel], tmp_path: Path) -> None:
    rectangle = replace(LAVAN, shape="rectangle", size=(3, 4))
    with pytest.raises(UsageError, match=r"lavan.*no single size"):
        analyze(Size(attack=rectangle), models, tmp_path)
