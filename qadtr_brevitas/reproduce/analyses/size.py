"""Patches of several sizes: how large a patch must be, and whether that depends on the precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from qadtr_brevitas.attacks.base import PatchAttack
from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.attacks.patch_settings import PatchSettings, Pixels
from qadtr_brevitas.config.slots import slot_name
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.evaluation.report import AttackCell, PatchFacts
from qadtr_brevitas.evaluation.report.summaries import ASR_NOTE, MEAN_NOTE
from qadtr_brevitas.reproduce.analyses.base import (
    Analysis,
    AnalysisContext,
    CraftingAttack,
    Findings,
    PatchFiles,
    TargetClasses,
)
from qadtr_brevitas.reproduce.analyses.charts import draw_records
from qadtr_brevitas.reproduce.analyses.document import Picture, Record
from qadtr_brevitas.reproduce.analyses.patches import reference_patches
from qadtr_brevitas.reproduce.analyses.scores import AttackFacts, Facets, mean_records, score
from qadtr_brevitas.reproduce.analyses.tables import percents, precision_table

_ASR, _CONTROL_ASR = "asr", "asr of a random patch"


@plugin
class Size(Analysis):
    """ASR of patches of several sizes, made at the highest precision, at every precision (paper, Table 21)."""

    patches: PatchFiles = ()
    attack: Annotated[
        CraftingAttack, Field(description="patch attack with a size, used where no patches are given")
    ] = Lavan()
    sizes: Annotated[tuple[Pixels, ...], Field(min_length=1, description="sides or diameters in pixels")] = (
        6,
        8,
        10,
        12,
    )
    targets: TargetClasses = None

    def run(self, context: AnalysisContext) -> Findings:
        """Score patches of each size, and draw size.png."""
        attacks = [] if self.patches else [_with_size(self.attack, size) for size in self.sizes]
        found: list[Record] = []
        for loaded in context.models:
            patches = reference_patches(context, loaded, attacks, finished=self.patches, targets=self.targets)
            report = score(context, loaded, patches=sorted(patches, key=lambda patch: patch.facts.pixels))
            found += mean_records(report, _ASR, lambda cell: cell.asr, _patch_facets)
            found += mean_records(report, _CONTROL_ASR, lambda cell: cell.asr, _control_facets)
        notes = (f"In percent; patches made at the highest precision. {ASR_NOTE}", MEAN_NOTE)
        draw_records(
            [record for record in found if record.what == _ASR],
            context.output / "size.png",
            along="size",
            x_label="size of the patch (pixels)",
            y_label="attack success rate (%)",
        )
        by_size = precision_table(
            "ASR by patch size", found, _ASR, write=percents, facets=("attack", "size"), notes=notes
        )
        controls = precision_table(
            "ASR of random patches by size", found, _CONTROL_ASR, write=percents, facets=("size",)
        )
        return Findings(
            title="Patches of several sizes",
            records=found,
            tables=[by_size, controls],
            pictures=[Picture(file="size.png", caption="ASR by patch size, with 95 % intervals.")],
        )


def _with_size(attack: PatchAttack, size: int) -> PatchAttack:
    if not isinstance(attack, PatchSettings) or isinstance(attack.size, tuple):
        raise UsageError(
            f"the sizes of the analysis cannot be set on {slot_name(attack)}, which has no single size: choose another "
            "attack, for instance attack=lavan"
        )
    return replace(attack, size=size)


def _patch_facets(cell: AttackCell, facts: AttackFacts) -> Facets | None:
    if not isinstance(facts, PatchFacts) or facts.control:
        return None
    return {"attack": f"{facts.method} {facts.apart}".strip(), "size": facts.size}


def _control_facets(cell: AttackCell, facts: AttackFacts) -> Facets | None:
    return {"size": facts.size} if isinstance(facts, PatchFacts) and facts.control else None
