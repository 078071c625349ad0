"""From a switchable model at one precision to files for FPGA and edge tools, proved equal before they are kept."""

from qadtr_brevitas.exporting.folder import Build as Build
from qadtr_brevitas.exporting.formats import FORMATS as FORMATS
from qadtr_brevitas.exporting.run import ExportReport as ExportReport
from qadtr_brevitas.exporting.run import export as export
