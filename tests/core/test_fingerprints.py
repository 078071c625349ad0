from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import torch

from qadtr_brevitas.core.files import fingerprint_facts, fingerprint_file, fingerprint_tensors


def test_file_fingerprint_is_of_bytes_and_facts(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"weights")
    two.write_bytes(b"weights")
    assert fingerprint_file(one) == fingerprint_file(two) == blake2b(b"weights", digest_size=16).hexdigest()
    assert fingerprint_file(one, facts={"first_last": "8bit"}) != fingerprint_file(two, facts={"first_last": "same"})
    two.write_bytes(b"weightS")
    assert fingerprint_file(one) != fingerprint_file(two)


def test_tensor_fingerprint_is_of_values_shapes_and_types() -> None:
    values = torch.arange(6)
    different = [values, values.view(2, 3), values.int(), values + 1, values.flip(0)]
    assert len({fingerprint_tensors([tensor]) for tensor in different}) == len(different)
    assert fingerprint_tensors([values]) == fingerprint_tensors([torch.arange(12)[::2] // 2])


def test_order_of_keys_does_not_matter() -> None:
    assert fingerprint_facts({"a": 1, "b": 2}) == fingerprint_facts({"b": 2, "a": 1})
    assert fingerprint_facts({"a": 1}) != fingerprint_facts({"a": 2})
