from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.reproduce.analyses.features import Features
from qadtr_brevitas.reproduce.analyses.layers import choose_layers, recorded_outputs
from tests.reproduce.analyses.support import LAVAN, analyze


@pytest.mark.slow
def test_an_unknown_layer_is_refused_before_anything_is_made(models: list[LoadedModel], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"net0.*'layer1\.0\.conv3'.*'layer1\.0\.conv[12]'"):
        analyze(Features(attack=LAVAN, layers=("layer1.0.conv3",)), models, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_name_like_none_lists_some_layers_without_quantizers(models: list[LoadedModel]) -> None:
    with pytest.raises(UsageError, match=r"conv1, bn1, act1, layer1, layer1\.0, .* and \d+ more") as caught:
        choose_layers(models[0].model, ("?",), of="model net0")
    assert "quant" not in str(caught.value)


@pytest.mark.slow
def test_a_layer_without_a_feature_map_is_refused(models: list[LoadedModel], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'linear'.*\(6, 3\)"):
        analyze(Features(attack=LAVAN, images=6, layers=("linear",)), models, tmp_path)


def test_a_network_without_convolutions_needs_names() -> None:
    with pytest.raises(UsageError, match=r"toy has no convolutions.*layers=\[...\] from 0"):
        choose_layers(nn.Sequential(nn.Linear(2, 2)), (), of="toy")


def test_hooks_are_removed_after_the_block() -> None:
    layer = nn.Conv2d(3, 2, 1)
    with recorded_outputs({"conv": layer}) as outputs:
        layer(torch.ones(1, 3, 2, 2))
    assert outputs["conv"].shape == (1, 2, 2, 2)
    assert not layer._forward_hooks
