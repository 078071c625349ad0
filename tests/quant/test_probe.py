"""What the probe sees of networks as they come, odd ones included."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant import convert
from qadtr_brevitas.quant.probe import probe

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Token(nn.Module):
    """Passes a parameter, and a view of it, to its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        return self.head(x.mean(1) + self.norm(self.token)[:, 0] + self.norm(self.token.expand(2, -1, -1))[:, 0])


def test_a_parameter_may_be_the_input_of_a_layer() -> None:
    net = Token()
    net.norm.weight.requires_grad_(False)
    found = probe(net, IMAGES)
    assert [product.owner for product in found.products] == ["embed", "head"]
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {"norm.weight"}
    convert(net, image_size=(8, 8))


class Recurrent(nn.Module):
    """Reads an image row by row."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 2, 2)
        self.layer = layer
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Any = self.layer(self.embed(x).flatten(2).mT)
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_refused(kind: Any) -> None:
    name = {"RNN": "rnn_tanh"}.get(kind.__name__, kind.__name__.lower())
    with pytest.raises(UsageError, match=f"layer.*{name}.*cannot be followed.*matmul"):
        convert(Recurrent(kind(4, 4)), image_size=(8, 8))


def test_multi_head_attention_is_followed_inside() -> None:
    net = Recurrent(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    found = probe(net, IMAGES)
    names = [(product.owner, product.name) for product in found.products]
    attention = ["linear", "scaled_dot_product_attention", "linear"]
    expected = [("layer.self_attn", name) for name in attention] + [
        ("layer.linear1", "linear"),
        ("layer.linear2", "linear"),
    ]
    assert names == [("embed", "conv2d"), *expected, ("head", "linear")]
    assert found.unseen_macs == 0


def test_dynamic_ranges_need_images_apart() -> None:
    net = Recurrent(nn.TransformerEncoderLayer(4, 2, 8))
    with pytest.raises(UsageError, match=r"layer\.self_attn.*MultiheadAttention.*activations='static'"):
        convert(net, image_size=(8, 8), activations="dynamic")
