"""Analyses of why attacks transfer between precisions: gradients, features, placements, sizes, and accuracy by eps.

Each analysis is a plug-in; `run_analysis` runs it on models and writes what it found.
"""

from qadtr_brevitas.reproduce.analyses.base import Analysis as Analysis
from qadtr_brevitas.reproduce.analyses.base import AnalysisContext as AnalysisContext
from qadtr_brevitas.reproduce.analyses.base import AnalysisData as AnalysisData
from qadtr_brevitas.reproduce.analyses.base import Findings as Findings
from qadtr_brevitas.reproduce.analyses.document import Picture as Picture
from qadtr_brevitas.reproduce.analyses.document import Record as Record
from qadtr_brevitas.reproduce.analyses.run import run_analysis as run_analysis
