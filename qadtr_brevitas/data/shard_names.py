"""What the names of shards say about those that are missing: x-0007.tar, or x-0007-of-1024.tar."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qadtr_brevitas.core.errors import DataError

_NUMBERED = re.compile(r"(?P<stem>.*?)(?P<number>\d+)(?:(?P<of>[-_]of[-_])(?P<count>\d+))?")


def check_none_is_missing(tars: Sequence[Path], expected: int | None, first: int | None) -> None:
    """Raise if the numbers in the names of tars, or how many tars there are, show that some are missing.

    Args:
        tars: the tars of one split, at least one.
        expected: how many there should be; None if that is not known.
        first: number of the first one; None for any.

    Raises:
        DataError: there are more or fewer than `expected` or than their names say, or a number is left out.
    """
    folder = tars[0].parent
    if expected is not None and len(tars) != expected:
        raise DataError(
            f"{folder} has {len(tars)} shards, but data.dataset.expected_shards is {expected}: fetch the others"
        )
    for (stem, of, count), numbers in _sequences(tars).items():
        if count:
            _check_counted(folder, f"{stem}{{}}{of}{count}.tar", numbers, int(count))
        elif len(numbers) > 1 or _is_padded(*numbers.values()):
            _check_numbered(folder, f"{stem}{{}}.tar", numbers, first if expected is None else None)


def _sequences(tars: Sequence[Path]) -> Mapping[tuple[str, str, str], dict[int, str]]:
    """Return the numbers, as they are and as they are written, of tars that are called alike; others are left out."""
    found: dict[tuple[str, str, str], dict[int, str]] = {}
    for tar in tars:
        if name := _NUMBERED.fullmatch(tar.stem):
            alike = name["stem"], name["of"] or "", name["count"] or ""
            found.setdefault(alike, {})[int(name["number"])] = name["number"]
    return found


def _is_padded(number: str) -> bool:
    """Return whether this is the number of a shard, even of the only one; that of val2017.tar is not."""
    return len(number) > 1 and number.startswith("0")


def _check_counted(folder: Path, name: str, there: Mapping[int, str], count: int) -> None:
    """Check tars that say themselves how many there are, whether they count from 0 or from 1."""
    width = len(next(iter(there.values())))
    first = 1 if count in there and 0 not in there else 0
    if beyond := sorted(number for number in there if not first <= number < first + count):
        raise DataError(
            f"{folder} has the shard {name.format(there[beyond[0]])}, but numbers of {count} end at "
            f"{first + count - 1}: move it away, or fetch all shards of one set again"
        )
    if missing := sorted(set(range(first, first + count)) - set(there)):
        raise _lacking(folder, [name.format(f"{number:0{width}}") for number in missing], "fetch it")


def _check_numbered(folder: Path, name: str, there: Mapping[int, str], first: int | None) -> None:
    """Check tars that are only numbered: the last ones may be missing unnoticed."""
    width = len(next(iter(there.values())))
    lowest = min(there)
    if first is not None and lowest < first:
        raise DataError(
            f"{folder} has the shard {name.format(there[lowest])}, but data.dataset.first_shard is {first}: set it to "
            f"{lowest}"
        )
    missing = sorted(set(range(lowest if first is None else first, max(there))) - set(there))
    if missing:
        cure = "fetch it, or rename the others"
        if missing[-1] < lowest:
            cure = f"fetch it, or set data.dataset.first_shard to {lowest} where that is the first (null: any)"
        raise _lacking(folder, [name.format(f"{number:0{width}}") for number in missing], cure)


def _lacking(folder: Path, names: Sequence[str], cure: str) -> DataError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return DataError(f"{folder} lacks the shard {names[0]}{more}: {cure}")
