"""From a switchable model at one precision to files for FPGA and edge tools, proved equal before they are kept."""

from qadtr_brevitas.export.folder import Build as Build
from qadtr_brevitas.export.formats import FORMATS as FORMATS
from qadtr_brevitas.export.run import ExportReport as ExportReport
from qadtr_brevitas.export.run import export as export
