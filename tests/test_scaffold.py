"""Packages that robust-bench new begins: their tests pass as written, and once installed they are found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from robustbench_lite import registry, scaffold
from robustbench_lite.registry import KINDS
from robustbench_lite.testing import check_certifier, check_defense

ROOT = Path(__file__).parents[1]
SHRINKING = ROOT / "tests" / "packages" / "robust-bench-shrinking-steps"
MODEL = """
import torch

def load():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    torch.nn.init.orthogonal_(net[1].weight, generator=torch.Generator().manual_seed(0))
    return net.eval()
"""


def files(folder: Path) -> dict[str, str]:
    found = [path for path in folder.rglob("*") if path.suffix in (".py", ".toml", ".md")]
    return {str(path.relative_to(folder)): path.read_text() for path in found}


def run(*command: object, folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    known = os.pathsep.join(str(one) for one in (path, ROOT) if one)
    env = {"PYTHONPATH": known, "PYTHONDONTWRITEBYTECODE": "1", "ROBUST_BENCH_CACHE": str(folder / "cache")}
    env |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "COLUMNS": "200"}
    command = (sys.executable, "-m", *map(str, command))
    return subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True, timeout=200)


def test_the_package_in_the_tests_is_what_new_writes(tmp_path):
    assert files(SHRINKING) == files(scaffold.write("attack", "shrinking-steps", tmp_path))


def test_it_prints_the_next_two_commands(bench, place):
    ran = bench("new attack my-attack --out 'here and there'")
    folder = Path("here and there/robust-bench-my-attack")
    said, *commands = ran.out.splitlines()
    assert (ran.code, ran.err) == (0, "")
    assert str(folder) in said
    assert commands == [f"    pip install --editable '{folder}'", f"    pytest '{folder}'"]
    assert "class MyAttack:" in (place / folder / "robust_bench_my_attack.py").read_text()


@pytest.mark.parametrize("name", ["first", "x" * scaffold.LONGEST], ids=["short", "longest"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_writes_is_tidy(kind, name, tmp_path):
    folder = scaffold.write(kind, name, tmp_path)
    for check in ("check", "format --check"):
        ran = run("ruff", *check.split(), ".", folder=folder)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_its_tests_pass(tmp_path):
    folder = scaffold.write("attack", "first", tmp_path)
    ran = run("pytest", "-p", "no:cacheprovider", folder, folder=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "passed" in ran.stdout


@pytest.mark.parametrize(("kind", "check"), [("defense", check_defense), ("certifier", check_certifier)])
def test_what_its_tests_check_holds_for_the_other_kinds(kind, check, place):
    folder = scaffold.write(kind, "first", place)
    registry.load_file(folder / "robust_bench_first.py")
    check(registry.make(kind, "first"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("new attac mine", "no kind of plugin 'attac'; did you mean attack?"),
        ("new attack Mine", "'Mine' is no name"),
        ("new attack ../mine", "'../mine' is no name"),
        ("new attack a/b", "'a/b' is no name"),
        (f"new attack {'x' * 25}", "is no name: at most 24"),
        ("new defense madry", "there is defense 'madry' already"),
        ("new attack there", "robust-bench-there is there already; choose another name"),
        ("new attack mine --out file", "file"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(bench, place, line, said):
    (place / "robust-bench-there").mkdir()
    (place / "file").touch()
    before = sorted(place.rglob("*"))
    ran = bench(line)
    assert (ran.code, ran.out, len(ran.errors)) == (2, "", 1)
    assert said in ran.errors[0]
    assert sorted(place.rglob("*")) == before


def test_installed_it_is_found_and_runs(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    installed, source = tmp_path / "installed", scaffold.write("attack", "shrinking-steps", tmp_path)  # builds in place
    ran = run(
        *("pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", installed, source),
        folder=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    ran = run("robustbench_lite", "attacks", "shrinking-steps", folder=tmp_path, path=installed)
    assert "shrinking-steps  (entry-point:robust-bench-shrinking-steps==0.1.0)" in ran.stdout, ran.stderr
    line = "--attack shrinking-steps:steps=3 --model model.py:load --dataset digits --threat linf:0.1 --n 50"
    ran = run("robustbench_lite", *line.split(), "--no-audit", "--json", folder=tmp_path, path=installed)
    assert ran.returncode == 0, ran.stderr
    [row] = json.loads(ran.stdout)
    assert (row["attacks"], row["examples"]) == ("shrinking-steps:steps=3", 50)
