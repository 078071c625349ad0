"""From the predictions of finished cells to the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluate.cells import CellStore
from qadtr_brevitas.evaluate.jobs import ChunkJob, PatchJob, Victim
from qadtr_brevitas.evaluate.plan import Grid, threat
from qadtr_brevitas.fingerprints import fingerprint_tensors
from qadtr_brevitas.metrics import Share, accuracy, score
from qadtr_brevitas.report import (
    AttackCell,
    CleanCell,
    DataFacts,
    ModelFacts,
    Rate,
    Report,
    Scope,
    Threat,
    WorstCase,
    versions,
)
from qadtr_brevitas.subjects import Contender, Subject

_OWN: tuple[Threat, ...] = ("white-box", "eot")


def make_report(grid: Grid, store: CellStore, *, data: DataFacts, device: str, command: str = "") -> Report:
    """Scores the cells of a grid, all of which have to be in the store.

    Args:
        grid: what was computed.
        store: its predictions.
        data: the images, for the report.
        device: where it was computed, for the report.
        command: command line, for the report.
    """
    reader = _Reader(grid, store)
    clean: list[CleanCell] = []
    cells: list[AttackCell] = []
    worst: list[WorstCase] = []
    for victim in grid.victims:
        outcome = reader.outcome(victim)
        clean.append(outcome.clean_cell())
        cells += outcome.cells()
        worst += outcome.worst_cases()
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=versions(),
        seed=grid.bench.seed,
        device=device,
        data=data,
        models=tuple(_model_facts(subject, grid) for subject in grid.subjects),
        patches=tuple(contender.facts for contender in grid.contenders),
        attacks=tuple(attack.facts for attack, _ in grid.raids),
        clean=tuple(clean),
        cells=tuple(cells),
        worst_case=tuple(worst),
    )


def data_facts(split: Split, *, name: str, settings: dict[str, Any] | None, available: int | None) -> DataFacts:
    """The report's entry of the images."""
    return DataFacts(
        name=name,
        settings=settings or {},
        images=len(split),
        available=len(split) if available is None else available,
        image_size=split.image_size,
        classes=split.classes,
        fingerprint=fingerprint_tensors([split.images, split.labels]),
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
class _Outcome:
    """Everything one victim was put through."""

    victim: Victim
    labels: Tensor
    clean: Tensor
    results: Sequence[_Result]

    @property
    def _where(self) -> dict[str, str]:
        return {"model": self.victim.subject.name, "precision": str(self.victim.precision)}

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
            robust_accuracy=Rate.of(Share(int(right.all(dim=0).sum()), len(self.labels))),
        )


@dataclass(frozen=True)
class _Reader:
    """Finds the predictions of a victim in the store."""

    grid: Grid
    store: CellStore

    def outcome(self, victim: Victim) -> _Outcome:
        bench = self.grid.bench
        results = [self._patch_result(victim, contender) for contender in self.grid.contenders_of(victim)]
        return _Outcome(victim, bench.split.labels, self._patched(victim, None), [*results, *self._raided(victim)])

    def _patch_result(self, victim: Victim, contender: Contender) -> _Result:
        return _Result(
            name=contender.name,
            threat="control" if contender.control else threat(contender.facts.source, victim),
            targets=self.grid.targets_of(contender),
            predictions=self._patched(victim, contender),
            counts=not contender.control and contender.variant is None,
        )

    def _patched(self, victim: Victim, contender: Contender | None) -> Tensor:
        job = PatchJob(self.grid.bench, victim, contender)
        predictions = self.store.read(job.key, images=len(self.grid.bench.split))
        assert predictions is not None, f"{job} is reported before it is computed"
        return predictions

    def _raided(self, victim: Victim) -> Iterator[_Result]:
        for attack, victims in self.grid.raids:
            if victim in victims:
                facts = attack.facts
                chunks = [ChunkJob(self.grid.bench, attack, victims, chunk) for chunk in self.grid.chunks()]
                predictions = torch.cat([self.store.read_chunk(job.key)[victim.name] for job in chunks])
                yield _Result(facts.name, threat(facts.source, victim), [facts.target], predictions, counts=True)


def _model_facts(subject: Subject, grid: Grid) -> ModelFacts:
    return ModelFacts(
        name=subject.name,
        path=subject.path,
        fingerprint=subject.fingerprint,
        architecture=subject.info.name,
        settings=dict(subject.info.quant),
        source=subject.info.source,
        precisions=tuple(map(str, grid.precisions_of(subject))),
    )
