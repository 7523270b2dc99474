"""Level one: the scan inside a device. See README.md beside this file for the mathematics."""

from models.scan.backend import choose_backend
from models.scan.recurrence import Inputs, Problem, Recurrence
from models.scan.recurrences import RECURRENCES
from models.scan.scan import Exchange, linear_scan, mingru_scan, minlstm_scan, scan
from models.scan.span import ELEMENTWISE, MATRIX, Span

__all__ = [
    "ELEMENTWISE",
    "MATRIX",
    "RECURRENCES",
    "Exchange",
    "Inputs",
    "Problem",
    "Recurrence",
    "Span",
    "choose_backend",
    "linear_scan",
    "mingru_scan",
    "minlstm_scan",
    "scan",
]
