"""The README and the manual: what they say to type is typed, in order, and the site builds without a warning."""

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from robustbench_lite import audit, leaderboard
from tests.conftest import Ran, forgetting

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": ROOT / "README.md",
    **{str(path.relative_to(ROOT / "docs")): path for path in sorted((ROOT / "docs").rglob("*.md"))},
}
TUTORIAL = "tutorial.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# Not typed here; everything else in a block of `sh` is.
NOT_RUN = {
    "make bench": "sets up an environment",
    "make test": "is what runs this",
    "pip install": "needs a network",
    "--data-dir DATA": "needs files that do not ship",
    "--attack all": "takes hours",
    "robust-bench train": "trains on files that do not ship",
    "https://": "needs a server",
}
# Typed with less work than the page asks for, but on the tutorial.
SHORTER = {
    r"--n \d\d+": "--n 8",
    r"steps=100,restarts=5": "steps=2",
    r"square(:queries=\d+)?(?=[, ])": "square:queries=20",
    r"pgd,fab ": "pgd:steps=2,fab:steps=2 ",
    r"attack pgd(?=[, ])": "attack pgd:steps=2",
    r"0:0.4:0.02": "0,0.1",
    r"robust-bench run mnist(-linf)? ": "robust-bench run smoke ",
}
COUNTS = ("robust-bench -", "robust-bench curve", "robust-bench certify", "robust-bench run")


class Block(NamedTuple):
    kind: str
    body: str

    @property
    def file(self) -> str | None:
        """What a block is called that is to be saved."""
        named = re.match(r"# (\S+\.(?:py|toml))\n", self.body)
        return named[1] if named else None

    @property
    def commands(self) -> list[str]:
        lines = self.body.replace("\\\n", " ").splitlines()
        return [line.partition(" #")[0].strip() for line in lines if line.strip()]


def blocks(page: str) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall(PAGES[page].read_text())]


