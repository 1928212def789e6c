"""What the documents show works: their Python runs, their files are methods, data sets and models that run, their
commands parse, and their links lead somewhere.

In a document whose programs are whole, a Python block that starts with `# name.py` is that file; the others run in
order, in one namespace.
"""

import re
import shlex
from pathlib import Path

import pytest

from lilliput.cli import main as lilliput
from lilliput.config.axes import AXES
from lilliput.core.registry import normal

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PUBLISHED = "splitfed_v1 splitfed_v2 cse_fsl fsl_sage fedsub heteroavg heterofl fedrolex scalefl inco raffm"
WHOLE = (
    "README.md",
    "data.md",
    "method.md",
    "model.md",
    "pretrain.md",
    "runs.md",
)  # the others show pieces of programs
TAUGHT = ("method.md", "data.md", "model.md")  # their commands are run, not only parsed


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[list[str]]:
    """Every `lilliput run` and `pretrain` of a document's shell blocks, and `run` of its tables, as words."""
    text = document.read_text(encoding="utf-8")
    lines = "\n".join(blocks(document, "sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(lilliput run[^`]*)`", text)
    words = [shlex.split(line, comments=True) for line in lines]
    runs = [
        w[1:]
        for w in words
        if w[:2] in (["lilliput", "run"], ["lilliput", "pretrain"])
        and not any(word in ("--config", "--help") or "NAME" in word for word in w)
    ]
    return [[word for word in run if word not in ("…", "...")] for run in runs]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=lambda d: d.name)
def test_the_python_of_a_document_runs(document, desk):
    space: dict[str, object] = {}
    for block in blocks(document, "python"):
        program = compile(block, document.name, "exec")
        if document.name in WHOLE:
            exec(program, space)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if commands(d)], ids=lambda d: d.name)
def test_the_commands_of_a_document_run(document, desk, capsys):
    for block in blocks(document, "python"):
        if name := re.match(r"# (\w+\.py)\n", block):
            (desk / name[1]).write_text(block)
    for words in commands(document):
        short = ["rounds=2", "tensorboard=false", "plots=false"] if document.name in TAUGHT else ["--cfg"]
        if "-m" not in words:
            assert lilliput([*words, *short]) == 0, (words, capsys.readouterr().err)


def test_the_taught_method_sends_a_quarter_of_the_bytes_and_learns(desk):
    from lilliput.report.runs import read, series, total

    (desk / "sign_avg.py").write_text(blocks(ROOT / "docs" / "method.md", "python")[0])
    for name in ("sign_avg.py:SignAvg", "fedavg"):
        gain = ["sign_avg.gain=2"] * name.startswith("sign")
        words = [f"algorithm={name}", *gain, "rounds=10", "plots=false", "tensorboard=false", f"name={name[:4]}"]
        assert lilliput(["run", *words]) == 0
    sign, average = (read(desk / "runs" / name).rows for name in ("sign", "feda"))
    sizes = 4 * 6  # one float32 a tensor: weights and biases of three layers
    for ours, theirs in zip(sign, average, strict=True):
        assert ours["up_bytes"] - 10 * sizes == theirs["up_bytes"] / 4
    assert series(sign, "accuracy")[1][-1] > 3 * series(sign, "accuracy")[1][0]
    assert total(sign, "dropped") == 0


def test_what_the_readme_calls_missing_is_missing_and_nothing_else_is():
    """A method that lands leaves that line of the README and fills its row of the table."""
    (line,) = re.findall(r"\*\*Not there yet\*\*.*?: (.*?)[;.]", (ROOT / "README.md").read_text(), re.DOTALL)
    missing = {normal(name.replace(" ", "")) for name in re.split(r",\s+", line)}
    there = {normal(choice.name) for axis in AXES.values() for choice in axis.nodes()}
    assert missing == {normal(name) for name in PUBLISHED.split()} - there


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
