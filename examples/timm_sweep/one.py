"""Checks one model in a process of its own and prints what came out, as one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch

from examples.timm_sweep.check import WrongResult, check_conversion
from examples.timm_sweep.choose import create, smallest_input
from qadtr_brevitas.errors import UsageError


def check_model(name: str) -> dict[str, Any]:
    """Converts and checks a model at the smallest image size it takes.

    Returns:
        What the results file keeps: result is "converts", "refused" (with an explanation) or "wrong".
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(check_model(sys.argv[1])))
