"""Content fingerprints: what tells one model, patch or data set from another, whatever its file is called."""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

_DIGEST_BYTES = 16
_CHUNK_BYTES = 1 << 20


def fingerprint_file(path: Path, *, facts: Any = None) -> str:
    """32 hex digits of a file's bytes and, if given, of JSON-like facts that change what the file means."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if facts is not None:
        digest.update(_canonical(facts))
    return digest.hexdigest()


def fingerprint_tensors(tensors: Iterable[Tensor], *, facts: Any = None) -> str:
    """32 hex digits of the types, shapes and values of tensors and, if given, of JSON-like facts."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.data)
    if facts is not None:
        digest.update(_canonical(facts))
    return digest.hexdigest()


def fingerprint_facts(facts: Any) -> str:
    """32 hex digits of JSON-like facts; the order of keys does not matter."""
    return blake2b(_canonical(facts), digest_size=_DIGEST_BYTES).hexdigest()


def _canonical(facts: Any) -> bytes:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), default=str).encode()
