"""Suites: what a file may say, what its mistakes are told, and that a run is what the main command would do."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_lite import cli, forecast, suites
from robustbench_lite.leaderboard import LEADERBOARD
from robustbench_lite.matrix import benchmark, load, prepare
from robustbench_lite.runner import Watcher
from tests.outcomes import made

ROOT = Path(__file__).parents[1]

MODEL = """
import torch

def load():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    net[1].weight.data *= 0.1
    return net
"""

TROUBLE = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
from robustbench_lite import attack

@attack("trouble")
@dataclass(frozen=True)
class Trouble:
    '''Its process is killed, or someone presses Ctrl-C, once something is stored.'''
    access, norms = "gradients", frozenset({"linf"})

    def __call__(self, problem):
        if list(Path("runs").rglob("*.npz")):
            if Path("kill").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            if Path("stop").exists():
                raise KeyboardInterrupt
        gradient, _ = problem.gradient(problem.x)
        return problem.threat.step(problem.x, problem.x, gradient, problem.threat.eps)
"""

SUITE = {
    "name": "mine",
    "version": 2,
    "description": "Two blocks.",
    "dataset": "digits",
    "defense": ["standard", "madry"],
    "seed": 3,
    "block": {
        "linf": {"threat": ["linf:0.05", "linf:0.1"], "attack": ["fgsm", "pgd:steps=5"], "certify": ["ibp"], "n": 120},
        "l2": {"threat": ["l2:0.5"], "attack": ["fgsm"], "n": 40},
    },
}


def toml(value: Any) -> str:
    """A value as TOML writes it; tables inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(one)}" for key, one in value.items()) + "}"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def written(table: dict[str, Any], path: str = "mine.toml") -> str:
    Path(path).write_text("\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in table.items()))
    return path


def changed(*path: str, to: Any) -> dict[str, Any]:
    """The suite with another value somewhere."""
    table = json.loads(json.dumps(SUITE))
    inner = table
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return table


@pytest.fixture
def place(place: Path) -> Path:
    """With a model of a user's, and an attack that is stopped."""
    Path("model.py").write_text(MODEL)
    Path("trouble.py").write_text(TROUBLE)
    return place


def board(path: str) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False).drop(columns="seconds")


# What a file says


def test_a_file_is_read_as_it_stands(place):
    suite = suites.load(written(SUITE))
    linf, l2 = suite.block
    assert (str(suite), suite.dataset, suite.model, suite.seed) == ("mine 2", "digits", None, 3)
    assert (linf.name, linf.threat, linf.attack) == ("linf", ("linf:0.05", "linf:0.1"), ("fgsm", "pgd:steps=5"))
    assert (linf.certify, linf.n, linf.adaptive) == (("ibp",), 120, "on")
    assert suite.asked(l2) == {
        "attacks": ("fgsm",),
        "defenses": ("standard", "madry"),
        "certifiers": (),
        "threats": ("l2:0.5",),
        "n": 40,
        "adaptive": "on",
        "dataset": "digits",
        "model": None,
    }


PUBLISHED = {  # protocols, and the SHA-256 of what they ask for; `mnist 1` follows with its table
    "cifar10-linf 1": "ce62419707225a3e4d9b9073ec003fba307628da4fa961237cab55e27aca38aa",
    "mnist-linf 1": "73cc3f87afcc5b18ec11076efc5a4dad038264b774f3f9812f5284120d7efd49",
    "smoke 1": "807af9ccb4ba3fea547a8c1201fa8d6f647c6d2968c14cde36e2a1d492742413",
}


def test_what_a_published_protocol_asks_for_does_not_change_under_its_version():
    """Raise the version, and leave the old line here: rows of two protocols must not be taken for one."""
    for suite in map(suites.load, suites.builtin()):
        said = hashlib.sha256(json.dumps(asdict(suite), sort_keys=True).encode()).hexdigest()
        assert PUBLISHED.get(str(suite), said) == said, f"{suite} has changed: raise its version"


def test_every_built_in_suite_is_read_and_named_as_its_file():
    assert [*suites.builtin()] == ["cifar10-linf", "mnist", "mnist-linf", "smoke"]
    assert [suites.load(name).name for name in suites.builtin()] == [*suites.builtin()]


