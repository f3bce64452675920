"""Who may import whom, read from the imports of every module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
CORE = "robustbench_lite"
PLUGINS = ("attacks", "defenses", "certify")
# top to bottom: a module of the core imports only from its own line or the lines below it
LAYERS = [
    {"__init__", "__main__", "cli", "options", "reading", "scaffold", "running", "display", "listings"},
    {
        "matrix",
        "runner",
        "tasks",
        "pool",
        "cluster",
        "claims",
        "planning",
        "suites",
        "forecast",
        "chance",
        "entries",
        "leaderboard",
        "curves",
        "figures",
        "charts",
        "drawing",
        "gallery",
        "provenance",
        "comparison",
        "exports",
        "model_info",
        "report",
        "audit",
        "testing",
    },
    {"evaluation", "layout", "probing", "certifying", "trained", "store", "outcome", "blackbox"},
    {
        "plugins",
        "certificate",
        "problem",
        "defended",
        "smoothed",
        "training",
        "ascent",
        "bounds",
        "lipschitz",
    },  # what a plugin may import
    {
        "threat",
        "norms",
        "noise",
        "registry",
        "specs",
        "data",
        "downloads",
        "files",
        "history",
        "models",
        "classifiers",
        "folders",
        "zoo",
        "kernels",
        "papers",
        "wording",
    },
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
SHARED = RANK["plugins"]
NEVER = {
    "registry": {"torch", "numpy"},
    "specs": {"torch", "numpy"},
    "norms": {f"{CORE}.registry", f"{CORE}.specs"},
}
HEAVY = {"foolbox", "cvxpy", "sklearn", "pandas", "scipy", "pooch", "matplotlib", "jinja2", "ray"}
LIGHT: set[tuple[str, str]] = set()  # (module, library) that may be imported at the top of the module all the same


class Import(NamedTuple):
    line: int
    target: str
    at_once: bool  # not in a function nor for the type checker alone


def imports(name: str, source: str) -> Iterator[Import]:
    """Every import of the module ``name`` (a package's ends in ``.__init__``), relative ones resolved."""

    def walk(node: ast.AST, at_once: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*name.split(".")[: -node.level], *([node.module] if node.module else [])])
            base = base if node.level else str(node.module)
            submodules = base == CORE or node.module is None
            for target in [f"{base}.{alias.name}" for alias in node.names] if submodules else [base]:
                yield Import(node.lineno, target, at_once)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for part in node.body:
                yield from walk(part, False)
            for part in node.orelse:
                yield from walk(part, at_once)
        else:
            deeper = at_once and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, deeper)

    return walk(ast.parse(source), True)


def broken(name: str, source: str) -> list[str]:
    """What the module ``name`` imports and may not."""
    part = name.split(".")[1]
    faults = []
    for line, target, at_once in imports(name, source):
        root, _, rest = target.partition(".")
        fault = ""
        if root in PLUGINS:
            fault = f"is {CORE}.{root}"
        elif root == CORE:
            fault = misplaced(part, rest.partition(".")[0])
        elif part not in PLUGINS and root in HEAVY and at_once and (part, root) not in LIGHT:
            fault = "is heavy: import it in the function that uses it"
        if any(f"{target}.".startswith(f"{other}.") for other in NEVER.get(part, ())):
            fault = f"is not for {part}"
        if fault:
            faults.append(f"{name}:{line} imports {target}, which {fault}")
    return faults


def misplaced(part: str, target: str) -> str:
    """Why ``part`` of the package may not import ``target`` of it; empty where it may."""
    if target == part or (target == "__version__" and part not in PLUGINS):
        return ""
    if target in PLUGINS:
        return "is another plugin folder" if part in PLUGINS else "is a plugin folder"
    if target not in RANK or target == "__init__":
        return "is the package's face, or missing in LAYERS"
    if part in PLUGINS:
        return "is the harness" if RANK[target] < SHARED else ""
    return "lies above it" if part in RANK and RANK[target] < RANK[part] else ""


def modules() -> dict[str, str]:
    folders = {CORE: ROOT / CORE, **{f"{CORE}.{folder}": ROOT / folder for folder in PLUGINS}}
    return {
        ".".join([package, *path.relative_to(folder).with_suffix("").parts]): path.read_text()
        for package, folder in folders.items()
        for path in folder.rglob("*.py")
    }


