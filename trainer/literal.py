"""What a YAML node says, as the type of the field that it is for: literally, or not at all.

YAML 1.1 reads `on` as true, `010` as 8, `1:30` as 90 and `2026-01-01` as a date. Here a text is
what was written, a number is decimal and finite, and anything else is refused.
"""

import math
import re
import types
from typing import Any, Union, get_args, get_origin

import yaml

NODES: dict[Any, type[yaml.Node]] = {list: yaml.SequenceNode, dict: yaml.MappingNode}
NULLS = ("", "~", "null", "Null", "NULL")
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
WANTED = {int: "a whole decimal number", float: "a finite decimal number", bool: "true or false"}
DEEPEST, LARGEST = 20, 10_000  # of lists within lists, and of values in them
INTEGER = re.compile(r"[+-]?(0|[1-9][0-9_]*)")
DECIMAL = re.compile(r"[+-]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def shown(kind: Any) -> str:
    """A field's type, for people."""
    if kind is str:
        return "text"
    if get_origin(kind) is list:
        return f"list of {shown(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"{{{' : '.join(map(shown, get_args(kind)))}}}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(shown(part) for part in get_args(kind))
    return "null" if kind is type(None) else str(getattr(kind, "__name__", kind))


def value_of(node: yaml.Node, kind: Any, depth: int = 0) -> Any:
    """The value. Raises ValueError with the reason where the node says no such thing."""
    if depth > DEEPEST:
        raise ValueError("is nested too deeply")
    if depth == 0 and not isinstance(node, yaml.ScalarNode):
        _check_size(node)
    if not node.tag.startswith("tag:yaml.org,2002:") or ":python/" in node.tag:
        raise ValueError(f"has the tag {node.tag}, which means nothing here")
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        parts = get_args(kind)
        if type(None) in parts and _is_null(node):
            return None
        scalars = [part for part in parts if get_origin(part) is None and part is not type(None)]
        nested = [part for part in parts if NODES.get(get_origin(part)) is type(node)]
        kind = (nested or scalars)[0]
        if not nested and len(scalars) > 1 and not _is_number(node):  # a word in its place
            kind = scalars[1]
        return value_of(node, kind, depth)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, kind)
    if isinstance(node, yaml.SequenceNode) and origin is list:
        return [value_of(item, get_args(kind)[0], depth + 1) for item in node.value]
    if isinstance(node, yaml.MappingNode) and origin is dict:
        inner = get_args(kind)[1]
        names = [str(value_of(key, str)) for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"names {twice[0]!r} twice")
        return {
            name: value_of(value, inner, depth + 1)
            for name, (_, value) in zip(names, node.value, strict=True)
        }
    raise ValueError(f"{yaml.serialize(node).strip()[:60]!r} is not of type {shown(kind)}")


def value_in(text: str, kind: Any) -> Any:
    """The same of what stands after the = on a command line; a text is all of it."""
    begun: Any = {"[": list, "{": dict}.get(text.lstrip()[:1])
    parts = [get_origin(part) for part in get_args(kind)]
    nested = get_origin(kind) in NODES or (begun is not None and begun in parts)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if nested or quoted:
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError) as error:
            reason = str(error).splitlines()[0] if str(error) else "it is nested too deeply"
            raise ValueError(f"{text[:60]!r} is not YAML ({reason})") from None
        return value_of(node or yaml.ScalarNode("tag:yaml.org,2002:null", ""), kind)
    if text == "~" and str in (kind, *get_args(kind)):
        return text  # on a command line, the home folder
    return value_of(yaml.ScalarNode("tag:yaml.org,2002:str", text), kind)


def fits(value: Any, kind: Any) -> bool:
    """Whether it is a value of that type."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(fits(each, parts[0]) for each in value)
    if origin is dict:
        items = value.items() if isinstance(value, dict) else [(None, None)]
        return all(fits(name, parts[0]) and fits(each, parts[1]) for name, each in items)
    return isinstance(value, (int, float) if kind is float else kind)


def _check_size(node: yaml.Node) -> None:
    """An alias stands for all that it names, each time: ten of ten of ten are a thousand."""
    left, count = [(node, 0)], 0
    while left:
        here, depth = left.pop()
        count += 1
        if count > LARGEST or depth > DEEPEST:
            raise ValueError("is too large, or nested too deeply")
        if isinstance(here, yaml.SequenceNode):
            left += [(item, depth + 1) for item in here.value]
        elif isinstance(here, yaml.MappingNode):
            left += [(value, depth + 1) for _, value in here.value]


def _is_number(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and bool(DECIMAL.fullmatch(node.value))


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULLS


def _scalar(node: yaml.ScalarNode, kind: Any) -> Any:
    text: str = node.value
    if "\0" in text or text == "???":  # which would mean to OmegaConf that nothing is set
        raise ValueError(f"is {text!r}, which names nothing")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} is not Unicode text") from None
    if "${" in text:  # OmegaConf's: another setting's value, or the environment's
        return text
    if kind is str:
        if _is_null(node):
            raise ValueError("is empty: give a value, or leave the key out")
        return text
    if kind is bool and text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    if kind is int and INTEGER.fullmatch(text):
        if len(text) > 19:
            raise ValueError(f"{text[:20]}... is too large")
        return int(text)
    if kind is float and DECIMAL.fullmatch(text):
        value = float(text)
        if math.isfinite(value):
            return value
    said = f"{text[:60]!r} is not of type {shown(kind)}"
    raise ValueError(f"{said}: it must be {WANTED[kind]}" if kind in WANTED else said)
