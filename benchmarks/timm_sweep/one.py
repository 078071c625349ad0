"""Checks one model and says what came out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count

from benchmarks.timm_sweep.check import WrongResult, check_conversion
from benchmarks.timm_sweep.choose import create, smallest_input, smallest_model
from benchmarks.timm_sweep.processes import Record
from qadtr_brevitas.core.errors import UsageError


def check_module(record: Record) -> Iterator[Record]:
    """Checks the smallest model of a module.

    Args:
        record: "module" is one of `all_modules()`; "model" is the name of its smallest, or None.

    Yields:
        The model's name, and what `check_model` gives.
    """
    model = record["model"] or smallest_model(record["module"])
    yield {"model": model}
    yield check_model(model)


def check_model(name: str) -> Record:
    """Converts and checks a model at the smallest image size it takes.

    Returns:
        What the results file keeps: result is "converts", "refused" (with an explanation), "wrong" or "failed".
    """
    size, args = smallest_input(name)
    seeds = count()
    facts: Record = {"image_size": size[0], "args": args}
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
