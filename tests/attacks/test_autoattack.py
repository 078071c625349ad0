import logging
import sys

import pytest
import torch
from pydantic import ValidationError

from qadtr_brevitas.attacks.autoattack import AutoAttack
from qadtr_brevitas.attacks.pixel import Pgd
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.seeding import generator
from tests.attacks.support import accuracy, attacked, sample


@pytest.mark.slow
def test_it_does_at_least_what_pgd_does_and_stays_in_the_ball(toy, caplog):
    images, _ = sample(toy, 40)
    with caplog.at_level(logging.WARNING):
        adversarial = attacked(toy, AutoAttack(eps=0.07), count=40)
    assert accuracy(toy, adversarial) <= accuracy(toy, attacked(toy, Pgd(eps=0.07), count=40))
    assert (adversarial - images).abs().max() <= 0.07 + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    # Nine targets are too many for four classes: it would say so and then fail.
    assert not caplog.records


@pytest.mark.slow
def test_all_four_attacks_run_on_what_withstands_and_leave_no_traces(toy):
    images, _ = sample(toy, 2)
    adversarial = attacked(toy, AutoAttack(eps=0.002), count=2)
    assert torch.equal(adversarial, images)
    assert all(parameter.grad is None for parameter in toy.model.parameters())


class Stub:
    """Stands for the library's class and records its arguments."""

    def __init__(self, model, **settings):
        self.settings = settings
        self.apgd_targeted = self.fab = self
        Stub.made = self

    def run_standard_evaluation(self, images, labels, *, batch_size):
        self.batch_size = batch_size
        return images, labels


def test_the_fast_version_breaks_what_a_few_steps_break(toy):
    fast = attacked(toy, AutoAttack(eps=0.07, version="fast"), count=8)
    assert accuracy(toy, fast) <= accuracy(toy, attacked(toy, Pgd(eps=0.07, steps=5), count=8))
    assert (fast - sample(toy, 8)[0]).abs().max() <= 0.07 + 1e-6


def test_arguments_passed_to_the_library(toy, monkeypatch):
    import pyautoattack

    monkeypatch.setattr(pyautoattack, "AutoAttack", Stub)
    attacked(toy, AutoAttack(eps=0.01, version="rand"), count=7)
    assert {key: Stub.made.settings[key] for key in ("norm", "eps", "version")} == {
        "norm": "Linf",
        "eps": 0.01,
        "version": "rand",
    }
    assert Stub.made.batch_size == 7
    assert Stub.made.n_target_classes == 3
    seed = Stub.made.settings["seed"]
    attacked(toy, AutoAttack(), count=7, seed=1)
    assert Stub.made.settings["seed"] != seed


def test_a_missing_package_is_named(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(UsageError, match=r"pyautoattack.*qadtr-brevitas\[attacks\]"):
        attacked(toy, AutoAttack(), count=2)


@pytest.mark.parametrize(("version", "classes"), [("standard", 3), ("rand", 2), ("fast", 3)])
def test_too_few_classes_are_refused(version, classes):
    images, labels = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)

    def model(images):
        return images.flatten(1)[:, :classes]

    with pytest.raises(UsageError, match=f"version={version} needs {classes + 1} classes or more"):
        AutoAttack(version=version).run(model, images, labels, generator=generator(0))


def test_there_is_no_targeted_autoattack():
    with pytest.raises(ValidationError, match="target"):
        AutoAttack(target=1)
