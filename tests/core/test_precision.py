import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision, parse_precisions

BITS = st.sampled_from([*range(2, 17), 32])


@given(weight=BITS, act=BITS)
def test_text_and_precision_are_inverse(weight: int, act: int) -> None:
    precision = Precision(weight, act)
    assert Precision.parse(str(precision)) == precision
    assert str(precision) == (str(weight) if weight == act else f"w{weight}a{act}")


@pytest.mark.parametrize("value", [4, "4", " 4 ", "w4a4", "W4A4", (4, 4), [4, 4], Precision(4, 4)])
def test_every_way_to_write_4_bit(value: object) -> None:
    assert Precision.parse(value) == Precision(4, 4)


@pytest.mark.parametrize("value", [0, 1, 17, 31, 33, -4, "1", "w4a1", (64, 4)])
def test_bit_widths_that_are_not_possible(value: object) -> None:
    with pytest.raises(UsageError, match=r"not possible|is not a precision"):
        Precision.parse(value)


@pytest.mark.parametrize("value", ["", "four", "a4w4", "w4", "4.0", 4.0, True, None, (4,), (4, 4, 4), ("4", 4), "²"])
def test_values_that_are_no_precision(value: object) -> None:
    with pytest.raises(UsageError, match="is not a precision: bit-widths are 2 to 16, or 32 for not quantized"):
        Precision.parse(value)


def test_several_keep_their_order_and_lose_repeats() -> None:
    assert [str(p) for p in parse_precisions([32, "4", 4, "w4a8", 2])] == ["32", "4", "w4a8", "2"]


def test_none_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="no precision given"):
        parse_precisions([])


def test_float_and_tied() -> None:
    assert Precision(32, 32).is_float
    assert not Precision(4, 32).is_float
    assert Precision(4, 4).is_tied
    assert not Precision(4, 8).is_tied
    assert Precision(2, 8) < Precision(4, 4)
