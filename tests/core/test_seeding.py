import torch
from hypothesis import given
from hypothesis import strategies as st

from qadtr_brevitas.core.seeding import derive_seed, generator


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed(0) == 4246866556266386882
    assert derive_seed(1, "gir", 7) == derive_seed(1, "gir", "7")


@given(seed=st.integers(0, 2**32), step=st.integers(0, 10**6))
def test_seeds_fit_torch_and_differ(seed: int, step: int) -> None:
    values = {derive_seed(seed, "a", step), derive_seed(seed, "b", step), derive_seed(seed, "a", step + 1)}
    assert len(values) == 3
    assert all(0 <= value < 2**63 for value in values)


def test_a_generator_depends_on_its_purpose_only() -> None:
    first = torch.rand(4, generator=generator(3, "noise", 1))
    torch.manual_seed(99)
    torch.rand(10)
    assert torch.equal(first, torch.rand(4, generator=generator(3, "noise", 1)))
    assert not torch.equal(first, torch.rand(4, generator=generator(3, "noise", 2)))
