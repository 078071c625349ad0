"""Train, attack and deploy quantized networks that resist adversarial patches.

    import qadtr_brevitas as qb

    model = qb.convert(timm.create_model("resnet18", pretrained=True), precisions=[32, 8, 4])
    qb.calibrate(model, loader)
    result = qb.evaluate(model, loader, attacks=["pgd"], precisions=[32, 4])

Names are imported when they are first used: the import of the package itself loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qadtr_brevitas.core.version import __version__

if TYPE_CHECKING:
    from qadtr_brevitas import attacks as attacks
    from qadtr_brevitas.api.auditing import audit as audit
    from qadtr_brevitas.api.certification import CertificationResult as CertificationResult
    from qadtr_brevitas.api.certification import certify as certify
    from qadtr_brevitas.api.certification import defend as defend
    from qadtr_brevitas.api.evaluation import EvaluationResult as EvaluationResult
    from qadtr_brevitas.api.evaluation import evaluate as evaluate
    from qadtr_brevitas.api.exporting import export as export
    from qadtr_brevitas.api.hub import from_pretrained as from_pretrained
    from qadtr_brevitas.api.hub import push as push
    from qadtr_brevitas.api.models import convert as convert
    from qadtr_brevitas.api.models import load as load
    from qadtr_brevitas.api.models import save as save
    from qadtr_brevitas.api.training import Run as Run
    from qadtr_brevitas.api.training import train as train
    from qadtr_brevitas.attacks.patch import Patch as Patch
    from qadtr_brevitas.core.errors import QadtrError as QadtrError
    from qadtr_brevitas.core.precision import Precision as Precision
    from qadtr_brevitas.quant import SwitchableModel as SwitchableModel
    from qadtr_brevitas.quant import allowed_precisions as allowed_precisions
    from qadtr_brevitas.quant import at_precision as at_precision
    from qadtr_brevitas.quant import calibrate as calibrate
    from qadtr_brevitas.quant import freeze as freeze
    from qadtr_brevitas.quant import frozen_weights as frozen_weights
    from qadtr_brevitas.quant import get_precision as get_precision
    from qadtr_brevitas.quant import recalibrate_norms as recalibrate_norms
    from qadtr_brevitas.quant import set_precision as set_precision

_HOMES = {
    "audit": "api.auditing",
    "CertificationResult": "api.certification",
    "certify": "api.certification",
    "defend": "api.certification",
    "EvaluationResult": "api.evaluation",
    "evaluate": "api.evaluation",
    "export": "api.exporting",
    "from_pretrained": "api.hub",
    "push": "api.hub",
    "convert": "api.models",
    "load": "api.models",
    "save": "api.models",
    "Run": "api.training",
    "train": "api.training",
    "Patch": "attacks.patch",
    "QadtrError": "core.errors",
    "Precision": "core.precision",
    "SwitchableModel": "quant",
    "allowed_precisions": "quant",
    "at_precision": "quant",
    "calibrate": "quant",
    "freeze": "quant",
    "frozen_weights": "quant",
    "get_precision": "quant",
    "recalibrate_norms": "quant",
    "set_precision": "quant",
}

__all__ = ["__version__", "attacks", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "attacks":
        return import_module("qadtr_brevitas.attacks")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
