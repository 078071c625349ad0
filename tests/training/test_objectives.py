"""Objectives of other packages: found through entry points, trained with, and their metrics logged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch

from qadtr_brevitas.config import load_recorded_recipe
from qadtr_brevitas.core import registry
from qadtr_brevitas.core.errors import PluginError, UsageError
from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.training.gir import Gir
from qadtr_brevitas.training.loop import train
from qadtr_brevitas.training.objectives import CrossEntropy, Objective
from qadtr_brevitas.training.regularizers import Regularizer
from qadtr_brevitas.training.step import ForwardOutput, StepLoss, TrainingStep
from tests.training.support import Recorder, make_recipe, same_weights

SHORT: dict[str, Any] = {"epochs": 1, "float_epochs": 0, "scheduler": {"warmup_epochs": 0}, "norm_batches": 0}
PLAIN: dict[str, Any] = {"attack": None, "gradient": None, "regularizers": []}
EXAMPLE = "examples.objectives.feature_matching:FeatureMatching"


@plugin
class WrongShape(Objective):
    """One loss for each image."""

    def compute(self, step: TrainingStep) -> StepLoss:
        return StepLoss(step.forward(step.images).logits.sum(1))


@plugin
class Constant(Objective):
    """A loss that no parameter changes."""

    def compute(self, step: TrainingStep) -> StepLoss:
        return StepLoss(torch.zeros(()))


@plugin
class Named(Objective):
    """The ordinary loss with metrics of all kinds."""

    clash: bool = False
    vector: bool = False

    def compute(self, step: TrainingStep) -> StepLoss:
        ordinary = step.default_loss()
        figures: dict[str, Any] = {"number": 3, "tensor": ordinary.loss, "unknown": float("nan")}
        if self.clash:
            figures["lr"] = 1.0
        if self.vector:
            figures["vector"] = torch.zeros(2)
        return StepLoss(ordinary.loss, {**ordinary.metrics, **figures})


@plugin
class FeatureNorm(Regularizer):
    """The size of some features and of the labels, to show what a regularizer gets."""

    @property
    def features(self) -> tuple[str, ...]:
        return ("act2",)

    def compute(self, step: TrainingStep, output: ForwardOutput) -> StepLoss | None:
        size = output.features["act2"].square().mean()
        return StepLoss(0.1 * size, {"feature_size": size, "mean_label": step.labels.float().mean()})


@pytest.fixture(autouse=True)
def entry_points(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The objectives above and that of the examples, as if installed packages declared them."""
    here = "tests.training.test_objectives"
    points = EntryPoints(
        [
            EntryPoint("feature-matching", EXAMPLE, "qadtr_brevitas.objective"),
            EntryPoint("wrong-shape", f"{here}:WrongShape", "qadtr_brevitas.objective"),
            EntryPoint("constant", f"{here}:Constant", "qadtr_brevitas.objective"),
            EntryPoint("named", f"{here}:Named", "qadtr_brevitas.objective"),
            EntryPoint("feature-norm", f"{here}:FeatureNorm", "qadtr_brevitas.regularizer"),
        ]
    )
    monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))
    registry._external.cache_clear()
    yield
    registry._external.cache_clear()


def observe(run: Path, **keys: Any) -> Recorder:
    recorder = Recorder()
    train(make_recipe(**keys), run, device="cpu", observer=recorder)
    return recorder


def matching(**keys: Any) -> dict[str, Any]:
    return {"objective": {"name": "feature-matching", "layers": ["act*"], **keys}}


@pytest.mark.slow
def test_an_objective_matches_features_of_two_precisions_and_lowers_the_input_gradient(tmp_path: Path) -> None:
    def means(run: str, **factors: float) -> list[dict[str, float]]:
        keys = {**SHORT, **PLAIN, "epochs": 4, "optimizer": {"lr": 0.02}}
        found = [record.means for record in observe(tmp_path / run, **keys, **matching(**factors)).epochs]
        assert all({"accuracy", "feature_distance", "input_gradient"} <= mean.keys() for mean in found)
        return found

    penalized = means("penalized", penalty=2, match=0)
    matched = means("matched", penalty=0, match=16)
    plain = means("plain", penalty=0, match=0)
    assert penalized[-1]["input_gradient"] < 0.7 * penalized[0]["input_gradient"]
    assert penalized[-1]["input_gradient"] < 0.7 * plain[-1]["input_gradient"]
    assert matched[-1]["feature_distance"] < 0.75 * plain[-1]["feature_distance"]


