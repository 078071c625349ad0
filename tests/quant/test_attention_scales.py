"""One range per attention head."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze
from qadtr_brevitas.quant.switchable_quant import SwitchableActQuant

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
HEADS = 4


class Attending(nn.Module):
    """Attention whose heads differ by factors of four, by torch's function and by two products."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 2, stride=2), nn.Linear(8, 5)
        self.scale = nn.Parameter(4.0 ** torch.arange(-HEADS, 0).view(1, HEADS, 1, 1).float())

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        heads = tokens.unflatten(-1, (HEADS, -1)).transpose(1, 2) * self.scale
        seen = F.scaled_dot_product_attention(heads, heads, heads)
        seen = seen + (heads @ heads.transpose(2, 3)).softmax(-1) @ heads
        return self.head((seen / self.scale).transpose(1, 2).flatten(2).mean(1))


def converted(**settings: object) -> SwitchableModel:
    settings = {"image_size": (8, 8), "first_last": "same", **settings}
    return convert(Attending().eval(), [32, 4], **settings)  # pyright: ignore[reportArgumentType]


def quantizers(model: SwitchableModel) -> dict[str, SwitchableActQuant]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SwitchableActQuant) and m.shape}


def error(model: SwitchableModel) -> float:
    with torch.no_grad(), at_precision(model, 4):
        expected = Attending().eval()(IMAGES)
        return float((model(IMAGES) - expected).norm() / expected.norm())


def test_each_operand_of_attention_has_a_threshold_per_head() -> None:
    model = converted(attention_scales="head")
    found = quantizers(model)
    # Query, key, value and probabilities of the first; both sides of both products of the second.
    assert len(found) == 8
    assert {quantizer.shape for quantizer in found.values()} == {(1, HEADS, 1, 1)}
    assert any("per head" in layer.note for layer in model.report.layers)
    assert not quantizers(converted())


def test_thresholds_are_those_of_each_heads_values() -> None:
    model, net = converted(attention_scales="head"), Attending().eval()
    calibrate(model, list(IMAGES.split(2)), method="minmax")
    query = next(quantizer for name, quantizer in quantizers(model).items() if "query" in name)
    heads = net.stem(IMAGES).flatten(2).transpose(1, 2).unflatten(-1, (HEADS, -1)).transpose(1, 2) * net.scale
    # The largest value is half a step above the highest of 8 levels on a side, at 7.5 steps.
    thresholds = query.thresholds["4"].detach().flatten()
    torch.testing.assert_close(thresholds * 7.5 / 8, heads.detach().abs().amax((0, 2, 3)))


def test_heads_of_different_ranges_are_quantized_more_finely() -> None:
    found: dict[str, float] = {}
    for scales in ("tensor", "head"):
        model = converted(attention_scales=scales)
        calibrate(model, IMAGES)
        with torch.no_grad():
            assert torch.equal(model(IMAGES), Attending().eval()(IMAGES))
        found[scales] = error(model)
    assert found["head"] < 0.8 * found["tensor"], found


def test_it_learns_freezes_and_saves_its_thresholds() -> None:
    model, other = converted(attention_scales="head"), converted(attention_scales="head")
    calibrate(model, IMAGES)
    other.load_state_dict(model.state_dict())
    with at_precision(model, 4), at_precision(other, 4):
        logits = model(IMAGES)
        logits.square().sum().backward()
        assert torch.equal(other(IMAGES), logits)
    for quantizer in quantizers(model).values():
        gradient = quantizer.thresholds["4"].grad
        assert gradient is not None
        assert gradient.isfinite().all()
    torch.testing.assert_close(freeze(model, 4)(IMAGES), logits, rtol=1e-4, atol=1e-5)


def test_dynamic_ranges_are_refused() -> None:
    with pytest.raises(UsageError, match=r"attention_scales.*static"):
        converted(attention_scales="head", activations="dynamic")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_steps_serve_half_precision(dtype: torch.dtype) -> None:
    model = converted(attention_scales="head")
    quantizer = next(iter(quantizers(model).values()))
    with torch.no_grad():
        quantizer.thresholds["4"].fill_(1e-7)
    x = torch.full((2, HEADS, 3, 2), 0.5, dtype=dtype, requires_grad=True)
    with at_precision(model, 4):
        y = quantizer.quantize(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype  # pyright: ignore[reportOptionalMemberAccess]
    assert (y > 0).all()
    assert quantizer.thresholds["4"].grad.isfinite().all()  # pyright: ignore[reportOptionalMemberAccess]
