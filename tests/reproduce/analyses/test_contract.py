"""Every registered analysis fulfills the contract, and the check finds analyses that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.attacks.pixel import Fgsm
from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.core.registry import ANALYSES
from qadtr_brevitas.core.table import Table
from qadtr_brevitas.reproduce.analyses import Analysis, AnalysisContext, Findings, Picture, Record
from qadtr_brevitas.reproduce.analyses.features import Features
from qadtr_brevitas.reproduce.analyses.gradients import Gradients
from qadtr_brevitas.reproduce.analyses.pixel import Pixel
from qadtr_brevitas.reproduce.analyses.sensitivity import SensitivityAnalysis
from qadtr_brevitas.reproduce.analyses.size import Size
from qadtr_brevitas.reproduce.analyses.spatial import Spatial
from qadtr_brevitas.testing.analyses import check_analysis

LAVAN = Lavan(size=8, steps=2, batch_size=32)
SMOKE: dict[str, Analysis] = {
    "features": Features(attack=LAVAN, images=8),
    "gradients": Gradients(attack=LAVAN, pixel=Fgsm(), images=8),
    "pixel": Pixel(attacks=(Fgsm(),), eps=(0.0, 0.03)),
    "sensitivity": SensitivityAnalysis(images=8),
    "size": Size(attack=LAVAN, sizes=(6, 8), targets=(0,)),
    "spatial": Spatial(attack=LAVAN, targets=(0,), shifts=(2,), degrees=(30,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ANALYSES.names())
def test_a_registered_analysis_fulfills_the_contract(name: str, tmp_path: Path) -> None:
    check_analysis(SMOKE[name], tmp_path)


@plugin
class Broken(Analysis):
    """An analysis with one fault."""

    fault: str

    def run(self, context: AnalysisContext) -> Findings:
        (loaded,) = context.models
        value = {"share": 1.5, "seed": float(torch.rand(()))}.get(self.fault, 0.5)
        record = Record(model=loaded.name, precision="6" if self.fault == "precision" else "4", what="asr", value=value)
        if self.fault == "gradients":
            for parameter in loaded.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        table = Table("t", ("model", "4 bit"), (("digits",) if self.fault == "row" else ("digits", "50.0"),))
        return Findings(
            title="x",
            records=[record] * (2 if self.fault == "twice" else 1),
            tables=[] if self.fault == "table" else [table],
            pictures=[Picture(file="gone.png", caption="x")] if self.fault == "picture" else [],
        )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("gradients", "left gradients behind"),
        ("share", r"in \[0, 1\]"),
        ("seed", "same seed"),
        ("precision", "precision"),
        ("twice", "two records"),
        ("table", "at least one table"),
        ("row", "another length"),
        ("picture", r"gone\.png was not drawn"),
    ],
)
def test_the_check_finds_a_broken_analysis(fault: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        check_analysis(Broken(fault=fault), tmp_path)


def test_the_check_accepts_the_analysis_without_its_faults(tmp_path: Path) -> None:
    check_analysis(Broken(fault="none"), tmp_path)
