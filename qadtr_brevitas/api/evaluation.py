"""`evaluate`: the success of attacks on models, from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group

from qadtr_brevitas.api.inputs import (
    AttackLike,
    ModelLike,
    PatchLike,
    as_named_attacks,
    as_named_models,
    as_named_patches,
    as_split,
    prepared,
)
from qadtr_brevitas.auditing.headline import headline
from qadtr_brevitas.core.device import resolve_device
from qadtr_brevitas.core.extras import require
from qadtr_brevitas.core.precision import PrecisionLike
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.batches import Loader
from qadtr_brevitas.evaluation import Grid, Transfer
from qadtr_brevitas.evaluation import evaluate as evaluate_grid
from qadtr_brevitas.evaluation.ensemble import EnsembleVersion, missing_ensembles
from qadtr_brevitas.evaluation.report import EvaluationReport, ImageAttackFacts, PatchFacts, Rate
from qadtr_brevitas.evaluation.report.files import write_report
from qadtr_brevitas.evaluation.report.summaries import terminal_tables
from qadtr_brevitas.quant.inference import InferenceMode

if TYPE_CHECKING:
    from pandas import DataFrame  # pyright: ignore[reportMissingImports]

_WIDTH = 100


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Args:
        report: every figure, with its denominator, interval and threat model: what `report.json` holds.
    """

    report: EvaluationReport

    @property
    def clean_accuracy(self) -> dict[str, Rate]:
        """Accuracy without an attack, by precision (`model/precision` where there are several models)."""
        return {self._key(cell.model, cell.precision): cell.accuracy for cell in self.report.clean}

    @property
    def asr(self) -> dict[str, dict[str, Rate]]:
        """Attack success rate by attack or patch, then by precision (`model/precision` with several models).

        Attacks are called by their name, the settings that are not the defaults, and their target class.

        The denominator `n` counts images that are classified correctly without the attack and, for a targeted one, are
        not of the target class. Per-image attacks count at the precision they were made at; what they do at others is
        in `report.cells` and in `to_pandas()`.
        """
        found: dict[str, dict[str, Rate]] = {}
        facts = self.report.attack_facts()
        for cell in self.report.cells:
            attack = facts[cell.attack]
            is_patch = isinstance(attack, PatchFacts)
            if is_patch or cell.threat != "transfer":
                name = cell.attack if is_patch else _attack_name(attack)
                found.setdefault(name, {})[self._key(cell.model, cell.precision)] = cell.asr
        return found

    def to_pandas(self) -> DataFrame:
        """Return one row for each model, precision and attack.

        Raises:
            UsageError: pandas is not installed.
        """
        return require("pandas", extra="report", purpose="to_pandas()").DataFrame(self._rows)

    def save(self, folder: str | Path) -> list[Path]:
        """Write report.json, report.md and CSV files, and return their paths.

        Raises:
            CheckpointError: a file cannot be written.
        """
        first = headline(self.report)
        return write_report(self.report, Path(folder), summary=first.markdown() if first else "")

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        clean = [
            {"model": cell.model, "precision": cell.precision, "attack": None, "clean_accuracy": cell.accuracy.value}
            for cell in self.report.clean
        ]
        attacked = [
            {
                "model": cell.model,
                "precision": cell.precision,
                "attack": cell.attack,
                "target": cell.target,
                "threat": cell.threat,
                "asr": cell.asr.value,
                "asr_low": cell.asr.low,
                "asr_high": cell.asr.high,
                "n": cell.asr.n,
                "clean_accuracy": cell.clean_accuracy.value,
                "robust_accuracy": cell.robust_accuracy.value,
            }
            for cell in self.report.cells
        ]
        return [*clean, *attacked]

    def _key(self, model: str, precision: str) -> str:
        return precision if len(self.report.models) == 1 else f"{model}/{precision}"

    def __str__(self) -> str:
        text, first = StringIO(), headline(self.report)
        tables = [table.rich() for table in terminal_tables(self.report)]
        Console(file=text, width=_WIDTH).print(Group(*([first.rich()] if first else []), *tables))
        return text.getvalue()


def _attack_name(attack: ImageAttackFacts) -> str:
    return attack.family if attack.target is None else f"{attack.family} to {attack.target}"


def evaluate(
    model: ModelLike | Sequence[ModelLike] | Mapping[str, ModelLike],
    loader: Loader,
    *,
    patches: Sequence[PatchLike] | Mapping[str, Any] = (),
    attacks: Sequence[AttackLike] = (),
    precisions: Sequence[PrecisionLike | InferenceMode] | None = None,
    transfer: Transfer = "all",
    ensemble: EnsembleVersion | None = "fast",
    images: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: str = "auto",
    cells: str | Path | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Score models without an attack, under patches and under per-image attacks.

    Models are left as they were: mode, precision and device are restored.

    Args:
        model: a switchable model, the folder of one, several of them, or a mapping from names to them.
        loader: labeled test images; pixels in [0, 1] or uint8.
        patches: patches, patch files, or pictures of one's own (transparency is their shape); beside each, noise of its
            size and shape is scored as control.
        attacks: per-image attacks or their names, each made on every model at every precision.
        precisions: precisions to score, `8+4` for the mean over several; None for all of each model.
        transfer: `all` scores attacks on every model and precision, `float` those made at 32 bit, and `none` only where
            they were made. Patches made in Python do not say where: they count as transferred.
        ensemble: version of the ensemble `patch-auto` that is made beside each attack that searches a patch for each
            image, of its size, so that the worst case is not that of a single search; None for no ensemble.
        images: at most this many images, drawn class-balanced; None for all.
        seed: of placements, attacks and the draw of images.
        batch_size: images in one forward pass.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        cells: folder that keeps finished parts, so that an interrupted evaluation resumes; None to keep nothing.
        progress: called after each part.

    Raises:
        UsageError: a precision that a model lacks, a patch that does not fit, a target that is out of range, an unknown
            attack, or a model that was not converted.
        DataError: images or labels do not fit the model.
    """
    where = resolve_device(device)
    loaded = as_named_models(model)
    named = as_named_attacks(attacks)
    added = [] if ensemble is None else missing_ensembles(named, ensemble)
    with prepared(loaded, device=where):
        grid = Grid(
            loaded_models=loaded,
            patches=as_named_patches(patches),
            split=as_split(loader, loaded[0], images=images, seed=seed),
            data_name="loader",
            attacks=[*named, *added],
            precisions=precisions,
            transfer=transfer,
            seed=seed,
            batch_size=batch_size,
        )
        output = None if cells is None else Path(cells)
        return EvaluationResult(evaluate_grid(grid, output=output, device=where, progress=progress))
