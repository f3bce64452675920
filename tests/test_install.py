"""The wheel and the other ways to have the toolkit: installed, editable, uninstalled, in any folder."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("robustbench_lite", "attacks", "defenses", "certify", "benchmarks", "tests")
FILES = ("pyproject.toml", "README.md", "LICENSE")
MODEL = """
import torch

def load():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
"""
EVALUATION = ("--attack", "fgsm,pgd:steps=3", "--model", "model.py:load", "--dataset", "digits", "--n", "8", "--json")


def run(*command: object, folder: Path, path: Path | None = None) -> str:
    """What a command prints, in ``folder`` and with nothing but ``path`` on PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "VIRTUAL"))}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env |= {"ROBUST_BENCH_CACHE": str(folder / "cache"), "COLUMNS": "200"}
    env |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, so that building leaves nothing in it."""
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file in FILES:
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, folder=source)
    [built] = folder.glob("*.whl")
    return built


def environment(folder: Path, *what: object) -> Path:
    """A fresh environment with ``what`` installed in it, and all else as in the one that runs the tests."""
    venv.create(folder, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    inherited = "\n".join(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
    (packages / "inherited.pth").write_text(inherited)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--ignore-installed", *what, folder=folder)
    return folder


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture(scope="module")
def editable(source, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("editable"), "--no-build-isolation", "--editable", source)


@pytest.fixture
def elsewhere(tmp_path):
    """A researcher's folder: files with our names in it, which must not be ours, nor we theirs."""
    for name in ("attacks", "defenses", "certify", "data", "models", "registry", "threat"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('imported the {name}.py of the user')\n")
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def works(*command: object, folder: Path, home: Path, path: Path | None = None) -> None:
    """The command line does its work in ``folder``, and it is the one below ``home``."""
    [line] = json.loads(run(*command, *EVALUATION, folder=folder, path=path))
    assert (line["dataset"], line["model"], line["examples"]) == ("digits", "model.py:load", 8)
    assert line["attacks"] == "fgsm; pgd:steps=3"
    shown = run(*python_of(command), "-c", WHERE, folder=folder, path=path)
    assert [Path(file).is_relative_to(home.resolve()) for file in shown.splitlines()] == [True] * 4, shown


WHERE = """
import robustbench_lite, robustbench_lite.attacks, robustbench_lite.defenses, robustbench_lite.certify
for module in (robustbench_lite, robustbench_lite.attacks, robustbench_lite.defenses, robustbench_lite.certify):
    print(module.__file__)
"""


def python_of(command: tuple[object, ...]) -> tuple[object, ...]:
    first = Path(str(command[0]))
    return (first.with_name("python"),) if first.name == "robust-bench" else (first,)


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as file:
        return [name for name in file.namelist() if not name.endswith("/")]


def test_the_wheel_holds_one_top_level_name(wheel):
    tops = {name.partition("/")[0] for name in contents(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"robustbench_lite"}
    assert len(tops) == 2


def test_the_wheel_holds_what_it_needs_and_no_more(wheel):
    names = set(contents(wheel))
    core = ROOT / "robustbench_lite"
    modules = {f"robustbench_lite/{path.relative_to(core)}" for path in core.rglob("*.py")}
    for folder in ("attacks", "defenses", "certify"):
        modules |= {f"robustbench_lite/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    kinds = (".py", ".toml", ".safetensors")
    modules |= {f"robustbench_lite/benchmarks/suites/{path.name}" for path in (ROOT / "benchmarks/suites").iterdir()}
    zoo = (path.name for path in (ROOT / "robustbench_lite/zoo").iterdir() if path.suffix in kinds)
    for folder in ("page", "templates"):
        modules |= {f"robustbench_lite/{folder}/{path.name}" for path in (core / folder).iterdir()}
    needed = {
        "robustbench_lite/py.typed",
        "robustbench_lite/zoo/manifest.toml",
        "robustbench_lite/mnist/t10k-images-idx3-ubyte.gz",
        "robustbench_lite/mnist/t10k-labels-idx1-ubyte.gz",
    }
    ours = {name for name in names if name.startswith("robustbench_lite/")}
    assert ours == modules | needed | {f"robustbench_lite/zoo/{name}" for name in zoo}
    assert not [
        name
        for name in names
        if "tests/" in name or "test_" in name or "publish" in name or name.endswith("pyproject.toml")
    ]
    with zipfile.ZipFile(wheel) as file:
        shipped = file.read("robustbench_lite/mnist/t10k-images-idx3-ubyte.gz")
    assert shipped == (ROOT / "robustbench_lite/mnist/t10k-images-idx3-ubyte.gz").read_bytes()


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as file:
        [metadata] = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        text, points = (
            file.read(metadata).decode(),
            file.read(metadata.replace("METADATA", "entry_points.txt")).decode(),
        )
    assert "\nName: robustbench-lite\nVersion: 0.1.0\n" in text
    assert "\nRequires-Python: >=3.11\n" in text
    assert "robust-bench --attack pgd --defense madry" in text  # the README
    assert "robust-bench = robustbench_lite.cli:main" in points


def test_installed(installed, elsewhere):
    command = installed / "bin" / "robust-bench"
    works(command, folder=elsewhere, home=installed)
    assert run(command, "--version", folder=elsewhere) == "robust-bench 0.1.0\n"
    assert "linf-blind" in run(command, "suites", folder=elsewhere)
    listed = run(command, "attacks", folder=elsewhere)
    assert "pgd" in listed
    assert "linf l2 l1" in listed


def test_installed_mnist_is_in_the_package(installed, elsewhere):
    load = "from robustbench_lite import data; print(len(data.load('mnist')))"
    assert run(installed / "bin" / "python", "-c", load, folder=elsewhere) == "10000\n"
    assert not (elsewhere / "cache").exists()


def test_editable(editable, source, elsewhere):
    works(editable / "bin" / "robust-bench", folder=elsewhere, home=source)
    assert "linf-blind" in run(editable / "bin" / "robust-bench", "suites", folder=elsewhere)


def test_uninstalled_at_the_root(source, elsewhere):
    shutil.copy(elsewhere / "model.py", source)
    works(sys.executable, "-m", "robustbench_lite", folder=source, home=source)


def test_uninstalled_from_another_folder(source, elsewhere):
    works(sys.executable, "-m", "robustbench_lite", folder=elsewhere, home=source, path=source)
