"""The checks G1 to G22, by their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from qadtr_brevitas.auditing.ablation_checks import ablated
from qadtr_brevitas.auditing.black_box_checks import black_box, noise_patches
from qadtr_brevitas.auditing.context import FEWEST_IMAGES, AuditContext
from qadtr_brevitas.auditing.convergence_checks import best_kept, more_steps, plateau, single_step
from qadtr_brevitas.auditing.finding import CheckResult, Finding, skipped
from qadtr_brevitas.auditing.gradient_checks import smooth_loss, usable_gradients
from qadtr_brevitas.auditing.loss_checks import other_losses, targeted
from qadtr_brevitas.auditing.output_checks import mean_over_precisions, outputs_are_logits, random_outputs
from qadtr_brevitas.auditing.picture_checks import pictures
from qadtr_brevitas.auditing.pixel_checks import pixel_attacks
from qadtr_brevitas.auditing.size_checks import larger_patches
from qadtr_brevitas.auditing.transfer_checks import other_gradients, transfer, undefended_twin
from qadtr_brevitas.auditing.worst_case_checks import chosen_places, ensemble


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        id: G1 to G22.
        title: what is compared, in a few words.
        measure: runs the check.
        attacks: whether it needs images that are classified correctly.
    """

    id: str
    title: str
    measure: Callable[[AuditContext], CheckResult]
    attacks: bool = True

    def run(self, context: AuditContext) -> Finding:
        """Return the finding; `skipped` if too few images are classified correctly to show anything."""
        result = self.measure(context) if self._can_run(context) else skipped(_too_few(context))
        if not all(map(math.isfinite, result.numbers.values())):
            result = CheckResult("WARN", _NOT_FINITE)
        return Finding(
            id=self.id, title=self.title, status=result.status, numbers=result.numbers, meaning=result.meaning
        )

    def _can_run(self, context: AuditContext) -> bool:
        return len(context) >= FEWEST_IMAGES if self.attacks else len(context.images) > 0


_NOT_FINITE = "the network's outputs are not finite on attacked images, so nothing can be measured: look for overflow"


def _too_few(context: AuditContext) -> str:
    return (
        f"only {len(context)} of {len(context.images)} images are classified correctly, at least {FEWEST_IMAGES} are "
        "needed: give more images"
    )


CHECKS = (
    Check("G1", "more steps, more restarts", more_steps),
    Check("G2", "loss has stopped falling", plateau),
    Check("G3", "larger patches", larger_patches),
    Check("G4", "one step against many", single_step),
    Check("G5", "black box against white box", black_box),
    Check("G6", "patches made elsewhere", transfer),
    Check("G7", "patches of noise", noise_patches),
    Check("G8", "usable gradients", usable_gradients),
    Check("G9", "random outputs", random_outputs, attacks=False),
    Check("G10", "mean over precisions (EOT)", mean_over_precisions),
    Check("G11", "logits, not probabilities", outputs_are_logits, attacks=False),
    Check("G12", "temperature and margin losses", other_losses),
    Check("G13", "gradients of other networks", other_gradients),
    Check("G14", "targeted against untargeted", targeted),
    Check("G15", "best patch against last", best_kept),
    Check("G16", "smooth loss", smooth_loss),
    Check("G17", "undefended twin", undefended_twin),
    Check("G18", "parts of the defense", ablated),
    Check("G19", "pictures against noise", pictures),
    Check("G20", "ensemble at the same places", ensemble),
    Check("G21", "PGD against AutoAttack", pixel_attacks),
    Check("G22", "chosen places against random ones", chosen_places),
)
