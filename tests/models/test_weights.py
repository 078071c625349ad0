import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm import create_model
from torch import nn

from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.models.weights import classes_of_weights, load_into, load_weights


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QADTR_BREVITAS_DATA", raising=False)
    return tmp_path


def weights() -> dict[str, torch.Tensor]:
    return create_float_model("cifar_resnet20", num_classes=10).state_dict()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.pt", "a.th"])
def test_files(name: str, here: Path) -> None:
    state = weights()
    (save_file if name.endswith("safetensors") else torch.save)(state, here / name)
    loaded = load_weights(here / name)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "net", "model_state_dict", "ema", "something"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_wrappers_and_prefixes_are_taken_off(wrapper: str, prefix: str, here: Path) -> None:
    state = weights()
    stored = {wrapper: {prefix + key: value for key, value in state.items()}, "epoch": 3, "best": 0.9}
    torch.save(stored, here / "a.pth")
    assert load_weights("a.pth").keys() == state.keys()


def test_weights_come_before_their_moving_average(here: Path) -> None:
    state = weights()
    average = {key: value * 0 for key, value in state.items()}
    torch.save({"ema": average, "model": state, "optimizer": {"state": {}, "param_groups": []}}, here / "a.pth")
    assert torch.equal(load_weights("a.pth")["conv1.weight"], state["conv1.weight"])


def test_counters_of_averages_and_profilers_are_left_out(here: Path) -> None:
    state = weights()
    stored = {f"module.{key}": value for key, value in state.items()}
    counters = {
        "n_averaged": torch.tensor(4),
        "total_ops": torch.zeros(1),
        "module.layer1.total_params": torch.zeros(1),
    }
    torch.save(stored | counters, here / "a.pth")
    assert load_weights("a.pth").keys() == state.keys()


def loaded(stored: Mapping[str, torch.Tensor]) -> nn.Module:
    model = create_float_model("cifar_resnet20", num_classes=10)
    load_into(model, stored, source="a.pth", name="cifar_resnet20")
    return model


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "1.", "student.net."])
def test_one_prefix_of_all_names_is_found(prefix: str) -> None:
    state = weights()
    beside = {"criterion.weight": torch.ones(10), "metric.total": torch.zeros(1)}
    model = loaded({prefix + key: value for key, value in state.items()} | beside)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("prefix", "mean", "std"), [("", "mu", "sigma"), ("model.", "mu", "sigma"), ("1.", "0.mean", "0.std")]
)
def test_a_normalization_beside_the_weights_becomes_that_of_the_network(prefix: str, mean: str, std: str) -> None:
    stored = {prefix + key: value for key, value in weights().items()}
    stored |= {mean: torch.tensor([0.5, 0.25, 0.125]).view(1, 3, 1, 1), std: torch.tensor([0.25, 0.5, 1.0])}
    config = loaded(stored).pretrained_cfg
    assert (config["mean"], config["std"]) == ((0.5, 0.25, 0.125), (0.25, 0.5, 1.0))
    assert config["architecture"] == "cifar_resnet20"


def test_several_networks_that_fit_are_named() -> None:
    stored = {prefix + key: value for prefix in ("a.", "b.") for key, value in weights().items()}
    with pytest.raises(CheckpointError, match=r"a\. and b\."):
        loaded(stored)
    loaded({prefix + key: value for prefix in ("teacher.", "b.") for key, value in weights().items()})


