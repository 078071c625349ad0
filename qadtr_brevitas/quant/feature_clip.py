"""Feature-norm clipping: no position of a feature map may be much stronger than positions of clean images are.

A universal patch works by features of very large norm at its place, so clipping their norm takes its strength away
(Yu et al. 2021, "Defending Against Universal Adversarial Patches by Clipping Feature Norms", ICCV). The layer has no
weights and is differentiable, so attacks go through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError, suggest
from qadtr_brevitas.data.batches import ImageBatches
from qadtr_brevitas.quant.ranges import percentiles
from qadtr_brevitas.quant.switch import Switch, at_precision, evaluating, frozen_weights

_NO_LIMIT = 1e30
# Norms that are kept of each batch: enough for a percentile of the few strongest.
_SAMPLED = 1 << 17

DEFAULT_PERCENTILE = 90.0


@dataclass(frozen=True)
class FeatureClipping:
    """Where features are clipped, and to what.

    Args:
        after: names of modules whose outputs are clipped, such as layer1.
        percentile: of the norms on the images of a calibration, at each precision by itself; the paper fits its
            threshold to clean images too, but does not say at which share of them. With 90 a patch succeeds three
            quarters as often as with 99, at less than a point of accuracy (ResNet-20, docs/results/resistance.md).

    Raises:
        UsageError: no module, or a percentile that is none.
    """

    after: tuple[str, ...]
    percentile: float = DEFAULT_PERCENTILE

    def __post_init__(self) -> None:
        if not self.after:
            raise UsageError("feature_clip names no module: give after=[...], for instance [layer1, layer2]")
        if not 0 < self.percentile <= 100:
            raise UsageError(f"feature_clip.percentile={self.percentile:g} is none: give a number above 0, at most 100")

    @classmethod
    def parse(cls, value: FeatureClipping | Mapping[str, Any] | Sequence[str]) -> FeatureClipping:
        """Read an object, its keys as in a recipe, or the names of the modules alone.

        Raises:
            UsageError: an unknown key, or as the class.
        """
        if isinstance(value, FeatureClipping):
            return value
        keys: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"after": value}
        if unknown := sorted(keys.keys() - {"after", "percentile"}):
            raise UsageError(f"feature_clip has no key {unknown[0]!r}: {suggest(unknown[0], ['after', 'percentile'])}")
        return cls(tuple(keys.get("after", ())), float(keys.get("percentile", DEFAULT_PERCENTILE)))


class FeatureClip(nn.Module):
    """Scale the feature vector of each position down to a largest L2 norm; shorter ones stay bit for bit.

    Args:
        switch: the model's switch.
        name: of the module whose output is clipped.
        percentile: as in `FeatureClipping`.
        channels_last: whether four-dimensional features are (N, H, W, C) instead of (N, C, H, W).
    """

    def __init__(self, switch: Switch, name: str, *, percentile: float, channels_last: bool = False) -> None:
        super().__init__()
        self.switch, self.name, self.percentile, self.channels_last = switch, name, percentile, channels_last
        self.norms: list[Tensor] | None = None
        for precision in switch.allowed:
            self.register_buffer(str(precision), torch.tensor(_NO_LIMIT))

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape: (N, C, H, W) or (N, tokens, C).

        Raises:
            UsageError: they are of another shape.
        """
        if features.dim() not in (3, 4):
            raise UsageError(
                f"{self.name} returns features of shape {tuple(features.shape)}, which have no positions: clip after a "
                "module that returns (N, channels, H, W) or (N, tokens, channels)"
            )
        dim = 1 if features.dim() == 4 and not self.channels_last else -1
        norms = torch.linalg.vector_norm(features, dim=dim, keepdim=True)
        if self.norms is not None:
            self.norms.append(_sampled(norms.detach().flatten()))
            return features
        threshold = self.get_buffer(str(self.switch.precision))
        # A quotient of equal numbers is 1, so that shorter vectors do not change.
        return features * (threshold / torch.clamp_min(norms, threshold))

    def hook(self, module: nn.Module, args: Any, output: Any) -> Tensor:
        """Clip the output of a module, as a forward hook of it."""
        if not isinstance(output, Tensor):
            raise UsageError(f"{self.name} returns no tensor: clip after a module that returns features alone")
        return self(output)

    @torch.no_grad()
    def reset(self) -> None:
        """Clip nothing until the next calibration."""
        for threshold in self.buffers():
            threshold.fill_(_NO_LIMIT)


def insert_feature_clips(net: nn.Module, switch: Switch, clipping: FeatureClipping) -> nn.ModuleList:
    """Clip the outputs of modules of a float network, which is changed in place, and return the clips.

    Raises:
        UsageError: there is no such module.
    """
    names = {name for name, _ in net.named_modules() if name}
    last = getattr(net, "output_fmt", None)
    clips: list[FeatureClip] = []
    for name in clipping.after:
        if name not in names:
            raise UsageError(f"feature_clip: {type(net).__name__} has no module {name!r}: {suggest(name, names)}")
        channels_last = str(last).endswith("NHWC")
        clip = FeatureClip(switch, name, percentile=clipping.percentile, channels_last=channels_last)
        net.get_submodule(name).register_forward_hook(clip.hook)
        clips.append(clip)
    return nn.ModuleList(clips)


def feature_clips(model: nn.Module) -> list[FeatureClip]:
    """Return the clips of a model."""
    return [module for module in model.modules() if isinstance(module, FeatureClip)]


def clip_passes(model: nn.Module) -> int:
    """Return the passes over all batches that the calibration of clips takes."""
    clips = feature_clips(model)
    return len(clips[0].switch.allowed) if clips else 0


@torch.no_grad()
def calibrate_feature_clips(model: nn.Module, batches: ImageBatches, count_batch: Callable[[], object]) -> None:
    """Set the thresholds of all clips at each precision to the percentile of the norms there, without clips.

    Args:
        model: a switchable model, calibrated but for its clips.
        batches: images.
        count_batch: called after each batch of each of `clip_passes(model)` passes.
    """
    clips = feature_clips(model)
    for precision in clips[0].switch.allowed if clips else ():
        with evaluating(model), at_precision(model, precision), frozen_weights(model):
            for clip in clips:
                clip.norms = []
            try:
                for images in batches:
                    model(images)
                    count_batch()
                for clip in clips:
                    assert clip.norms
                    found = percentiles(torch.cat(clip.norms)[None].float(), clip.percentile)
                    clip.get_buffer(str(precision)).copy_(found[0].clamp(min=torch.finfo(found.dtype).tiny))
            finally:
                for clip in clips:
                    clip.norms = None


def _sampled(norms: Tensor) -> Tensor:
    """Return some of many norms, evenly spread."""
    return norms[:: -(-len(norms) // _SAMPLED)]
