"""Runs that are killed, and go on: no chunk is lost, none counts twice, and the tables are those of a run in peace."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.matrix import Results, benchmark, load
from robustbench_lite.problem import Access, Problem

COUNT, CHUNKS = 430, 5
TABLES = ("leaderboard", "matrix", "rows")

PLUGINS = '''
import time
from dataclasses import dataclass
from typing import ClassVar
import torch
from robustbench_lite.registry import attack

@attack("slow")
@dataclass(frozen=True)
class Slow:
    """A random step, a gradient step, and a rest."""
    minimises: ClassVar[bool] = False
    access: ClassVar[str] = "gradients"
    norms: ClassVar[frozenset] = frozenset({"linf"})

    def __call__(self, problem):
        x = problem.threat.sample(problem.noise, problem.x)
        gradient, _ = problem.gradient(x)
        time.sleep(0.01)
        x = (x + 0.02 * gradient.sign()).clamp(0, 1)
        problem.labels(x)
        return problem.best if self.minimises else problem.threat.project(x, problem.x)

@attack("slow-nearest")
@dataclass(frozen=True)
class SlowNearest(Slow):
    minimises: ClassVar[bool] = True

    def __call__(self, problem):
        x = problem.x + 0.08 * problem.noise.signs(problem.x)
        time.sleep(0.01)
        problem.labels(x.clamp(0, 1))
        return problem.best
'''

MODEL = """
import torch
from torch import nn

def load():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 5)).eval()
"""

# Imports once what takes seconds to import; each attempt is a fork of its own, killed while it computes or writes.
HELPER = '''
import json, os, random, signal, sys, time, traceback
from pathlib import Path
import numpy, pandas, scipy.stats, torch
torch.set_num_threads(1)
from robustbench_lite import registry
from robustbench_lite.matrix import benchmark, write_csv

where, seed, wanted = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
registry.load_file(where / "plugins.py")

def attempt(folder):
    """Runs in a child of its own; its exit code says whether it came to its end."""
    pid = os.fork()
    if pid:
        return pid
    try:
        results = benchmark(
            ["slow", "slow-nearest"], dataset=f"npz:{where}/x.npz", model=f"{where}/model.py:load", n=None,
            threats=["linf:0.05", "linf:0.1"], out=folder / "runs", batch=100, keep_all=True, device="cpu",
        )
        for name in ("leaderboard", "matrix", "rows"):
            write_csv(getattr(results, name)(), folder / f"{name}.csv")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(9)

def chunks(folder):
    return {path.name + path.parent.name: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}

def writing(folder):
    return {path.name for path in folder.rglob("*.npz.*.part")}

def finish(pid):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == 0

dice, kills, rounds, midway = random.Random(seed), 0, 0, 0
(where / "peace").mkdir()
assert finish(attempt(where / "peace"))
while kills < wanted:
    folder = where / f"round-{rounds:03d}"
    folder.mkdir()
    done = False
    while not done:
        before, parts = chunks(folder), writing(folder)
        pid = attempt(folder)
        if kills < wanted:
            way, late = dice.choice(("start", "any", "write", "write")), time.monotonic() + 5
            if way == "write":
                while not writing(folder) - parts and time.monotonic() < late:
                    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                        break
            else:
                time.sleep(dice.uniform(0, 0.01 if way == "start" else 0.25))
            os.kill(pid, signal.SIGKILL)
        done = finish(pid)
        kills += not done
        midway += bool(not done and writing(folder) - parts)
        after = chunks(folder)
        assert before.items() <= after.items(), "a finished chunk was lost, or written again"
    rounds += 1
print(json.dumps({"kills": kills, "rounds": rounds, "midway": midway}))
'''


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """A folder with a data set, a model and attacks, on which the helper runs."""
    (tmp_path / "plugins.py").write_text(PLUGINS)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "helper.py").write_text(HELPER)
    random = np.random.default_rng(0)
    x = random.random((COUNT, 1, 16, 16), np.float32)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 5))
    with torch.no_grad():
        y = net(torch.from_numpy(x)).argmax(1).numpy()
    y[::17] = (y[::17] + 1) % 5
    np.savez(tmp_path / "x.npz", x=x, y=y, classes=5)
    return tmp_path


def table(path: Path) -> list[list[str]]:
    """The fields of a CSV file, without those that a clock decides."""
    text = path.read_bytes().decode()
    assert "\r" not in text
    header, *lines = csv.reader(text.splitlines())
    place = header.index("seconds") if "seconds" in header else len(header)
    return [line[:place] + line[place + 1 :] for line in [header, *lines]]


def python(where: Path, *arguments: object) -> str:
    """What the helper prints."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "ROBUST_BENCH_CACHE": str(where / "cache"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, where / "helper.py", where, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill(where: Path, kills: int, seed: int) -> None:
    told = json.loads(python(where, seed, kills))
    assert told["kills"] == kills
    assert told["midway"] >= kills // 10, "hardly any kill hit a file that was being written"
    rounds = sorted(where.glob("round-*"))
    assert len(rounds) == told["rounds"] >= 1
    peace = {name: table(where / "peace" / f"{name}.csv") for name in TABLES}
    header, *lines = peace["rows"]
    assert len(lines) == 4 * COUNT
    assert len({line[header.index("status")] for line in lines}) == 3
    for folder in rounds:
        for name in TABLES:
            assert table(folder / f"{name}.csv") == peace[name], folder
        chunks = [path.name for path in folder.rglob("*.npz")]
        assert len(chunks) == 3 * CHUNKS + 2  # slow at two eps, slow-nearest once for both, a probe for each
        assert all(re.fullmatch(r"\d{8}-\d{8}\.npz", name) for name in chunks)
        notes: list[str] = []
        loaded = load(folder / "runs", notes.append)
        assert not notes
        for name in TABLES:
            frame = getattr(loaded, name)()
            assert frame.to_csv(index=False, lineterminator="\n").encode() == (folder / f"{name}.csv").read_bytes()


posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")


@posix
def test_a_run_that_is_killed_twenty_times_ends_as_one_in_peace(where: Path):
    kill(where, 20, seed=0)


@posix
@pytest.mark.soak
def test_a_run_that_is_killed_two_hundred_times_ends_as_one_in_peace(where: Path):
    kill(where, 200, seed=int.from_bytes(os.urandom(4)))


TWO = """
(where / "both").mkdir()
pids = [attempt(where / "both"), attempt(where / "both")]
assert all([finish(pid) for pid in pids])
"""


@posix
def test_two_runs_at_once_in_one_folder_do_not_disturb_each_other(where: Path):
    (where / "helper.py").write_text(HELPER[: HELPER.index("dice, kills")] + TWO)
    python(where, 0, 0)
    assert len(load(where / "both" / "runs").rows()) == 4 * COUNT
    assert len(list((where / "both").rglob("*.npz"))) == 3 * CHUNKS + 2
    assert not list((where / "both").rglob("*.part"))


# Ctrl-C


@dataclass(frozen=True)
class Interrupting:
    """FGSM, in whose third call someone presses Ctrl-C."""

    name: ClassVar[str] = "interrupting"
    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    calls: ClassVar[list[int]] = []
    pressed: ClassVar[Sequence[int]] = (3,)

    def __call__(self, problem: Problem) -> Tensor:
        self.calls.append(int(problem.noise.rows[0]))
        if len(self.calls) in self.pressed:
            os.kill(os.getpid(), signal.SIGINT)
        gradient, _ = problem.gradient(problem.x)
        return problem.threat.step(problem.x, problem.x, gradient, problem.threat.eps)


def test_ctrl_c_keeps_what_is_finished(where: Path, monkeypatch: pytest.MonkeyPatch):
    def run(out: str) -> Results:
        settings = {"dataset": f"npz:{where / 'x.npz'}", "model": f"{where / 'model.py'}:load", "n": None}
        return benchmark([Interrupting()], threats=["linf:0.05"], out=where / out, batch=100, device="cpu", **settings)

    with pytest.raises(KeyboardInterrupt):
        run("runs")
    stored = {path: path.stat().st_mtime_ns for path in (where / "runs").rglob("*.npz")}
    assert sorted(path.name for path in stored) == ["00000000-00000100.npz", "00000100-00000200.npz"]
    assert load(where / "runs").leaderboard()["examples"].tolist() == [200]
    Interrupting.calls.clear()
    monkeypatch.setattr(Interrupting, "pressed", ())
    resumed = run("runs")
    assert all(path.stat().st_mtime_ns == when for path, when in stored.items())
    assert len(Interrupting.calls) == CHUNKS - 2
    peace = run("peace")
    for name in TABLES:
        one, other = (getattr(results, name)().drop(columns="seconds", errors="ignore") for results in (resumed, peace))
        assert one.to_csv() == other.to_csv()
