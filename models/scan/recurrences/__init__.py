"""The recurrences that ship, one folder each: definition, gates in torch, C++ and Triton.

A folder is found by being here; its `VARIANTS` are the recurrences in it.
"""

from importlib import import_module
from pkgutil import iter_modules

from models.scan.recurrence import Recurrence

RECURRENCES: dict[str, Recurrence] = {
    recurrence.name: recurrence
    for folder in iter_modules(__path__)
    for recurrence in import_module(f"{__name__}.{folder.name}").VARIANTS
}
