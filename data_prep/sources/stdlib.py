"""The running Python's own standard library: real text, on every machine, no download."""

import sysconfig
from pathlib import Path

from data_prep.sources.pieces import Piece

EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def plan() -> list[Piece]:
    """One document per package or top-level module of the running Python, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pieces = []
    for entry in sorted(root.iterdir()):
        if entry.name in EXCLUDED or entry.name.startswith(("_sysconfigdata", ".")):
            continue
        modules = [entry] if entry.suffix == ".py" else sorted(entry.rglob("*.py"))
        paths = [
            str(p)
            for p in modules
            if not EXCLUDED.intersection(p.relative_to(root).parts)
            and p.stat().st_size
            and _is_utf8(p)
        ]
        if paths:
            end = Path(paths[0]).stat().st_size
            pieces.append(Piece("text", f"stdlib/{entry.name}", tuple(paths), 0, end))
    return pieces


def _is_utf8(path: Path) -> bool:
    """A few modules of the standard library are, on purpose, in other encodings."""
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
