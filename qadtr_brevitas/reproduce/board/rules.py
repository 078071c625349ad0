"""The rules of admission to a board: what they ask, and why a line is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from qadtr_brevitas.auditing.finding import PrecisionAudit
from qadtr_brevitas.auditing.standings import Standing, is_guessing
from qadtr_brevitas.evaluation.report.layout import bits, percent
from qadtr_brevitas.evaluation.report.schema import DataFacts
from qadtr_brevitas.quant.inference import parse_mode
from qadtr_brevitas.reproduce.board.protocol import AttackRule, Protocol

# More steps, a black box, gradients, random outputs: without them an audit cannot tell that the attack failed.
_NEEDED_CHECKS = ("G1", "G5", "G8", "G9")
_EVALUATE = "run qadtr-brevitas evaluate --audit"


@dataclass(frozen=True)
class Line:
    """One model at one precision of one report, as the rules see it.

    Args:
        standing: what is known of it.
        data: the images of its report.
        attacks: the attacks that count.
        eot: whether it was attacked through a mean over several precisions.
    """

    standing: Standing
    data: DataFacts
    attacks: tuple[AttackRule, ...]
    eot: bool


@dataclass(frozen=True)
class Rule:
    """One rule.

    Args:
        name: what it is about.
        asks: what it asks, as a sentence.
        refusal: returns why a line is refused, or an empty text.
    """

    name: str
    asks: str
    refusal: Callable[[Line, Protocol], str]


def _audited(line: Line, protocol: Protocol) -> str:
    audit = line.standing.audit
    if audit is None:
        return f"no audit of these weights at {bits(line.standing.precision)}: {_EVALUATE}"
    missing = [id for id in _NEEDED_CHECKS if _status(audit, id) in ("", "skipped")]
    if audit.is_incomplete:
        return f"{audit.count('skipped')} of {len(audit.findings)} checks measured nothing: audit more images"
    return f"the audit skipped {', '.join(missing)}: audit more images" if missing else ""


def _not_guessing(line: Line, protocol: Protocol) -> str:
    clean, classes = line.standing.clean, len(line.data.classes)
    if not is_guessing(clean, classes):
        return ""
    return f"right on {percent(clean)} % of {clean.n} images, as guessing one of {classes} classes could be"


def _not_random(line: Line, protocol: Protocol) -> str:
    audit = line.standing.audit
    is_random = parse_mode(line.standing.precision).is_random
    is_random |= audit is not None and _status(audit, "G9") == "WARN"
    if not is_random or line.eot:
        return ""
    return "its outputs are random, and no attack is on their mean: attack with EOT (a precision written as 8+4)"


def _has_gradients(line: Line, protocol: Protocol) -> str:
    audit = line.standing.audit
    found = [] if audit is None else [f for f in audit.findings if f.id == "G8" and f.status == "WARN"]
    return found[0].meaning if found else ""


def _same_data(line: Line, protocol: Protocol) -> str:
    mine, theirs = line.data, protocol.data
    if (mine.name, mine.split) != (theirs.name, theirs.split):
        return f"{mine.split} images of {mine.name} instead of {theirs.split} images of {theirs.name}"
    if mine.images == theirs.images and mine.fingerprint != theirs.fingerprint:
        return f"other {mine.images} images of {mine.name}: take the same seed, order and image size"
    return ""


def _same_count(line: Line, protocol: Protocol) -> str:
    mine, theirs = line.data.images, protocol.data.images
    return f"{mine} images instead of {theirs}" if mine != theirs else ""


def _same_precision(line: Line, protocol: Protocol) -> str:
    if line.standing.precision in protocol.attacks:
        return ""
    return f"{bits(line.standing.precision)}; the protocol has {', '.join(map(bits, protocol.precisions))}"


def _attacked(line: Line, protocol: Protocol) -> str:
    return "" if line.attacks else "no attack was made"


def _same_attacks(line: Line, protocol: Protocol) -> str:
    mine, theirs = (Counter(attack.attack for attack in attacks) for attacks in _both(line, protocol))
    if not mine or mine == theirs:
        return ""
    return _difference(mine, theirs)


def _same_sizes(line: Line, protocol: Protocol) -> str:
    mine, theirs = (Counter(attack.label for attack in attacks) for attacks in _both(line, protocol))
    if not mine or mine == theirs or _same_attacks(line, protocol):
        return ""
    return _difference(mine, theirs)


def _same_settings(line: Line, protocol: Protocol) -> str:
    mine, theirs = _both(line, protocol)
    if not mine or mine == theirs or _same_attacks(line, protocol) or _same_sizes(line, protocol):
        return ""
    one, other = next((a, b) for a, b in zip(mine, theirs, strict=True) if a != b)
    keys = one.keys.keys() | other.keys.keys()
    different = [key for key in sorted(keys) if one.keys.get(key) != other.keys.get(key)]
    if different:
        key = different[0]
        return f"{one.attack} with {key}={one.keys.get(key)} instead of {other.keys.get(key)}"
    if one.target != other.target:
        return f"{one.attack} at {_target(one)} instead of {_target(other)}"
    return f"{one.attack} made on {one.made} instead of {other.made}"


RULES = (
    Rule("audit complete", "An audit of the same weights at the same precision, most of whose checks ran.", _audited),
    Rule("accuracy", "Without an attack, right more often than guessing one of the classes could be.", _not_guessing),
    Rule(
        "no randomness",
        "The same images give the same outputs, or an attack is on the mean of them (EOT).",
        _not_random,
    ),
    Rule("gradients", "The attack finds a finite gradient that is not zero on every image.", _has_gradients),
    Rule("same data", "The same test images.", _same_data),
    Rule("number of images", "As many of them.", _same_count),
    Rule("precision", "A precision of the protocol.", _same_precision),
    Rule("attacked", "At least one attack.", _attacked),
    Rule("attack", "The same attacks, as many of each.", _same_attacks),
    Rule("patch size", "Patches of the same sizes and places.", _same_sizes),
    Rule("attack settings", "The same settings, targets and threat of each attack.", _same_settings),
)
"""All rules, in the order in which they are told."""


def refusals(line: Line, protocol: Protocol) -> dict[str, str]:
    """Return the rules that refuse a line, and why; empty for one that is admitted."""
    found = {rule.name: rule.refusal(line, protocol) for rule in RULES}
    return {name: reason for name, reason in found.items() if reason}


def _status(audit: PrecisionAudit, id: str) -> str:
    return next((finding.status for finding in audit.findings if finding.id == id), "")


def _both(line: Line, protocol: Protocol) -> tuple[tuple[AttackRule, ...], tuple[AttackRule, ...]]:
    """Return the attacks of a line, and those of the protocol at its precision: its own where the protocol has none."""
    return line.attacks, protocol.attacks.get(line.standing.precision, line.attacks)


def _difference(mine: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    return f"{_counts(mine.items())} instead of {_counts(theirs.items())}"


def _counts(found: Iterable[tuple[str, int]]) -> str:
    return " and ".join(f"{count} x {name}" for name, count in sorted(found)) or "none"


def _target(attack: AttackRule) -> str:
    return "any wrong class" if attack.target < 0 else f"class {attack.target}"
