"""From a switchable model at one precision to files for FPGA and edge tools, proved equal before they are kept."""

from qadtr_brevitas.exporting.batch import Batch as Batch
from qadtr_brevitas.exporting.batch import parse_batch as parse_batch
from qadtr_brevitas.exporting.compiler import BuildTarget as BuildTarget
from qadtr_brevitas.exporting.compiler import check_build_options as check_build_options
from qadtr_brevitas.exporting.convertible import check_for_target as check_for_target
from qadtr_brevitas.exporting.formats import Format as Format
from qadtr_brevitas.exporting.formats import find_format as find_format
from qadtr_brevitas.exporting.report import ExportReport as ExportReport
from qadtr_brevitas.exporting.run import export as export
