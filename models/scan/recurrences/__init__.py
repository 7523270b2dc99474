"""The recurrences that ship, one folder each: definition, gates in torch, C++ and Triton.

A folder is found by being here; its `VARIANTS` are the recurrences in it.
"""

from importlib import import_module
from pkgutil import iter_modules

from models.scan.recurrence import Recurrence


def _find() -> dict[str, Recurrence]:
    recurrences: dict[str, Recurrence] = {}
    for folder in iter_modules(__path__):
        module = import_module(f"{__name__}.{folder.name}")
        for recurrence in getattr(module, "VARIANTS", ()):
            assert recurrence.name not in recurrences, f"two recurrences named {recurrence.name}"
            recurrences[recurrence.name] = recurrence
    return recurrences


RECURRENCES = _find()
