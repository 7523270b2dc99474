"""Defaults <- YAML file <- key=value, into a dataclass of sections. Imports no torch.

Every fault is found in one pass, with the file, the line and the nearest known key.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")
Fault = tuple[str, str]  # a key; what is wrong with it and what to do


def positive(default: Any) -> Any:
    """A field whose value must be above zero, where it is not None."""
    return _bounded(default, above=0)


def not_negative(default: Any, below: float | None = None) -> Any:
    """A field whose value must be at least zero, and below a bound if there is one."""
    return _bounded(default, least=0, below=below)


def one_of(default: Any, *values: Any) -> Any:
    """A field that must have one of these values."""
    return _bounded(default, values=values)


def _bounded(default: Any, **bounds: Any) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=bounds)
    return field(default=default, metadata=bounds)


def field_faults(section: Any, prefix: str = "") -> Iterator[Fault]:
    """(key, what is wrong) for every value of a dataclass of sections outside its field's bounds.

    A list is held to the bounds item by item.
    """
    for item in fields(section):
        value, name, bounds = getattr(section, item.name), f"{prefix}{item.name}", item.metadata
        if is_dataclass(value):
            yield from field_faults(value, f"{name}.")
            continue
        for each in value if isinstance(value, list) else [value]:
            if each is not None and (fault := _out_of_bounds(each, bounds)):
                yield name, fault


def _out_of_bounds(value: Any, bounds: Mapping[str, Any]) -> str | None:
    if "above" in bounds and not value > bounds["above"]:
        return f"{value} is not positive"
    if "least" in bounds and not value >= bounds["least"]:
        return f"{value} is negative"
    if bounds.get("below") is not None and not value < bounds["below"]:
        return f"{value} is not below {bounds['below']:g}"
    if "values" in bounds and value not in bounds["values"]:
        *others, last = map(str, bounds["values"])
        return f"{value!r} is not {', '.join(others)} or {last}"
    return None


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one fault a line."""

    def __init__(self, source: str, faults: list[str]) -> None:
        self.faults = faults
        count = f"{len(faults)} fault" + ("s" if len(faults) > 1 else "")
        super().__init__("\n".join([f"{source}: {count}", *(f"  {fault}" for fault in faults)]))


def merge(root: type[T], path: Path, overrides: list[str]) -> tuple[T, dict[str, str], list[str]]:
    """A `root` with the file's and the command line's values, where each key was set, and faults.

    Raises ConfigError where the file is not a YAML mapping at all.
    """
    if not path.is_file():
        raise ConfigError(str(path), ["the file does not exist"])
    try:
        text = path.read_text()
        lines = dict(_key_lines(yaml.compose(text, Loader=yaml.SafeLoader)))
        loaded = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(str(path), [f"not readable as YAML: {error}"]) from None
    if not isinstance(loaded, dict):
        raise ConfigError(str(path), ["the file is not a mapping of sections"])
    known = dict(leaves_of(root))
    settings = [
        (key, value, f"{path}:{lines.get(key, 1)}: {key}") for key, value in _leaves(loaded, known)
    ]
    faults = []
    for override in overrides:
        key, equals, value = override.partition("=")
        place = f"command line: {key}"
        if not equals:
            faults.append(f"{place}: an override is written key=value")
            continue
        try:
            loaded = OmegaConf.to_container(OmegaConf.create(f"value: {value}"))
            assert isinstance(loaded, dict)
            parsed = loaded["value"]
        except (yaml.YAMLError, OmegaConfBaseException):
            parsed = value
        settings.append((key, parsed, place))

    merged = OmegaConf.structured(root)
    places = {}
    for key, value, place in settings:
        places[key] = place
        if key in known:
            try:
                OmegaConf.update(merged, key, value, merge=False)
            except OmegaConfBaseException:
                faults.append(f"{place}: {value!r} is not of type {known[key]}")
        elif any(name.startswith(key + ".") for name in known):
            if value not in (None, {}):
                faults.append(f"{place}: this is a section, with keys of its own below it")
        else:
            faults.append(f"{place}: unknown key; the nearest known one is {_nearest(key, known)}")
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # an interpolation of what is not there
        raise ConfigError(str(path), [*faults, str(error).splitlines()[0]]) from None
    assert isinstance(config, root)
    return config, places, faults


def _key_lines(node: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, 1-based line) of every key of a YAML mapping."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _key_lines(value, name + ".")


def _leaves(
    mapping: dict[Any, Any], known: dict[str, str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting; a value may itself be a mapping where that is known."""
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in known:
            yield from _leaves(value, known, name + ".")
        else:
            yield name, value


def leaves_of(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, type) of every setting below a dataclass."""
    for item in fields(section):
        if is_dataclass(item.type):
            yield from leaves_of(item.type, f"{prefix}{item.name}.")
        else:
            shown = item.type.__name__ if isinstance(item.type, type) else str(item.type)
            yield f"{prefix}{item.name}", shown


def _nearest(key: str, known: dict[str, str]) -> str:
    """The most similar known key: by the whole name, else by its last part in any section."""
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return close[0]
    last = key.rpartition(".")[2]
    return max(
        known,
        key=lambda name: difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio(),
    )


def get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config
