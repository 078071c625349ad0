"""Every registered target and format is what it declares; one that is not is found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qadtr_brevitas.core.registry import FORMATS, TARGETS
from qadtr_brevitas.exporting.formats import Format
from qadtr_brevitas.quant.targets import Target
from qadtr_brevitas.testing.formats import check_format
from qadtr_brevitas.testing.targets import check_target


@pytest.mark.parametrize("name", TARGETS.names())
def test_targets(name: str) -> None:
    check_target(TARGETS.load(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS.names())
def test_formats(name: str) -> None:
    check_format(FORMATS.load(name))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target(name="finn", quantizer="nonsense"), "nonsense"),
        (Target(name="finn", quantizer="power-of-two"), "power-of-two"),
        (Target(name="finn", products=frozenset()), "products is empty"),
    ],
)
def test_a_target_that_breaks_the_contract_is_found(target: Target, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_target(target)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "nowhere"}, "nowhere"),
        ({"max_bits": 0}, "0 bits"),
        ({"load": lambda path: lambda images: images.flatten(1)[:, :5]}, "differs by"),
        ({"write": lambda frozen, image, path: None}, "wrote no file"),
    ],
)
def test_a_format_that_breaks_the_contract_is_found(change: dict[str, object], words: str) -> None:
    form: Format = FORMATS.load("qcdq")
    with pytest.raises(AssertionError, match=words):
        check_format(replace(form, **change))
