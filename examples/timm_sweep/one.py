"""Checks one model and says what came out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from typing import Any

from examples.timm_sweep.check import WrongResult, check_conversion
from examples.timm_sweep.choose import create, smallest_input
from qadtr_brevitas.errors import UsageError


def check_model(name: str) -> dict[str, Any]:
    """Converts and checks a model at the smallest image size it takes.

    Returns:
        What the results file keeps: result is "converts", "refused" (with an explanation), "wrong" or "failed".
    """
    size, args = smallest_input(name)
    seeds: Iterator[int] = count()
    facts: dict[str, Any] = {"image_size": size[0], "args": args}
    start = time.process_time()
    try:
        report = check_conversion(lambda: create(name, next(seeds), **args), size)
    except UsageError as error:
        return {**facts, "result": "refused", "reason": str(error)}
    except WrongResult as error:
        return {**facts, "result": "wrong", "reason": str(error)}
    except Exception as error:  # a crash of whatever kind is what the sweep is looking for
        return {**facts, "result": "failed", "reason": f"{type(error).__name__}: {error}"}
    return {
        **facts,
        "result": "converts",
        "reason": "",
        "parameters": report.parameters,
        "quantized_share": report.quantized_share,
        "macs": report.macs,
        "quantized_macs": report.quantized_macs,
        "seconds": round(time.process_time() - start, 1),
    }
