"""Runs whose chunks are computed by other processes: the same tables, whatever happens to those."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_lite import registry
from robustbench_lite.claims import Claims
from robustbench_lite.matrix import Results, benchmark, load
from robustbench_lite.outcome import CHUNK
from robustbench_lite.problem import Access, Problem
from robustbench_lite.runner import Watcher
from robustbench_lite.trained import Workshop, save
from tests.outcomes import Notes

TABLES = ("leaderboard", "matrix", "rows", "certificates", "certified_rows")

PLUGINS = '''
import os, threading, time
import torch
from dataclasses import dataclass, field, replace
from pathlib import Path
from robustbench_lite.registry import attack, defense
from robustbench_lite.defended import Defended

@attack("careful")
@dataclass(frozen=True)
class Careful:
    """A gradient step; on one chunk, as long as there is a file, it does what it is told."""
    evil: str = ""
    rest: float = 0
    access, norms = "gradients", frozenset({"linf"})

    def __call__(self, problem):
        with open("calls.txt", "a") as calls:
            for row in (problem.noise.rows // 100 * 100).unique().tolist():
                calls.write(f"{row} ")
        time.sleep(self.rest)
        if self.evil and Path("evil").exists() and 100 in problem.noise.rows // 100 * 100:
            Path("pid").write_text(str(os.getpid()))
            {"hang": lambda: time.sleep(600), "exit": lambda: os._exit(3), "raise": lambda: 1 / 0}[self.evil]()
        gradient, _ = problem.gradient(problem.x)
        return problem.threat.step(problem.x, problem.x, gradient, problem.threat.eps)

HOARD = []

@attack("leaky")
@dataclass(frozen=True)
class Leaky(Careful):
    """A gradient step, before which memory, until there is no more, or threads are taken and never given back."""
    what: str = "memory"

    def __call__(self, problem):
        if self.what == "threads":
            for _ in range(100):
                threading.Thread(target=time.sleep, args=(600,)).start()
        else:
            import resource  # not everywhere, and nor is what follows
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), -1))
            while True:
                HOARD.append(bytearray(1 << 22))
        return super().__call__(problem)

@attack("pupil")
@dataclass(frozen=True)
class Pupil(Careful):
    """Learns nothing that it needs; as long as there is a file, it does instead what it is told."""
    images: int = 20
    learned: "torch.Tensor | None" = field(default=None, compare=False, repr=False)

    def fit(self, problem):
        if Path("evil").exists():
            {"hang": lambda: time.sleep(600), "exit": lambda: os._exit(3), "raise": lambda: 1 / 0}[self.evil]()
        return replace(self, learned=problem.x[:1])

class Dim(Defended):
    def forward(self, x, noise=None):
        return self.model(0.9 * x)

@defense("dim")
@dataclass(frozen=True)
class Dimmed:
    trains = False

    def __call__(self, model, lab):
        return Dim(model)
'''


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an mlp after two epochs on digits."""
    path = tmp_path_factory.mktemp("weights") / "mlp.safetensors"
    net = Workshop("digits", (1, 8, 8), 10, model="mlp")
    save(net.train(registry.make("defense", "standard:epochs=2,rate=0.003")).model, path)
    return path


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own, with a plugin file that is loaded."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    Path("plugins.py").write_text(PLUGINS)
    registry.load_file(Path("plugins.py"))
    return place


def bench(weights: Path, *attacks: Any, watcher: Watcher | None = None, **settings: Any) -> Results:
    usual = {"dataset": "digits", "model": "mlp", "weights": weights, "n": 330, "device": "cpu", "out": "runs"}
    return benchmark(attacks, watcher=watcher or Notes(), **(usual | settings))


def tables(results: Results) -> list[str]:
    frames = [getattr(results, name)() for name in TABLES]
    return [frame.drop(columns="seconds", errors="ignore").to_csv(index=False) for frame in frames]


def calls() -> list[int]:
    """The first rows of the chunks that were attacked."""
    return sorted(map(int, Path("calls.txt").read_text().split()))


