"""The results of a study: study.json for the report page, and its scores in one table as Markdown and CSV."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from qadtr_brevitas.core.files import write_atomically, write_json
from qadtr_brevitas.core.table import Cell, Table
from qadtr_brevitas.evaluation.metrics import mean
from qadtr_brevitas.evaluation.report import read_report, versions
from qadtr_brevitas.evaluation.report.layout import EMPTY, bits, interval
from qadtr_brevitas.evaluation.report.views import FLOAT
from qadtr_brevitas.pipeline.directories import (
    PAGE_FILE,
    STUDY_FILE,
    STUDY_SETTINGS_FILE,
    STUDY_TEXT_FILE,
    STUDY_VALUES_FILE,
)
from qadtr_brevitas.quant.inference import sorted_modes
from qadtr_brevitas.reproduce.page import build_page, read_inputs, write_page
from qadtr_brevitas.reproduce.page.study_file import StudyFacts, StudyRow
from qadtr_brevitas.reproduce.paper import paper_table
from qadtr_brevitas.reproduce.study.file import dump_json
from qadtr_brevitas.reproduce.study.plan import NetworkEvaluation, StudyPlan
from qadtr_brevitas.reproduce.study.scores import CERTIFIED, DEFENDED, StudyScore, study_scores
from qadtr_brevitas.reproduce.study.sections import Study

_HEADER = (
    "model",
    "label",
    "evaluation",
    "seed",
    "precision",
    "what",
    "threat",
    "made_on",
    "made_at",
    "targets",
    "value",
    "count",
    "n",
    "low",
    "high",
)
_NOTE = (
    "In percent: mean over targets and seeds, with the standard deviation over seeds where there are several. ASR: "
    "of the images that are classified correctly without the attack and are not of the target class."
)
_CERTIFIED_NOTE = (
    "Certified: right whatever one patch of the size shows and wherever it lies; defended: right without a patch, "
    "under the same masks. Intervals of 95 % (Wilson), of several seeds that of the smallest number of images."
)


_SMOKE = "smoke"


def write_study(study: Study, plan: StudyPlan, folder: Path, *, scale: str, command: str) -> list[Path]:
    """Write study.json, study.yaml, study.md, figures.csv and the page of a study whose steps are finished.

    Args:
        study: the study.
        plan: its steps.
        folder: folder of the study.
        scale: the scale it was run at.
        command: command line.

    Returns:
        The paths of the files.

    Raises:
        CheckpointError: a report cannot be read, or a file cannot be written.
    """
    scores = study_scores(plan)
    settings = f"# As it was run, at scale {scale}.\n{dump_json(study)}"
    study = _stamped(study, plan, scale)
    facts = _facts(study, plan, folder, scale=scale, command=command)
    write_json(folder / STUDY_FILE, facts.model_dump(mode="json"))
    texts = {
        STUDY_SETTINGS_FILE: settings,
        STUDY_TEXT_FILE: _markdown(study, scores, scale=scale, command=command),
        STUDY_VALUES_FILE: _csv(study, scores),
    }
    for name, text in texts.items():
        write_atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    page = build_page(read_inputs([folder]), title=study.title, command=command)
    return [folder / STUDY_FILE, *(folder / name for name in texts), *write_page(page, folder / PAGE_FILE)]


def summary_tables(study: Study, plan: StudyPlan, *, scale: str) -> list[Table]:
    """Return a table for each evaluation: accuracies, ASR and certificates of every model at every precision."""
    return _tables(_stamped(study, plan, scale), study_scores(plan))


def left_open(study: Study) -> tuple[str, ...]:
    """Return what the paper does not say of the table that a study is of, and what it contradicts."""
    return paper_table(study.paper).notes if study.paper else ()


def _stamped(study: Study, plan: StudyPlan, scale: str) -> Study:
    """Return a study whose title says, at scale smoke, that its values are no results and which images they are of."""
    if scale != _SMOKE:
        return study
    data = [read_report(evaluated.step.folder).data for evaluated in plan.evaluations]
    images = " and ".join(dict.fromkeys(f"{part.images} images of {part.name}" for part in data))
    return study.model_copy(update={"title": f"NOT A RESULT, smoke test{images and f' on {images}'}: {study.title}"})


def _facts(study: Study, plan: StudyPlan, folder: Path, *, scale: str, command: str) -> StudyFacts:
    def relative(path: Path) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    return StudyFacts(
        title=study.title,
        paper=study.paper,
        scale=scale,
        command=command,
        versions=versions(),
        reports=tuple(relative(evaluated.step.folder) for evaluated in plan.evaluations),
        rows={evaluated.step.report_name: _row(study, evaluated) for evaluated in plan.evaluations},
        analyses=tuple(relative(step.folder) for step in plan.analyses),
    )


def _row(study: Study, evaluated: NetworkEvaluation) -> StudyRow:
    section, scored = evaluated.network.section, evaluated.step.scored
    paper = section.paper.get(evaluated.evaluation) if isinstance(section.paper, dict) else section.paper
    suffix = f" ({evaluated.evaluation})" if len(study.evaluations) > 1 else ""
    return StudyRow(
        label=f"{section.label or evaluated.network.model}{suffix}",
        paper=paper,
        seed=evaluated.network.seed,
        model=evaluated.network.model,
        evaluation=evaluated.evaluation,
        precision=str(scored[0]) if len(scored) == 1 else None,
    )


def _tables(study: Study, scores: Sequence[StudyScore]) -> list[Table]:
    return [_table(study, scores, evaluation) for evaluation in study.evaluations]


def _table(study: Study, scores: Sequence[StudyScore], evaluation: str) -> Table:
    scores = [score for score in scores if score.evaluation == evaluation]
    columns = sorted_modes({score.precision for score in scores})
    rows: list[tuple[str, ...] | None] = []
    for model in dict.fromkeys(score.model for score in scores):
        own = _shown([score for score in scores if score.model == model])
        label = study.models[model].label or model
        for number, what in enumerate(dict.fromkeys(score.what for score in own)):
            cells = [[s for s in own if (s.what, s.precision) == (what, column)] for column in columns]
            rows.append((label if number == 0 else "", what, *map(_cell, cells)))
            if any(score.kind in (DEFENDED, CERTIFIED) for found in cells for score in found):
                rows.append(("", f"{what}, 95 % interval", *map(_interval, cells)))
        rows.append(None)
    title = f"{study.title}: {evaluation}"
    certified = any(score.kind == CERTIFIED for score in scores)
    notes = (_NOTE, _CERTIFIED_NOTE) if certified else (_NOTE,)
    return Table(title, ("model", "", *map(bits, columns)), tuple(rows[:-1]), notes, labels=2)


def _shown(scores: Sequence[StudyScore]) -> list[StudyScore]:
    """Return the scores without transfer between precisions where white-box scores exist, except from 32 bit."""
    white_box = {(score.kind, score.made_on) for score in scores if score.threat == "white-box"}
    return [
        score
        for score in scores
        if score.threat != "transfer" or score.made_at == FLOAT or (score.kind, score.made_on) not in white_box
    ]


def _cell(scores: Sequence[StudyScore]) -> str:
    """Return the mean over networks in percent, with the standard deviation if there are several."""
    if not scores:
        return EMPTY
    values = [100 * score.value for score in scores]
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _interval(scores: Sequence[StudyScore]) -> str:
    return interval(mean([score.share for score in scores if score.share]))


def _markdown(study: Study, scores: Sequence[StudyScore], *, scale: str, command: str) -> str:
    seeds = ", ".join(map(str, study.seeds))
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    facts = f"- Command: `{command}`\n- Scale {scale}, training seeds {seeds}\n- Versions: {packages}"
    parts = [f"# {study.title}", facts, *(table.markdown() for table in _tables(study, scores))]
    if open_points := left_open(study):
        parts += ["## What the paper leaves open", "\n".join(f"- {point}" for point in open_points)]
    return "\n\n".join(parts) + "\n"


def _csv(study: Study, scores: Sequence[StudyScore]) -> str:
    rows: list[tuple[Cell, ...]] = []
    for score in scores:
        label = study.models[score.model].label or score.model
        share = score.share
        counts = (share.count, share.n, *share.interval) if share else (None,) * 4
        first = (score.model, label, score.evaluation, score.seed, score.precision, score.what)
        source = (score.threat, score.made_on, score.made_at)
        rows.append((*first, *source, score.targets, score.value, *counts))
    return Table(study.title, _HEADER, tuple(rows)).csv()
