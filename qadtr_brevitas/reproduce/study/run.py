"""Carrying out a study: whatever is missing is made, by as many processes as see the same folders."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from qadtr_brevitas.core.errors import QadtrError, StudyError
from qadtr_brevitas.core.progress import Progress, silent
from qadtr_brevitas.evaluation.sharding import Shard
from qadtr_brevitas.reproduce.study.claims import Claims
from qadtr_brevitas.reproduce.study.plan import StudyPlan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.steps import StudyStep
from qadtr_brevitas.training.stop import Interrupted

LOOK_EVERY = 2.0
"""Seconds between two looks at what the others have finished."""

Say: TypeAlias = Callable[[str], object]
Begin: TypeAlias = Callable[[str], Progress]
"""Is told what is begun, and gives what is told how far it is."""


@dataclass
class StudyOutcome:
    """What became of the parts.

    Args:
        made: names of those that this process made.
        failed: names of those that could not be made, and why.
    """

    made: list[str] = field(default_factory=list)
    failed: dict[str, QadtrError] = field(default_factory=dict)


def carry_out(
    plan: StudyPlan,
    resources: StudyResources,
    claims: Claims,
    *,
    share: Shard | None = None,
    say: Say = lambda message: None,
    begin: Begin = lambda what: silent,
    look_every: float = LOOK_EVERY,
) -> StudyOutcome:
    """Makes every part that is missing, and waits for those that others are making.

    A part that fails does not keep those from being made that do not need it.

    Args:
        plan: the parts.
        resources: with what they are made.
        claims: keeps two processes from making the same part.
        share: the share of the parts to begin with; the others follow, as far as nobody has begun them.
        say: told what happens, in words.
        begin: told what is begun.
        look_every: seconds between two looks at what others have finished.

    Raises:
        StudyError: parts could not be made; everything else is.
        Interrupted: stopped by Ctrl-C or a signal in a training, after its state was saved.
    """
    outcome, waiting = StudyOutcome(), ""
    missing = _in_turn([part for part in plan.parts if not part.is_made()], share)
    while missing := [part for part in missing if part.name not in outcome.failed and not part.is_made()]:
        _give_up(missing, outcome)
        ready = [part for part in missing if all(need.is_made() for need in part.needs)]
        if any(_make(part, resources, claims, outcome, say, begin) for part in ready):
            waiting = ""
            continue
        now = "; ".join(f"{part.name} ({who})" for part in ready if (who := claims.owner(part.key)))
        if now and now != waiting:
            say(f"waiting for {now}")
        waiting = now
        time.sleep(look_every)
    if outcome.failed:
        raise _failure(outcome, plan)
    return outcome


def _in_turn(parts: Sequence[StudyStep], share: Shard | None) -> list[StudyStep]:
    """The parts, those of the share first; what others need stays before it."""
    if share is None:
        return list(parts)
    mine = share.pick(parts)
    return [*mine, *(part for part in parts if part not in mine)]


def _make(
    part: StudyStep, resources: StudyResources, claims: Claims, outcome: StudyOutcome, say: Say, begin: Begin
) -> bool:
    """Makes a part if nobody else does; True if something changed."""
    with claims.claim(part.key, part.name) as is_mine:
        if not is_mine:
            return False
        # Another process may have finished it since.
        if part.is_made():
            return True
        say(part.name)
        try:
            part.make(resources, begin(part.name))
        except Interrupted:
            raise
        except QadtrError as error:
            outcome.failed[part.name] = error
            say(f"{part.name} failed: {error}")
        else:
            outcome.made.append(part.name)
        return True


def _give_up(missing: Sequence[StudyStep], outcome: StudyOutcome) -> None:
    """Marks what needs a part that has failed."""
    for part in missing:
        for need in part.needs:
            if need.name in outcome.failed and part.name not in outcome.failed:
                outcome.failed[part.name] = StudyError(f"it needs: {need.name}")


def _failure(outcome: StudyOutcome, plan: StudyPlan) -> StudyError:
    reasons: dict[str, list[str]] = {}
    for name, error in outcome.failed.items():
        if not isinstance(error, StudyError):
            reasons.setdefault(str(error), []).append(name)
    lines = [f"{_shortened(names)}: {reason}" for reason, names in reasons.items()]
    return StudyError(
        f"{len(outcome.failed)} of {len(plan.parts)} parts of the study could not be made; all others are, and are not "
        "made again. Remove the cause and give the same command:\n" + "\n".join(lines)
    )


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
