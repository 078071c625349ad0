"""Quantizers of attention probabilities and of the outputs of GELUs."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.registry import TARGETS
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze
from qadtr_brevitas.quant.switchable_quant import SwitchableActQuant
from qadtr_brevitas.quant.targets import find_target
from qadtr_brevitas.quant.twin import Twin
from qadtr_brevitas.quant.uniform import Uniform

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Attending(nn.Module):
    """Attention by torch's function, by a softmax and two products, and an MLP with a GELU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.softmax, self.drop, self.act = nn.Softmax(-1), nn.Dropout(0.1), nn.GELU()
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        x = x + F.scaled_dot_product_attention(x, x, x)
        x = x + self.drop(self.softmax(x @ x.mT)) @ x
        x = x + self.down(self.drop(self.act(self.up(x))))
        return self.head(x.mean(1))


def converted(**settings: object) -> SwitchableModel:
    settings = {"softmax_quantizer": "log2", "gelu_quantizer": {"name": "twin", "shift": 4}, **settings}
    return convert(Attending().eval(), [32, 4], image_size=(8, 8), first_last="same", **settings)  # pyright: ignore


def schemes(model: SwitchableModel) -> dict[str, str]:
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, SwitchableActQuant)}
    return {name: type(quantizer.scheme).__name__ for name, quantizer in quantizers.items()}


def test_values_of_softmax_and_gelu_alone_get_their_quantizers() -> None:
    found = schemes(converted())
    special = {name: kind for name, kind in found.items() if kind != "Uniform"}
    assert sorted(special.values()) == ["Log2", "Log2", "Twin"]
    (gelu,) = [name for name, kind in special.items() if kind == "Twin"]
    assert ".down." in gelu
    softmax = [name for name, kind in special.items() if kind == "Log2"]
    assert any("probabilities" in name for name in softmax)
    assert any(".left." in name for name in softmax)
    assert set(schemes(converted(softmax_quantizer=None, gelu_quantizer=None)).values()) == {"Uniform"}


def test_probabilities_are_powers_of_two_and_the_report_says_so() -> None:
    model = converted()
    calibrate(model, IMAGES)
    quantizer = next(m for n, m in model.named_modules() if "probabilities" in n and isinstance(m, SwitchableActQuant))
    values = torch.logspace(-20, 0, 1000, base=2)
    # FQ-ViT, equation 9: 2^-clip(round(-log2 p), 0, 2^b - 1); the last code stands for 0 here.
    codes = (-values.log2()).round()
    expected = torch.where(codes < 15, 2**-codes, 0.0)
    assert torch.equal(quantizer.scheme.round(values, quantizer.levels(4)), expected)
    notes = " ".join(layer.note for layer in model.report.layers)
    assert "Log2" in notes
    assert "Twin" in notes
    with at_precision(model, 4), torch.no_grad():
        assert model(IMAGES).isfinite().all()


def test_twin_levels_are_those_of_ptq4vit() -> None:
    twin = Twin(shift=4)
    levels = twin.levels(4, signed=True, narrow_range=False)
    x = torch.linspace(-1, 12, 5001)
    step = 0.8
    # Equation 8: codes of k - 1 bits in the ranges [-2^(k-1) d1, 0] and [0, 2^(k-1) d2), with d2 = 2^m d1.
    small = step / 2**4
    below = (x / small).round().clamp(-8, 0) * small
    above = (x / step).round().clamp(0, 7) * step
    torch.testing.assert_close(twin.round(x / step, levels) * step, torch.where(x < 0, below, above))
    assert len(twin.round(x / step, levels).unique()) == 16


def test_a_twin_is_nearer_to_the_outputs_of_a_gelu_than_equal_steps() -> None:
    x = F.gelu(torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 2)
    errors: list[float] = []
    for quantizer in (Uniform(), Twin()):
        levels = quantizer.levels(4, signed=True, narrow_range=False)
        steps = quantizer.steps_per_threshold(levels)
        errors.append(
            min(
                float((quantizer.round(x / (t / steps), levels) * (t / steps) - x).square().mean())
                for t in torch.linspace(2, 8, 60).tolist()
            )
        )
    assert errors[1] < 0.9 * errors[0]


def test_levels_below_zero_pass_gradients_down_to_their_end() -> None:
    x = torch.tensor([-1.0, -0.3, 0.3, 9.0], requires_grad=True)
    levels = Twin(shift=2).levels(4, signed=True, narrow_range=False)
    Twin(shift=2).quantize_weight(x, torch.tensor(0.2), levels).sum().backward()
    assert x.grad is not None
    # The range is that from -8 / 4 to 7 steps of 0.2.
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


class Blocks(nn.Module):
    """The network as a module of another one, so that its layers have names."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Attending().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("target", TARGETS.names())
@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"softmax_quantizer": "log2"}, "Log2 as softmax_quantizer of block:"),
        ({"gelu_quantizer": "twin"}, "Twin as gelu_quantizer of block.down:"),
    ],
)
def test_every_target_refuses_them_by_layer_with_the_nearest(target: str, settings: dict[str, str], facts: str) -> None:
    with pytest.raises(UsageError, match=f"{target} .*{facts}") as caught:
        convert(Blocks().eval(), [32, 8], image_size=(8, 8), target=target, **settings)  # pyright: ignore
    assert f"{next(iter(settings))}={find_target(target).quantizer}" in str(caught.value)  # pyright: ignore


@pytest.mark.parametrize("settings", [{}, {"attention_scales": "head"}])
def test_attention_is_taken_or_refused_by_layer(settings: dict[str, str]) -> None:
    for target in TARGETS.names():
        if find_target(target).products is not None:  # pyright: ignore[reportOptionalMemberAccess]
            with pytest.raises(UsageError, match=rf"{target} .*block computes \w+: .*without target"):
                convert(Blocks().eval(), [32, 8], image_size=(8, 8), target=target, **settings)  # pyright: ignore
            continue
        model = convert(Blocks().eval(), [32, 8], image_size=(8, 8), target=target, **settings)  # pyright: ignore
        calibrate(model, IMAGES)
        with at_precision(model, 8), torch.no_grad():
            torch.testing.assert_close(freeze(model, 8)(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"softmax_quantizer": "log2"}, ("Log2", "softmax_quantizer", "(block)")),
        ({"gelu_quantizer": "twin"}, ("Twin", "gelu_quantizer", "(block.down)")),
        ({"weight_quantizer": "log2"}, ("Log2", "uniform", "block.stem, block.up")),
        ({"weight_quantizer": {"name": "uniform", "granularity": "group", "group_size": 4}}, ("channel", "block.stem")),
    ],
)
def test_no_export_has_them_and_the_layers_are_named(settings: dict[str, object], facts: tuple[str, ...]) -> None:
    model = convert(Blocks().eval(), [32, 4], image_size=(8, 8), **settings)  # pyright: ignore
    with pytest.raises(UsageError, match="cannot be frozen") as caught:
        freeze(model, 4)
    assert all(fact in str(caught.value) for fact in facts), caught.value
    # The float network has none of them.
    freeze(model, 32)


def test_a_granularity_is_refused_by_key() -> None:
    with pytest.raises(UsageError, match="gelu_quantizer"):
        converted(gelu_quantizer=Twin(granularity="channel"))


def test_a_twin_is_refused_for_weights() -> None:
    with pytest.raises(UsageError, match=r"negative weights.*uniform"):
        converted(weight_quantizer="twin")