@pytest.fixture
def given(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pages take for granted: a model, data, photographs and a function of the reader's own."""
    monkeypatch.syspath_prepend(str(place))
    rng = np.random.default_rng(0)
    np.savez("mydata.npz", x=rng.random((16, 1, 28, 28), np.float32), y=np.arange(16) % 10)
    for name in ("cat", "dog"):
        (place / "photos" / name).mkdir(parents=True)
        for k in range(3):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(place / "photos" / name / f"{k}.png")
    flat = "torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))"
    Path("mymodel.py").write_text(
        f"import torch\n\n\ndef load():\n    torch.manual_seed(0)\n    return {flat}.eval()\n"
    )
    Path("classify.py").write_text("def predict(x):\n    return (x.mean((1, 2, 3)) > 0.5).astype(int)\n")
    entry = {"name": "Other", "clean_acc": "99.0", "autoattack_acc": "50.0"}
    Path("model_info/mnist/Linf").mkdir(parents=True)
    Path("model_info/mnist/Linf/Other2020.json").write_text(json.dumps(entry))
    return place


def typed(page: str, command: str) -> str | None:
    """A command as it is typed here, or None."""
    if any(part in command for part in NOT_RUN):
        return None
    if page != TUTORIAL:
        for pattern, less in SHORTER.items():
            command = re.sub(pattern, less, command)
        if command.startswith(COUNTS) and "--n " not in command and "--help" not in command:
            command += " --n 8"
    return command


def follow(page: str, bench: Callable[[str], Ran]) -> None:
    """Does what a page says, from top to bottom, each block and command as in a process of its own."""
    out = ""
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(block.body)
        elif block.kind == "python":
            with forgetting():
                exec(compile(block.body, page, "exec"), {"__name__": page})
        elif block.kind == "sh":
            for command in filter(None, (typed(page, command) for command in block.commands)):
                with forgetting():
                    out = run(command, bench)
        elif block.kind == "text" and page == TUTORIAL:
            compare_tables(block.body, out)


def run(command: str, bench: Callable[[str], Ran]) -> str:
    """What a command prints."""
    if command.startswith("python "):
        runpy.run_path(command.removeprefix("python "), run_name="__main__")
        return ""
    ran = bench(command.removeprefix("robust-bench "))
    assert ran.code == 0, f"{command}\n{ran.err}"
    return ran.out


@pytest.mark.parametrize("page", [page for page in PAGES if page != TUTORIAL and blocks(page)])
def test_what_a_page_says_to_do_works(page, given, bench):
    follow(page, bench)


def compare_tables(shown: str, out: str) -> None:
    """What a page shows is what is printed, but for a few inputs that another processor may round otherwise."""
    number = re.compile(r"\d+(?:\.\d+)?")
    for line in shown.splitlines():
        words = number.sub("#", line).split()
        alike = [other for other in out.splitlines() if number.sub("#", other).split() == words]
        assert alike, f"{line!r} is not in\n{out}"
        figures = [[float(figure) for figure in number.findall(one)] for one in (line, alike[0])]
        assert figures[0] == pytest.approx(figures[1], abs=3), f"{line!r} is printed as {alike[0]!r}"


def test_the_tutorial_ends_with_the_row_that_it_promises(place, bench, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("COLUMNS", "100")
    follow(TUTORIAL, bench)
    (row,) = pd.read_csv("board.csv", keep_default_na=False).to_dict("records")
    assert (row["flags"], row["unknown"]) == ("", 0)
    assert row["certified_accuracy"] < row["robust_accuracy"] < row["clean_accuracy"]


def test_every_command_is_in_a_block_and_none_is_idle():
    for text in (path.read_text() for path in PAGES.values()):
        outside = BLOCK.sub("", text)
        assert not re.findall(r"^\s*(?:robust-bench|python|pip|make) .*$", outside, re.MULTILINE)
        assert "```" not in outside
    commands = [command for page in PAGES for block in blocks(page) if block.kind == "sh" for command in block.commands]
    assert not [part for part in NOT_RUN if not any(part in command for command in commands)]


def test_the_custom_attack_of_the_readme_is_short():
    (block,) = (block for block in blocks("README.md") if block.file == "mine.py")
    body = block.body[block.body.index("@attack") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 15


def test_the_custom_defense_of_the_readme_is_voted_on_and_not_flagged(place, bench):
    (block,) = (block for block in blocks("README.md") if block.file == "jitter.py")
    Path("jitter.py").write_text(block.body)
    ran = bench("--plugin jitter.py --attack fgsm --defense standard+jitter --n 20 --csv board.csv")
    assert ran.code == 0, ran.err
    (row,) = pd.read_csv("board.csv", keep_default_na=False).to_dict("records")
    assert (row["draws"], row["backwards"], row["flags"]) == (16, 16, "")


class Loads(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
        self.urls += [value for name, value in attrs if value and names.get(tag) == name]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds_and_loads_nothing_from_elsewhere(site):
    html = sorted(site.rglob("*.html"))
    assert len(html) == len(PAGES)  # a page of it is "not found", and the README is none
    for path in html:
        loads = Loads()
        loads.feed(path.read_text())
        assert not [url for url in loads.urls if "//" in url], path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", path.read_text()), path


def test_the_site_has_every_plugin_flag_and_column(site):
    attacks = (site / "plugins/attacks.html").read_text()
    assert 'id="pgd"' in attacks
    assert "41 forwards and 40 backwards" in attacks  # 40 steps, and a look at the end of the last
    assert "towards2018" not in attacks
    assert "madry2018towards" in attacks
    rows, soundness = ((site / name).read_text() for name in ("rows.html", "soundness.html"))
    assert all(f"<code>{column}</code>" in rows for column in leaderboard.LEADERBOARD)
    assert all(f"<code>{flag}</code>" in soundness for flag in audit.FLAGS)


def test_a_column_or_flag_without_a_description_fails_the_build(monkeypatch):
    generated = runpy.run_path(str(ROOT / "docs/generated.py"))
    generated["TABLES"]["leaderboard"] = (*leaderboard.LEADERBOARD, "newcomer")
    with pytest.raises(ValueError, match=r"lacks \['newcomer'\]"):
        generated["on_page_markdown"]("{{ columns of leaderboard }}")
    monkeypatch.setitem(audit.FLAGS, "latecomer", audit.FLAGS["noise"])
    with pytest.raises(ValueError, match=r"lacks \['latecomer'\]"):
        generated["on_page_markdown"]("{{ flags }}")
    generated["TABLES"]["leaderboard"] = leaderboard.LEADERBOARD[1:]
    with pytest.raises(ValueError, match=r"nothing: \['rank'\]"):
        generated["on_page_markdown"]("{{ columns of leaderboard }}")
    with pytest.raises(KeyError):
        generated["on_page_markdown"]("{{ nothing }}")
