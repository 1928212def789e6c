"""The shape of the package: rooms import lower rooms, files form no circle, and importing it costs torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "lilliput"
# The rooms from the ground up, and what each imports, as the table in the document says.
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in (SOURCE.parents[1] / "docs" / "architecture.md").read_text().splitlines()
    if line.startswith("| `")
]
ROOMS = {name.strip("`"): set(filter(None, imported.split(", "))) for name, _, imported in ROWS}


def runtime(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a file but for what only a type checker reads."""
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield child
            yield from runtime(child)


def module(path: Path) -> str:
    """The dotted name of a file's module below the package."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


FILES = {module(path): path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"}


def imports(path: Path) -> set[str]:
    """The package's modules that a file imports, wherever in the file."""
    found = set()
    for node in runtime(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lilliput":
            below = node.module.removeprefix("lilliput").removeprefix(".")
            names = {f"{below}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= {name if name in FILES else below for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("lilliput.") for a in node.names if a.name.startswith("lilliput.")}
    return found & FILES.keys() - {module(path)}


GRAPH = {name: imports(path) for name, path in FILES.items()}


def test_the_package_holds_rooms_and_nothing_else() -> None:
    entries = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert entries == {*ROOMS, "__init__.py", "__main__.py", "py.typed"} and len(entries) <= 24


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_document_says_and_nothing_below_it(room: str) -> None:
    files = {name: other for name, other in GRAPH.items() if name.split(".")[0] == room}
    found = {imported.split(".")[0] for others in files.values() for imported in others} - {room}
    assert found == ROOMS[room]
    rooms = list(ROOMS)
    assert all(rooms.index(other) < rooms.index(room) for other in found)


def test_files_form_no_circle() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


HEAVY = [
    "torch._dynamo",
    "datasets",
    "sklearn",
    "hydra",
    "omegaconf",
    "matplotlib",
    "tensorboard",
    "pandas",
    "scipy",
    "flwr",
    "ray",
    "transformers",
]


@pytest.mark.parametrize(
    "module",
    ["lilliput", "lilliput.optim", "lilliput.experiment", "lilliput.algorithms", "lilliput.engines"],
)
def test_importing_loads_torch_and_nothing_heavier(module: str) -> None:
    code = (
        f"import sys, torch; before = set(sys.modules); import {module}; "
        f"print(*[m for m in {HEAVY} if m in sys.modules and m not in before])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