@pytest.mark.parametrize("name", ["mnist", "mnist-linf", "smoke"])
def test_the_built_in_suites_can_be_run(name):
    suite = suites.load(name)
    assert suite.name == name
    for block in suite.block:
        notes: list[str] = []
        _, _, wanted = prepare(**suite.asked(block))
        asked = len(block.defense or suite.defense) * (len(block.attack) + len(block.certify))
        own = ("transfer" in block.attack) * ("standard" in suite.defense)  # which is crafted on it
        assert len(wanted) == asked - own, (block.name, notes)


def test_defenses_of_the_command_line_replace_those_of_the_suite_and_narrow_those_of_a_block(place):
    suite = suites.load(written(changed("block", "l2", "defense", to=["madry:eps=0.1", "standard"])))
    linf, l2 = suite.on(["madry:eps=1/10", "trades"]).block
    narrowed = suite.on(["madry:eps=1/10", "trades"])
    assert narrowed.asked(linf)["defenses"] == ("madry:eps=1/10", "trades")
    assert narrowed.asked(l2)["defenses"] == ("madry:eps=0.1",)
    assert [block.name for block in suite.on(["trades"]).block] == ["linf"]


def test_a_shrunk_suite_is_another_protocol(place):
    suite = suites.load(written(SUITE))
    assert [block.n for block in suite.shrunk(50).block] == [50, 40]
    assert str(suite.shrunk(50)) == "mine (n=50) 2"
    assert suite.shrunk(120) == suite


# Mistakes


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["colour"], 1, "mine.toml: there is no field 'colour'; there are: name, version, description, dataset"),
        (["versoin"], 1, "no field 'versoin'; did you mean version?"),
        (["version"], "1", "mine.toml: version wants a whole number, not '1'"),
        (["version"], True, "version wants a whole number, not True"),
        (["version"], 0, "version must be 1 or more, not 0"),
        (["name"], "My Suite", "name: 'My Suite' must be lowercase"),
        (["name"], "mnist", "mine.toml: name: mnist is a built-in suite, and another one"),
        (["description"], ["x"], "description wants text, not ['x']"),
        (["dataset"], "digit", "mine.toml: dataset: no data set 'digit'; did you mean digits?"),
        (["model"], "evil.py:load", "mine.toml: model: no model 'evil.py:load'"),
        (["defense"], "standard", "defense wants a list of texts, not 'standard'"),
        (["defense"], [], "defense must name at least one"),
        (["defense"], ["all"], "mine.toml: defense: no defense 'all'"),
        (["defense"], ["standard+nothing"], "defense: no defense 'nothing'"),
        (["block"], {}, "block must name at least one"),
        (["block"], [{}], "block wants a table, not [{}]"),
        (["block", "l2"], 7, "mine.toml: block 'l2' wants a table, not 7"),
        (["block", "L 2"], {"threat": ["l2:1"], "attack": ["fgsm"], "n": 1}, "block 'L 2': name: 'L 2' must be"),
        (["block", "l2", "attacks"], ["fgsm"], "block l2: there is no field 'attacks'; did you mean attack?"),
        (["block", "l2", "n"], 0, "mine.toml: block l2: n must be 1 or more, not 0"),
        (["block", "l2", "n"], "all", "block l2: n wants a whole number, not 'all'"),
        (["block", "l2", "attack"], ["fgsm", 7], "block l2: attack wants a list of texts"),
        (["block", "l2", "attack"], [], "block l2: attack or certify must name at least one"),
        (["block", "l2", "attack"], ["pdg"], "mine.toml: block l2: attack: no attack 'pdg'; did you mean pgd?"),
        (
            ["block", "l2", "attack"],
            ["pgd:stepps=3"],
            "attack: attack pgd has no setting 'stepps'; did you mean",
        ),
        (["block", "l2", "attack"], ["mine.py"], "attack: no attack 'mine.py'"),
        (["block", "l2", "certify"], ["pgd"], "block l2: certify: no certifier 'pgd'"),
        (["block", "l2", "threat"], ["l3:1"], "mine.toml: block l2: threat: no norm 'l3'"),
        (["block", "l2", "threat"], ["l2"], "block l2: threat: threat 'l2' has no eps"),
        (["block", "l2", "threat"], [], "block l2: threat must name at least one"),
        (["block", "l2", "adaptive"], "never", "block l2: adaptive is on, off, both, not 'never'"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_field(bench, path, value, said):
    code, out, err = bench(f"run {written(changed(*path, to=value))}")
    assert (code, out) == (cli.USAGE, "")
    assert len(err.splitlines()) == 1
    assert said in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            "mnits",
            "no suite 'mnits'; did you mean mnist? There are: cifar10-linf, mnist, mnist-linf, smoke, and FILE.toml",
        ),
        ("gone.toml", "cannot read gone.toml: No such file or directory"),
        ("lacks.toml", "lacks.toml: it lacks version, description, dataset, defense"),
        ("half.toml", "half.toml: "),
        ("deep.toml", "deep.toml: "),
        ("bytes.toml", "bytes.toml: "),
    ],
)
def test_what_is_no_suite(bench, asked, said):
    Path("lacks.toml").write_text('name = "x"')
    Path("half.toml").write_text("name =")
    Path("deep.toml").write_text("name = " + "[" * 5000)
    Path("bytes.toml").write_bytes(b"name = '\xff\xfe'")
    code, _, err = bench(f"run {asked}")
    assert code == cli.USAGE
    assert len(err.splitlines()) == 1
    assert said in err


