import pytest
from checkerboard_patch.attack import Checkerboard

from qadtr_brevitas.testing.attacks import check_attack


@pytest.mark.parametrize("cells", [1, 2, 5])
def test_it_fulfills_the_contract(cells: int) -> None:
    check_attack(Checkerboard(size=5, cells=cells))
