import pytest
import torch

from qadtr_brevitas.attacks.results import AttackGoal, AttackResult, best_per_image


def result(losses, success, value=0.0):
    return AttackResult(torch.full((len(losses), 3, 2, 2), value), torch.tensor(losses), torch.tensor(success))


def test_a_success_is_better_than_a_failure_of_lower_loss():
    """By loss alone a restart that fails can be preferred to one that succeeds."""
    success, failure = result([2.0], [True]), result([-5.0], [False], 1.0)
    assert best_per_image([success, failure]).success.tolist() == [True]
    assert best_per_image([failure, success]).images.max() == 0


def test_of_equal_successes_the_lower_loss_wins_for_each_image():
    first = result([1.0, 4.0, 1.0], [True, True, False], 0.0)
    second = result([2.0, 3.0, 0.5], [True, True, False], 1.0)
    best = best_per_image([first, second])
    assert best.losses.tolist() == [1.0, 3.0, 0.5]
    assert best.images[:, 0, 0, 0].tolist() == [0.0, 1.0, 1.0]


def test_a_nan_loss_never_wins():
    broken, sound = result([float("nan")], [False], 1.0), result([9.0], [False])
    assert best_per_image([broken, sound]).losses.tolist() == [9.0]
    assert best_per_image([sound, broken]).losses.tolist() == [9.0]


def test_some_rows_of_a_result_are_replaced():
    whole = result([1.0, 2.0, 3.0], [False, False, False])
    updated = whole.index_copy(torch.tensor([2, 0]), result([0.3, 0.1], [True, True], 1.0))
    assert updated.losses.tolist() == pytest.approx([0.1, 2.0, 0.3])
    assert updated.success.tolist() == [True, False, True]
    assert updated.images[:, 0, 0, 0].tolist() == [1.0, 0.0, 1.0]


def test_what_counts_as_success():
    logits, labels = torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]]), torch.tensor([0, 0])
    images = torch.zeros(2, 3, 2, 2)
    assert AttackGoal.of(None, labels, loss="margin").assess(images, logits).success.tolist() == [False, True]
    assert AttackGoal.of(2, labels, loss="margin").assess(images, logits).success.tolist() == [False, False]
    assert AttackGoal.of(1, labels, loss="margin").assess(images, logits).success.tolist() == [False, True]
