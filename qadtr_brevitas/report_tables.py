"""The tables of a report, as plain text cells that Markdown and the terminal draw alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qadtr_brevitas.metrics import Mean, mean
from qadtr_brevitas.precision import Precision
from qadtr_brevitas.report import AttackCell, ModelFacts, PatchFacts, Rate, Report

EMPTY = "-"
FLOAT = "32"

ASR_NOTE = (
    "ASR: images that the patch turns into the target class (untargeted: into any wrong class), of the n images that "
    "are classified correctly without it and are not of the target class."
)
MEAN_NOTE = (
    "Several patches, for instance one for each target class, are given as their mean; its 95 % Wilson interval is "
    "that of the smallest n, because all of them meet the same images."
)


@dataclass(frozen=True)
class Table:
    """A titled table of text; a row of None separates blocks."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...] | None, ...]
    notes: tuple[str, ...] = ()


def tables(report: Report) -> list[Table]:
    """All tables, the one to read first in front."""
    found = [summary_table(report, family) for family in families(report)]
    found.append(clean_table(report))
    for family in families(report):
        found.append(white_box_table(report, family))
        found.extend(matrix_tables(report, family))
    return found


def terminal_tables(report: Report) -> list[Table]:
    """The tables worth a screen: all of one model, the comparison of several."""
    if len(report.models) == 1 or not families(report):
        return tables(report)
    return [summary_table(report, family) for family in families(report)]


def families(report: Report) -> list[str]:
    """The kinds of patches that tables average over, in the order of the report."""
    return list(dict.fromkeys(patch.family for patch in report.patches if not patch.control))


def summary_table(report: Report, family: str) -> Table:
    """One block for each model: what it gets right, and what the patches do to it at each precision."""
    return Table(
        f"{family}: clean accuracy and ASR at each precision",
        _header(report),
        _blocks(report, family, _summary),
        (_images_note(report), ASR_NOTE, MEAN_NOTE, f"Targets: {_targets(report, family)}. Seed {report.seed}."),
    )


def clean_table(report: Report) -> Table:
    """Accuracy without a patch, with its interval."""
    n, available = report.data.images, report.data.available
    note = f"Percent of n = {n} test images" + ("." if n == available else f" (of {available}).")
    return Table("Clean accuracy", _header(report), _blocks(report, "", _clean), (note,))


def white_box_table(report: Report, family: str) -> Table:
    """Patches against the model and precision they were made on, with every figure that belongs to an ASR."""
    notes = (
        _images_note(report),
        ASR_NOTE,
        "Any wrong class: of the images classified correctly without the patch.",
        MEAN_NOTE,
        f"Targets: {_targets(report, family)}. Seed {report.seed}.",
    )
    title = f"{family}: white-box, each precision attacked with its own patches"
    return Table(title, _header(report), _blocks(report, family, _white_box), notes)


def matrix_tables(report: Report, family: str) -> list[Table]:
    """Precision the patch was made at x precision attacked, for each pair of source and attacked model."""
    sources = _sources(report, family).items()
    return [
        _matrix(View(report, model, family), fingerprint, source)
        for fingerprint, source in sources
        for model in report.models
    ]


def attacked_precisions(report: Report) -> list[str]:
    """Every precision that some model was attacked at, highest first."""
    return sorted_precisions({precision for model in report.models for precision in model.precisions})


def sorted_precisions(precisions: Iterable[str]) -> list[str]:
    """Precisions from many bits to few."""
    return sorted(precisions, key=Precision.parse, reverse=True)


@dataclass(frozen=True)
class View:
    """The cells of one model and one family of patches, and means over them."""

    report: Report
    model: ModelFacts
    family: str

    def clean(self, precision: str) -> Rate | None:
        """Accuracy without a patch; None where the model was not evaluated at this precision."""
        where = (self.model.name, precision)
        return next((cell.accuracy for cell in self.report.clean if (cell.model, cell.precision) == where), None)

    def white_box(self, precision: str, what: Callable[[AttackCell], Rate] | None = None) -> Mean | None:
        """Mean over the patches made on this model at this precision."""
        return _mean(self._cells(precision, lambda cell, patch: cell.threat == "white-box"), what)

    def made_at(self, precision: str, source: str, fingerprint: str | None = None) -> Mean | None:
        """Mean ASR of the patches made at precision `source`, on this model or on another one."""
        origin = (fingerprint or self.model.fingerprint, source)
        return _mean(self._cells(precision, lambda cell, patch: _origin(patch) == origin))

    def control(self, precision: str, what: Callable[[AttackCell], Rate] | None = None) -> Mean | None:
        """Mean of the random patches of the family's geometry, for the family's targets."""
        family = [patch for patch in self.report.patches if patch.family == self.family and not patch.control]
        aims = {(patch.geometry, patch.target) for patch in family}
        return _mean(
            self._cells(precision, lambda cell, patch: patch.control and (patch.geometry, cell.target) in aims), what
        )

    def source_precisions(self, fingerprint: str) -> set[str]:
        """The precisions at which patches of the family were made on a model."""
        family = [patch for patch in self.report.patches if patch.family == self.family and patch.source]
        return {patch.source.precision for patch in family if patch.source and patch.source.fingerprint == fingerprint}

    def _cells(self, precision: str, keep: Callable[[AttackCell, PatchFacts], bool]) -> list[AttackCell]:
        patches = {patch.name: patch for patch in self.report.patches}
        return [
            cell
            for cell in self.report.cells
            if (cell.model, cell.precision) == (self.model.name, precision)
            and (patches[cell.patch].control or patches[cell.patch].family == self.family)
            and keep(cell, patches[cell.patch])
        ]


