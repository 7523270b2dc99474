"""Defaults <- YAML file <- key=value, into a dataclass of sections. Imports no torch.

Every fault is found in one pass, with the file, the line and the nearest known key.
"""

import difflib
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.files import at_home
from models.bounds import bounded
from trainer.literal import NULLS, fits, shown, value_in, value_of

T = TypeVar("T")
LARGEST_FILE = 1 << 20


def file_path(default: Any, **bounds: Any) -> Any:
    """A field that names a file, a folder or an address; ~ is the home folder."""
    return bounded(default, path=True, **bounds)


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
    node, faults = _composed(path)
    kinds = dict(_kinds(root))
    settings: list[tuple[str, Any, str]] = []
    for key, found, line in _settings(node, kinds, faults, str(path)):
        settings.append((key, partial(value_of, found), f"{path}:{line}: {key}"))
    for override in overrides:
        key, equals, text = override.partition("=")
        if equals:
            settings.append((key, partial(value_in, text), f"command line: {key}"))
        else:
            faults.append(f"command line: {key}: an override is written key=value")

    merged = OmegaConf.structured(root)
    places = {}
    for key, read, place in settings:
        places[key] = place
        if key in kinds:
            try:
                OmegaConf.update(merged, key, read(kinds[key]), merge=False)
            except ValueError as error:
                faults.append(f"{place}: {error}")
            except OmegaConfBaseException as error:
                faults.append(f"{place}: {str(error).splitlines()[0]}")
        elif any(name.startswith(key + ".") for name in kinds):
            faults.append(f"{place}: this is a section, with keys of its own below it")
        else:
            faults.append(f"{place}: unknown key; the nearest known one is {_nearest(key, kinds)}")
    try:
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, RecursionError) as error:  # an interpolation that ends nowhere
        reason = str(error).splitlines()[0] if str(error) else "an interpolation of itself"
        raise ConfigError(str(path), [*faults, reason]) from None
    assert isinstance(config, root)
    if misfits := list(_misfits(config)):  # nothing that follows could read them
        raise ConfigError(str(path), [*faults, *misfits])
    try:
        _expand_home(config)
    except ValueError as error:
        faults.append(str(error))
    return config, places, faults


def _misfits(section: Any, prefix: str = "") -> Iterator[str]:
    """Values of another type than their field's, which only an interpolation can bring there."""
    for item in fields(section):
        value, name = getattr(section, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            yield from _misfits(value, f"{name}.")
        elif (kind := item.metadata.get("kind")) and not fits(value, kind):
            yield f"{name}: {str(value)[:60]!r} is not of type {shown(kind)}"


def _expand_home(section: Any) -> None:
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            _expand_home(value)
        elif item.metadata.get("path") and isinstance(value, dict):
            setattr(section, item.name, {_home(name): each for name, each in value.items()})
        elif item.metadata.get("path") and isinstance(value, str):
            setattr(section, item.name, _home(value))


def _home(path: str) -> str:
    return str(at_home(path)) if path.startswith("~") else path


def _composed(path: Path) -> tuple[yaml.MappingNode | None, list[str]]:
    """The file as YAML's nodes, and a list for faults. Raises ConfigError where it is no YAML."""
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ConfigError(str(path), [f"{size:,} bytes: no configuration is so large"])
        node = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError(str(path), ["the file does not exist"]) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(str(path), [f"not readable as YAML: {error}"]) from None
    except RecursionError:
        raise ConfigError(str(path), ["not readable as YAML: nested too deeply"]) from None
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise ConfigError(str(path), ["the file is not a mapping of sections"])
    return node, []


def _settings(
    node: yaml.Node | None,
    kinds: dict[str, Any],
    faults: list[str],
    path: str,
    prefix: str = "",
    seen: set[str] | None = None,
) -> Iterator[tuple[str, yaml.Node, int]]:
    """(dotted key, what is set, line) of every setting; sections alone are gone into."""
    seen = set() if seen is None else seen
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            faults.append(f"{path}:{line}: a key is not a name")
            continue
        name = f"{prefix}{key.value}"
        if name in seen:
            faults.append(f"{path}:{line}: {name}: this key stands there twice")
        seen.add(name)
        section = name not in kinds and any(known.startswith(name + ".") for known in kinds)
        if section and isinstance(value, yaml.MappingNode):
            yield from _settings(value, kinds, faults, path, name + ".", seen)
        elif not (section and isinstance(value, yaml.ScalarNode) and value.value in NULLS):
            yield name, value, line


def _kinds(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every setting below a dataclass."""
    for item in fields(section):
        if is_dataclass(item.type):
            yield from _kinds(item.type, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item.metadata.get("kind", item.type)


def leaves_of(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, type) of every setting below a dataclass."""
    for item in fields(section):
        if is_dataclass(item.type):
            yield from leaves_of(item.type, f"{prefix}{item.name}.")
        else:
            shown = item.type.__name__ if isinstance(item.type, type) else str(item.type)
            yield f"{prefix}{item.name}", shown


def described(root: Any) -> Iterator[tuple[str, str, str, str]]:
    """(key, type and bounds, default, meaning) of every setting; what its comment says it means."""
    for name, item, comment in _fields(root):
        kind = shown(item.metadata.get("kind", item.type))
        bounds = [kind.replace("text", item.metadata.get("word") or "text")]
        for word, text in (("above", "above"), ("least", "at least"), ("below", "below")):
            if item.metadata.get(word) is not None:
                bounds.append(f"{text} {item.metadata[word]}")
        if most := item.metadata.get("most"):
            bounds.append(f"at most {most:,}")
        if values := item.metadata.get("values"):
            bounds = [" | ".join(map(str, values))]
        default = item.default if item.default is not MISSING else item.default_factory()
        yield name, ", ".join(bounds), "null" if default is None else str(default), comment


def _fields(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, field, comment before or behind it in the source) of every setting."""
    lines = inspect.getsource(section).splitlines()
    comments = {}
    above: list[str] = []
    for line in lines:
        code, _, comment = line.partition("  # ") if "  # " in line else (line, "", "")
        if line.strip().startswith("# "):
            above.append(line.strip()[2:])
            continue
        if name := re.match(r"    (\w+):", code):
            comments[name[1]] = " ".join([*above, *([comment.strip()] if comment else [])])
        above = []
    for item in fields(section):
        if is_dataclass(item.type):
            yield from _fields(item.type, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item, comments.get(item.name, "")


def _nearest(key: str, known: dict[str, Any]) -> str:
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
