import copy
import math
from typing import Any

import pytest
import timm.optim
import timm.scheduler
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.training.gir import GIR_KEY, Gir, GirOptimizer

GRADIENTS = (torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([1.0, -2.0, 2.0]))


def parameters(gradients: tuple[Tensor | None, ...] = GRADIENTS) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(2 if g is None else g.shape)) for g in gradients]
    for parameter, gradient in zip(made, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    return made


def perturbed(gradients: tuple[Tensor | None, ...] = GRADIENTS, *, step: int = 0, **fields: Any) -> list[Tensor | None]:
    """The gradients that an optimizer sees, from a step of plain SGD with learning rate 1."""
    made = parameters(gradients)
    optimizer = Gir(frequency=1, **fields).wrap(torch.optim.SGD(made, lr=1.0), seed=0)
    optimizer.set_context(step=step, precision=Precision(4, 4))
    optimizer.step()
    return [None if p.grad is None else -p.detach() for p in made]


def noise(index: int, shape: torch.Size, step: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(0, "gir", step, index))


def test_formula_by_hand_with_norm_per_tensor() -> None:
    for index, (seen, raw, norm) in enumerate(zip(perturbed(), GRADIENTS, (5.0, 3.0), strict=True)):
        expected = raw + 0.1 * (raw / (norm + 1e-5) + 0.05 * noise(index, raw.shape))
        torch.testing.assert_close(seen, expected)


def test_formula_by_hand_with_global_norm() -> None:
    norm = math.sqrt(25 + 9)
    for index, (seen, raw) in enumerate(zip(perturbed(norm="global", gamma=2, beta=3), GRADIENTS, strict=True)):
        expected = raw + 0.1 * (3 * raw / (norm + 1e-5) + 2 * 0.05 * noise(index, raw.shape))
        torch.testing.assert_close(seen, expected)


def test_literal_eps_is_added_to_every_coordinate_and_a_zero_gradient_stays_finite() -> None:
    gradients = (GRADIENTS[0], torch.zeros(3))
    first, second = perturbed(gradients, eps_placement="literal", eps=0.5, gamma=0)
    torch.testing.assert_close(first, GRADIENTS[0] * (1 + 0.1 / 5) + 0.1 * 0.5)
    torch.testing.assert_close(second, torch.full((3,), 0.05))


def test_without_gamma_directions_are_kept() -> None:
    for seen, raw in zip(perturbed(gamma=0), GRADIENTS, strict=True):
        assert seen is not None
        assert torch.cosine_similarity(seen.flatten(), raw.flatten(), dim=0).item() == pytest.approx(1)


@pytest.mark.parametrize("norm", ["tensor", "global"])
@pytest.mark.parametrize("rho", [0.25, 0.5, 1.0])
def test_relative_noise_gives_the_expected_cosine(rho: float, norm: str) -> None:
    rng = torch.Generator().manual_seed(0)
    made = parameters((torch.randn(200, 200, generator=rng), 1e-3 * torch.randn(20_000, generator=rng)))
    optimizer = Gir(frequency=1, mode="relative", rho=rho, norm=norm).wrap(torch.optim.SGD(made, lr=1.0), seed=0)
    optimizer.step()
    assert optimizer.last_cosine == pytest.approx(1 / math.sqrt(1 + rho**2), abs=0.01)


def test_last_cosine_is_that_of_all_parameters_together() -> None:
    made = parameters()
    raw = torch.cat([p.grad.flatten() for p in made])
    optimizer = Gir(frequency=1, sigma=5).wrap(torch.optim.SGD(made, lr=1.0), seed=0)
    optimizer.step()
    changed = torch.cat([p.grad.flatten() for p in made])
    assert optimizer.last_cosine == pytest.approx(torch.cosine_similarity(raw, changed, dim=0).item())
    assert optimizer.last_cosine < 0.999


def test_zero_gradients_have_no_cosine() -> None:
    optimizer = Gir(frequency=1).wrap(torch.optim.SGD(parameters((torch.zeros(3),)), lr=1.0), seed=0)
    assert optimizer.last_cosine is None
    optimizer.step()
    assert optimizer.last_cosine is None


def test_parameters_without_gradient_are_untouched_and_do_not_shift_the_noise() -> None:
    seen = perturbed((None, GRADIENTS[1]))
    assert seen[0] is None
    torch.testing.assert_close(seen[1], perturbed()[1], rtol=0, atol=0)
    assert perturbed((None, None)) == [None, None]


def test_groups_that_opt_out_are_untouched() -> None:
    weight, threshold = parameters()
    groups = [{"params": [weight]}, {"params": [threshold], GIR_KEY: False}]
    Gir(frequency=1).wrap(torch.optim.SGD(groups, lr=1.0), seed=0).step()
    assert torch.equal(-threshold.detach(), GRADIENTS[1])
    assert not torch.equal(-weight.detach(), GRADIENTS[0])


def test_noise_depends_on_seed_and_step_only() -> None:
    torch.testing.assert_close(perturbed(step=3), perturbed(step=3), rtol=0, atol=0)
    assert not torch.equal(perturbed(step=3)[0], perturbed(step=4)[0])


def test_frequency_is_a_share_of_the_steps() -> None:
    made = parameters()
    optimizer = Gir(frequency=0.3).wrap(torch.optim.SGD(made, lr=0.0), seed=0)
    due = 0
    for _ in range(1000):
        optimizer.step()
        due += optimizer.last_cosine is not None
    assert due == pytest.approx(300, abs=5 * math.sqrt(1000 * 0.3 * 0.7))


@pytest.mark.parametrize(
    ("fields", "bits", "due"),
    [
        ({}, 32, False),
        ({}, 8, True),
        ({}, 3, True),
        ({"float_too": True}, 32, True),
        ({"only": (Precision(2, 2),)}, 4, False),
        ({"only": (Precision(2, 2),)}, 2, True),
    ],
)
def test_precisions_that_are_perturbed(fields: dict[str, Any], bits: int, due: bool) -> None:
    optimizer = Gir(frequency=1, **fields).wrap(torch.optim.SGD(parameters(), lr=1.0), seed=0)
    optimizer.set_context(step=0, precision=Precision(bits, bits))
    optimizer.step()
    assert (optimizer.last_cosine is not None) is due


def test_without_context_steps_are_counted_and_every_step_is_perturbed() -> None:
    made, other_made = parameters(), parameters()
    one = Gir(frequency=1).wrap(torch.optim.SGD(made, lr=1.0), seed=0)
    other = Gir(frequency=1).wrap(torch.optim.SGD(other_made, lr=1.0), seed=0)
    for step in range(3):
        one.step()
        other.set_context(step=step, precision=None)
        other.step()
    assert torch.equal(made[0], other_made[0])


def fit(optimizer: Any, model: nn.Module, steps: int, step: Any = None) -> list[float]:
    """Take steps of regression and return the losses."""
    x = torch.linspace(-1, 1, 32)[:, None]
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - 3 * x).square().mean()
        (step or default_step)(loss, optimizer)
        losses.append(loss.item())
    return losses


