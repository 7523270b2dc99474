"""The import law: who may import whom, and one door per library."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "data_prep", "trainer", "launch")
ALLOWED = {
    "models": {"models"},
    "data_prep": {"data_prep"},
    "trainer": {"trainer", "models", "data_prep.schema", "data_prep.tokenizer"},
    "launch": {"launch", "trainer"},
}
DOORS = {
    "ray": {"launch/gang.py", "launch/ray_job.py", "launch/cells.py"},
    "tensorboard": {"trainer/metrics.py"},
    "torch.utils.tensorboard": {"trainer/metrics.py"},
    "triton": {"models/scan/triton_kernels.py"},
    "deepspeed": {"trainer/engine.py", "trainer/parallel/ulysses.py"},
    "streaming": {"trainer/data.py", "data_prep/write.py", "data_prep/verify.py"},
}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            if node.module not in ROOMS:
                yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_keeps_the_import_law(path):
    name = path.relative_to(ROOT).as_posix()
    room = name.split("/")[0]
    for module in imported(path):
        if module.split(".")[0] in ROOMS:
            fine = any(within(module, allowed) for allowed in ALLOWED[room])
            assert fine, f"{name} imports {module}"
        if within(module, "torch.distributed"):
            assert room == "trainer", f"{name} imports {module}"
        for library, doors in DOORS.items():
            if within(module, library):
                assert name in doors, f"{name} imports {module}, whose door is {doors}"


def test_the_law_is_checked():
    """A breach is seen: launch does import trainer, so trainer importing launch would be."""
    modules = set(imported(ROOT / "launch" / "ray_job.py"))
    assert "trainer.config" in modules
    assert not any(within("launch.ray_job", allowed) for allowed in ALLOWED["trainer"])


def test_no_banned_names():
    banned = ("utils", "helper", "common", "misc", "manager")
    for path in FILES:
        assert not any(word in path.stem for word in banned), path
