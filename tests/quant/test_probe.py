"""What the probe sees of networks as they come, odd ones included."""

import torch
from torch import Tensor, nn

from qadtr_brevitas.quant import convert
from qadtr_brevitas.quant.probe import probe

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Token(nn.Module):
    """Hands a parameter, and a view of it, to layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        return self.head(x.mean(1) + self.norm(self.token)[:, 0] + self.norm(self.token.expand(2, -1, -1))[:, 0])


def test_a_parameter_may_be_put_into_a_layer() -> None:
    net = Token()
    net.norm.weight.requires_grad_(False)
    found = probe(net, IMAGES)
    assert [product.owner for product in found.products] == ["embed", "head"]
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {"norm.weight"}
    convert(net, image_size=(8, 8))