def _summary(view: View, columns: Sequence[str]) -> dict[str, list[str]]:
    means = [view.white_box(p) for p in columns]
    return {
        "clean accuracy": [_percent(view.clean(p)) for p in columns],
        "ASR white-box": [_percent(mean) for mean in means],
        "95 % interval": [_range(mean.interval) if mean else EMPTY for mean in means],
        "ASR of patches made at 32 bit": [_percent(view.made_at(p, FLOAT)) for p in columns],
        "ASR of a random patch": [_percent(view.control(p)) for p in columns],
        "n of ASR": [_sizes(mean or view.control(p)) for mean, p in zip(means, columns, strict=True)],
        "ASR over all images": [_percent(view.white_box(p, lambda cell: cell.asr_all)) for p in columns],
        "robust accuracy": [_percent(view.white_box(p, lambda cell: cell.robust_accuracy)) for p in columns],
    }


def _clean(view: View, columns: Sequence[str]) -> dict[str, list[str]]:
    rates = [view.clean(p) for p in columns]
    return {
        "clean accuracy": [_percent(rate) for rate in rates],
        "95 % interval": [_range((rate.low, rate.high)) if rate else EMPTY for rate in rates],
    }


def _white_box(view: View, columns: Sequence[str]) -> dict[str, list[str]]:
    means = [view.white_box(p) for p in columns]
    return {
        "ASR": [_percent(mean) for mean in means],
        "95 % interval": [_range(mean.interval) if mean else EMPTY for mean in means],
        "lowest to highest patch": [_range((mean.low, mean.high)) if mean else EMPTY for mean in means],
        "ASR of a random patch": [_percent(view.control(p)) for p in columns],
        "any wrong class": [_percent(view.white_box(p, lambda cell: cell.untargeted)) for p in columns],
        "any wrong class, random patch": [_percent(view.control(p, lambda cell: cell.untargeted)) for p in columns],
        "ASR over all images": [_percent(view.white_box(p, lambda cell: cell.asr_all)) for p in columns],
        "robust accuracy": [_percent(view.white_box(p, lambda cell: cell.robust_accuracy)) for p in columns],
        "n of ASR": [_sizes(mean) for mean in means],
        "patches": [str(mean.shares) if mean else EMPTY for mean in means],
    }


def _matrix(view: View, fingerprint: str, source: str) -> Table:
    columns = attacked_precisions(view.report)
    rows = [
        (f"made at {made}", *(_percent(view.made_at(p, made, fingerprint)) for p in columns))
        for made in sorted_precisions(view.source_precisions(fingerprint))
    ]
    rows.append(("random patch", *(_percent(view.control(p)) for p in columns)))
    rows.append(("n of ASR", *(_sizes(view.control(p)) for p in columns)))
    note = (
        f"Mean ASR in percent of n images: classified correctly by {view.model.name} without a patch and not of the "
        f"target class. Patches made on {source}; targets: {_targets(view.report, view.family)}."
    )
    title = f"{view.family}: ASR, {source} to {view.model.name}"
    return Table(title, ("bit", *(f"at {p}" for p in columns)), tuple(rows), (note,))


def _origin(patch: PatchFacts) -> tuple[str, str] | None:
    return (patch.source.fingerprint, patch.source.precision) if patch.source else None


def _mean(cells: Sequence[AttackCell], what: Callable[[AttackCell], Rate] | None = None) -> Mean | None:
    return mean([(what(cell) if what else cell.asr).share for cell in cells])


def _sources(report: Report, family: str) -> dict[str, str]:
    """Fingerprints of the models the family's patches were made on, and what to call them."""
    names = {model.fingerprint: model.name for model in reversed(report.models)}
    sources = [patch.source for patch in report.patches if patch.family == family and patch.source]
    return {source.fingerprint: names.get(source.fingerprint, source.name) for source in sources}


def _images_note(report: Report) -> str:
    return (
        f"In percent. Clean accuracy, ASR over all images and robust accuracy (correct with and without the patch) are "
        f"shares of n = {report.data.images} test images."
    )


def _targets(report: Report, family: str) -> str:
    """Target classes of a family, by number and name."""
    numbers = sorted({patch.target for patch in report.patches if patch.family == family and patch.target is not None})
    classes = report.data.classes
    names = [str(n) if classes[n] == str(n) else f"{n} ({classes[n]})" for n in numbers]
    return ", ".join(names) or "none, any wrong class counts"


def _header(report: Report) -> tuple[str, ...]:
    columns = attacked_precisions(report)
    return "model", "", *(f"{p} bit" if p.isdigit() else p for p in columns)


def _blocks(
    report: Report, family: str, figures: Callable[[View, Sequence[str]], dict[str, list[str]]]
) -> tuple[tuple[str, ...] | None, ...]:
    """The rows of every model; a row without any figure is left out."""
    columns = attacked_precisions(report)
    rows: list[tuple[str, ...] | None] = []
    for model in report.models:
        found = figures(View(report, model, family), columns)
        full = {label: cells for label, cells in found.items() if any(cell != EMPTY for cell in cells)}
        rows += [(model.name if index == 0 else "", label, *full[label]) for index, label in enumerate(full)]
        rows.append(None)
    return tuple(rows[:-1])


def _percent(share: Mean | Rate | None) -> str:
    return EMPTY if share is None or share.value is None else f"{100 * share.value:.1f}"


def _range(bounds: tuple[float, float]) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def _sizes(value: Mean | None) -> str:
    if value is None:
        return EMPTY
    return str(value.n[0]) if value.n[0] == value.n[1] else f"{value.n[0]} to {value.n[1]}"
