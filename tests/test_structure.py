"""The shape of the package: imports point downwards, and importing it costs torch and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "lilliput"
LAYERS = {
    0: "tree random registry sources layers labels",
    1: "wire header replies",
    2: "codecs store fleet ledger meter data",
    3: "models optim optimizers updates lean subspace",
    4: "tasks training passes scaling step local submodel splitter",
    5: "algorithms footprint",
    6: "engines evaluation",
    7: "checkpoint stop identity logs loop experiment report pretraining",
    8: "recipes config cli __main__",
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names.split()}


def unit(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def runtime(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a file but for what only a type checker reads."""
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield child
            yield from runtime(child)


def imports(path: Path) -> set[str]:
    """The units of the package that a file imports, wherever in the file."""
    found = set()
    for node in runtime(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lilliput":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lilliput.")}
    return found & LAYER.keys()


FILES = sorted(p for p in SOURCE.rglob("*.py") if p.parent != SOURCE or p.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_to_lower_layers(path: Path) -> None:
    own = unit(path)
    for other in imports(path) - {own}:
        assert LAYER[other] <= LAYER[own], f"{path.name} (layer {LAYER[own]}) imports {other} (layer {LAYER[other]})"


def test_units_form_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(unit(path), set()).update(imports(path) - {unit(path)})
    done: set[str] = set()
    while graph.keys() - done:
        free = {name for name in graph.keys() - done if graph[name] <= done}
        assert free, f"a cycle among {sorted(graph.keys() - done)}"
        done |= free


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
    "module", ["lilliput", "lilliput.optim", "lilliput.experiment", "lilliput.algorithms", "lilliput.engines"]
)
def test_importing_loads_torch_and_nothing_heavier(module: str) -> None:
    code = (
        f"import sys, torch; before = set(sys.modules); import {module}; "
        f"print(*[m for m in {HEAVY} if m in sys.modules and m not in before])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
