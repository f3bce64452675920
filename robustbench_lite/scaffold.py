"""The command that begins a plugin: a small package that can be installed, with its tests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from robustbench_lite import registry, running
from robustbench_lite.wording import suggest

TEMPLATES = Path(__file__).parent / "templates"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST = 24  # letters of a name, so that lines of the package stay short
EXAMPLES = {
    "attack": "robust-bench --attack {} --defense standard",
    "defense": "robust-bench --attack pgd --defense standard+{}",
    "certifier": "robust-bench certify --method {} --defense madry --eps 0.01",
}


def new(
    kind: Annotated[str, typer.Argument(help="attack, defense or certifier.")],
    name: Annotated[str, typer.Argument(help="What it is to be called, as my-attack.")],
    out: Annotated[Path, typer.Option(help="The folder that the package's folder is made in.")] = Path(),
) -> None:
    """Begin a plugin of your own: a package with a working example and the tests of its contract."""
    folder = write(kind, name, out)
    output = running.stdout()
    output.print(f"Wrote {folder}. It works as it stands; go on with", soft_wrap=True, markup=False)
    place = shlex.quote(str(folder))
    output.print(f"    pip install --editable {place}\n    pytest {place}", soft_wrap=True, markup=False)


def write(kind: str, name: str, out: Path) -> Path:
    """The package's folder, made below ``out``.

    Raises:
        ValueError: for a kind that there is not, a name that cannot be or is taken, or a folder that is there.
    """
    if kind not in registry.KINDS:
        raise ValueError(f"no kind of plugin {kind!r}; {suggest(kind, registry.KINDS)}")
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        raise ValueError(f"{name!r} is no name: at most {LONGEST} lowercase letters, digits and -, as my-{kind}")
    if name in registry.plugins(kind):
        raise ValueError(f"there is {kind} {name!r} already; choose another name")
    dist = f"robust-bench-{name}"
    module, folder = dist.replace("-", "_"), out / dist
    words = name.removesuffix(f"-{kind}").split("-")
    if folder.exists():
        raise ValueError(f"{folder} is there already; choose another name, or another folder with --out")
    said = {
        "kind": kind,
        "name": name,
        "dist": dist,
        "module": module,
        "cls": "".join(word.capitalize() for word in [*words, kind]),
        "group": registry.GROUPS[kind],
        "example": EXAMPLES[kind].format(name),
    }
    (folder / "tests").mkdir(parents=True)
    for template, file in {
        "pyproject": "pyproject.toml",
        "README": "README.md",
        kind: f"{module}.py",
        "test": f"tests/test_{module}.py",
    }.items():
        text = (TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")
        (folder / file).write_text(Template(text).substitute(said), encoding="utf-8")
    return folder
