"""Thresholds against what defines them: torch.quantile, and the least error of many thresholds tried."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qadtr_brevitas.quant.ranges import Sample, all_of, least_error, percentiles, thinned

BITS = (8, 5, 4, 2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(*shape: int) -> Tensor:
    """Return values with longer tails than weights: a few are many times as large as the others."""
    return normal(*shape) / normal(*shape, seed=1).abs().clamp_min(0.2)


def with_an_outlier(*shape: int) -> Tensor:
    rows = normal(*shape)
    rows[:, shape[1] // 2] = 20
    return rows


def levels_of(bits: int) -> tuple[int, int]:
    return 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1


def error(rows: Tensor, thresholds: Tensor, bits: int) -> Tensor:
    step = (thresholds / levels_of(bits)[1])[:, None]
    return ((rows / step).round().clamp(*levels_of(bits)) * step - rows).square().sum(1)


def least_of_many(rows: Tensor, bits: int) -> Tensor:
    largest = rows.abs().amax(1)
    return torch.stack([error(rows, largest * k / 100, bits) for k in range(2, 101)]).amin(0)


def excess(rows: Tensor, sample: Sample, bits: int) -> Tensor:
    """Return the error with the threshold found, over the least error of many thresholds."""
    found = least_error(sample, sample.largest, levels_of(bits), levels_of(bits)[1])
    return error(rows, found, bits) / least_of_many(rows, bits)


@given(st.integers(1, 300), st.sampled_from([0.5, 50.0, 90.0, 99.99, 100.0]))
def test_percentiles_are_those_of_torch(count: int, percentile: float) -> None:
    rows = normal(3, count, seed=count)
    expected = torch.quantile(rows.abs().double(), percentile / 100, dim=1)
    torch.testing.assert_close(percentiles(rows, percentile), expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [normal, heavy_tailed, with_an_outlier])
@pytest.mark.parametrize("bits", BITS)
def test_search_finds_nearly_the_least_error(make: object, bits: int) -> None:
    rows = make(40, 1500)
    assert excess(rows, all_of(rows), bits).mean() < 1.04
    assert excess(rows, all_of(rows), bits).max() < 1.15


@pytest.mark.parametrize("make", [normal, heavy_tailed, with_an_outlier])
@pytest.mark.parametrize("bits", BITS)
def test_a_sample_that_keeps_the_largest_serves_as_well(make: object, bits: int) -> None:
    rows = make(40, 3000)
    sample = thinned(all_of(rows))
    assert sample.rows.shape[1] < 300
    assert excess(rows, sample, bits).mean() < 1.08


@pytest.mark.parametrize("make", [normal, heavy_tailed, with_an_outlier])
@pytest.mark.parametrize("bits", BITS)
def test_a_sample_of_one_long_row_serves_as_well(make: object, bits: int) -> None:
    row = make(1, 1 << 17)
    sample = thinned(all_of(row))
    assert sample.rows.shape[1] < 20_000
    assert excess(row, sample, bits) < 1.08


def test_a_sample_without_the_largest_values_is_much_worse() -> None:
    rows = with_an_outlier(40, 3000)
    cut = rows[:, :250]
    assert excess(rows, Sample(cut, cut.abs().amax(1)), 8).mean() > 5


def test_few_values_are_not_thinned() -> None:
    rows = normal(2, 256)
    assert thinned(all_of(rows)).rows is rows


def test_rows_are_searched_one_by_one() -> None:
    rows = heavy_tailed(600, 400)
    together = least_error(all_of(rows), rows.abs().amax(1), levels_of(4), 7)
    alone = [least_error(all_of(row[None]), row.abs().max()[None], levels_of(4), 7) for row in rows[::100]]
    torch.testing.assert_close(together[::100], torch.cat(alone), rtol=1e-4, atol=0)


@pytest.mark.parametrize("make", [normal, heavy_tailed, with_an_outlier])
@pytest.mark.parametrize("bits", BITS)
def test_the_best_of_halves_is_found(make: object, bits: int) -> None:
    rows = make(600, 400)
    start = rows.abs().amax(1) * torch.linspace(0.6, 2, 600)
    found = least_error(all_of(rows), start, levels_of(bits), levels_of(bits)[1], halves=True)
    tried = torch.stack([error(rows, start / 2**k, bits) for k in range(6)])
    torch.testing.assert_close(error(rows, found, bits), tried.amin(0), rtol=1e-4, atol=0)
    exponents = (start / found).log2()
    assert torch.equal(exponents, exponents.round())


@pytest.mark.parametrize("halves", [False, True])
def test_rows_of_zeros_keep_the_threshold_to_start_from(halves: bool) -> None:
    start = torch.tensor([0.5, 3.0])
    assert torch.equal(least_error(all_of(torch.zeros(2, 5)), start, levels_of(4), 7, halves=halves), start)