def test_what_the_network_lacks_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"does not fit.*differ in 1.*extra\.weight"):
        loaded({f"model.{key}": value for key, value in weights().items()} | {"extra.weight": torch.ones(3)})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_scripted_network_is_named(here: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(here / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt holds a scripted or traced network.*state_dict"):
        load_weights("a.pt")


@pytest.mark.parametrize("whole", [True, False])
def test_the_advice_for_pickled_objects_works(whole: bool, here: Path) -> None:
    net = create_float_model("cifar_resnet20", num_classes=10)
    torch.save(net if whole else {"model": net, "extra": Path("x")}, here / "a b.pth")
    with pytest.raises(CheckpointError, match="python -c") as caught:
        load_weights("a b.pth")
    exec(str(caught.value).partition('python -c "')[2].removesuffix('"'), {})
    assert load_weights("a b.weights.pth").keys() == net.state_dict().keys()


def test_relative_paths_are_also_looked_for_in_the_data_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "data").mkdir()
    save_file(weights(), here / "data" / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint a.safetensors: .*set QADTR_BREVITAS_DATA"):
        load_weights("a.safetensors")
    monkeypatch.setenv("QADTR_BREVITAS_DATA", str(here / "data"))
    assert load_weights("a.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint b.pth or .*data/b.pth: put it there or name"):
        load_weights("b.pth")


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy"])
def test_truncated_files(kind: str, share: float, here: Path) -> None:
    file = here / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        save_file(weights(), file)
    else:
        torch.save(weights(), file, _use_new_zipfile_serialization=kind == "pth")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged or incomplete \(.+\): fetch it again"):
        load_weights(file)


@pytest.mark.parametrize("content", [b"hello world", b"\x00" * 100])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_files_of_another_kind(name: str, content: bytes, here: Path) -> None:
    (here / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a.*(is damaged or incomplete|holds pickled Python objects)"):
        load_weights(name)


def test_pickled_code_is_not_run_and_the_way_out_is_named(here: Path) -> None:
    torch.save({"state_dict": weights(), "extra": Code()}, here / "a.pth")
    with pytest.raises(CheckpointError, match=r"(?s)a.pth holds pickled Python objects.*python -c .*a.weights.pth"):
        load_weights("a.pth")
    assert not (here / "ran").exists()


@pytest.mark.parametrize(
    ("stored", "fact"),
    [
        ({}, "empty"),
        ([1, 2], "list"),
        ({"a": 1}, r"a \(int\)"),
        (torch.zeros(3), "Tensor"),
        ({"state_dict": {}, "epoch": 3}, r"state_dict \(dict\), epoch \(int\)"),
        ({"one": {"w": torch.ones(1)}, "other": {"w": torch.ones(1)}}, r"one \(dict\), other \(dict\)"),
    ],
)
def test_a_file_without_weights_is_refused_with_what_it_holds(stored: object, fact: str, here: Path) -> None:
    torch.save(stored, here / "a.pth")
    with pytest.raises(CheckpointError, match=rf"a\.pth.*{fact}.*state_dict\(\)"):
        load_weights("a.pth")


def test_load_into_accepts_missing_counters_and_nothing_else() -> None:
    state = {key: value for key, value in weights().items() if not key.endswith("num_batches_tracked")}
    model = create_float_model("cifar_resnet20", num_classes=10)
    load_into(model, state, source="a.pth", name="cifar_resnet20")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    del state["layer1.0.bn1.running_var"]
    with pytest.raises(CheckpointError, match=r"a\.pth.* differ in 1.*layer1\.0\.bn1\.running_var.*model\.name"):
        load_into(model, state, source="a.pth", name="cifar_resnet20")


def test_weights_of_another_network() -> None:
    model = create_float_model("cifar_resnet32", num_classes=10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(model, weights(), source="a.pth", name="cifar_resnet32")
    facts = ("a.pth", "cifar_resnet32", "share 116", "differ in 60", "layer1.3.conv1.weight", "model.name")
    assert all(fact in str(caught.value) for fact in facts)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    with pytest.raises(
        CheckpointError, match=r"a.pth does not fit cifar_vgg16: they share 1 tensors, but differ in 180"
    ):
        load_into(create_float_model("cifar_vgg16", num_classes=10), weights(), source="a.pth", name="cifar_vgg16")


def test_weights_for_another_number_of_classes() -> None:
    model = create_float_model("cifar_resnet20", num_classes=7)
    with pytest.raises(CheckpointError, match=r"a.pth has weights for 10 classes, but 7 are needed: use data with 10"):
        load_into(model, weights(), source="a.pth", name="cifar_resnet20")


def own_network(classes: int, width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(width, classes))


@pytest.mark.parametrize("make", [own_network, lambda classes: create_model("test_resnet", num_classes=classes)])
def test_all_but_the_last_layer_of_weights_for_other_classes(make: Callable[[int], nn.Module]) -> None:
    weights, model = make(7).state_dict(), make(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert classes_of_weights(model, weights) == 7
    with pytest.raises(CheckpointError, match="for 7 classes, but 3 are needed"):
        load_into(model, weights, source="file", name="net")
    assert load_into(model, weights, source="file", name="net", new_head=True) == 7
    head = list(weights)[-2:]
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if name in head else weights)[name])
    assert load_into(make(7), weights, source="file", name="net", new_head=True) == 7


def test_another_network_is_not_taken_for_one_of_other_classes() -> None:
    weights = own_network(7, width=5).state_dict()
    assert classes_of_weights(own_network(3), weights) is None
    with pytest.raises(CheckpointError, match="does not fit net"):
        load_into(own_network(3), weights, source="file", name="net", new_head=True)
