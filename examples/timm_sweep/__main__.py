"""Converts the smallest model of every module of timm and checks what comes out.

    make sweep                                # or: python -m examples.timm_sweep [MODULE ...] [--jobs N]

Each model runs in a process of its own. Results are appended to a file, one line of JSON each, so that an interrupted
sweep goes on where it stopped; modules that are named are checked again. The table is written at the end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from examples.timm_sweep.choose import all_modules, smallest_model
from examples.timm_sweep.table import markdown


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="of timm; all that have no result yet by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each model")
    parser.add_argument("--results", type=Path, default=Path("timm_sweep.jsonl"))
    parser.add_argument("--table", type=Path, default=Path("timm_sweep.md"))
    args = parser.parse_args(argv)
    known = all_modules()
    if unknown := sorted(set(args.modules) - set(known)):
        parser.error(f"timm and torchvision have no module {', '.join(unknown)}")
    records = _read(args.results)
    wanted = args.modules or [module for module in known if module not in records]
    with ThreadPoolExecutor(args.jobs) as pool:
        for record in pool.map(lambda module: _checked(module, records, args.timeout), wanted):
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


def _checked(module: str, records: dict[str, dict[str, Any]], timeout: float) -> dict[str, Any]:
    # What takes longest is to find the smallest model, and that does not change.
    model = records[module]["model"] if module in records else smallest_model(module)
    return {"module": module, "model": model, **_run(model, timeout)}


def _run(model: str, timeout: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "examples.timm_sweep.one", model]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"result": "failed", "reason": f"took more than {timeout:.0f} seconds"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"result": "failed", "reason": last[0]}
    return json.loads(lines[-1])


if __name__ == "__main__":
    main()
