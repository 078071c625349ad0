import json
import math
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.errors import TrainingError, UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.pipeline.checkpoint import load_model
from qadtr_brevitas.quant import at_precision, quantizer_parameters
from qadtr_brevitas.training import loop, objectives
from qadtr_brevitas.training.gir import GirOptimizer
from qadtr_brevitas.training.inputs import attack_autocast
from qadtr_brevitas.training.log import EpochRecord
from qadtr_brevitas.training.loop import train
from qadtr_brevitas.training.processes import average_norm_statistics, memory_of_rank
from qadtr_brevitas.training.setup import make_optimizer
from qadtr_brevitas.training.state import load_state
from tests.training.launch import torchrun
from tests.training.support import Recorder, make_recipe, weights

pytestmark = pytest.mark.slow

PLAIN: dict[str, Any] = {"attack": None, "gradient": None, "regularizers": []}
SHORT: dict[str, Any] = {"epochs": 1, "float_epochs": 0, "scheduler": {"warmup_epochs": 0}, **PLAIN}


def observe(recipe: Recipe, run: Path) -> Recorder:
    recorder = Recorder()
    train(recipe, run, device="cpu", observer=recorder)
    return recorder


def test_learns_shapes_at_every_precision(tmp_path: Path) -> None:
    recorder = observe(make_recipe(augment="none", epochs=8, float_epochs=8, **PLAIN), tmp_path)
    final = recorder.epochs[-1]
    assert final.kind == "final"
    assert final.val_accuracy is not None
    assert list(final.val_accuracy) == ["32", "4", "2"]
    assert min(final.val_accuracy.values()) > 0.55
    assert recorder.epochs[-2].means["accuracy"] > 0.9


def test_run_directory_and_saved_model_hold_what_was_trained(tmp_path: Path) -> None:
    recorder = observe(make_recipe(), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"recipe.yaml", "metrics.jsonl", "tensorboard", "last", "state"}
    model, info = load_model(tmp_path / "last")
    assert info.name == "train_tiny_net"
    test = make_recipe().data.dataset.load("test")
    images, labels = test.batch(torch.arange(len(test)))
    model.eval()
    for precision, accuracy in (recorder.epochs[-1].val_accuracy or {}).items():
        with at_precision(model, precision), torch.no_grad():
            assert (model(images).argmax(1) == labels).float().mean().item() == pytest.approx(accuracy)


def test_records_describe_each_step(tmp_path: Path) -> None:
    recorder = observe(make_recipe(), tmp_path)
    assert [record.step for record in recorder.steps] == list(range(1, 25))
    before, after = recorder.steps[:6], recorder.steps[6:]
    # The float phase is plain training; A-QAPA attacks half of each batch after it.
    assert {record.precision for record in before} == {"32"}
    assert all("adversarial_accuracy" not in record.metrics and "gir_cosine" not in record.metrics for record in before)
    assert {record.precision for record in after} == {"32", "4", "2"}
    assert all("adversarial_accuracy" in record.metrics for record in after)
    perturbed = [record for record in after if "gir_cosine" in record.metrics]
    assert perturbed
    assert all(record.precision != "32" and record.metrics["gir_cosine"] < 1 for record in perturbed)
    assert len(perturbed) < len([record for record in after if record.precision != "32"])
    assert all(math.isfinite(record.loss) and record.images_per_s > 0 for record in recorder.steps)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("step") == 24
    assert [line["kind"] for line in lines][-2:] == ["epoch", "final"]


def test_learning_rate_warms_up_and_falls_in_each_phase(tmp_path: Path) -> None:
    recorder = observe(make_recipe(float_epochs=1, epochs=2, scheduler={"warmup_epochs": 1}, **PLAIN), tmp_path)
    lrs = [record.lr for record in recorder.steps]
    # The float phase has one epoch and warms up for half of it.
    for phase, warm in ((lrs[:6], 3), (lrs[6:], 6)):
        assert phase[0] == pytest.approx(0.0005)
        assert phase[:warm] == sorted(phase[:warm])
        assert phase[warm:] == sorted(phase[warm:], reverse=True)
        assert max(phase) > 0.03
        assert phase[-1] < 0.005


