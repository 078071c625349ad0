"""How long the unfinished steps of a study will take, judged by the finished ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from qadtr_brevitas.core.progress import format_seconds
from qadtr_brevitas.reproduce.study.steps import StudyStep


def describe_remaining_time(steps: Sequence[StudyStep]) -> str:
    """Return the time that the unfinished steps will take, in words; empty if nothing is known.

    A step is expected to take the mean time of the finished steps of its kind. Steps of a kind of which none is
    finished are not counted, which the words `at least` say.
    """
    known: defaultdict[type[StudyStep], list[float]] = defaultdict(list)
    unfinished: list[StudyStep] = []
    for step in steps:
        seconds = step.seconds_taken()
        if seconds is None:
            unfinished.append(step)
        else:
            known[type(step)].append(seconds)
    expected = [fmean(known[type(step)]) for step in unfinished if type(step) in known]
    if not expected:
        return ""
    at_least = "at least " if len(expected) < len(unfinished) else "about "
    return at_least + format_seconds(sum(expected))
