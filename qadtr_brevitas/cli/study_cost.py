"""`study --estimate`: what the unfinished steps of a study cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadtr_brevitas.cli.common import emit, say
from qadtr_brevitas.core.progress import format_seconds
from qadtr_brevitas.core.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qadtr_brevitas.reproduce.study.cost import CostRow
    from qadtr_brevitas.reproduce.study.plan import StudyPlan

_HOUR = 3600


def tell_cost(plan: StudyPlan, *, device: str, speedup: float, price: float | None) -> None:
    """Print the hours of one device, and the dollars, of each kind of steps.

    Args:
        plan: the steps.
        device: where the networks are timed.
        speedup: how many times faster the device is on which the study will run.
        price: dollars for an hour of that device; None to leave dollars out.
    """
    from qadtr_brevitas.core.device import resolve_device
    from qadtr_brevitas.reproduce.study.cost import estimate

    where = resolve_device(device)
    say(f"timing a few images through each network on {where}; no data are read and nothing is made")
    rows, left_out = estimate(plan, device=where)
    total = sum(row.seconds for row in rows) / speedup
    document = {
        "device": str(where),
        "speedup": speedup,
        "price": price,
        "hours": total / _HOUR,
        "dollars": None if price is None else total / _HOUR * price,
        "rows": [
            {
                "kind": row.kind,
                "network": row.network,
                "steps": row.steps,
                "images_forward": row.work.forward,
                "images_attack": row.work.attack,
                "images_training": row.work.training,
                "hours": row.seconds / speedup / _HOUR,
            }
            for row in rows
        ],
        "not_counted": left_out,
    }
    emit(document, _table(rows, total, speedup=speedup, price=price, device=str(where)).rich())
    if left_out:
        say(f"not counted: {len(left_out)} steps, such as {left_out[0]!r}, whose passes are not known beforehand")
    say(
        f"one {where} would take {format_seconds(total)}"
        + ("" if speedup == 1 else f" if it were {speedup:g} times faster")
    )


def _table(rows: Sequence[CostRow], total: float, *, speedup: float, price: float | None, device: str) -> Table:
    def costs(seconds: float) -> tuple[str, ...]:
        hours = seconds / _HOUR
        return f"{hours:,.1f}", *(() if price is None else (f"{hours * price:,.0f}",))

    body = [
        (
            row.kind,
            row.network,
            str(row.steps),
            *(f"{images / 1e6:,.2f}" for images in (row.work.training, row.work.attack, row.work.forward)),
            *costs(row.seconds / speedup),
        )
        for row in rows
    ]
    steps = str(sum(row.steps for row in rows))
    header = ("steps", "network", "number", "trained on", "attacked", "forward", "hours")
    return Table(
        "Cost of what is not finished: millions of images, and hours of one device",
        (*header, *(() if price is None else ("dollars",))),
        (*body, ("all", "", steps, "", "", "", *costs(total))),
        (
            f"Passes are counted from the recipes and timed on {device}"
            + (
                "." if speedup == 1 else f", whose times are divided by {speedup:g} (--speedup, which is not measured)."
            ),
            "Certificates are counted as if every image were proved: others take fewer passes.",
            "Reading of images, validation, audits, analyses and what an objective or a gradient rule adds to a step "
            "are not counted.",
        ),
        labels=2,
    )