def test_best_is_chosen_on_held_out_training_images(tmp_path: Path) -> None:
    recorder = observe(make_recipe(val_share=0.25, float_epochs=0, epochs=4, norm_batches=0, **PLAIN), tmp_path)
    assert {record.split for record in recorder.epochs} == {"val"}
    means = [sum(record.val_accuracy.values()) / 3 for record in recorder.epochs if record.val_accuracy]
    assert [record.best for record in recorder.epochs] == [m > max(means[:i], default=-1) for i, m in enumerate(means)]
    state = load_state(tmp_path)
    assert state is not None
    assert state.counters.best == max(means)
    best, _ = load_model(tmp_path / "best")
    last, _ = load_model(tmp_path / "last")
    equal = all(torch.equal(a, b) for a, b in zip(best.parameters(), last.parameters(), strict=True))
    assert equal is (means.index(max(means)) == 3)


def test_best_gets_recalibrated_norms_too(tmp_path: Path) -> None:
    quick = {"val_share": 0.25, "float_epochs": 0, "epochs": 1, "scheduler": {"warmup_epochs": 0}, **PLAIN}
    observe(make_recipe(**quick, norm_batches=2), tmp_path / "with")
    observe(make_recipe(**quick, norm_batches=0), tmp_path / "without")
    best, last = (weights(tmp_path / "with", folder) for folder in ("best", "last"))
    assert all(torch.equal(best[name], last[name]) for name in last)
    one, other = weights(tmp_path / "with", "best"), weights(tmp_path / "without", "best")
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed
    assert all("running_" in name for name in changed)


def test_validation_runs_every_few_epochs_and_at_the_end(tmp_path: Path) -> None:
    recorder = observe(make_recipe(epochs=3, float_epochs=0, validate_every=2, norm_batches=0, **PLAIN), tmp_path)
    assert [record.val_accuracy is not None for record in recorder.epochs] == [False, True, True]


def test_a_new_classifier_for_pretrained_weights_is_reported(tmp_path: Path) -> None:
    plain = make_recipe(**SHORT)
    assert not observe(plain, tmp_path / "plain").messages
    pretrained = plain.model_copy(update={"model": plain.model.model_copy(update={"pretrained": True})})
    messages = observe(pretrained, tmp_path / "pretrained").messages
    (message,) = messages
    assert "3 classes" in message
    assert "1000" in message


def test_sandwich_trains_three_precisions_a_step(tmp_path: Path) -> None:
    precision = {"schedule": "sandwich", "choices": [32, 4, 2]}
    recorder = observe(make_recipe(**{**SHORT, "gradient": "gir"}, precision=precision), tmp_path)
    assert {record.precision for record in recorder.steps} == {"32+4+2"}
    assert any("gir_cosine" in record.metrics for record in recorder.steps)


@pytest.mark.parametrize(("update", "updates"), [("mean", 1), ("each", 3)])
def test_weights_are_updated_once_a_step_or_after_each_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: str, updates: int
) -> None:
    steps: list[int] = []
    original = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *args: Any) -> Any:
        steps.append(1)
        return original(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    precision = {"schedule": "sandwich", "choices": [32, 4, 2]}
    recorder = observe(make_recipe(**SHORT, precision=precision, update=update), tmp_path)
    assert len(recorder.steps) == 6
    assert len(steps) == 6 * updates


@pytest.mark.parametrize(
    "keys",
    [
        {"amp": "bf16"},
        {"clip_grad_norm": 0.5},
        {"label_smoothing": 0.1},
        {"optimizer": {"name": "adamw", "lr": 0.001, "momentum": 0.8}},
        {"scheduler": {"name": "step", "warmup_epochs": 0, "decay_epochs": 0.5}},
        {"scheduler": {"name": "poly", "warmup_epochs": 0}},
        {"precision": {"schedule": "fixed", "choice": 2}},
    ],
    ids=lambda keys: str(next(iter(keys.values()))),
)
def test_options_change_the_outcome(tmp_path: Path, keys: dict[str, Any]) -> None:
    changed = observe(make_recipe(**{**SHORT, **keys}), tmp_path / "changed")
    plain = observe(make_recipe(**SHORT), tmp_path / "plain")
    assert all(math.isfinite(record.loss) for record in changed.steps)
    assert [record.loss for record in changed.steps] != [record.loss for record in plain.steps]


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy, calls = objectives.cross_entropy, []

    def poisoned(*args: Any, **keys: Any) -> torch.Tensor:
        calls.append(1)
        return healthy(*args, **keys) * (math.nan if len(calls) == 7 else 1)

    monkeypatch.setattr(objectives, "cross_entropy", poisoned)
    with pytest.raises(TrainingError) as error:
        train(make_recipe(**{**SHORT, "epochs": 2, "checkpoint_every": 4}), tmp_path, device="cpu")
    message = str(error.value)
    assert re.search(r"nan at step 6 .*precision .*learning rate 0\.0.*train\.optimizer\.lr.*clip_grad_norm", message)
    saved = load_state(tmp_path)
    assert saved is not None
    assert saved.counters.step == 6
    assert all(value.isfinite().all() for value in saved.model.values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    class Poison(Recorder):
        def on_step(self, record: Any) -> None:
            if record.step == 3:
                with torch.no_grad():
                    biases[0].fill_(math.inf)

    biases: list[torch.Tensor] = []
    build = loop.build_switchable

    def spy(*args: Any, **options: Any) -> Any:
        built = build(*args, **options)
        biases.append(built[0].net.linear.bias)
        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_switchable", spy)
        with pytest.raises(TrainingError, match=r"step 3 .*net\.linear\.bias.*not finite"):
            train(make_recipe(**{**SHORT, "checkpoint_every": 3}), tmp_path, device="cpu", observer=Poison())
    assert load_state(tmp_path) is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_size": 97}, r"train\.batch_size=97.*96 training images.*train\.batch_size=96"),
        ({"precision": {"schedule": "fixed", "choice": 6}}, r"precision 6.*32, 4, 2"),
        (
            {"precision": {"schedule": "uniform", "choices": [4, 2], "independent": True}},
            r"precision w4a2.*32, 4, 2",
        ),
        ({"optimizer": {"name": "sgdd"}}, r"optimizer 'sgdd'.*'sgd'"),
        ({"amp": "fp16"}, r"train\.amp=fp16.*GPU.*train\.amp=bf16"),
    ],
)
def test_recipes_that_cannot_be_trained_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(make_recipe(**{**SHORT, **keys}), tmp_path, device="cpu")
    assert not list(tmp_path.iterdir())


