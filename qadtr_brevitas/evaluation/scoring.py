"""From the predictions of finished cells to the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

import torch
from torch import Tensor

from qadtr_brevitas.evaluation.cells import CellStore
from qadtr_brevitas.evaluation.certification import masks_fingerprint
from qadtr_brevitas.evaluation.entries import LoadedModel, NamedPatch
from qadtr_brevitas.evaluation.grid import Grid, threat
from qadtr_brevitas.evaluation.image_attacks import SourcedAttack
from qadtr_brevitas.evaluation.jobs import ChunkJob, PatchJob, Victim
from qadtr_brevitas.evaluation.metrics import Proportion, accuracy, score
from qadtr_brevitas.evaluation.report import (
    AttackCell,
    CertifiedCell,
    CleanCell,
    EvaluationReport,
    ModelFacts,
    Rate,
    Scope,
    Threat,
    WorstCase,
    versions,
)
from qadtr_brevitas.evaluation.report.views import disambiguate_patches

_OWN: tuple[Threat, ...] = ("white-box", "eot")


def make_report(grid: Grid, store: CellStore, *, device: str, command: str = "") -> EvaluationReport:
    """Score the cells of a grid, all of which have to be in the store.

    Args:
        grid: what was computed.
        store: its predictions.
        device: where it was computed, for the report.
        command: command line, for the report.
    """
    reader = _PredictionReader(grid, store)
    clean: list[CleanCell] = []
    cells: list[AttackCell] = []
    worst: list[WorstCase] = []
    certified: list[CertifiedCell] = []
    for victim in grid.victims:
        outcome = reader.outcome(victim)
        clean.append(outcome.clean_cell())
        cells += outcome.cells()
        worst += outcome.worst_cases()
        certified += reader.certified(victim) if victim in grid.certified_victims else []
    return EvaluationReport(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=versions(),
        seed=grid.seed,
        device=device,
        data=grid.data,
        models=tuple(_model_facts(loaded, grid) for loaded in grid.loaded_models),
        patches=disambiguate_patches([patch_entry.facts for patch_entry in grid.patch_entries]),
        attacks=tuple(attack.facts for attack, _ in grid.sourced_attacks),
        clean=tuple(clean),
        cells=tuple(cells),
        worst_case=tuple(worst),
        certified=tuple(certified),
    )


@dataclass(frozen=True)
class _Result:
    """The predictions of one victim under one patch or attack."""

    name: str
    threat: Threat
    targets: Sequence[int | None]
    predictions: Tensor
    counts: bool
    """False for controls and moved patches, which are no attacks of their own."""


@dataclass(frozen=True)
class _VictimResults:
    """Everything one victim was put through."""

    victim: Victim
    labels: Tensor
    clean: Tensor
    results: Sequence[_Result]

    @property
    def _where(self) -> dict[str, str]:
        return {"model": self.victim.loaded.name, "precision": str(self.victim.precision)}

    def clean_cell(self) -> CleanCell:
        return CleanCell(**self._where, accuracy=Rate.of(accuracy(self.clean, self.labels)))

    def cells(self) -> Iterator[AttackCell]:
        for result in self.results:
            for target in result.targets:
                found = score(self.clean, result.predictions, self.labels, target=target)
                yield AttackCell.of(found, **self._where, attack=result.name, target=target, threat=result.threat)

    def worst_cases(self) -> Iterator[WorstCase]:
        scopes: dict[Scope, list[_Result]] = {
            "own": [result for result in self.results if result.counts and result.threat in _OWN],
            "all": [result for result in self.results if result.counts],
        }
        for scope, results in scopes.items():
            if results:
                yield self._worst_case(scope, results)

    def _worst_case(self, scope: Scope, results: Sequence[_Result]) -> WorstCase:
        right = torch.stack([(self.clean == self.labels) & (r.predictions == self.labels) for r in results])
        return WorstCase(
            **self._where,
            scope=scope,
            attacks=len(results),
            mean=right.double().mean().item(),
            robust_accuracy=Rate.of(Proportion(int(right.all(dim=0).sum()), len(self.labels))),
        )


@dataclass(frozen=True)
class _PredictionReader:
    """Finds the predictions of a victim in the store."""

    grid: Grid
    store: CellStore

    def outcome(self, victim: Victim) -> _VictimResults:
        results = [self._patch_result(victim, patch_entry) for patch_entry in self.grid.patches_on(victim)]
        return _VictimResults(
            victim, self.grid.split.labels, self._patched(victim, None), [*results, *self._raided(victim)]
        )

    def certified(self, victim: Victim) -> Iterator[CertifiedCell]:
        """Return what is proved of the victim's predictions."""
        for certification in self.grid.certifications:
            found = [job.read(self.store) for job in self.grid.certify_jobs(victim, certification)]
            whole = [outcome for outcome in found if outcome is not None]
            assert len(whole) == len(found), f"{certification} of {victim} is reported before it is computed"
            split, size = self.grid.split, certification.size
            labels = split.labels[self.grid.certified_order[: self.grid.certified_count]]
            names = ("defended", "proved", "passes")
            defended, proved, passes = (torch.cat([getattr(part, name) for part in whole]) for name in names)
            yield CertifiedCell(
                model=victim.loaded.name,
                precision=str(victim.precision),
                method=certification.method,
                fill=certification.fill,
                tta=certification.tta,
                overlap=certification.overlap,
                size=size.height if size.is_square else str(size),
                masks=len(certification.covering(split.image_size)),
                clean_accuracy=Rate.of(accuracy(defended, labels)),
                certified_accuracy=Rate.of(accuracy(proved, labels)),
                passes=passes.double().mean().item(),
                weights_fingerprint=victim.loaded.fingerprint,
                masks_fingerprint=masks_fingerprint(certification, victim.loaded.info.mean, split.image_size),
                data_fingerprint=self.grid.data.fingerprint,
            )

    def _patch_result(self, victim: Victim, patch_entry: NamedPatch) -> _Result:
        return _Result(
            name=patch_entry.name,
            threat="control" if patch_entry.control else threat(patch_entry.facts.source, victim),
            targets=self.grid.targets_of(patch_entry),
            predictions=self._patched(victim, patch_entry),
            counts=not patch_entry.control and patch_entry.variant is None,
        )

    def _patched(self, victim: Victim, patch_entry: NamedPatch | None) -> Tensor:
        job = PatchJob(self.grid.inputs, victim, patch_entry)
        predictions = self.store.read(job.key, images=len(self.grid.split))
        assert predictions is not None, f"{job} is reported before it is computed"
        return predictions

    def _raided(self, victim: Victim) -> Iterator[_Result]:
        for attack, victims in self.grid.sourced_attacks:
            if victim in victims:
                facts, predictions = attack.facts, self._raids[attack.facts.name][victim.name]
                yield _Result(facts.name, threat(facts.source, victim), [facts.target], predictions, counts=True)

    @cached_property
    def _raids(self) -> dict[str, dict[str, Tensor]]:
        """Name of the attack -> victim -> predictions on all images; each file is read once."""
        return {attack.facts.name: self._chunks(attack, victims) for attack, victims in self.grid.sourced_attacks}

    def _chunks(self, attack: SourcedAttack, victims: tuple[Victim, ...]) -> dict[str, Tensor]:
        jobs = [ChunkJob(self.grid.inputs, attack, victims, chunk) for chunk in self.grid.chunks()]
        found = [self.store.read_chunk(job.key) for job in jobs]
        return {victim.name: torch.cat([chunk[victim.name] for chunk in found]) for victim in victims}


def _model_facts(loaded: LoadedModel, grid: Grid) -> ModelFacts:
    return ModelFacts(
        name=loaded.name,
        path=loaded.path,
        fingerprint=loaded.fingerprint,
        architecture=loaded.info.name,
        settings=dict(loaded.info.quant),
        source=loaded.info.source,
        precisions=tuple(map(str, grid.precisions_of(loaded))),
    )