@dataclass(frozen=True)
class Handed:
    """An object of a class that is not registered, but can be imported."""

    name: ClassVar[str] = "handed"
    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"l2"})

    def __call__(self, problem: Problem) -> Tensor:
        gradient, _ = problem.gradient(problem.x)
        return problem.threat.step(problem.x, problem.x, gradient, problem.threat.eps)


# The same tables


def test_the_number_of_workers_changes_nothing(here: Path, weights: Path):
    """With an attack that learns, one that is crafted on another model, one that minimises, an object, a certifier, a
    wrapper and an attack from a file."""
    attacks = (
        "pgd:steps=4",
        "careful",
        "deepfool:steps=3",
        Handed(),
        "patch:steps=5,images=50",
        "transfer:source=standard:epochs=1@mlp,attack=(fgsm)",
    )
    settings: dict[str, Any] = {
        "defenses": ["dim"],
        "threats": ["linf:0.1", "l2:0.5", "patch:0.1"],
        "certifiers": ["ibp"],
        "n": 230,
        "batch": 200,
    }
    alone = bench(weights, *attacks, out="alone", **settings)
    watcher = Notes()
    shared = bench(weights, *attacks, out="shared", workers=2, watcher=watcher, **settings)
    assert tables(alone) == tables(shared)
    assert watcher.inputs == watcher.expected
    assert any("learns from training images" in note for note in watcher.notes)
    assert tables(load("shared")) == tables(shared)
    assert not [*here.rglob("*.claim"), *here.rglob("*.part")]
    before = torch.get_num_threads()
    again = Notes()
    assert tables(bench(weights, *attacks, out="shared", workers=1, watcher=again, **settings)) == tables(shared)
    assert again.inputs == again.expected
    assert torch.get_num_threads() == before


def test_what_cannot_be_handed_to_a_worker_is_one_line(here: Path, weights: Path):
    @dataclass(frozen=True)
    class Local(Handed):
        pass

    with pytest.raises(ValueError, match="worker processes cannot be handed what cannot be pickled") as error:
        bench(weights, Local(), workers=1, threats=["l2:1"])
    assert "\n" not in str(error.value)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net.forward = lambda x: x.flatten(1)[:, :10]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="worker processes cannot be handed what cannot be pickled"):
        benchmark(["fgsm"], dataset="digits", model=net, n=10, workers=1, out="runs")


def test_a_model_that_comes_out_otherwise_in_a_worker_is_refused(here: Path):
    Path("model.py").write_text(
        "from torch import nn\ndef load():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()"
    )
    with pytest.raises(ValueError, match="comes out otherwise each time that it is made"):
        benchmark(["fgsm"], dataset="digits", model="model.py:load", n=10, workers=1, out="runs")


@pytest.mark.parametrize(
    "settings", [{"workers": -1}, {"threads": 0}, {"timeout": 0.0}, {"timeout": float("nan")}, {"seed": 2**63}]
)
def test_settings_that_make_no_sense_are_refused(here: Path, weights: Path, settings: dict[str, Any]):
    with pytest.raises(ValueError, match="must"):
        bench(weights, "fgsm", **settings)


# Plugins that hang, die and fall over