def default_step(loss: Tensor, optimizer: Any) -> None:
    loss.backward()
    optimizer.step()


def regression(name: str = "sgd", **fields: Any) -> tuple[nn.Module, GirOptimizer]:
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    optimizer = timm.optim.create_optimizer_v2(model, name, lr=0.05)
    return model, Gir(**{"sigma": 0.5, **fields}).wrap(optimizer, seed=0)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw", "lamb", "rmsprop", "lion", "nadamw"])
def test_any_optimizer_can_be_wrapped(name: str) -> None:
    model, optimizer = regression(name)
    assert isinstance(optimizer, torch.optim.Optimizer)
    losses = fit(optimizer, model, 60)
    assert losses[-1] < losses[0]
    assert optimizer.state


def test_frequency_zero_is_the_wrapped_optimizer() -> None:
    model, optimizer = regression(frequency=0)
    plain, _ = regression()
    fit(optimizer, model, 10)
    fit(timm.optim.create_optimizer_v2(plain, "sgd", lr=0.05), plain, 10)
    assert torch.equal(model.weight, plain.weight)


def test_a_state_dict_resumes_exactly() -> None:
    whole, optimizer = regression("adam")
    fit(optimizer, whole, 20)
    first, optimizer = regression("adam")
    fit(optimizer, first, 9)
    saved = copy.deepcopy(optimizer.state_dict())
    second, resumed = regression("adam")
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(saved)
    fit(resumed, second, 11)
    assert torch.equal(second.weight, whole.weight)


