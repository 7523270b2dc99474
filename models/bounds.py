"""Fields of a configuration with their bounds declared beside them. Imports no torch."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from typing import Any

Fault = tuple[str, str]  # a key; what is wrong with it and what to do


def bounded(default: Any, **bounds: Any) -> Any:
    """A field held to `above`, `least`, `most`, `below` or `values`, where it is not None.

    `kind` is its type where the annotation cannot say it, with a `word` that it may be besides;
    `path`: ~ in it is the home folder.
    """
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=bounds)
    return field(default=default, metadata=bounds)


def positive(default: Any, most: float | None = None) -> Any:
    """A field whose value must be above zero, where it is not None, and at most `most`."""
    return bounded(default, above=0, most=most)


def not_negative(default: Any, below: float | None = None, most: float | None = None) -> Any:
    """A field whose value must be at least zero, and below or at most a bound if there is one."""
    return bounded(default, least=0, below=below, most=most)


def one_of(default: Any, *values: Any) -> Any:
    """A field that must have one of these values."""
    return bounded(default, values=values)


def bound_faults(section: Any, prefix: str = "") -> Iterator[Fault]:
    """(key, what is wrong) for every value of a dataclass of sections outside its field's bounds.

    A list is held to the bounds item by item.
    """
    for item in fields(section):
        value, name, bounds = getattr(section, item.name), f"{prefix}{item.name}", item.metadata
        if is_dataclass(value):
            yield from bound_faults(value, f"{name}.")
            continue
        for each in value if isinstance(value, list) else [value]:
            if each is not None and (fault := _out_of_bounds(each, bounds)):
                yield name, fault


def _out_of_bounds(value: Any, bounds: Mapping[str, Any]) -> str | None:
    if word := bounds.get("word"):
        if value == word:
            return None
        if isinstance(value, str):
            return f"{value!r} is neither a number nor {word}"
    above, least = bounds.get("above"), bounds.get("least")
    if above is not None and not value > above:
        return f"{value} is not above {above}" if above else f"{value} is not positive"
    if least is not None and not value >= least:
        return f"{value} is below {least}" if least else f"{value} is negative"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not finite"
    if bounds.get("most") is not None and value > bounds["most"]:
        return f"{value} is above {bounds['most']:,}"
    if bounds.get("below") is not None and not value < bounds["below"]:
        return f"{value} is not below {bounds['below']:g}"
    if "values" in bounds and value not in bounds["values"]:
        *others, last = map(str, bounds["values"])
        return f"{value!r} is not {', '.join(others)} or {last}"
    return None