def test_the_modules_are_found():
    faces = {f"{CORE}.{folder}.__init__" for folder in PLUGINS}
    assert {f"{CORE}.__init__", f"{CORE}.registry", *faces} <= modules().keys()


def test_every_module_of_the_core_has_a_layer():
    unknown = {name for name in modules() if name.split(".")[1] not in {*RANK, *PLUGINS}}
    assert not unknown, f"give {', '.join(sorted(unknown))} a line in LAYERS of {Path(__file__).name}"


def test_every_module_imports_only_what_it_may():
    faults = [fault for name, source in modules().items() for fault in broken(name, source)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("threat", "import torch\nfrom robustbench_lite.norms import Norm"),
        ("matrix", "from robustbench_lite import norms, __version__"),
        ("bounds.graph", "from .interval import x\nfrom robustbench_lite.bounds import y"),
        ("evaluation", "def f():\n    import pandas"),
        ("evaluation", "if TYPE_CHECKING:\n    import pandas"),
        ("attacks.pgd", "from robustbench_lite.plugins import x\nfrom .square import y\nfrom . import mim"),
        ("attacks.foolbox", "import foolbox"),
        ("__init__", "from robustbench_lite.matrix import x"),
    ],
)
def test_what_is_allowed(name, source):
    assert broken(f"{CORE}.{name}", source) == []


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("matrix", "from robustbench_lite.attacks.pgd import PGD", "is a plugin folder"),
        ("matrix", "from robustbench_lite import attacks", "is a plugin folder"),
        ("matrix", "import robustbench_lite.certify.ibp", "is a plugin folder"),
        ("matrix", "from .defenses import madry", "is a plugin folder"),
        ("matrix", "from attacks.pgd import PGD", "is robustbench_lite.attacks"),
        ("threat", "from robustbench_lite.problem import Problem", "lies above it"),
        ("threat", "def f():\n    from robustbench_lite import matrix", "lies above it"),
        ("store", "try:\n    import robustbench_lite.cli\nexcept ImportError:\n    pass", "lies above it"),
        ("bounds.graph", "from ..store import x", "lies above it"),
        ("bounds.__init__", "from ..store import x", "lies above it"),
        ("zoo.__init__", "if TYPE_CHECKING:\n    from robustbench_lite.audit import x", "lies above it"),
        ("store", "from robustbench_lite.newcomer import x", "missing in LAYERS"),
        ("store", "from robustbench_lite import benchmark", "missing in LAYERS"),
        ("attacks.pgd", "from robustbench_lite.defenses.madry import x", "is another plugin folder"),
        ("attacks.pgd", "from ..certify import ibp", "is another plugin folder"),
        ("attacks.pgd", "from defenses import madry", "is robustbench_lite.defenses"),
        ("attacks.pgd", "import robustbench_lite", "the package's face"),
        ("attacks.pgd", "from robustbench_lite import attack", "the package's face"),
        ("attacks.pgd", "from robustbench_lite import __version__", "the package's face"),
        ("attacks.pgd", "from .. import attack", "the package's face"),
        ("defenses.madry", "from robustbench_lite.evaluation import x", "is the harness"),
        ("certify.ibp", "class A:\n    def f(self):\n        import robustbench_lite.cli", "is the harness"),
        ("registry", "def f():\n    import torch.nn", "is not for registry"),
        ("norms", "from robustbench_lite.registry import attack", "is not for norms"),
        ("norms", "from . import registry", "is not for norms"),
        ("matrix", "import pandas as pd", "is heavy"),
        ("store", "class A:\n    from scipy.stats import beta", "is heavy"),
        ("store", "if TYPE_CHECKING:\n    pass\nelse:\n    import ray", "is heavy"),
    ],
)
def test_what_is_not(name, source, fault):
    (said,) = broken(f"{CORE}.{name}", source)
    assert fault in said
    assert said.startswith(f"{CORE}.{name}:")


def test_the_registry_loads_no_heavy_library():
    heavy = sorted(HEAVY | {"torch", "numpy"})
    code = f"import sys, {CORE}, {CORE}.registry; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
