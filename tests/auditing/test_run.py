from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.auditing import AuditReport, audit
from qadtr_brevitas.auditing.checks import CHECKS
from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.finding import PrecisionAudit
from qadtr_brevitas.auditing.tables import audit_tables, write_audits
from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.core.files import read_json
from qadtr_brevitas.evaluation.entries import load_models
from qadtr_brevitas.evaluation.metrics import Proportion
from qadtr_brevitas.evaluation.report import Rate
from qadtr_brevitas.pipeline.directories import AUDIT_FILE
from tests.auditing.conftest import CLASSES, Trained, gratings, make_net, train
from tests.evaluation.models import make_model_dir, train_split

pytestmark = pytest.mark.slow

IDS = [f"G{number}" for number in range(1, 23)]
NEEDS_MORE = {"G6", "G10", "G13", "G17", "G18"}


@pytest.fixture(scope="module")
def ordinary(trained: Trained) -> AuditReport:
    return audit(trained.net, trained.split)


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is around the checks."""
    monkeypatch.setattr("qadtr_brevitas.auditing.run.CHECKS", [check for check in CHECKS if check.id in {"G8", "G9"}])


def test_an_ordinary_float_network_passes(ordinary: AuditReport) -> None:
    (part,) = ordinary.precisions
    assert [finding.id for finding in part.findings] == IDS
    assert [finding.meaning for finding in part.warnings] == []
    assert {finding.id for finding in part.findings if finding.status == "skipped"} == NEEDS_MORE
    assert all(finding.numbers for finding in part.findings if finding.status == "pass")
    assert part.precision is None
    assert (part.asr.n, part.side, part.resolution) == (200, 4, 0.05)
    assert 0.3 < part.asr.value <= part.worst_case.value < 1


def test_another_ordinary_network_passes_too() -> None:
    report = audit(train(make_net(1), seed=1), gratings(200, seed=2), seed=1)
    assert [finding.id for finding in report.precisions[0].warnings] == []


def test_skipped_checks_say_what_they_need(ordinary: AuditReport) -> None:
    assert "needs the same network without the defense: give --twin DIR" in ordinary.finding("G17").meaning
    assert "--ablation DIR" in ordinary.finding("G18").meaning
    assert "several precisions, --twin DIR, or other models" in ordinary.finding("G6").meaning
    assert "several precisions or with random outputs" in ordinary.finding("G10").meaning
    assert "can also run at 32 bit" in ordinary.finding("G13").meaning


def test_the_network_is_left_as_it_was(trained: Trained, few_checks: None) -> None:
    net = nn.Sequential(nn.Dropout(0.5), trained.net).train()
    report = audit(net, trained.split.subset(torch.arange(30)), images=30)
    assert net.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    # In evaluation mode dropout draws nothing.
    assert report.finding("G9").status == "pass"
    trained.net.eval()


def test_the_same_seed_gives_the_same_audit(trained: Trained, few_checks: None) -> None:
    few = trained.split.subset(torch.arange(40))
    first, second, other = (audit(trained.net, few, images=30, seed=seed) for seed in (1, 1, 2))
    assert first == second
    assert first.precisions != other.precisions


def test_a_network_that_knows_nothing_is_skipped_not_passed(trained: Trained) -> None:
    def ignorant(images: Tensor) -> Tensor:
        return torch.zeros(len(images), CLASSES + 1).index_fill_(1, torch.tensor([CLASSES]), 7.0)

    (part,) = audit(ignorant, trained.split).precisions
    assert part.asr.n == 0
    assert part.asr.value is None
    for finding in part.findings:
        assert finding.status == ("pass" if finding.id in {"G9", "G11"} else "skipped")
    assert "only 0 of 200 images are classified correctly" in part.findings[0].meaning


def test_outputs_that_are_not_finite_are_a_warning(trained: Trained) -> None:
    def breaking(images: Tensor) -> Tensor:
        strange = (images.amax((1, 2, 3)) > 0.98) & (images.amin((1, 2, 3)) < 0.02)
        return trained.net(images).masked_fill(strange[:, None], torch.nan)

    findings = trained.findings(breaking, "G16")
    assert findings["G16"].status == "WARN"
    assert "not finite" in findings["G16"].meaning
    assert findings["G16"].numbers == {}


def test_a_weak_attack_on_the_twin_is_a_warning(trained: Trained) -> None:
    findings = trained.findings(trained.net, "G17", twin=trained.net)
    assert findings["G17"].status == "WARN"
    assert findings["G17"].numbers["asr on the twin"] == findings["G17"].numbers["asr here"] < 0.8
    assert "too weak to claim a defense" in findings["G17"].meaning


def test_a_part_that_only_hides_gradients_is_named(trained: Trained) -> None:
    def hidden(images: Tensor) -> Tensor:
        return trained.net(images.detach())

    findings = trained.findings(hidden, "G18", ablations=[trained.net])
    assert findings["G18"].status == "WARN"
    assert "Sequential lacks helps against gradients but not against random search" in findings["G18"].meaning
    assert trained.findings(trained.net, "G18", ablations=[trained.net])["G18"].status == "pass"


def test_models_of_other_data_are_refused(trained: Trained) -> None:
    with pytest.raises(DataError, match=r"undefended twin .*2 classes.*Sequential .*5"):
        audit(trained.net, trained.split, twin=nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)))


def test_precisions_need_a_switchable_model(trained: Trained) -> None:
    with pytest.raises(UsageError, match=r"Sequential.*not switchable"):
        audit(trained.net, trained.split, precisions=[4])


def test_an_unknown_profile_is_named(trained: Trained) -> None:
    with pytest.raises(UsageError, match="unknown audit profile 'ful': did you mean 'full'"):
        audit(trained.net, trained.split, profile="ful")


def test_finished_precisions_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(context: AuditContext, report: object) -> PrecisionAudit:
        calls.append(str(context.audited.precision))
        nothing = Rate.of(Proportion(0, 0))
        facts = {"clean_accuracy": nothing, "asr": nothing, "worst_case": nothing, "resolution": None, "passes": {}}
        return PrecisionAudit(precision=calls[-1], side=4, findings=(), **facts)

    monkeypatch.setattr("qadtr_brevitas.auditing.run._audit_precision", counted)
    loaded = load_models([make_model_dir(tmp_path / "net")])[0]

    def again(folder: Path | None, **settings: Any) -> AuditReport:
        return audit(loaded, train_split(), images=30, folder=folder, **settings)

    first = again(tmp_path, precisions=[4])
    assert again(tmp_path, precisions=[4]) == first
    assert calls == ["4"]
    again(tmp_path)
    assert calls == ["4", "32"]
    for settings in ({"seed": 1}, {"twin": loaded}, {"profile": "full"}):
        again(tmp_path, precisions=[4], **settings)
    assert calls[2:] == ["4"] * 3
    again(None, precisions=[4])
    for file in (tmp_path / "audit").iterdir():
        file.write_text("{")
    again(tmp_path, precisions=[4])
    assert calls[5:] == ["4"] * 2


def test_tables_and_files(ordinary: AuditReport, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("# Attack report\n")
    assert write_audits([ordinary], tmp_path) == tmp_path / AUDIT_FILE
    assert AuditReport.model_validate(read_json(tmp_path / AUDIT_FILE)[0]) == ordinary
    text = (tmp_path / "report.md").read_text()
    tables = audit_tables([ordinary])
    assert text == "# Attack report\n\n" + "\n\n".join(table.markdown() for table in tables) + "\n"
    assert "| G8 | usable gradients | pass | images without gradient 0," in text
    assert "patches of 4x4 on 200 of 200 images" in text.lower()
    assert tables[0].rows[0][-4:] == ("17", "0", "5", "-")