def test_what_cannot_be_run_is_told_before_anything_is(bench):
    table = changed("block", "l2", "n", to=10_000)
    code, out, err = bench(f"run {written(table)} --model model.py:load")
    assert (code, out) == (cli.USAGE, "")
    assert "n must be 1 to 599" in err
    assert not Path("runs").exists()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["pgd", "linf:0.1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
SPOTS = [(key,) for key in [*SUITE, "model", "new"]] + [
    ("block", name, key)
    for name in ("linf", "l2")
    for key in ("threat", "attack", "certify", "n", "defense", "adaptive")
]


CHANGES = st.lists(st.tuples(st.sampled_from(SPOTS), VALUES), min_size=1, max_size=3)
BYTES = st.binary(max_size=60) | st.text(max_size=60).map(str.encode)


@given(CHANGES)
@settings(max_examples=100, deadline=None)
def test_a_mangled_file_gets_an_answer_or_one_line(tmp_path_factory, changes):
    said(mangled(tmp_path_factory.getbasetemp() / "mangled.toml", changes))


@given(BYTES)
@settings(deadline=None)
def test_any_bytes_get_one_line(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(content)
    assert said(str(file))


@pytest.mark.soak
@given(CHANGES, BYTES)
@settings(max_examples=10_000, deadline=None)
def test_ten_thousand_files_get_an_answer_or_one_line(tmp_path_factory, changes, content):
    file = tmp_path_factory.getbasetemp() / "soaked.toml"
    said(mangled(file, changes))
    file.write_bytes(content)
    assert said(str(file))


def mangled(file: Path, changes: list[tuple[tuple[str, ...], Any]]) -> str:
    """Writes a suite in which some values are others, or missing."""
    table: Any = json.loads(json.dumps(SUITE))
    for path, value in changes:
        inner = table
        for key in path[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[path[-1]] = value
            if value is None:
                del inner[path[-1]]
    return written(table, str(file))


def said(file: str) -> str:
    """What the mistake in a file is told; empty where there is none."""
    try:
        suites.load(file)
    except ValueError as error:
        message = str(error)
    else:
        return ""
    assert len(message.splitlines()) == 1
    assert file in message
    return message


@pytest.mark.parametrize(
    "change",
    [
        (["dataset"], "npz:evil.npz"),
        (["block", "l2", "attack"], ["transfer:source=standard@(evil.py:load)"]),
        (["block", "l2", "attack"], ["transfer:source=(standard@evil.py:load)"]),
        (["block", "l2", "attack"], ["evil.py"]),
        (["defense"], ["evil.py:load"]),
        (["defense"], ["ensemble:sources=(standard@evil.py:load)"]),
    ],
    ids=lambda change: f"{change[0][-1]}={change[1]}",
)
def test_a_file_from_elsewhere_runs_no_code(bench, change):
    path, value = change
    Path("evil.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef load(): pass")
    with Path("evil.npz").open("wb") as file:
        np.savez(file, x=np.array([Evil()], object), y=np.zeros(1, int))
    code, _, err = bench(f"run {written(changed(*path, to=value))}")
    assert (code, len(err.splitlines())) == (cli.USAGE, 1)
    assert not Path("ran").exists()


def test_a_file_from_elsewhere_names_no_code_as_its_model(bench):
    Path("evil.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef load(): pass")
    code, _, err = bench(f"run {written(SUITE | {'model': 'evil.py:load', 'defense': ['feature-squeezing']})}")
    assert code == cli.USAGE
    assert "FILE.py:factory" in err
    assert not Path("ran").exists()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


# A run


def test_a_run_is_what_the_main_command_does_block_by_block(bench):
    own = "--model model.py:load --defense none,feature-squeezing --dataset digits --seed 3"
    code, out, _ = bench(f"run {written(SUITE)} --model model.py:load --defense none,feature-squeezing --csv suite.csv")
    assert code == 0
    assert [out.index(f"mine 2, block {name}") for name in ("linf", "l2")] == sorted(
        out.index(f"mine 2, block {name}") for name in ("linf", "l2")
    )
    assert "Results are in runs, suite.csv" in out
    linf = "--attack fgsm,pgd:steps=5 --certify ibp --threat linf:0.05,linf:0.1 --n 120"
    assert bench(f"{linf} {own} --out main --csv linf.csv")[0] == 0
    assert bench(f"--attack fgsm --threat l2:0.5 --n 40 {own} --out main --csv l2.csv")[0] == 0
    together, blocks = board("suite.csv"), {name: board(f"{name}.csv") for name in ("linf", "l2")}
    assert tuple(together.columns) == ("protocol", "block", *(name for name in LEADERBOARD if name != "seconds"))
    assert set(together["protocol"]) == {"mine 2"}
    for name, alone in blocks.items():
        here = together[together["block"] == name].drop(columns=["protocol", "block"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(here, alone, check_dtype=False)
    assert (len(blocks["linf"]), len(blocks["l2"])) == (4, 2)
    assert set(together["examples"]) == {120, 40}


def test_blocks_of_one_threat_model_are_ranked_apart(bench):
    table = changed("block", "l2", to={"threat": ["linf:0.1"], "attack": ["fgsm"], "n": 40})
    assert bench(f"run {written(table)} --model model.py:load --n 60 --csv suite.csv")[0] == 0
    together = board("suite.csv")
    assert together["rank"].tolist() == [1, 1, 1]
    assert together["examples"].tolist() == [60, 60, 40]
    assert set(together["protocol"]) == {"mine (n=60) 2"}


TROUBLED = changed("block", "linf", "attack", to=["fgsm", "trouble"])
LINE = "--plugin trouble.py run mine.toml --model model.py:load"


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(bench):
    written(TROUBLED)
    assert bench(f"{LINE} --out peace --csv peace.csv")[0] == 0
    Path("stop").touch()
    code, _, err = bench(f"{LINE} --csv suite.csv")
    assert code == 130
    assert "kept in runs: run the same again to go on" in err
    assert not Path("suite.csv").exists()
    kept = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.npz")}
    assert kept
    Path("stop").unlink()
    assert bench(f"{LINE} --csv suite.csv")[0] == 0
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    pd.testing.assert_frame_equal(board("suite.csv"), board("peace.csv"))


@pytest.mark.skipif(os.name != "posix", reason="kills")
def test_a_run_that_is_killed_goes_on(bench):
    written(TROUBLED)
    Path("kill").touch()
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "robustbench_lite", *shlex.split(LINE)]
    assert subprocess.run(command, env=env, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert load("runs").entries
    Path("kill").unlink()
    assert bench(f"{LINE} --csv suite.csv")[0] == 0
    assert bench(f"{LINE} --out peace --csv peace.csv")[0] == 0
    pd.testing.assert_frame_equal(board("suite.csv"), board("peace.csv"))


def test_an_unknown_input_of_any_block_is_exit_code_1(bench):
    Path("crash.py").write_text(TROUBLE.replace("trouble", "crash").replace("gradient, _ =", "raise RuntimeError #"))
    written(changed("block", "linf", "attack", to=["crash"]))
    code, _, err = bench("--plugin crash.py run mine.toml --model model.py:load")
    assert code == 1
    assert "unknown: " in err


def test_the_list_of_suites(bench):
    code, out, _ = bench("suites")
    assert code == 0
    assert "linf, linf-blind, l2, l2-smoothed, l2-queries, l0, patch" in " ".join(out.split())
    assert "in seconds" in out


# What is still to be done


def test_a_dry_run_counts_what_is_missing_and_writes_nothing(bench):
    line = f"run {written(SUITE)} --model model.py:load"
    code, out, _ = bench(f"{line} --dry-run")
    assert code == 0
    assert not Path("runs").exists()
    assert out.count("120 of 120") == 6  # fgsm, pgd and ibp, at two eps
    assert out.count("40 of 40") == 1
    assert "7 of 7 cells are to be run: about " in out
    assert "This is rough" in out
    (megabytes,) = re.findall(r"Memory: (\d+) MB", out)
    assert 100 < int(megabytes) < 20_000

    assert bench("--attack fgsm --threat linf:0.1 --n 100 --seed 3 --dataset digits --model model.py:load")[0] == 0
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    _, out, _ = bench(f"{line} --dry-run")
    assert (out.count(" 120 of 120"), out.count(" 20 of 120")) == (5, 1)
    assert before == {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}

    assert bench(line)[0] == 0
    _, out, _ = bench(f"{line} --dry-run")
    assert "0 of 7 cells are to be run: about 0 s" in out
    assert "rough" not in out
    assert "7 of 7 cells" in bench(f"{line} --dry-run --fresh")[1]


def test_the_main_command_has_a_dry_run_too(bench):
    line = "--attack fgsm,pgd:steps=2 --dataset digits --model model.py:load --threat linf:0.1"
    assert bench(f"{line} --n 100 --target 3")[0] == 0
    counts = {}
    for target in ("", " --target 3"):
        code, out, _ = bench(f"{line} --n 120{target} --dry-run")
        assert code == 0
        counts[target] = out.count(" 120 of 120"), out.count(" 20 of 120")
    assert counts == {"": (2, 0), " --target 3": (0, 2)}


def test_a_dry_run_trains_nothing(bench):
    table = changed("block", "l2", "attack", to=["transfer:source=standard@mlp"])
    code, out, _ = bench(f"run {written(table)} --dry-run")
    assert code == 0
    assert out.count("standard is trained first") == 7
    assert "8 of 8 cells" not in out
    assert "about 0 s, and 14 of which nothing can be said" in out
    assert not Path("cache").exists()
    _, out, _ = bench(f"run {written(table)} --dry-run --model model.py:load")
    assert "standard@mlp is trained first" in out


def test_queries_are_counted_and_multiplied(place):
    told = made("bhw", forwards=[4, 5, 0], backwards=[2, 4, 0], seconds=[9, 9, 9])
    assert forecast.Pace(forward=1.0, backward=10.0)(told) == pytest.approx(3 + 20)
    silent = made("bhw", forwards=[0, 0, 0], backwards=[0, 0, 0], seconds=[3, 4, 5])
    assert forecast.Pace(forward=1.0, backward=10.0)(silent) == pytest.approx(4)


def test_an_estimate_is_from_what_is_stored_else_from_a_few_inputs(place, monkeypatch):
    monkeypatch.setattr(forecast.Pace, "of", lambda *_: forecast.Pace(1.0, 0.0))
    suite = suites.load(written(SUITE))
    asked = suite.asked(suite.block[0]) | {"model": "model.py:load", "defenses": None, "certifiers": ()}
    asked |= {"attacks": "pgd:steps=5", "threats": ["linf:0.05"]}

    def pgd() -> forecast.Ahead:
        (one,) = forecast.forecast(seed=3, out="runs", **asked)
        return one

    assert (pgd().missing, pgd().seconds) == (120, pytest.approx(120 * 6))  # each step, and a last look
    stored = benchmark(**asked | {"n": 100}, seed=3).entries[0].outcome.forwards.mean()
    assert 0 < stored < 6
    assert (pgd().missing, pgd().seconds) == (20, pytest.approx(20 * stored))


def test_certifiers_are_tried_on_every_model_and_attacks_on_one(place):
    asked = suites.load("smoke").asked(suites.load("smoke").block[0])
    asked |= {
        "attacks": "fgsm",
        "defenses": ["madry", "standard"],
        "certifiers": "ibp",
        "threats": ["linf:0.1"],
        "n": 20,
    }
    notes: list[str] = []

    class Told(Watcher):
        def note(self, text: str) -> None:
            notes.append(text)

    assert len([*forecast.forecast(seed=0, out="runs", watcher=Told(), **asked)]) == 4
    tried = [note.removesuffix(", on a few inputs") for note in notes]
    certified = [f"trying ibp under linf:0.1 on {defense}" for defense in ("madry:eps=0.3", "standard")]
    assert sorted(tried) == sorted(["trying fgsm under linf:0.1", *certified])
