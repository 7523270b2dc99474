"""The field of a record that holds its text: by name, or by names with dots between."""

from typing import Any


class Ambiguous(dict[str, Any]):
    """A JSON object with two values of one name: which is meant is not known."""

    twice: frozenset[str]


def record_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, from its names and values in order."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    ambiguous = Ambiguous(found)
    ambiguous.twice = frozenset(name for name in found if names.count(name) > 1)
    return ambiguous


def text_in(record: Any, field: str) -> str:
    """The text. Raises ValueError that says what there is instead."""
    value, read = record, ""
    for name in [field] if isinstance(record, dict) and field in record else field.split("."):
        if not isinstance(value, dict) or name not in value:
            has = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            inside = f" in {read!r}" if read else ""
            raise ValueError(
                f"no field {name!r}{inside} (it has: {has}): name the text's field with --field"
            )
        if isinstance(value, Ambiguous) and name in value.twice:
            raise ValueError(f"the field {name!r} stands there twice")
        value, read = value[name], f"{read}.{name}".strip(".")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"field {field!r} is not UTF-8 ({error.reason})") from None
    if not isinstance(value, str):
        what = "null" if value is None else f"not a text but {type(value).__name__}"
        raise ValueError(f"field {field!r} is {what}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field {field!r} is not Unicode text ({error.reason})") from None
    return value
