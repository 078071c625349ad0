import pytest
import torch
import torch.nn.functional as F

from qadtr_brevitas.attacks.losses import attack_loss

LOGITS = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, -1.0, 4.0]])
LABELS = torch.tensor([0, 3])
TARGETS = torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("loss", "targets", "expected"),
    [
        ("logits", TARGETS, [2.0, 4.0]),
        ("margin", TARGETS, [2.0, 5.0]),
        ("logits", None, [1.0, -1.0]),
        ("margin", None, [1.0, -1.0]),
        ("dlr", None, [1 / 2, -1 / 5]),
        ("dlr", TARGETS, [2 / 2.5, 4 / 5.5]),
    ],
)
def test_logit_losses_by_hand(loss, targets, expected):
    assert attack_loss(loss, LOGITS, LABELS, targets).tolist() == pytest.approx(expected)


def test_the_ratio_of_differences_does_not_change_with_the_scale_of_the_logits():
    for targets in (None, TARGETS):
        torch.testing.assert_close(
            attack_loss("dlr", 100 * LOGITS + 7, LABELS, targets), attack_loss("dlr", LOGITS, LABELS, targets)
        )


def test_the_ratio_of_differences_is_finite_for_equal_logits_and_few_classes():
    for classes in (2, 3, 4):
        for logits in (torch.zeros(2, classes), torch.arange(2.0 * classes).view(2, classes)):
            for targets in (None, torch.tensor([1, 0])):
                assert attack_loss("dlr", logits, torch.tensor([0, 1]), targets).isfinite().all()


def test_the_lavan_loss_is_the_same_on_logits_and_log_probabilities():
    raw, normalized = (attack_loss("logits", z, LABELS, TARGETS) for z in (LOGITS, LOGITS.log_softmax(1)))
    torch.testing.assert_close(raw, normalized)
    difference = F.cross_entropy(LOGITS, TARGETS, reduction="none") - F.cross_entropy(LOGITS, LABELS, reduction="none")
    torch.testing.assert_close(raw, difference)


def test_cross_entropy_pulls_to_the_target_or_pushes_from_the_label():
    towards = attack_loss("cross-entropy", LOGITS, LABELS, TARGETS)
    torch.testing.assert_close(towards, F.cross_entropy(LOGITS, TARGETS, reduction="none"))
    torch.testing.assert_close(
        attack_loss("cross-entropy", LOGITS, LABELS), -F.cross_entropy(LOGITS, LABELS, reduction="none")
    )


@pytest.mark.parametrize("loss", ["logits", "margin", "cross-entropy", "dlr"])
@pytest.mark.parametrize("targeted", [False, True])
def test_descending_lowers_the_label_or_raises_the_target(loss, targeted):
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(attack_loss(loss, logits, LABELS, TARGETS if targeted else None).sum(), logits)
    rows = torch.arange(2)
    if targeted:
        assert (gradient[rows, TARGETS] < 0).all()
    else:
        assert (gradient[rows, LABELS] > 0).all()
