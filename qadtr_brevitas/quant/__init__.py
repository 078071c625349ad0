"""Switchable quantization: one set of weights, many precisions, switched at run time."""

from qadtr_brevitas.quant.calibrate import calibrate as calibrate
from qadtr_brevitas.quant.conversion_report import ConversionReport as ConversionReport
from qadtr_brevitas.quant.conversion_report import LayerReport as LayerReport
from qadtr_brevitas.quant.convert import convert as convert
from qadtr_brevitas.quant.folding import folded_norms as folded_norms
from qadtr_brevitas.quant.freeze import freeze as freeze
from qadtr_brevitas.quant.model import SwitchableModel as SwitchableModel
from qadtr_brevitas.quant.norm import recalibrate_norms as recalibrate_norms
from qadtr_brevitas.quant.switch import allowed_precisions as allowed_precisions
from qadtr_brevitas.quant.switch import at_precision as at_precision
from qadtr_brevitas.quant.switch import frozen_weights as frozen_weights
from qadtr_brevitas.quant.switch import get_precision as get_precision
from qadtr_brevitas.quant.switch import precisions_or_all as precisions_or_all
from qadtr_brevitas.quant.switch import set_precision as set_precision
from qadtr_brevitas.quant.switchable_quant import quantizer_parameters as quantizer_parameters
