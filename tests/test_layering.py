"""The layers of the house: imports point left only, there is no cycle, no file or function grows too big."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
FILES = sorted(SOURCE.rglob("*.py"))
# A package may import those on floors below its own, and itself.
FLOORS = {
    "weights": 0,
    "fluxion": 1,
    "adapters": 2,
    "solvers": 2,
    "foundationals": 3,
    "training": 4,
    "training_utils": 5,
    "cli": 5,
    "studio": 5,
}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported_modules(path: Path) -> Iterator[str]:
    """Every module of ours that a file imports anywhere in it: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found = submodule if submodule in MODULES else node.module
                if found in MODULES:
                    yield found


IMPORTS = {name: sorted(set(imported_modules(path))) for name, path in MODULES.items()}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_to_lower_floors_only(name: str) -> None:
    package = name.split(".")[1] if "." in name else None
    for other in IMPORTS[name]:
        target = other.split(".")[1] if "." in other else None
        if target is None or target == package:
            continue
        assert package in FLOORS and target in FLOORS, f"{name} imports {other}: give the package a floor"
        assert FLOORS[target] < FLOORS[package], f"{name} imports {other}, which is not below it"


def test_no_import_cycle() -> None:
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        assert name not in way, f"cycle: {' > '.join([*way[way.index(name) :], name])}"
        if name not in done:
            for other in IMPORTS[name]:
                visit(other, [*way, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


@pytest.mark.parametrize(
    "path", [*FILES, *sorted(ROOT.glob("tests/**/*.py")), *sorted(ROOT.glob("bench/*.py"))], ids=str
)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500, f"{path} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 60, f"{path}:{node.lineno} {node.name} is over 60 lines"


def test_packages_export_and_do_nothing_else() -> None:
    for path in FILES:
        if path.name == "__init__.py":
            kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
            assert all(isinstance(node, kinds) for node in ast.parse(path.read_text()).body), path
