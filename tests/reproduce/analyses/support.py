"""What the tests of analyses share: two tiny switchable networks and the procedural shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.data.shapes import Shapes
from qadtr_brevitas.evaluation.entries import LoadedModel, load_subjects
from qadtr_brevitas.reproduce.analyses import Analysis, AnalysisData, run_analysis
from qadtr_brevitas.reproduce.analyses.document import AnalysisReport, RecordFacts, read_analysis
from tests.evaluation.models import CLASSES, SIDE, make_model_dir, train_split

LAVAN = Lavan(size=4, steps=2, batch_size=16)


def make_subjects(folder: Path, *, precisions: tuple[int, ...] = (32, 4), count: int = 1) -> list[LoadedModel]:
    """Networks that know some of the shapes."""
    return load_subjects([make_model_dir(folder / f"net{n}", precisions=precisions, name=n) for n in range(count)])


def shapes(images: int = 12) -> AnalysisData:
    """The procedural shapes, with training images."""
    test = Shapes(image_size=SIDE, classes=CLASSES, test_images=images).load("test")
    return AnalysisData("shapes", test, load_train=train_split)


def analyze(
    analysis: Analysis, subjects: list[LoadedModel], output: Path, data: AnalysisData | None = None
) -> AnalysisReport:
    """Runs an analysis and reads what it wrote."""
    return read_analysis(run_analysis(analysis, subjects, data or shapes(), output, seed=0))


def values(report: AnalysisReport, what: str, **facets: Any) -> list[RecordFacts]:
    """The records of one kind that have these facets, or fields."""

    def fits(record: RecordFacts) -> bool:
        told: Mapping[str, Any] = {**record.facets, "model": record.model, "precision": record.precision}
        return record.what == what and all(told.get(name) == value for name, value in facets.items())

    return [record for record in report.records if fits(record)]


def patch_folder(output: Path) -> Path:
    """Where an analysis of one model keeps the patches it made with its one attack."""
    (folder,) = output.glob("patches/*/*")
    return folder
