from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest

from qadtr_brevitas.auditing.significance import FALSE_ALARM, AsrGain, compare, deviations, resolution


def broken(*spans: tuple[int, int], images: int = 200) -> torch.Tensor:
    images_broken = torch.zeros(images, dtype=torch.bool)
    for first, last in spans:
        images_broken[first:last] = True
    return images_broken


def test_a_gain_counts_the_images_that_differ() -> None:
    gain = AsrGain.of(broken((0, 50)), broken((40, 60)))
    assert gain.value == pytest.approx((40 - 10) / 200)
    assert gain.noise == pytest.approx(deviations() * 50**0.5 / 200)
    assert gain.exceeds(0)


def test_a_gain_within_noise_or_threshold_does_not_count() -> None:
    assert not AsrGain.of(broken((0, 9)), broken()).exceeds(0)
    assert AsrGain.of(broken((0, 10)), broken()).exceeds(0)
    assert not AsrGain.of(broken((0, 10)), broken()).exceeds(0.05)
    assert not AsrGain.of(broken((0, 110)), broken((90, 200))).exceeds(0)
    assert resolution(200) == 10 / 200


def test_the_largest_of_many_gains_has_to_be_larger() -> None:
    others = {f"attack {number}": broken((0, 10)) for number in range(6)}
    assert compare(broken(), {"attack": broken((0, 10))}, base_name="base").is_better
    assert not compare(broken(), others, base_name="base").is_better


def test_comparing_names_the_best_and_gives_the_numbers() -> None:
    comparison = compare(broken((0, 20)), {"weak": broken((0, 10)), "strong": broken((0, 60))}, base_name="base")
    assert (comparison.best, comparison.is_better) == ("strong", True)
    assert comparison.numbers == pytest.approx(
        {"asr base": 0.1, "asr weak": 0.05, "asr strong": 0.3, "gain": 0.2, "noise": comparison.gain.noise}
    )


def test_chance_alone_hardly_ever_counts() -> None:
    draw = torch.Generator().manual_seed(0)
    alarms = sum(
        AsrGain.of(torch.rand(200, generator=draw) < 0.5, torch.rand(200, generator=draw) < 0.5).exceeds(0)
        for _ in range(2000)
    )
    assert alarms <= 6


@pytest.mark.parametrize("differing", [10, 17, 50, 120, 200])
def test_the_exact_test_decides_alike_but_for_one_image(differing: int) -> None:
    """McNemar's test by the normal distribution against the exact one, on images that only one attack breaks."""
    counts = range(differing // 2, differing + 1)
    gains = {more: AsrGain.of(broken((0, more)), broken((more, differing))).exceeds(0) for more in counts}
    exact = {more: binomtest(more, differing, alternative="greater").pvalue < FALSE_ALARM for more in counts}
    fewest, fewest_exact = (min(more for more in counts if decided[more]) for decided in (gains, exact))
    assert fewest <= fewest_exact <= fewest + 1
