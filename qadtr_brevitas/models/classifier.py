"""What the CIFAR networks share: the pooled linear head and the methods timm's tools call on any model."""

from typing import Any

from torch import Tensor, nn


class CifarClassifier(nn.Module):
    """A network that ends in global average pooling and one linear layer.

    A subclass sets up its layers, calls `add_head` and writes `forward_features`.
    """

    num_classes: int
    num_features: int

    def add_head(self, num_features: int, num_classes: int) -> None:
        """Adds pooling and classifier, and initializes every convolution for ReLU (He et al. 2015).

        Args:
            num_features: channels of the last feature map.
            num_classes: outputs; 0 for none, as in timm.
        """
        self.num_features = self.head_hidden_size = num_features
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps normalized images (N, 3, H, W) to the last feature map (N, num_features, h, w)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps the last feature map to logits (N, num_classes), or to the pooled features (N, num_features)."""
        x = self.avgpool(x).flatten(1)
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalized images (N, 3, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the last layer by a new one, in place.

        Args:
            num_classes: outputs of the new layer; 0 for none.
            global_pool: only "avg", or None to keep it.

        Raises:
            ValueError: another kind of pooling.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool={global_pool!r} is not possible here: leave it out, or give 'avg'")
        self.num_classes = num_classes
        self.linear: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


def cifar_cfg(first_conv: str) -> dict[str, Any]:
    """Timm's default_cfg of a CIFAR network; mean and std are those of the published weights.

    Y. Idelbayev's CIFAR-10 weights were trained with the ImageNet mean and std, not with CIFAR's own.
    """
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "first_conv": first_conv,
        "classifier": "linear",
    }
