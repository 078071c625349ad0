"""The board: reports of different people side by side, each checked by the same rules of admission."""

from qadtr_brevitas.reproduce.board.build import Board as Board
from qadtr_brevitas.reproduce.board.build import build_board as build_board
from qadtr_brevitas.reproduce.board.files import board_json as board_json
from qadtr_brevitas.reproduce.board.files import write_board as write_board
from qadtr_brevitas.reproduce.board.page import board_tables as board_tables
from qadtr_brevitas.reproduce.board.submissions import read_submissions as read_submissions
