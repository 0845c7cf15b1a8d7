"""No code path of ayllu unpickles, evaluates or executes what a file says: read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "ayllu"
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"torch.load", "torch.hub.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load"}
CALLS |= {
    "pandas.read_pickle",
    "pd.read_pickle",
    "runpy.run_path",
    "torch.jit.load",
    "torch.package.PackageImporter",
}
WITHIN_CONVERT = "weights/meta.py"


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def weights_only(call: ast.Call) -> bool:
    given = {word.arg: word.value for word in call.keywords}
    value = given.get("weights_only")
    return isinstance(value, ast.Constant) and value.value is True


def offences(tree: ast.AST, *, convert: bool = False) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {n.name}" for n in node.names if n.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in MODULES:
                yield f"from {node.module} import"
            names = {f"{node.module}.{n.name}" for n in node.names}
            yield from (f"from-import of {name}" for name in names & CALLS)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name == "torch.load" and convert and weights_only(node):
                continue
            if name in BUILTINS | CALLS or (
                name.endswith(".load") and any(w.arg == "allow_pickle" for w in node.keywords)
            ):
                yield f"{name}(…)"


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(SOURCE)) for file in FILES])
def test_no_module_can_unpickle_or_execute_data(file: Path) -> None:
    convert = file == SOURCE / WITHIN_CONVERT
    assert list(offences(ast.parse(file.read_text("utf-8")), convert=convert)) == []


def test_only_convert_reaches_the_restricted_loader() -> None:
    """`weights.meta` is imported by the command line's convert alone, and only when it runs."""
    importers = {
        str(file.relative_to(SOURCE))
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "ayllu.weights.meta"
    }
    assert importers == {"cli/convert.py"}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import dill as d",
        "from marshal import loads",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=flag)",
        "from torch import load",
        "import numpy as np\nnp.load('x')",
        "eval('1')",
        "exec(code)",
        "yaml.load(text)",
        "__import__('os')",
        "archive.load(file, allow_pickle=True)",
    ],
)
def test_the_rule_catches(code: str) -> None:
    assert list(offences(ast.parse(code), convert=True))