def test_state_of_the_plain_optimizer_loads() -> None:
    model, _ = regression()
    plain = timm.optim.create_optimizer_v2(model, "adam", lr=0.05)
    fit(plain, model, 2)
    _, wrapped = regression("adam")
    wrapped.load_state_dict(plain.state_dict())
    assert len(wrapped.state) == 2


def test_groups_and_defaults_are_shared() -> None:
    model, optimizer = regression()
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.defaults is optimizer.optimizer.defaults
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.5})
    assert optimizer.optimizer.param_groups[-1]["lr"] == 0.5
    fit(optimizer, model, 1)
    optimizer.zero_grad()
    assert model.weight.grad is None
    assert "lr: 0.05" in repr(optimizer)


def test_hooks_run() -> None:
    model, optimizer = regression()
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    handle = optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    fit(optimizer, model, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    handle.remove()
    fit(optimizer, model, 1)
    assert calls == ["before", "after", "saving", "saved", "loading", "loaded", "before"]


def test_closure_is_called_once_and_its_loss_returned() -> None:
    model, optimizer = regression(frequency=1)
    calls: list[int] = []

    def closure() -> float:
        calls.append(1)
        optimizer.zero_grad()
        loss = model(torch.ones(1, 1)).sum()
        loss.backward()
        return loss.item()

    loss = optimizer.step(closure)
    assert len(calls) == 1
    assert isinstance(loss, float)
    assert optimizer.last_cosine is not None


def test_schedulers_of_torch_set_the_learning_rate() -> None:
    model, optimizer = regression()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    fit(optimizer, model, 1)
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.025


def test_schedulers_of_timm_set_the_learning_rate() -> None:
    _, optimizer = regression()
    scheduler = timm.scheduler.CosineLRScheduler(optimizer, t_initial=10, t_in_epochs=False)
    scheduler.step_update(5)
    assert optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_gradients_are_unscaled_before_the_perturbation(name: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, optimizer = regression(name, frequency=1)
    plain, reference = regression(name, frequency=1)

    def scaled(loss: Tensor, optimizer: Any) -> None:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    fit(optimizer, model, 5, scaled)
    fit(reference, plain, 5)
    torch.testing.assert_close(model.weight, plain.weight)


def test_a_skipped_step_has_no_cosine() -> None:
    model, optimizer = regression(frequency=1)
    fit(optimizer, model, 1)
    assert optimizer.last_cosine is not None
    optimizer.set_context(step=1, precision=None)
    assert optimizer.last_cosine is None


def test_grad_scaler_skips_steps_that_overflow() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    made = parameters((torch.tensor([math.inf]),))
    optimizer = Gir(frequency=1).wrap(torch.optim.SGD(made, lr=1.0), seed=0)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert made[0].item() == 0
    assert scaler.get_scale() == 512


def test_fused_optimizers_are_unscaled_before_the_perturbation() -> None:
    made = parameters()
    fused = torch.optim.AdamW(made, lr=1.0, fused=True)
    assert fused._step_supports_amp_scaling
    assert not getattr(Gir().wrap(fused, seed=0), "_step_supports_amp_scaling", False)


def test_accelerate_can_prepare_it() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    model, optimizer = regression(frequency=1)
    plain, reference = regression(frequency=1)
    prepared = accelerator.prepare_optimizer(optimizer)

    def accelerated(loss: Tensor, optimizer: Any) -> None:
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()

    fit(prepared, model, 5, accelerated)
    fit(reference, plain, 5)
    torch.testing.assert_close(model.weight, plain.weight)
    prepared.load_state_dict(prepared.state_dict())


def test_clipping_comes_first() -> None:
    made = parameters()
    optimizer = Gir(frequency=1, gamma=0).wrap(torch.optim.SGD(made, lr=1.0), seed=0)
    torch.nn.utils.clip_grad_norm_(made, 1e-2)
    optimizer.step()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in made if p.grad is not None))
    # Each tensor grows by alpha, whatever it was clipped to.
    assert norm > 0.1


def test_copy_keeps_the_wrapped_optimizer() -> None:
    _, optimizer = regression()
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == 0.05
