"""What the tests of analyses share: tiny switchable networks and the procedural shapes."""

from __future__ import annotations

from pathlib import Path

from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.data.shapes import Shapes
from qadtr_brevitas.evaluation.entries import LoadedModel, load_models
from qadtr_brevitas.reproduce.analyses import Analysis, AnalysisData, Record, run_analysis
from qadtr_brevitas.reproduce.analyses.document import AnalysisReport, FacetValue, read_analysis
from tests.evaluation.models import CLASSES, SIDE, make_model_dir, train_split

LAVAN = Lavan(size=4, steps=2, batch_size=16)


def make_models(folder: Path, *, precisions: tuple[int, ...] = (32, 4), count: int = 1) -> list[LoadedModel]:
    """Return networks that classify some of the shapes correctly."""
    return load_models([make_model_dir(folder / f"net{n}", precisions=precisions, name=n) for n in range(count)])


def shapes(images: int = 12) -> AnalysisData:
    """Return the procedural shapes, with training images."""
    test = Shapes(image_size=SIDE, classes=CLASSES, test_images=images).load("test")
    return AnalysisData("shapes", test, load_train=train_split)


def analyze(
    analysis: Analysis, models: list[LoadedModel], output: Path, data: AnalysisData | None = None
) -> AnalysisReport:
    """Run an analysis and read what it wrote."""
    return read_analysis(run_analysis(analysis, models, data or shapes(), output, seed=0))


def select(report: AnalysisReport, what: str, **facets: FacetValue) -> list[Record]:
    """Return the records of one quantity that have these facets or fields."""

    def matches(record: Record) -> bool:
        values = {**record.facets, "model": record.model, "precision": record.precision}
        return record.what == what and all(values.get(name) == value for name, value in facets.items())

    return [record for record in report.records if matches(record)]


def patch_folder(output: Path) -> Path:
    """Return the folder in which an analysis of one model keeps the patches of its one attack."""
    (folder,) = output.glob("patches/*/*")
    return folder
