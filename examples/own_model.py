"""Quantize a network of your own: any nn.Module from images to logits.

`architecture` names the function that makes it, so that the saved model can be loaded again, here and by every command:
qadtr-brevitas attack own_model --data digits
"""

from pathlib import Path

import torch
from digits_network import MEAN, STD, train_network
from torch import Tensor, nn

import qadtr_brevitas as qb
from qadtr_brevitas.data.digits import Digits


class SmallNet(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32 * 8 * 8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


def make_net(num_classes: int = 10) -> nn.Module:
    return SmallNet(num_classes)


def main(folder: str = "own_model", steps: int = 200) -> qb.EvaluationResult:
    torch.manual_seed(0)
    net = train_network(make_net(), steps=steps)
    # Pixels in [0, 1] go in: the normalization becomes a part of the model.
    model = qb.convert(
        net,
        precisions=[32, 8, 4, 2],
        image_size=(32, 32),
        mean=MEAN,
        std=STD,
        architecture=f"{Path(__file__).stem}:make_net",
    )
    qb.calibrate(model, Digits().load("train"))
    for layer in model.report.layers:
        print(f"{layer.name:12} {layer.type:12} {layer.note}")
    qb.save(model, folder)
    result = qb.evaluate(qb.load(folder), Digits().load("test"))
    print(result)
    return result


if __name__ == "__main__":
    main()
