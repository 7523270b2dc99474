"""Pieces of a Markdown page, for a run, a comparison and a benchmark."""

from collections.abc import Iterable, Sequence

Row = tuple[str, Sequence[str]]  # a name and the cells beside it


def table(corner: str, columns: Iterable[str], rows: Iterable[Row]) -> list[str]:
    """Lines of a table, and an empty one."""
    names = list(columns)
    lines = [f"| {corner} | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows), ""]