@pytest.mark.parametrize(
    ("evil", "settings", "reason"),
    [
        ("hang", {"timeout": 1.5}, "error: Unfinished: no answer within 1.5 s"),
        ("exit", {"isolate": True}, "error: Unfinished: its process ended with exit code 3"),
        ("raise", {"workers": 1}, "error: ZeroDivisionError: division by zero"),
    ],
    ids=["hangs", "exits", "raises"],
)
def test_a_plugin_costs_its_own_chunk_only(here: Path, weights: Path, evil: str, settings: dict[str, Any], reason: str):
    peace = bench(weights, "careful", out="peace", n=230)
    Path("evil").touch()
    watcher = Notes()
    results = bench(weights, f"careful:evil={evil}", watcher=watcher, n=230, **settings)
    assert watcher.inputs == watcher.expected
    rows = results.rows()
    hit = (rows["row"] // CHUNK == 1) & (rows["status"] != "wrong")
    assert set(rows["reason"][hit]) == {reason}
    assert set(rows["status"][hit]) == {"unknown"}
    assert rows["status"][~hit].tolist() == peace.rows()["status"][~hit].tolist()
    told = [note for note in watcher.notes if "inputs 100 to 199" in note]
    assert bool(told) == (evil != "raise")
    if told:
        assert told[-1].endswith("left unknown")
    Path("evil").unlink()  # and the next run tries what had no answer, but not what was an answer
    Path("calls.txt").unlink()
    again = bench(weights, f"careful:evil={evil}", n=230)
    if evil == "raise":
        assert not Path("calls.txt").exists()
    else:
        assert calls() == [100]
        assert again.unknown == 0
        assert again.rows()["status"].tolist() == peace.rows()["status"].tolist()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what a process has taken")
@pytest.mark.parametrize("what", ["memory", "threads"])
def test_a_plugin_that_leaks_takes_its_own_process_down_at_most(here: Path, weights: Path, what: str):
    peace = bench(weights, "careful", out="peace", n=230).rows()
    rows = bench(weights, f"leaky:what={what}", "careful", n=230, isolate=True).rows()
    leaky, right = rows["attack"].str.startswith("leaky"), rows["status"] != "wrong"
    assert rows["status"][~leaky].tolist() == peace["status"].tolist()
    if what == "threads":
        assert rows["status"][leaky].tolist() == peace["status"].tolist()
    else:
        assert set(rows["status"][leaky & right]) == {"unknown"}
        assert all("MemoryError" in reason or "process ended" in reason for reason in rows["reason"][leaky & right])


@pytest.mark.parametrize(
    ("evil", "settings", "reason"),
    [
        ("hang", {"timeout": 0.5}, "no answer within 1.5 s"),  # as long as three chunks may take
        ("exit", {"workers": 1}, "its process ended with exit code 3"),
        ("raise", {}, "it learned nothing: ZeroDivisionError: division by zero"),
    ],
    ids=["hangs", "exits", "raises"],
)
def test_an_attack_that_cannot_learn_costs_its_own_cell_only(
    here: Path, weights: Path, evil: str, settings: dict[str, Any], reason: str
):
    Path("evil").touch()
    watcher = Notes()
    settings = settings | {"n": 230, "threats": ["linf:0.1"]}
    results = bench(weights, f"pupil:evil={evil}", "fgsm", watcher=watcher, **settings)
    assert watcher.inputs == watcher.expected
    rows = results.rows()
    pupil, right = rows["attack"].str.startswith("pupil"), rows["status"] != "wrong"
    assert set(rows["reason"][pupil & right]) == {f"error: Unfinished: learning: {reason}"}
    assert set(rows["status"][pupil & right]) == {"unknown"}
    assert "unknown" not in set(rows["status"][~pupil])
    assert [note for note in watcher.notes if f"learning: {reason}; left unknown" in note]
    Path("evil").unlink()
    again = bench(weights, f"pupil:evil={evil}", "fgsm", **settings)
    assert again.unknown == 0
    peace = bench(weights, f"pupil:evil={evil}", "fgsm", out="peace", **settings)
    assert again.rows()["status"].tolist() == peace.rows()["status"].tolist()


def test_a_worker_that_is_killed_is_replaced_and_its_chunk_tried_again(here: Path, weights: Path):
    peace = bench(weights, "careful:evil=hang", out="peace")
    Path("evil").touch()

    def kill() -> None:
        until(Path("pid").exists)
        until(lambda: Path("pid").read_text())
        Path("evil").unlink()
        os.kill(int(Path("pid").read_text()), signal.SIGKILL)

    watcher, killer = Notes(), threading.Thread(target=kill)
    killer.start()
    results = bench(weights, "careful:evil=hang", workers=2, batch=100, watcher=watcher)
    killer.join()
    assert [note for note in watcher.notes if "signal SIGKILL; tried again" in note] == watcher.notes != []
    assert tables(results) == tables(peace)


# Ctrl-C

COMMAND = "--plugin plugins.py --attack careful:rest=0.3 --dataset digits --model mlp --n 430 --device cpu --batch 100"


def command(weights: Path, *options: str, out: str = "runs", **more: Any) -> "subprocess.Popen[str]":
    parts = [*COMMAND.split(), "--weights", str(weights), "--csv", f"{out}.csv", *options, "--out", "runs"]
    line = [sys.executable, "-m", "robustbench_lite", *parts]
    return subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **more)


