import pytest
import torch
from torch import nn

from qadtr_brevitas.attacks.library import InputGradientModel, seeded
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.seeding import generator


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


@pytest.fixture
def images():
    return torch.rand(4, 3, 8, 8, generator=generator(0))


def test_images_get_the_gradients_of_the_network_and_parameters_none(network, images):
    plain = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(network(plain).square().sum(), plain)
    guarded = images.clone().requires_grad_()
    InputGradientModel(network)(guarded).square().sum().backward()
    assert torch.equal(guarded.grad, expected)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_backward_can_be_called_twice(network, images):
    guarded = images.clone().requires_grad_()
    logits = InputGradientModel(network)(guarded)
    for number in range(5):
        logits[:, number].sum().backward(retain_graph=True)
    plain = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(network(plain).sum(), plain)
    torch.testing.assert_close(guarded.grad, expected)


def test_any_callable_is_accepted(network, images):
    assert torch.equal(InputGradientModel(lambda images: network(images) / 2)(images), network(images) / 2)


def test_the_network_is_no_submodule(network):
    guard = InputGradientModel(network)
    assert list(guard.parameters()) == []
    guard.train()
    assert not network.training


def test_a_target_class_out_of_range_is_refused(network, images):
    with pytest.raises(UsageError, match=r"5.*0 to 4"):
        InputGradientModel(network, target=5)(images)


def test_the_global_random_state_is_restored():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with seeded(generator(0), torch.device("cpu")) as seed:
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    with seeded(generator(0), torch.device("cpu")) as again:
        assert torch.equal(torch.rand(3), first)
    assert seed == again


def test_a_network_that_cuts_the_way_back_has_no_gradient(network, images):
    guarded = images.clone().requires_grad_()
    InputGradientModel(lambda images: network(images.detach()))(guarded).sum().backward()
    assert torch.equal(guarded.grad, torch.zeros_like(images))
