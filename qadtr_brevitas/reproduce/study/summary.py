"""What a study found: study.json for the report page, and its figures in one table as Markdown and CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from qadtr_brevitas.core.files import write_atomically, write_json
from qadtr_brevitas.evaluation.metrics import Proportion
from qadtr_brevitas.evaluation.report import AttackCell, EvaluationReport, Rate, read_report, versions
from qadtr_brevitas.evaluation.report.files import markdown_table
from qadtr_brevitas.evaluation.report.layout import EMPTY, Table, bits
from qadtr_brevitas.evaluation.report.views import FLOAT
from qadtr_brevitas.quant.inference import sorted_modes
from qadtr_brevitas.reproduce.page import build_page, read_inputs, write_page
from qadtr_brevitas.reproduce.study.file import dump_json
from qadtr_brevitas.reproduce.study.plan import Row, StudyPlan
from qadtr_brevitas.reproduce.study.sections import Study

STUDY_FILE, PLAN_FILE, SUMMARY_FILE, FIGURES_FILE = "study.json", "study.yaml", "study.md", "figures.csv"
PAGE_FILE = "report.html"
CLEAN, UNSEEN, MEAN_UNSEEN = "clean accuracy", "unseen ", "unseen, mean of all kinds"
_HEAD = (
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
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a study.

    Args:
        model: name of the model in the study.
        evaluation: the evaluation.
        seed: training seed; None for a finished model.
        precision: what the network was scored at.
        kind: what the study calls the attack; empty for clean accuracy and means.
        what: clean accuracy, or the attack and where it was made.
        threat: what the attack knew: `white-box`, `eot`, `transfer`, or `control` for patches of noise.
        made_on: the network it was made on.
        made_at: the precision it was made at, or several together.
        targets: over how many targets it is a mean.
        value: share in [0, 1].
        share: counts, where the figure is no mean over targets or attacks.
    """

    model: str
    evaluation: str
    seed: int | None
    precision: str = ""
    kind: str = ""
    what: str = ""
    threat: str = ""
    made_on: str = ""
    made_at: str = ""
    targets: int = 1
    value: float = 0.0
    share: Proportion | None = None


def write_study(study: Study, plan: StudyPlan, folder: Path, *, scale: str, command: str) -> list[Path]:
    """Writes study.json, study.yaml, study.md, figures.csv and the page, of reports that are all there.

    Args:
        study: the study.
        plan: its parts.
        folder: where to.
        scale: the scale it was run at.
        command: command line.

    Raises:
        CheckpointError: a report cannot be read, or a file cannot be written.
    """
    figures = [figure for row in plan.rows for figure in _figures(row)]
    write_json(folder / STUDY_FILE, _facts(study, plan, folder, scale=scale, command=command))
    texts = {
        PLAN_FILE: f"# As it was run, at scale {scale}.\n{dump_json(study)}",
        SUMMARY_FILE: _markdown(study, figures, scale=scale, command=command),
        FIGURES_FILE: _csv(study, figures),
    }
    for name, text in texts.items():
        write_atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    page = build_page(read_inputs([folder]), title=study.title, command=command)
    return [folder / STUDY_FILE, *(folder / name for name in texts), *write_page(page, folder / PAGE_FILE)]


def summary_tables(study: Study, plan: StudyPlan) -> list[Table]:
    """One table for each evaluation: clean accuracy and ASR of every model at every precision."""
    return _tables(study, [figure for row in plan.rows for figure in _figures(row)])


def _facts(study: Study, plan: StudyPlan, folder: Path, *, scale: str, command: str) -> dict[str, Any]:
    def place(path: Path) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    return {
        "title": study.title,
        "paper": study.paper,
        "scale": scale,
        "command": command,
        "versions": versions(),
        "reports": [place(row.part.folder) for row in plan.rows],
        "rows": {row.part.row: _row(study, row) for row in plan.rows},
        "analyses": [place(part.folder) for part in plan.analyses],
    }


def _row(study: Study, row: Row) -> dict[str, Any]:
    section = row.network.section
    paper = section.paper.get(row.evaluation) if isinstance(section.paper, dict) else section.paper
    suffix = f" ({row.evaluation})" if len(study.evaluations) > 1 else ""
    return {
        "label": f"{section.label or row.network.model}{suffix}",
        "paper": paper,
        "seed": row.network.seed,
        "model": row.network.model,
        "evaluation": row.evaluation,
        "precision": str(row.part.scored[0]) if len(row.part.scored) == 1 else None,
    }


def _figures(row: Row) -> Iterator[Figure]:
    report = read_report(row.part.folder)
    base = Figure(model=row.network.model, evaluation=row.evaluation, seed=row.network.seed)
    for cell in report.clean:
        rate = cell.accuracy
        yield replace(base, precision=cell.precision, what=CLEAN, value=rate.value or 0, share=rate.share)
    makers = _makers(row, report)
    for precision in report.models[0].precisions:
        found = list(_attack_figures(report, makers, replace(base, precision=precision)))
        yield from found
        if unseen := _one_of_each([figure for figure in found if figure.kind.startswith(UNSEEN)]):
            mean = sum(figure.value for figure in unseen) / len(unseen)
            yield replace(base, precision=precision, what=MEAN_UNSEEN, targets=len(unseen), value=mean)


