"""Contract checks of export formats, for this package's own and for those of other packages.

```python
from qadtr_brevitas.testing.formats import check_format

def test_mine():
    check_format(MINE)
```
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.core.registry import TARGETS
from qadtr_brevitas.exporting.build_files import write_build_files
from qadtr_brevitas.exporting.compiler import BuildTarget
from qadtr_brevitas.exporting.formats import Format, blockers, check_bits
from qadtr_brevitas.quant import at_precision, freeze
from qadtr_brevitas.testing.targets import BITS, converted_for

_TOLERANCE = 0.02


def check_format(form: Format) -> None:
    """Write a small network in a format, load the file, and check that it computes the same, as declared.

    Raises:
        AssertionError: the format breaks the contract; the message says how.
    """
    name = form.name
    assert form.target is None or form.target in TARGETS.names(), f"{name} names the target {form.target!r}: unknown"
    assert form.help, f"{name} does not say what it is for"
    assert 0 < form.max_bits <= FLOAT_BITS, f"{name} has room for {form.max_bits} bits"
    _check_refusals(form)
    model, images = converted_for(form.target)
    for bits in (bits for bits in BITS if bits <= form.max_bits):
        frozen = freeze(model, bits)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            file = Path(folder) / form.file
            form.write(frozen, images[:1], file)
            assert file.is_file(), f"{name} wrote no file"
            expected, found = frozen(images), form.load(file)(images)
            assert found.shape == expected.shape, f"{name} gives {tuple(found.shape)}, not {tuple(expected.shape)}"
            off = float((found - expected).abs().amax(1).median() / expected.abs().max())
            assert off < _TOLERANCE, f"at {bits} bit the file of {name} differs by {off:.2%} in the median image"
            _check_build_files(form, file)


def _check_refusals(form: Format) -> None:
    try:
        check_bits(Precision(FLOAT_BITS, FLOAT_BITS), form)
    except UsageError:
        pass
    else:
        raise AssertionError(f"{form.name} must refuse floats")
    model, _ = converted_for(form.target)
    for bits in BITS:
        with at_precision(model, bits):
            # First and last layer keep 8 bit.
            refused = bool(blockers(model, form))
        assert refused == (max(BITS) > form.max_bits), f"{form.name} must refuse more than {form.max_bits} bits only"


def _check_build_files(form: Format, file: Path) -> None:
    if form.compiler is None:
        return
    before = set(file.parent.iterdir())
    model, images = converted_for(form.target)
    write_build_files(
        file.parent, form.compiler, freeze(model, BITS[0]), images[:1], BuildTarget(), takes_bytes=form.takes_bytes
    )
    assert set(file.parent.iterdir()) > before, f"{form.name} writes nothing for its compiler"
