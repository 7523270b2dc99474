"""The running Python's own standard library: real text, on every machine, no download."""

import sysconfig
from pathlib import Path

from data_prep.sources.pieces import File, Piece, whole
from data_prep.sources.storage import size_and_content, stamp

EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def plan() -> list[Piece]:
    """One document per package or top-level module of the running Python, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pieces = []
    for entry in sorted(root.iterdir()):
        if entry.name in EXCLUDED or entry.name.startswith(("_sysconfigdata", ".")):
            continue
        modules = [entry] if entry.suffix == ".py" else sorted(entry.rglob("*.py"))
        files = [
            _file(p, p.relative_to(root).as_posix())
            for p in modules
            if not EXCLUDED.intersection(p.relative_to(root).parts)
            and p.stat().st_size
            and _is_utf8(p)
        ]
        if files:
            pieces.append(whole(*files, document=f"stdlib/{entry.name}"))
    return pieces


def _file(path: Path, name: str) -> File:
    written = stamp(str(path))  # before what it holds is looked at
    return File(name, str(path), *size_and_content(str(path)), stamp=written)


def _is_utf8(path: Path) -> bool:
    """A few modules of the standard library are, on purpose, in other encodings."""
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
