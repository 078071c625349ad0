import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.patch_size import PatchSize


@given(st.integers(1, 300), st.integers(1, 300))
def test_text_and_size_are_inverse(height: int, width: int) -> None:
    size = PatchSize(height, width)
    assert PatchSize.parse(str(size)) == PatchSize.parse((height, width)) == size
    assert (size.pixels, size.is_square) == (height * width, height == width)


@pytest.mark.parametrize("value", [5, "5", " 5X5 ", [5, 5], PatchSize(5, 5)])
def test_a_number_is_a_square(value: object) -> None:
    assert PatchSize.parse(value) == PatchSize(5, 5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", [0, -1, "0x3", "3x", "axb", 2.5, True, None, [1], [1, 2, 3], (2.0, 3)])
def test_anything_else_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(UsageError, match="3x10"):
        PatchSize.parse(value)  # pyright: ignore[reportArgumentType]
