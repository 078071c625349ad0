"""Converts the smallest model of every module of timm and checks what comes out.

    make sweep                                # or: python -m benchmarks.timm_sweep [MODULE ...] [--jobs N]

Each model runs in a process of its own. Results are appended to a file, one line of JSON each, so that an interrupted
sweep goes on where it stopped; modules that are named are checked again. The table is written at the end.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.timm_sweep.choose import all_modules
from benchmarks.timm_sweep.one import check_module
from benchmarks.timm_sweep.processes import Record, run_all
from benchmarks.timm_sweep.table import markdown


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="of timm; all that have no result yet by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each model")
    parser.add_argument("--results", type=Path, default=Path("timm_sweep.jsonl"))
    parser.add_argument("--table", type=Path, default=Path("timm_sweep.md"))
    args = parser.parse_args(argv)
    known = all_modules()
    if unknown := sorted(set(args.modules) - set(known)):
        parser.error(f"timm and torchvision have no module {', '.join(unknown)}")
    torch.set_num_threads(1)
    done = _read(args.results)
    wanted = args.modules or [module for module in known if module not in done]
    # To find the smallest model may take longest, and it does not change.
    records = [{"module": module, "model": done.get(module, {}).get("model")} for module in wanted]
    for record in run_all(check_module, records, jobs=args.jobs, timeout=args.timeout):
        with args.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(record["module"], record["model"], record["result"], record["reason"], flush=True)
    args.table.write_text(markdown(list(_read(args.results).values()), date=datetime.date.today().isoformat()))
    print(f"wrote {args.table}")


def _read(path: Path) -> dict[str, Record]:
    """The last result of each module."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["module"]: record for record in map(json.loads, lines)}


if __name__ == "__main__":
    main()
