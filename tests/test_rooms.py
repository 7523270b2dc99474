"""The house: who may import whom, one door per library, and how large a piece may be."""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "data_prep", "trainer", "launch")
ALLOWED = {
    "models": {"models"},
    "data_prep": {"data_prep"},
    "trainer": {
        "trainer",
        "models",
        "data_prep.blocks",
        "data_prep.schema",
        "data_prep.files",
        "data_prep.mixture",
        "data_prep.task",
        "data_prep.tokenizer",
        "data_prep.trajectories.environment",
    },
    "launch": {"launch", "trainer", "models", "data_prep.files"},
}
DOORS = {
    "ray": (
        "launch/gang.py",
        "launch/driver.py",
        "launch/rank.py",
        "launch/doctor.py",
        "launch/compare/cells.py",
    ),
    "tensorboard": ("trainer/metrics.py",),
    "torch.utils.tensorboard": ("trainer/metrics.py",),
    "triton": (
        "models/scan/kernels/loops.py",
        "models/scan/kernels/states.py",
        "models/scan/recurrences/*/triton.py",
    ),
    "fsspec": ("trainer/storage.py", "data_prep/sources/storage.py", "data_prep/remote.py"),
    "deepspeed": ("trainer/engine.py", "trainer/reshape.py"),
    "streaming": ("data_prep/mds.py",),
    "gymnasium": ("data_prep/trajectories/environment.py", "data_prep/trajectories/policy.py"),
    "stable_baselines3": ("data_prep/trajectories/policy.py",),
}
MOST_LINES, MOST_PARAMETERS = 350, 6
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
SOURCES = sorted(
    path
    for room in (*ROOMS, "tests")
    for kind in ("py", "cpp", "h")
    for path in (ROOT / room).rglob(f"*.{kind}")
)
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(
        path
        for room in (*ROOMS, "configs", "docker", "tests")
        for path in (ROOT / room).rglob("*.md")
    ),
]
TRITON = DOORS["triton"]  # another language: a kernel takes what it needs


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            if node.module not in (*ROOMS, "models.scan"):
                yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def linked(page: Path) -> list[str]:
    """The files and folders that a page links to."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    return [link for link in links if "://" not in link]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def parameters(path: Path) -> Iterator[tuple[str, int]]:
    """Every function's name and how many parameters it takes, `self`, `cls` and `ctx` aside."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            yield node.name, sum(arg.arg not in ("self", "cls", "ctx") for arg in named)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_file_keeps_the_import_law(path):
    name = _name(path)
    room = name.split("/")[0]
    for module in imported(path):
        if module.split(".")[0] in ROOMS:
            fine = any(within(module, allowed) for allowed in ALLOWED[room])
            assert fine, f"{name} imports {module}"
        if within(module, "torch.distributed"):
            assert room == "trainer", f"{name} imports {module}"
        for library, doors in DOORS.items():
            if within(module, library):
                opened = any(fnmatch(name, door) for door in doors)
                assert opened, f"{name} imports {module}, whose door is {doors}"


def test_the_law_is_checked():
    """A breach is seen: launch does import trainer, so trainer importing launch would be."""
    modules = set(imported(ROOT / "launch" / "ray_job.py"))
    assert "trainer.config" in modules
    assert not any(within("launch.ray_job", allowed) for allowed in ALLOWED["trainer"])


def test_a_configuration_is_checked_without_torch():
    """The table of mixers, and all that a check reads, import nothing heavy."""
    light = ["models/mixers/__init__.py", "models/config.py", "launch/compare/file.py"]
    light += [f"trainer/{name}.py" for name in ("config", "checks", "settings", "layout")]
    light += ["trainer/events.py", "trainer/run_folder.py", "launch/verbs/train.py"]
    for name in light:
        tree = ast.parse((ROOT / name).read_text())
        tops = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in tops:
            module = getattr(node, "module", None) or node.names[0].name
            assert module.split(".")[0] not in ("torch", "ray", "streaming", "deepspeed"), name


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_file_is_one_idea(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_LINES, f"{_name(path)} has {lines} lines: split it by idea"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_a_function_takes_six_parameters_at_most(path):
    if any(fnmatch(_name(path), pattern) for pattern in TRITON):
        return
    for function, count in parameters(path):
        assert count <= MOST_PARAMETERS, f"{_name(path)}: {function} takes {count} parameters"


def test_no_banned_names():
    banned = ("utils", "helper", "common", "misc", "manager")
    for path in FILES:
        assert not any(word in path.stem for word in banned), path


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_page_links_to_what_is_there(page):
    assert not [link for link in linked(page) if not (page.parent / link).exists()]


def test_links_are_found():
    assert "configs/paper/README.md" in linked(ROOT / "README.md")