def test_thresholds_norms_and_biases_have_no_weight_decay(tmp_path: Path) -> None:
    recipe = make_recipe(optimizer={"lr": 0.05, "weight_decay": 0.1, "threshold_lr_scale": 0.5})
    data = recipe.data.dataset.load("train")
    model, _ = loop.build_switchable(recipe, data)
    optimizer = make_optimizer(model, recipe.train.optimizer)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert decay[id(model.net.conv1.weight)] == decay[id(model.net.linear.weight)] == 0.1
    assert decay[id(model.net.bn1.weight)] == decay[id(model.net.linear.bias)] == 0
    thresholds = quantizer_parameters(model)
    assert thresholds
    assert {decay[id(p)] for p in thresholds} == {0}
    group = next(group for group in optimizer.param_groups if group.get("lr_scale"))
    assert {id(p) for p in group["params"]} == {id(p) for p in thresholds}
    assert group["lr_scale"] == 0.5


def test_tensorboard_has_accuracy_per_precision(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    observe(make_recipe(**SHORT, val_share=0.2), tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"val_accuracy/32", "val_accuracy/4", "val_accuracy/2", "epoch/loss"} <= set(events.Tags()["scalars"])


def test_attack_sees_the_model_in_eval_mode_at_the_steps_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qadtr_brevitas.attacks.a_qapa import AQapa

    seen: list[tuple[bool, bool, Precision, Precision, int]] = []
    original = AQapa.run

    def spy(self: AQapa, model: Any, images: Any, labels: Any, *, generator: Any, precision: Any) -> Any:
        frozen = not any(p.requires_grad for p in model.parameters())
        seen.append((model.training, frozen, model.switch.precision, precision, len(images)))
        return original(self, model, images, labels, generator=generator, precision=precision)

    monkeypatch.setattr(AQapa, "run", spy)
    observe(make_recipe(**{**SHORT, "attack": {"name": "a-qapa", "steps": 1, "sizes": [3], "share": 0.25}}), tmp_path)
    assert len(seen) == 6
    assert all(not training and frozen and at == told and count == 4 for training, frozen, at, told, count in seen)


@pytest.mark.parametrize(("amp", "enabled"), [("bf16", True), ("fp16", False), ("no", False)])
def test_attacks_are_made_in_bfloat16_and_not_in_float16(amp: str, enabled: bool) -> None:
    # Only GPUs have float16, so there is no run of it here.
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[amp]
    accelerator = SimpleNamespace(
        mixed_precision=amp,
        device=torch.device("cpu"),
        autocast=lambda: torch.autocast("cpu", dtype) if dtype else nullcontext(),
    )
    with accelerator.autocast(), attack_autocast(accelerator):
        assert torch.is_autocast_enabled("cpu") is enabled


def test_clipping_unscales_the_gradients_of_its_own_phase_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unscaled: list[Any] = []
    monkeypatch.setattr(Accelerator, "unscale_gradients", lambda self, optimizer=None: unscaled.append(optimizer))
    keys = {**SHORT, "float_epochs": 1, "gradient": "gir", "clip_grad_norm": 1.0}
    observe(make_recipe(**keys), tmp_path)
    assert [isinstance(of.optimizer, GirOptimizer) for of in unscaled] == [False] * 6 + [True] * 6


def test_networks_without_running_statistics_are_left_as_they_are() -> None:
    average_norm_statistics(nn.LayerNorm(4), SimpleNamespace(num_processes=2))


RANKS = """
import os, sys, torch
from importlib.metadata import EntryPoint, EntryPoints
from qadtr_brevitas.core import registry
torch.set_num_threads(1)
from tests.training.support import Recorder, make_recipe
from qadtr_brevitas.training import loop as t
models, build = [], t.build_switchable
t.build_switchable = lambda *a, **k: (lambda built: models.append(built[0]) or built)(build(*a, **k))
keys = dict(epochs=3, float_epochs=1, norm_batches=0, regularizers=["distillation"], checkpoint_every=1000)
t.train(make_recipe(**keys).model_copy(update={"seed": 2}), sys.argv[1], device="cpu")
torch.save(models[0].state_dict(), f"{sys.argv[1]}/rank{os.environ['RANK']}.pt")
target = "examples.objectives.feature_matching:FeatureMatching"
points = EntryPoints([EntryPoint("feature-matching", target, "qadtr_brevitas.objective")])
registry.entry_points = lambda group: points.select(group=group)
registry._external.cache_clear()
objective = {"name": "feature-matching", "layers": ["act*"]}
t.train(make_recipe(epochs=2, float_epochs=0, objective=objective), f"{sys.argv[1]}-objective", device="cpu")
torch.save(models[1].state_dict(), f"{sys.argv[1]}-objective/rank{os.environ['RANK']}.pt")
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A run of 2x8 images by two processes, and one beside it with an objective that runs several precisions."""
    run = tmp_path_factory.mktemp("two") / "run"
    script = run.parent / "ranks.py"
    script.write_text(RANKS)
    done = torchrun(repository, 2, str(script), str(run))
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("run", ["run", "run-objective"])
def test_two_processes_end_with_the_same_weights(two_processes: Path, run: str) -> None:
    first, second = (torch.load(two_processes.parent / run / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_patches_that_each_process_keeps_are_saved(two_processes: Path) -> None:
    memory = torch.load(two_processes / "state" / "training.pt", weights_only=True)["memory"]
    assert len(memory["textures"]) == len(memory["targets"]) == 2
    assert (memory["targets"] >= 0).any(1).all()
    # Each has images of its own, so patches too.
    assert not torch.equal(memory["textures"][0], memory["textures"][1])
    for rank in (0, 1):
        own = memory_of_rank(memory, rank, torch.device("cpu"))
        assert torch.equal(own["textures"], memory["textures"][rank])


def test_gradients_of_several_forward_passes_are_averaged_over_the_processes(two_processes: Path) -> None:
    run = two_processes.parent / "run-objective"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    means = [line["means"] for line in lines if line["kind"] == "epoch"]
    assert all(mean["feature_distance"] > 0 and mean["input_gradient"] > 0 for mean in means)
    assert means[1]["input_gradient"] < means[0]["input_gradient"]


def test_two_processes_learn_as_one_does(two_processes: Path, tmp_path: Path) -> None:
    keys = {"epochs": 3, "float_epochs": 1, "norm_batches": 0, "regularizers": ["distillation"]}
    # Six steps an epoch leave much to chance: over five seeds losses differ by up to 26 %, either way; here by 6 %.
    alone = observe(make_recipe(**keys, checkpoint_every=1000).model_copy(update={"seed": 2}), tmp_path)
    lines = [json.loads(line) for line in (two_processes / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    # Each process augments and attacks with a stream of its own and norms see half of the batch, so close, not equal.
    assert [line["precision"] for line in steps] == [record.precision for record in alone.steps]
    losses = torch.tensor([[line["loss"], record.loss] for line, record in zip(steps, alone.steps, strict=True)])
    assert (losses[:, 0] - losses[:, 1]).abs().mean() < 0.15
    epochs = [EpochRecord(**line).means["loss"] for line in lines if line["kind"] == "epoch"]
    ours = [record.means["loss"] for record in alone.epochs]
    assert epochs == pytest.approx(ours, rel=0.12)
