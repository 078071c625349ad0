"""Checks on made-up outcomes: what is a warning and what is noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.attacks.autoattack import AutoAttack
from qadtr_brevitas.auditing import pixel_checks, size_checks
from qadtr_brevitas.auditing.audited_model import AuditedModel, ForwardCounter
from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.search import SearchTrace
from tests.auditing.conftest import SIDE, Trained, run_checks

IMAGES, STEPS = 200, 40


@pytest.fixture
def context(trained: Trained) -> AuditContext:
    return trained.context(AuditedModel(name="net", precision=None, logits=trained.net, passes=ForwardCounter()))


def broken(count: int) -> Tensor:
    return torch.arange(IMAGES) < count


def set_outcomes(context: AuditContext, *, after: dict[int, int], losses: Tensor, restarts: int = 0) -> None:
    """Puts the outcome of the longest attack in place: images broken after so many steps, and its losses."""
    patches = context.start()
    none = torch.zeros(STEPS, IMAGES, dtype=torch.bool)
    context.__dict__["longest"] = SearchTrace({}, patches, losses, none, none)
    context.__dict__["broken_after"] = {steps: broken(count) for steps, count in after.items()}
    context.__dict__["broken_by_restarts"] = broken(restarts)


def falling(*, late: float) -> Tensor:
    """(41, 200) losses that fall by 1, a share of it in the last 10 steps."""
    fall = torch.full((STEPS,), (1 - late) / (STEPS - 10))
    fall[-10:] = late / 10
    return torch.cat([torch.zeros(1), -fall.cumsum(0)])[:, None].expand(-1, IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize(("last", "status"), [(105, "pass"), (109, "pass"), (112, "WARN")])
def test_more_steps_must_not_break_clearly_more(context: AuditContext, last: int, status: str) -> None:
    set_outcomes(context, after={10: 90, 20: 100, 40: last}, losses=falling(late=0.0), restarts=120)
    finding = run_checks(context, "G1")["G1"]
    assert finding.status == status
    assert finding.numbers["asr 10 steps, 2 restarts"] == pytest.approx(0.6)
    assert finding.numbers["gain"] == pytest.approx((last - 100) / 200)


@pytest.mark.parametrize(("late", "status"), [(0.04, "pass"), (0.1, "WARN")])
def test_the_loss_must_have_stopped_falling(context: AuditContext, late: float, status: str) -> None:
    set_outcomes(context, after={40: 100}, losses=falling(late=late))
    finding = run_checks(context, "G2")["G2"]
    assert (finding.status, finding.numbers["images left"]) == (status, 100)
    assert finding.numbers["fall in the last 10 steps"] == pytest.approx(late, abs=1e-5)


def test_an_attack_that_breaks_all_was_long_enough(context: AuditContext) -> None:
    set_outcomes(context, after={40: 195}, losses=falling(late=0.5))
    assert run_checks(context, "G2")["G2"].status == "pass"


def test_a_loss_that_moved_on_few_images_is_not_judged(context: AuditContext) -> None:
    losses = falling(late=0.1).clone()
    losses[:, 105:] = 0
    set_outcomes(context, after={40: 100}, losses=losses)
    finding = run_checks(context, "G2")["G2"]
    assert finding.status == "skipped"
    assert "only 5 of the 100 images left" in finding.meaning


def test_success_that_is_lost_again_is_a_warning(context: AuditContext) -> None:
    set_outcomes(context, after={40: 100}, losses=falling(late=0.0))
    finding = run_checks(context, "G15")["G15"]
    assert finding.numbers["asr last patches"] < 0.1
    assert finding.status == "WARN"
    assert "keep their best patch" in finding.meaning


def test_one_step_that_beats_many_is_a_warning(context: AuditContext) -> None:
    set_outcomes(context, after={10: 0, 40: 0}, losses=falling(late=0.0))
    finding = run_checks(context, "G4")["G4"]
    assert finding.status == "WARN"
    assert finding.meaning.startswith("one step of ")


def test_a_targeted_attack_that_beats_the_untargeted_one_is_a_warning(context: AuditContext) -> None:
    set_outcomes(context, after={10: 0, 40: 0}, losses=falling(late=0.0))
    assert run_checks(context, "G14")["G14"].status == "WARN"


def test_noise_that_beats_the_attack_is_a_warning(context: AuditContext) -> None:
    set_outcomes(context, after={40: 0}, losses=falling(late=0.0))
    weak = run_checks(context, "G7")["G7"]
    assert (weak.status, weak.numbers["noise"] > 0) == ("pass", weak.numbers["gain"] > 0)
    context.__dict__["is_wrong"] = lambda images, labels: torch.arange(len(labels)) % 4 == 0
    strong = run_checks(context, "G7")["G7"]
    assert strong.status == "WARN"
    assert "noise breaks 50 images that the optimized patches do not" in strong.meaning


@pytest.mark.slow
def test_other_precisions_and_their_mean_may_be_better_sources(trained: Trained) -> None:
    def masked(images: Tensor) -> Tensor:
        return trained.net(images.detach())

    audited = AuditedModel(
        name="net",
        precision=None,
        logits=masked,
        other_precisions={"32 bit": trained.net},
        full_precision=trained.net,
        passes=ForwardCounter(),
    )
    finding = run_checks(trained.context(audited), "G6", "G10", "G13")
    assert {finding.status for finding in finding.values()} == {"WARN"}
    assert "patches from 32 bit break more images" in finding["G6"].meaning
    assert "8+4+2" in finding["G10"].meaning
    assert "gradient of 32 bit breaks more images" in finding["G13"].meaning


@pytest.mark.parametrize(
    ("counts", "status"),
    [([20, 60, 100, 150, 200], "pass"), ([20, 60, 52, 150, 200], "pass"), ([20, 60, 40, 150, 200], "WARN")],
)
def test_a_larger_patch_must_not_be_worse(
    context: AuditContext, monkeypatch: pytest.MonkeyPatch, counts: list[int], status: str
) -> None:
    outcomes = dict(zip((2, 3, 4, 6, SIDE), counts, strict=True))
    monkeypatch.setattr(size_checks, "_broken", lambda context, size: broken(outcomes[size[0]]))
    finding = run_checks(context, "G3")["G3"]
    assert finding.status == status
    assert ("(3x3 to 4x4)" in finding.meaning) == (status == "WARN")


@pytest.mark.parametrize(("left", "status"), [(2, "pass"), (6, "pass"), (10, "WARN")])
def test_an_attacker_who_chooses_every_pixel_must_succeed(
    context: AuditContext, monkeypatch: pytest.MonkeyPatch, left: int, status: str
) -> None:
    monkeypatch.setattr(size_checks, "_broken", lambda context, size: broken(IMAGES - left))
    assert run_checks(context, "G3")["G3"].status == status


@pytest.mark.parametrize(("by_autoattack", "status"), [(4, "pass"), (60, "WARN")])
def test_pgd_must_not_leave_far_more_than_autoattack(
    context: AuditContext, monkeypatch: pytest.MonkeyPatch, by_autoattack: int, status: str
) -> None:
    def outcome(context: AuditContext, attack: object, index: Tensor, *, start: int) -> Tensor:
        assert len(index) == (IMAGES if (type(attack).__name__, start) == ("Pgd", 0) else IMAGES - 100)
        return broken(100 + (by_autoattack if isinstance(attack, AutoAttack) else start))

    monkeypatch.setattr(pixel_checks, "_broken", outcome)
    finding = run_checks(context, "G21")["G21"]
    assert finding.status == status
    assert finding.numbers["gain"] == pytest.approx((by_autoattack - 1) / IMAGES)
    assert ("--attack autoattack" in finding.meaning) == (status == "WARN")
