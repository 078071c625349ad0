"""The report page: evaluations, studies and analyses in one file, beside the values of the paper."""

from qadtr_brevitas.reproduce.page.build import build_page as build_page
from qadtr_brevitas.reproduce.page.inputs import read_inputs as read_inputs
from qadtr_brevitas.reproduce.page.render import check_path as check_path
from qadtr_brevitas.reproduce.page.render import write_page as write_page
