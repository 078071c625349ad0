"""Scores against cases counted by hand, and their properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qadtr_brevitas.evaluation.metrics import Mean, Proportion, Score, accuracy, mean, score, wilson

# Six images: the first four classified correctly without a patch; image 3 shows class 2.
LABELS = torch.tensor([0, 0, 1, 2, 1, 2])
CLEAN = torch.tensor([0, 0, 1, 2, 0, 0])
PATCHED = torch.tensor([2, 1, 1, 2, 2, 2])


def test_targeted_score_counts_only_correct_images_of_other_classes() -> None:
    assert score(CLEAN, PATCHED, LABELS, target=2) == Score(
        asr=Proportion(1, 3),  # of images 0, 1 and 2 only image 0 turns into class 2
        asr_all=Proportion(4, 6),  # images 0, 3, 4 and 5 are called class 2
        untargeted=Proportion(2, 4),  # images 0 and 1 turn wrong
        clean_accuracy=Proportion(4, 6),
        robust_accuracy=Proportion(2, 6),  # images 2 and 3; image 5 is right with the patch alone
    )


def test_untargeted_score_counts_any_wrong_class() -> None:
    assert score(CLEAN, PATCHED, LABELS, target=None) == Score(
        asr=Proportion(2, 4),
        asr_all=Proportion(3, 6),  # images 0, 1 and 4
        untargeted=Proportion(2, 4),
        clean_accuracy=Proportion(4, 6),
        robust_accuracy=Proportion(2, 6),
    )


def test_patch_that_always_wins_scores_one_and_leaves_out_its_own_class() -> None:
    labels = torch.arange(10).repeat(3)
    result = score(labels, torch.full_like(labels, 4), labels, target=4)
    assert (result.asr.value, result.asr.n) == (1.0, 27)
    assert result.robust_accuracy == Proportion(3, 30)


def test_share_without_denominator_has_no_value() -> None:
    wrong_everywhere = score(LABELS + 1, PATCHED, LABELS, target=2)
    assert wrong_everywhere.asr == Proportion(0, 0)
    assert wrong_everywhere.asr.value is None
    assert wrong_everywhere.asr.interval == (0.0, 1.0)


def test_accuracy() -> None:
    assert accuracy(CLEAN, LABELS) == Proportion(4, 6)


def test_wilson_against_published_values() -> None:
    assert wilson(50, 64) == pytest.approx((0.66567, 0.86498), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)


def test_mean_keeps_the_smallest_denominator() -> None:
    result = mean([Proportion(10, 100), Proportion(30, 200), Proportion(0, 0)])
    assert isinstance(result, Mean)
    assert (result.value, result.low, result.high) == pytest.approx((0.125, 0.10, 0.15))
    assert (result.n, result.shares) == ((100, 200), 2)
    assert result.interval == wilson(round(12.5), 100)
    assert mean([Proportion(0, 0)]) is None
    assert mean([]) is None


classes = st.integers(0, 3)
images = st.lists(st.tuples(classes, classes, classes), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(images, st.none() | classes)
def test_score_properties(rows: list[tuple[int, int, int]], target: int | None) -> None:
    clean, patched, labels = torch.tensor(rows).unbind(1)
    result = score(clean, patched, labels, target=target)
    for share in (result.asr, result.asr_all, result.untargeted, result.clean_accuracy, result.robust_accuracy):
        low, high = share.interval
        assert 0 <= low <= high <= 1
        assert share.value is None or low <= share.value <= high
    assert result.asr.n <= result.untargeted.n == result.clean_accuracy.count
    assert result.asr.count <= result.asr_all.count
    assert result.asr.count <= result.untargeted.count
    assert result.robust_accuracy.count == result.clean_accuracy.count - result.untargeted.count
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    assert score(clean[order], patched[order], labels[order], target=target) == result


@settings(deadline=None, max_examples=40)
@given(images)
def test_patch_that_changes_nothing_has_no_success(rows: list[tuple[int, int, int]]) -> None:
    clean, _, labels = torch.tensor(rows).unbind(1)
    result = score(clean, clean, labels, target=None)
    assert result.asr.count == 0
    assert result.robust_accuracy == result.clean_accuracy