def test_a_run_records_its_objective(tmp_path: Path) -> None:
    observe(tmp_path, **SHORT, **PLAIN, **matching(penalty=2.0))
    recorded = load_recorded_recipe(tmp_path / "recipe.yaml").train.objective
    assert recorded == make_recipe(**matching(penalty=2.0)).train.objective


def test_an_objective_goes_with_attack_regularizers_and_gradient_rule(tmp_path: Path) -> None:
    recorder = observe(tmp_path, **SHORT, **matching())
    names = {"accuracy", "adversarial_accuracy", "distillation", "feature_distance", "input_gradient", "gir_cosine"}
    assert recorder.epochs[-1].means.keys() == names | {"loss", "images_per_s"}


def test_the_float_epochs_minimize_the_ordinary_loss(tmp_path: Path) -> None:
    recorder = observe(tmp_path, **{**SHORT, **PLAIN, "float_epochs": 1}, **matching())
    assert [("feature_distance" in record.means) for record in recorder.epochs] == [False, True]


def test_metrics_are_in_every_log(tmp_path: Path) -> None:
    recorder = observe(tmp_path, **{**SHORT, **PLAIN}, objective="named")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for record, line in zip(recorder.steps, lines, strict=False):
        assert record.metrics["number"] == line["number"] == 3.0
        assert record.metrics["tensor"] == line["tensor"] == record.loss
        assert "unknown" not in line
    assert lines[-1]["means"]["tensor"] == pytest.approx(lines[-1]["means"]["loss"])
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"epoch/number", "epoch/tensor"} <= set(events.Tags()["scalars"])


def test_the_cosine_of_gir_keeps_its_key(tmp_path: Path) -> None:
    recorder = observe(tmp_path, **SHORT, **{**PLAIN, "gradient": Gir(frequency=1.0, float_too=True)})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["gir_cosine"] < 1 for line in lines if line["kind"] == "step")
    assert recorder.epochs[0].means["gir_cosine"] == lines[-1]["means"]["gir_cosine"]


def test_a_regularizer_sees_labels_and_features(tmp_path: Path) -> None:
    recorder = observe(tmp_path, **SHORT, **{**PLAIN, "regularizers": ["feature-norm"]})
    assert all(record.metrics["feature_size"] > 0 for record in recorder.steps)
    assert all(0 <= record.metrics["mean_label"] <= 2 for record in recorder.steps)


@pytest.mark.slow
def test_the_ordinary_objective_is_the_default(tmp_path: Path) -> None:
    assert isinstance(make_recipe().train.objective, CrossEntropy)
    observe(tmp_path / "named", **SHORT, objective="cross-entropy")
    observe(tmp_path / "default", **SHORT)
    assert same_weights(tmp_path / "named", tmp_path / "default")


@pytest.mark.parametrize(
    ("objective", "facts"),
    [
        ("wrong-shape", r"WrongShape.*\(16,\).*0-dim"),
        ("constant", r"Constant.*requires_grad=False"),
        ({"name": "named", "clash": True}, "'lr'.*another"),
        ({"name": "named", "vector": True}, r"'vector'.*\(2,\).*single number"),
    ],
)
def test_objectives_that_break_the_contract_are_refused(tmp_path: Path, objective: Any, facts: str) -> None:
    with pytest.raises(PluginError, match=facts):
        observe(tmp_path, **{**SHORT, **PLAIN}, objective=objective)


def test_an_objective_whose_precision_the_model_lacks_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"precision 5.*32, 4, 2"):
        observe(tmp_path, **{**SHORT, **PLAIN}, **matching(low=5))
    assert not list(tmp_path.iterdir())
