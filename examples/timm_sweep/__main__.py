"""Converts the smallest model of every module of timm and checks what comes out.

    make sweep                                # or: python -m examples.timm_sweep [MODULE ...] [--jobs N]

Each model runs in a process of its own. Results are appended to a file, one line of JSON each, so that an interrupted
sweep goes on where it stopped; modules that are named are checked again. The table is written at the end.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from examples.timm_sweep.choose import all_modules, smallest_model
from examples.timm_sweep.one import check_model
from examples.timm_sweep.table import markdown


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="of timm; all that have no result yet by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each model")
    parser.add_argument("--results", type=Path, default=Path("timm_sweep.jsonl"))
    parser.add_argument("--table", type=Path, default=Path("timm_sweep.md"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    known = all_modules()
    if unknown := sorted(set(args.modules) - set(known)):
        parser.error(f"timm and torchvision have no module {', '.join(unknown)}")
    records = _read(args.results)
    wanted = args.modules or [module for module in known if module not in records]
    tasks = [(module, records.get(module, {}).get("model"), args.timeout) for module in wanted]
    with ThreadPoolExecutor(args.jobs) as pool:
        for record in pool.map(lambda task: _checked(*task), tasks):
            with args.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(record["module"], record["model"], record["result"], record["reason"], flush=True)
    records = _read(args.results)
    args.table.write_text(markdown(list(records.values()), date=datetime.date.today().isoformat()))
    print(f"wrote {args.table}")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The last result of each module."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["module"]: record for record in map(json.loads, lines)}


def _checked(module: str, model: str | None, timeout: float) -> dict[str, Any]:
    """Checks a module's smallest model in a copy of this process, which has imported everything already."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, module, model), daemon=True)
    process.start()
    sender.close()
    record: dict[str, Any] = {"module": module, "model": model}
    try:
        while "result" not in record:
            if not receiver.poll(timeout):
                return {**record, "result": "failed", "reason": f"took more than {timeout:.0f} seconds"}
            record |= receiver.recv()
    except EOFError:
        process.join()
        return {**record, "result": "failed", "reason": f"the process ended with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()
    return record


def _send_result(sender: Connection, module: str, model: str | None) -> None:
    # What may take longest is to find the smallest model.
    model = model or smallest_model(module)
    sender.send({"model": model})
    sender.send(check_model(model))


if __name__ == "__main__":
    main()
