"""The results as a Markdown page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import compress
from typing import Any

_HEAD = """# Which networks convert

The smallest model (by parameters) of every module of timm, and of the modules of torchvision that define networks timm
lacks, with random weights, at the smallest square image it takes. Made with

```
python -m benchmarks.timm_sweep
```

on {date}, {versions}; seeds 0 and up, two images of noise, one thread.

{results}

"Converts" means that all of this was checked:

- at 32 bit the switchable network, and the frozen one, give bit for bit what the float network gives;
- at 8, 4 and 2 bit every operand of every convolution and matrix product that reaches PyTorch's kernels has at most
  256, 16 and 4 distinct values (a weight: in each of its first 64 output channels; first and last layer, and filters
  that are not learned: 256), unless the product is the same for every image;
- what is quantized without a sign has no negative value;
- at 8, 4 and 2 bit the frozen network gives bit for bit what the switchable one gives;
- the conversion is the same for other random weights, and its state dict loads into it and gives the same logits;
- in training, at 8, 4 and 2 bit, every parameter that has a gradient at 32 bit has one, every threshold in force has
  one, and all are finite.

MACs: multiply-accumulates for one image of that size, in millions, and the share of them on quantized operands.
Parameters: in thousands, and the share in layers with quantized weights; the others are norms, biases of theirs,
embeddings and scales.

| module | model | image | MACs | quantized | parameters | quantized | result |
|---|---|---|---|---|---|---|---|
"""


def markdown(records: Sequence[Mapping[str, Any]], *, date: str) -> str:
    """The page.

    Args:
        records: one for each module, as in the results file.
        date: year, month and day of the run.
    """
    theirs = [record["module"].startswith("torchvision.") for record in records]
    sources = {"timm": [not there for there in theirs], "torchvision": theirs}
    head = _HEAD.format(
        date=date,
        versions=", ".join(f"{name} {version(name)}" for name in ("timm", "torch", "torchvision", "brevitas")),
        results="\n".join(_summary(name, list(compress(records, chosen))) for name, chosen in sources.items()),
    )
    rows = "".join(_row(record) for record in sorted(records, key=_order))
    return head + rows + _reasons([record for record in records if record["reason"]])


def _summary(source: str, records: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(record["result"] for record in records)
    share = f" ({counts['converts'] / len(records):.1%})" if records else ""
    others = "".join(f", {number} {result}" for result, number in counts.most_common() if result != "converts")
    return f"- {source}: **{counts['converts']} of {len(records)} modules convert fully**{share}{others}"


def _order(record: Mapping[str, Any]) -> tuple[bool, str]:
    return record["module"].startswith("torchvision."), record["module"]


def _row(record: Mapping[str, Any]) -> str:
    cells = [record["module"], f"`{record['model']}`", str(record.get("image_size", ""))]
    if record["result"] == "converts":
        share = record["quantized_macs"] / record["macs"]
        cells += [f"{record['macs'] / 1e6:,.1f}", f"{share:.1%}"]
        cells += [f"{record['parameters'] / 1e3:,.0f}", f"{record['quantized_share']:.1%}"]
    else:
        cells += [""] * 4
    return f"| {' | '.join([*cells, record['result']])} |\n"


def _reasons(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return ""
    lines = (
        f"- {record['module']} (`{record['model']}`), {record['result']}: {record['reason']}" for record in records
    )
    return "\n## Why not\n\n" + "\n".join(lines) + "\n"