def board(name: str) -> list[str]:
    return [re.sub(r",[0-9.e-]+(,\d+,[0-9.]+)$", r"\1", line) for line in Path(name).read_text().splitlines()]


def until(there: Callable[[], object]) -> None:
    late = time.monotonic() + 120
    while not there():
        assert time.monotonic() < late
        time.sleep(0.02)


def any_process_of(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(os.name != "posix", reason="sends signals to a process group")
def test_ctrl_c_keeps_what_is_finished_and_leaves_no_process_behind(here: Path, weights: Path):
    run = command(weights, "--workers", "2", start_new_session=True)
    until(lambda: list(here.rglob("*.npz")))
    os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 130, errors
    assert "Traceback" not in errors
    assert "stopped; what is finished" in errors
    until(lambda: not any_process_of(run.pid))
    assert not [*here.rglob("*.claim"), *here.rglob("*.part")]
    kept = {path: path.stat().st_mtime_ns for path in here.rglob("*.npz")}
    assert 1 <= len(kept) < 5
    results = bench(weights, "careful:rest=0.3", n=430)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert tables(results) == tables(bench(weights, "careful:rest=0.3", n=430, out="peace", batch=100))


# Several runs on one folder


def test_two_runs_at_once_share_the_work(here: Path, weights: Path):
    """The second begins while the first is at work, is waited for, and both write the same table."""
    runs = [command(weights, out=name) for name in ("one", "other")]
    for run in runs:
        _, errors = run.communicate(timeout=60)
        assert run.returncode == 0, errors
    assert calls() == [0, 100, 200, 300, 400], "a chunk was computed twice"
    assert board("one.csv") == board("other.csv")
    assert not list(here.rglob("*.claim"))


def test_what_a_run_claims_another_leaves_until_it_is_gone(tmp_path: Path):
    path = tmp_path / "cell" / "00000000-00000100.npz"
    with Claims() as mine, Claims(patience=0.2) as other:
        assert mine.take(path)
        assert not other.take(path)
        mine.give_back(path)
        assert other.take(path)
        assert not mine.take(path)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("owner", ["gone", "elsewhere", "empty"])
def test_a_claim_without_signs_of_life_counts_for_nothing(tmp_path: Path, owner: str):
    path, claim = tmp_path / "00000000-00000100.npz", tmp_path / "00000000-00000100.claim"
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    host = os.uname().nodename
    claim.write_text({"gone": f"{host} {process.pid}", "elsewhere": f"not-{host} 1", "empty": ""}[owner])
    with Claims(patience=0.2) as claims:
        assert claims.take(path) == (owner == "gone")
        if owner != "gone":
            time.sleep(0.15)
            os.utime(claim)  # a sign of life
            assert not claims.take(path)
            time.sleep(0.15)
            assert not claims.take(path)
            time.sleep(0.15)
            assert claims.take(path)
    assert not claim.exists()


def test_a_stale_claim_does_not_stop_a_run(here: Path, weights: Path):
    bench(weights, "fgsm", probe=False)
    (chunk, *_) = sorted(here.rglob("*.npz"))
    chunk.unlink()
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    chunk.with_suffix(".claim").write_text(f"{os.uname().nodename} {process.pid}")
    results = bench(weights, "fgsm")
    assert np.array_equal(results.rows()["row"], np.arange(330))
    assert chunk.exists()
    assert not chunk.with_suffix(".claim").exists()
