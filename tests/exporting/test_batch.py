"""How many images a file takes at once: one, a fixed number, or any."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.exporting import export, find_format, parse_batch
from qadtr_brevitas.exporting.batch import check_batch
from qadtr_brevitas.pipeline.directories import ONNX_FILE
from qadtr_brevitas.quant import at_precision, freeze
from qadtr_brevitas.testing.targets import converted_for
from tests.exporting.networks import SPLIT, loaded, plain
from tests.exporting.test_export import loaded as loaded_by_name


def first_dimension(path: Path) -> list[int | str]:
    graph = onnx.load(str(path)).graph
    dims = [value.type.tensor_type.shape.dim[0] for value in (graph.input[0], graph.output[0])]
    return [dim.dim_param or dim.dim_value for dim in dims]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "batch"), [("qcdq", 5), ("qcdq", "dynamic"), ("ort", "dynamic"), ("qonnx", 5)])
def test_a_file_takes_as_many_images_as_it_says(form: str, batch: int | str, tmp_path: Path) -> None:
    given = loaded(plain(), precisions=(8,), target="ort" if form == "ort" else None)
    # 12 images, which 5 does not divide.
    report = export(given, Precision(8, 8), find_format(form), tmp_path / "out", split=SPLIT, batch=batch)
    assert report.batch == batch
    assert report.agreement is not None
    assert first_dimension(tmp_path / "out" / ONNX_FILE) == ["batch" if batch == "dynamic" else 5] * 2


@pytest.mark.slow
@pytest.mark.parametrize("net", ["vit", "swin"])
def test_transformers_take_any_number(net: str, tmp_path: Path) -> None:
    given = loaded_by_name(net)
    images = torch.rand(5, 3, 16, 16)
    form = find_format("qcdq")
    assert form.write_dynamic is not None
    form.write_dynamic(freeze(given.model, 4), images[:2], tmp_path / ONNX_FILE)
    found = form.load(tmp_path / ONNX_FILE)(images)
    with at_precision(given.model, 4), torch.no_grad():
        expected = given.model(images)
    assert (found - expected).abs().amax(1).median() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize(("form", "batch", "words"), [("finn", 2, "stream"), ("hls4ml", "dynamic", "stream")])
def test_compilers_take_one(form: str, batch: int | str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_batch(batch, find_format(form))
    check_batch(1, find_format(form))


def test_qonnx_takes_fixed_numbers_only() -> None:
    check_batch(7, find_format("qonnx"))
    with pytest.raises(UsageError, match="-f qcdq"):
        check_batch("dynamic", find_format("qonnx"))


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", ""])
def test_a_batch_is_a_number_or_dynamic(text: str) -> None:
    assert (parse_batch("16"), parse_batch("dynamic")) == (16, "dynamic")
    with pytest.raises(UsageError, match="dynamic"):
        parse_batch(text)


@pytest.mark.slow
def test_a_batch_larger_than_the_images_there_are(tmp_path: Path) -> None:
    model, images = converted_for(None)
    form = find_format("qcdq")
    form.write(freeze(model, 4), images.repeat(3, 1, 1, 1), tmp_path / ONNX_FILE)
    with at_precision(model, 4), torch.no_grad():
        assert torch.allclose(form.load(tmp_path / ONNX_FILE)(images[:1]), model(images[:1]), atol=1e-4)
