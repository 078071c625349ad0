"""Certified robustness: predictions that no patch of a given size changes, whatever it shows and wherever it lies."""

from qadtr_brevitas.certify.double_masking import Certified as Certified
from qadtr_brevitas.certify.double_masking import double_masking as double_masking
from qadtr_brevitas.certify.masks import MASKS_PER_SIDE as MASKS_PER_SIDE
from qadtr_brevitas.certify.masks import covering_masks as covering_masks
