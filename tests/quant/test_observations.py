"""What is kept of what quantizers see."""

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import parse_precisions
from qadtr_brevitas.quant.observations import Observations
from qadtr_brevitas.quant.ranges import percentiles
from qadtr_brevitas.quant.switch import Switch
from qadtr_brevitas.quant.switchable_quant import SwitchableActQuant
from qadtr_brevitas.quant.uniform import Uniform


def quantizer(*, signed: bool = True, max_threshold: float | None = None) -> SwitchableActQuant:
    switch = Switch(parse_precisions([32, 4]))
    return SwitchableActQuant(switch, (4,), 2, signed, False, (), max_threshold, Uniform())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_few_values_are_all_kept() -> None:
    quant = quantizer()
    seen = Observations([quant], 2)
    seen.add(quant, torch.tensor([[1.0, -2.0]]))
    seen.add(quant, torch.tensor([[-3.0, 0.5]]))
    sample = seen.seen_by(quant)
    assert sample.rows.tolist() == [[1.0, -2.0, -3.0, 0.5]]
    assert sample.largest.tolist() == [3.0]
    assert list(seen) == [quant]


def test_the_sample_has_the_same_share_of_each_batch() -> None:
    quant = quantizer()
    seen = Observations([quant], 4)
    for batch in range(4):
        seen.add(quant, torch.full((100, 3000), float(batch)))
    sample = seen.seen_by(quant).rows
    assert sample.numel() == 1 << 17
    assert sample.unique(return_counts=True)[1].tolist() == [1 << 15] * 4


def test_all_calls_of_a_shared_quantizer_have_the_same_share() -> None:
    quant = quantizer()
    seen = Observations([quant], 2)
    for call in range(8):
        seen.add(quant, torch.full((100, 3000), float(call)))
    values, counts = seen.seen_by(quant).rows.unique(return_counts=True)
    assert values.tolist() == list(range(8))
    assert counts.sum() == 1 << 17
    assert ((counts / (1 << 14) - 1).abs() < 0.05).all()


def test_the_sample_serves_the_percentile_and_the_largest_is_exact() -> None:
    x = normal(2000, 1000)
    x[7, 7] = -50
    quant = quantizer()
    seen = Observations([quant], 1)
    seen.add(quant, x)
    sample = seen.seen_by(quant)
    assert percentiles(sample.rows, 99.99).item() == pytest.approx(3.89, abs=0.2)
    assert sample.largest.item() == 50


def test_values_are_drawn_at_random_with_a_fixed_seed() -> None:
    x = torch.arange(1_000_000.0)
    samples = []
    for _ in range(2):
        quant = quantizer()
        seen = Observations([quant], 1)
        seen.add(quant, x)
        samples.append(seen.seen_by(quant).rows)
    assert torch.equal(*samples)
    assert samples[0].mean().item() == pytest.approx(5e5, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "kept", "largest"),
    [
        ({"signed": False}, [0.0, 0.0, 5.0, 9.0], 9.0),
        ({"signed": False, "max_threshold": 6.0}, [0.0, 0.0, 5.0, 6.0], 6.0),
        ({"signed": True}, [-20.0, 0.0, 5.0, 9.0], 20.0),
    ],
)
def test_values_are_clipped_to_fixed_limits(settings: dict[str, object], kept: list[float], largest: float) -> None:
    x = torch.tensor([-20.0, 0.0, 5.0, 9.0])
    quant = quantizer(**settings)
    seen = Observations([quant], 1)
    seen.add(quant, x)
    sample = seen.seen_by(quant)
    assert (sample.rows[0].tolist(), sample.largest.item()) == (kept, largest)
    assert x.tolist() == [-20.0, 0.0, 5.0, 9.0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    quant = quantizer(signed=False)
    with pytest.raises(UsageError, match=r"not finite.*weights"):
        Observations([quant], 1).add(quant, torch.tensor([1.0, bad]))


def test_quantizers_are_kept_apart() -> None:
    quantizers = [quantizer(), quantizer(), quantizer()]
    seen = Observations(quantizers, 1)
    seen.add(quantizers[2], torch.tensor([3.0]))
    seen.add(quantizers[0], torch.tensor([1.0, 1.5]))
    assert [seen.seen_by(q).rows.tolist() for q in seen] == [[[3.0]], [[1.0, 1.5]]]
    assert set(seen) == {quantizers[0], quantizers[2]}


def test_without_samples_the_largest_magnitude_is_recorded() -> None:
    quant = quantizer()
    seen = Observations([quant], 1, sampled=False)
    seen.add(quant, torch.tensor([1.0, -4.0]))
    assert seen.seen_by(quant).rows.numel() == 0
    assert seen.seen_by(quant).largest.tolist() == [4.0]
