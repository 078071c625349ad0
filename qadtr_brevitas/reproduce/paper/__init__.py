"""The results of the paper as data: every table and figure that a measurement can be compared with."""

from qadtr_brevitas.reproduce.paper.tables import SUBJECT as SUBJECT
from qadtr_brevitas.reproduce.paper.tables import PaperTable as PaperTable
from qadtr_brevitas.reproduce.paper.tables import PaperValue as PaperValue
from qadtr_brevitas.reproduce.paper.tables import paper_table as paper_table
from qadtr_brevitas.reproduce.paper.tables import paper_tables as paper_tables