def _attack_figures(report: EvaluationReport, makers: dict[str, _AttackSource], base: Figure) -> Iterator[Figure]:
    """The mean over targets of each attack, by where it was made."""
    groups: dict[tuple[_AttackSource, str], list[AttackCell]] = {}
    for cell in report.cells:
        if cell.precision == base.precision and cell.asr.value is not None:
            groups.setdefault((makers.get(cell.attack, _NOBODY), cell.threat), []).append(cell)
    for (maker, threat), cells in groups.items():
        made = replace(base, kind=maker.kind, threat=threat, made_on=maker.network, made_at=maker.mode)
        what = maker.what(threat)
        yield _mean(replace(made, what=what), [cell.asr for cell in cells])
        if not maker.is_patch:
            # What is usual to report of attacks on every pixel.
            yield _mean(replace(made, what=f"{what}: accuracy"), [cell.robust_accuracy for cell in cells])


def _mean(figure: Figure, rates: Sequence[Rate]) -> Figure:
    value = sum(rate.value or 0 for rate in rates) / len(rates)
    return replace(figure, targets=len(rates), value=value, share=rates[0].share if len(rates) == 1 else None)


def _one_of_each(figures: Sequence[Figure]) -> list[Figure]:
    """One figure of each kind: made at the precision that is scored, where there is one."""
    ordered = sorted(figures, key=lambda figure: figure.threat == "white-box")
    return list({figure.kind: figure for figure in ordered}.values())


@dataclass(frozen=True)
class _AttackSource:
    """Where an attack comes from: what the study calls it, the network and the precision it was made on."""

    kind: str
    network: str = ""
    mode: str = ""
    is_own: bool = True
    is_patch: bool = True
    is_black_box: bool = False

    def what(self, threat: str) -> str:
        """The row of the table that it belongs to."""
        if threat == "control":
            return self.kind
        if threat == "white-box":
            return f"{self.kind}, {'black-box' if self.is_black_box else threat}"
        return f"{self.kind}{'' if self.is_own else f' on {self.network}'}, made at {self.mode}"


_NOBODY = _AttackSource("random patch")


def _makers(row: Row, report: EvaluationReport) -> dict[str, _AttackSource]:
    found: dict[str, _AttackSource] = {}
    for part in row.part.patches:
        maker = _AttackSource(part.label, part.source, str(part.mode), is_own=part.source == row.network.name)
        found |= {patch_entry.name: maker for patch_entry in part.patch_entries()}
    for facts in report.attacks:
        source = facts.source
        is_own = source.name == row.part.row
        found[facts.name] = _AttackSource(
            facts.family, source.name, source.precision, is_own, is_patch=False, is_black_box=facts.black_box
        )
    return found


def _tables(study: Study, figures: Sequence[Figure]) -> list[Table]:
    return [_table(study, figures, evaluation) for evaluation in study.evaluations]


def _table(study: Study, figures: Sequence[Figure], evaluation: str) -> Table:
    mine = [figure for figure in figures if figure.evaluation == evaluation]
    columns = sorted_modes({figure.precision for figure in mine})
    rows: list[tuple[str, ...] | None] = []
    for model in dict.fromkeys(figure.model for figure in mine):
        own = _shown([figure for figure in mine if figure.model == model])
        label = study.models[model].label or model
        for number, what in enumerate(dict.fromkeys(figure.what for figure in own)):
            cells = [_cell([f for f in own if (f.what, f.precision) == (what, column)]) for column in columns]
            rows.append((label if number == 0 else "", what, *cells))
        rows.append(None)
    note = (
        "In percent: mean over targets and seeds, with the standard deviation over seeds where there are several. ASR: "
        "of the images that are classified correctly without the attack and are not of the target class."
    )
    return Table(
        f"{study.title}: {evaluation}", ("model", "", *map(bits, columns)), tuple(rows[:-1]), (note,), labels=2
    )


def _shown(figures: Sequence[Figure]) -> list[Figure]:
    """Without what was moved from one precision of a network to another, but for 32 bit, where there is better."""
    met = {(figure.kind, figure.made_on) for figure in figures if figure.threat == "white-box"}
    return [
        figure
        for figure in figures
        if figure.threat != "transfer" or figure.made_at == FLOAT or (figure.kind, figure.made_on) not in met
    ]


def _cell(figures: Sequence[Figure]) -> str:
    if not figures:
        return EMPTY
    values = [100 * figure.value for figure in figures]
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.1f} ± {deviation:.1f}"


def _markdown(study: Study, figures: Sequence[Figure], *, scale: str, command: str) -> str:
    seeds = ", ".join(map(str, study.seeds))
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    facts = f"- Command: `{command}`\n- Scale {scale}, training seeds {seeds}\n- Versions: {packages}"
    parts = [f"# {study.title}", facts, *map(markdown_table, _tables(study, figures))]
    return "\n\n".join(parts) + "\n"


def _csv(study: Study, figures: Sequence[Figure]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEAD)
    for figure in figures:
        label = study.models[figure.model].label or figure.model
        counts = (figure.share.count, figure.share.n) if figure.share else ("", "")
        first = (figure.model, label, figure.evaluation, figure.seed, figure.precision, figure.what)
        made = (figure.threat, figure.made_on, figure.made_at)
        writer.writerow((*first, *made, figure.targets, figure.value, *counts))
    return text.getvalue()
