"""The report of an evaluation: one typed document, `report.json`, from which every table and picture is made."""

from qadtr_brevitas.evaluation.report.schema import SCHEMA_VERSION as SCHEMA_VERSION
from qadtr_brevitas.evaluation.report.schema import AttackCell as AttackCell
from qadtr_brevitas.evaluation.report.schema import CertifiedCell as CertifiedCell
from qadtr_brevitas.evaluation.report.schema import CleanCell as CleanCell
from qadtr_brevitas.evaluation.report.schema import DataFacts as DataFacts
from qadtr_brevitas.evaluation.report.schema import EvaluationReport as EvaluationReport
from qadtr_brevitas.evaluation.report.schema import ImageAttackFacts as ImageAttackFacts
from qadtr_brevitas.evaluation.report.schema import ModelFacts as ModelFacts
from qadtr_brevitas.evaluation.report.schema import PatchFacts as PatchFacts
from qadtr_brevitas.evaluation.report.schema import Rate as Rate
from qadtr_brevitas.evaluation.report.schema import Scope as Scope
from qadtr_brevitas.evaluation.report.schema import SourceFacts as SourceFacts
from qadtr_brevitas.evaluation.report.schema import Threat as Threat
from qadtr_brevitas.evaluation.report.schema import VariantFacts as VariantFacts
from qadtr_brevitas.evaluation.report.schema import WorstCase as WorstCase
from qadtr_brevitas.evaluation.report.schema import read_report as read_report
from qadtr_brevitas.evaluation.report.schema import versions as versions
