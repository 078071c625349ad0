"""What README promises of Python: from any nn.Module to figures, files and exports, without a run directory."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import qadtr_brevitas as qb
from qadtr_brevitas.core.device import has_compiler
from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.evaluation.entries import LoadedModel, load_models
from qadtr_brevitas.models.describe import describe_network
from tests.api.conftest import CLASSES, TinyNet, loader, waves


@pytest.fixture
def model(net: TinyNet) -> qb.SwitchableModel:
    """The network converted for 32, 8 and 4 bit, and calibrated."""
    converted = qb.convert(copy.deepcopy(net), precisions=[32, 8, 4], image_size=(16, 16))
    qb.calibrate(converted, loader(128, seed=2))
    return converted


@pytest.mark.slow
def test_every_public_name_is_there_and_stays_what_it_is() -> None:
    code = (
        "import importlib, pkgutil, qadtr_brevitas as qb\n"
        "names = {name: getattr(qb, name) for name in qb.__all__}\n"
        "for module in pkgutil.walk_packages(qb.__path__, 'qadtr_brevitas.'):\n"
        "    if '_build' not in module.name and '__main__' not in module.name: importlib.import_module(module.name)\n"
        "assert all(getattr(qb, name) is value for name, value in names.items())\n"
        "assert all(callable(qb.__dict__[name]) for name in ('audit', 'certify', 'evaluate', 'export', 'train'))\n"
        "try: qb.nonsense\n"
        "except AttributeError as error: assert 'nonsense' in str(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_convert_leaves_the_network_and_reports_each_layer(net: TinyNet) -> None:
    before = copy.deepcopy(net.state_dict())
    model = qb.convert(net, precisions=[32, "w4a8"], image_size=(16, 16))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert {layer.name for layer in model.report.layers} >= {"features.0", "features.3", "head"}
    images, _ = waves(8, seed=3)
    assert torch.equal(model(images), net(images))


@pytest.mark.parametrize(
    "form",
    [
        lambda: loader(128, seed=2),
        lambda: [waves(64, seed=2)[0], waves(64, seed=4)[0]],
        lambda: DataLoader(waves(128, seed=2)[0], batch_size=32),
    ],
    ids=["images and labels", "list of batches", "images"],
)
def test_calibrate_takes_any_loader(net: TinyNet, form: object) -> None:
    model = qb.convert(net, precisions=[32, 8], image_size=(16, 16))
    qb.calibrate(model, form())  # pyright: ignore[reportCallIssue]
    qb.set_precision(model, 8)
    images, labels = waves(96, seed=1)
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.slow
def test_a_patch_made_in_python_is_scored_with_its_denominator(
    model: qb.SwitchableModel, test_loader: DataLoader[tuple[Tensor, ...]]
) -> None:
    images, labels = waves(256, seed=5)
    qb.set_precision(model, 32)
    patch = qb.attacks.Lavan(size=8, target=2, steps=100, init="uniform").fit(model, images, labels, seed=0)
    again = qb.attacks.Lavan(size=8, target=2, steps=100, init="uniform").fit(model, images, labels, seed=0)
    assert torch.equal(patch.texture, again.texture)
    assert all(parameter.grad is None for parameter in model.parameters())
    result = qb.evaluate(model, test_loader, patches=[patch], attacks=["pgd"], precisions=[32, 4])
    rates = result.asr["lavan-8x8"]
    assert set(rates) == {"32", "4"}
    # The judge counts what a forward pass shows.
    clean = {}
    pixels, truth = waves(96, seed=1)
    for precision in (32, 4):
        with qb.at_precision(model, precision), torch.no_grad():
            clean[precision] = model(pixels).argmax(1)
    assert rates["4"].n == int(((clean[4] == truth) & (truth != 2)).sum())
    assert result.clean_accuracy["4"].count == int((clean[4] == truth).sum())
    control = next(name for name in result.asr if name not in ("lavan-8x8", "pgd"))
    assert rates["32"].value > 0.5 > result.asr[control]["32"].value
    assert set(result.asr["pgd"]) == {"32", "4"}
    assert "lavan" in str(result)


def test_an_evaluation_leaves_the_model_as_it_was(
    model: qb.SwitchableModel, test_loader: DataLoader[tuple[Tensor, ...]]
) -> None:
    qb.set_precision(model, 8)
    model.train()
    before = copy.deepcopy(model.state_dict())
    qb.evaluate(model, test_loader, precisions=[4])
    assert model.training
    assert qb.get_precision(model) == qb.Precision(8, 8)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_results_are_saved_and_read_again(
    model: qb.SwitchableModel, test_loader: DataLoader[tuple[Tensor, ...]], tmp_path: Path
) -> None:
    pandas = pytest.importorskip("pandas")
    result = qb.evaluate({"mine": model, "same": model}, test_loader, attacks=["fgsm"], precisions=[4])
    written = result.save(tmp_path)
    assert tmp_path / "report.json" in written
    frame = result.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert set(frame["model"]) == {"mine", "same"}
    row = frame[(frame["model"] == "mine") & (frame["attack"].notna())].iloc[0]
    assert row["asr"] == result.asr["fgsm"]["mine/4"].value


def test_a_smaller_patch_certifies_no_fewer_images(model: qb.SwitchableModel) -> None:
    few = loader(32, seed=1)
    small, large = (qb.certify(model, few, patch=size, precisions=[4], masks=3) for size in (1, 5))
    for found in (small, large):
        assert found.certified_accuracy["4"].count <= found.defended_accuracy["4"].count
    assert small.certified_accuracy["4"].count >= large.certified_accuracy["4"].count


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler("cpu"), reason="there is no C++ compiler")
def test_compiled_certificates_are_the_same_and_leave_the_model_as_it_was(model: qb.SwitchableModel) -> None:
    few = loader(32, seed=1)
    plain, compiled = (
        qb.certify(model, few, patch=1, precisions=[4], masks=3, device="cpu", compile=compile)
        for compile in (False, True)
    )
    assert compiled.certificates == plain.certificates
    assert model.switch.passes is None


def test_several_patches_are_certified_at_once_and_resumed(model: qb.SwitchableModel, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"patch": [2, "1x3"], "precisions": [4], "masks": 3, "cells": tmp_path}
    found = qb.certify(model, loader(32, seed=1), **wanted)
    assert set(found.certified_accuracy) == set(found.defended_accuracy) == {"4, 2x2", "4, 1x3"}
    assert [cell.size for cell in found.certificates] == [2, "1x3"]
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    handle = model.register_forward_pre_hook(count)
    again = qb.certify(model, loader(32, seed=1), **wanted)
    handle.remove()
    assert forwards == 0
    assert again.certificates == found.certificates


def test_a_defended_classifier_agrees_with_its_certificate_and_can_be_attacked(model: qb.SwitchableModel) -> None:
    few = loader(16, seed=1)
    images, labels = next(iter(few))
    classifier = qb.defend(model, 4, patch=3, masks=3)
    found = classifier(images)
    certificate = qb.certify(model, few, patch=3, masks=3, precisions=[4])
    assert int((found.classes == labels).sum()) == certificate.defended_accuracy["4"].count
    assert int((found.certified & (found.classes == labels)).sum()) == certificate.certified_accuracy["4"].count
    result = qb.evaluate({"plain": model, "defended": classifier}, few, attacks=["fgsm"], precisions=[4])
    assert result.clean_accuracy["defended/4"].count == certificate.defended_accuracy["4"].count
    assert set(result.asr["fgsm"]) == {"plain/4", "defended/4"}


def test_an_audit_runs_on_a_model_in_memory(model: qb.SwitchableModel) -> None:
    report = qb.audit(model, loader(32, seed=1), precisions=[4], images=16)
    assert [audited.precision for audited in report.precisions] == ["4"]
    assert report.precisions[0].findings
    assert str(report).startswith("model at 4 bit: of ")
    assert "Trust: " in str(report)


@pytest.mark.parametrize(
    ("name", "settings"), [("cifar_resnet8", {}), ("test_vit", {"img_size": 32}), ("swin_s3_tiny_224", {})]
)
def test_networks_of_timm_know_how_they_are_made(name: str, settings: dict[str, int]) -> None:
    net = timm.create_model(name, num_classes=CLASSES, **settings)
    found, args = describe_network(net, args=settings, num_classes=CLASSES)
    assert (found, args) == (name, settings)


def test_attacks_on_several_targets_are_told_apart(
    model: qb.SwitchableModel, test_loader: DataLoader[tuple[Tensor, ...]]
) -> None:
    attacks = [qb.attacks.Pgd(target=target, steps=2) for target in (0, 1)]
    result = qb.evaluate(model, test_loader, attacks=attacks, precisions=[4])
    assert len(result.asr) == 2
    assert all(name.endswith(("to 0", "to 1")) for name in result.asr)


def test_saved_models_compute_the_same(tmp_path: Path) -> None:
    net = timm.create_model("cifar_resnet8", num_classes=CLASSES)
    model = qb.convert(net, precisions=[32, 4], image_size=(16, 16))
    qb.calibrate(model, loader(64, seed=2))
    qb.save(model, tmp_path / "model")
    loaded = qb.load(tmp_path / "model")
    (from_disk,) = load_models([tmp_path / "model"])
    assert LoadedModel.from_model(model).fingerprint == from_disk.fingerprint
    images, _ = waves(8, seed=3)
    for precision in (32, 4):
        with qb.at_precision(model, precision), qb.at_precision(loaded, precision), torch.no_grad():
            assert torch.equal(model.eval()(images), loaded(images))


def test_a_network_without_a_name_is_saved_only_with_one(model: qb.SwitchableModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"TinyNet.*architecture="):
        qb.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_function_of_the_users_own_names_a_network(net: TinyNet, tmp_path: Path) -> None:
    model = qb.convert(net, precisions=[32, 4], image_size=(16, 16), architecture="tests.api.conftest:TinyNet")
    qb.calibrate(model, loader(64, seed=2))
    qb.save(model, tmp_path / "model")
    images, _ = waves(8, seed=3)
    with torch.no_grad():
        assert torch.equal(qb.load(tmp_path / "model")(images), net(images))


def test_export_needs_no_run_directory(model: qb.SwitchableModel, tmp_path: Path) -> None:
    pytest.importorskip("qonnx")
    qb.export(model, tmp_path / "out", precision=4, format="qonnx", loader=loader(16, seed=1))
    assert (tmp_path / "out" / "model.onnx").is_file()


@pytest.mark.slow
def test_a_recipe_is_trained_with_overrides(tmp_path: Path) -> None:
    run = qb.train("digits_smoke", tmp_path / "run", overrides={"train.epochs": 1}, device="cpu")
    assert run.recipe.train.epochs == 1
    assert run.path == tmp_path / "run"
    assert any(record["kind"] == "step" for record in run.metrics)
    assert qb.allowed_precisions(run.model()) == run.recipe.quant.precisions
    assert 0 <= run.accuracy["4"] <= 1


class ReturnsPair(TinyNet):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits, logits


@pytest.mark.parametrize(
    ("make", "facts"),
    [
        (ReturnsPair, ["ReturnsPair", "tuple"]),
        (nn.Identity, ["Identity", "parameters"]),
    ],
)
def test_networks_that_are_no_classifiers_are_refused(make: type[nn.Module], facts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        qb.convert(make(), image_size=(16, 16))
    assert all(fact in str(caught.value) for fact in facts), caught.value


def test_a_plain_network_has_to_be_converted_first(net: TinyNet) -> None:
    with pytest.raises(UsageError, match="convert"):
        qb.evaluate(net, loader(8, seed=1))  # pyright: ignore[reportArgumentType]


def test_labels_beyond_the_classes_are_refused(model: qb.SwitchableModel) -> None:
    images, labels = waves(8, seed=1)
    with pytest.raises(DataError, match=r"0 to 3"):
        qb.evaluate(model, [(images, labels + CLASSES)])
