"""Every shipped study runs at its smallest scale, in one work folder, and runs nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qadtr_brevitas.cli.main import main
from qadtr_brevitas.config.shipped import recipe_description, shipped_studies
from qadtr_brevitas.reproduce.paper import paper_table
from qadtr_brevitas.reproduce.study.file import SCALE_NAMES, load_study
from qadtr_brevitas.reproduce.study.networks import make_networks

NAMES = list(shipped_studies())
TABLES = [number for number in range(2, 22) if number != 17]


def test_every_table_and_figure_has_a_study() -> None:
    wanted = [f"table{number:02}" for number in TABLES] + [f"figure{number:02}" for number in (1, 3, 4)]
    assert set(wanted) <= set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_study_describes_itself_and_names_existing_recipes(name: str) -> None:
    path = shipped_studies()[name]
    assert 10 < len(recipe_description(path)) < 125
    assert f"qadtr-brevitas study {name}\n" in path.read_text(encoding="utf-8")
    for scale in SCALE_NAMES:
        study = load_study(name, scale=scale)
        assert study.paper == (name if name.startswith(("table", "figure")) else None)
        assert make_networks(study).by_name


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("table")])
def test_every_row_of_the_paper_has_a_model(name: str) -> None:
    full, table = load_study(name, scale="full"), paper_table(name)
    said = [model.paper for model in full.models.values() if model.paper]
    papers = [paper for entry in said for paper in (entry.values() if isinstance(entry, dict) else [entry])]
    subjects = {facets.get("subject") for facets, _ in table.rows} | {column.get("subject") for column in table.columns}
    for subject in subjects - {None}:
        assert any(_plain(subject) in _plain(paper) for paper in papers), f"no model stands for {subject}"


def _plain(word: str) -> str:
    return "".join(filter(str.isalnum, word.lower()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


def run_smoke(name: str, folder: Path) -> int:
    return main(["study", name, "--scale", "smoke", "-o", str(folder / name), "--device", "cpu", "-q"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table11", *(name for name in NAMES if name != "table11")])
def test_the_smallest_scale_runs(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_smoke(name, folder) == 0, capsys.readouterr().err
    facts = json.loads((folder / name / "study.json").read_text())
    assert facts["scale"] == "smoke"
    assert facts["reports"] or facts["analyses"]
    for place in facts["reports"]:
        report = json.loads((folder / name / place / "report.json").read_text())
        assert {model["name"] for model in report["models"]} <= set(facts["rows"])
    for place in facts["analyses"]:
        assert (folder / name / place / "analysis.json").is_file()
    assert "<html" in (folder / name / "report.html").read_text()


@pytest.mark.slow
def test_a_finished_study_runs_nothing_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_smoke("table11", folder) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    before |= {path: path.stat().st_mtime_ns for path in folder.rglob("report.json")}
    assert len(before) > 10
    assert run_smoke("table11", folder) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    dry_run = ["study", "table11", "--scale", "smoke", "-o", str(folder / "table11"), "--dry-run", "--json"]
    capsys.readouterr()
    assert main(dry_run) == 0
    assert all(part["there"] for part in json.loads(capsys.readouterr().out))
