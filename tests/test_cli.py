"""The command line through its entry point: what it prints, what it writes, how it ends, what it says to mistakes."""

import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits

from robustbench_lite import data, models, registry
from robustbench_lite.leaderboard import CERTIFICATES, LEADERBOARD
from robustbench_lite.trained import save

from .conftest import Ran

ROOT = Path(__file__).parents[1]

MODEL = """
import torch
from sklearn.datasets import load_digits

class Means(torch.nn.Module):
    '''The class whose mean is nearest: linear in the image.'''
    def __init__(self, scale=1.0, shift=0.0, softmax=False):
        super().__init__()
        x, y = load_digits(return_X_y=True)
        x = torch.tensor(x / 16, dtype=torch.float32)
        mean = torch.stack([x[torch.tensor(y == label)].mean(0) for label in range(10)])
        self.weight, self.bias = torch.nn.Parameter(2 * mean), torch.nn.Parameter(-mean.square().sum(1))
        self.scale, self.shift, self.softmax = scale, shift, softmax
        self.eval()

    def forward(self, x):
        logits = (x * self.scale + self.shift).flatten(1) @ self.weight.T + self.bias
        return logits.softmax(1) if self.softmax else logits

def means(): return Means()
def pixels(): return Means(scale=1 / 255)
def normalised(): return Means(scale=0.5, shift=0.25)
def softmax(): return Means(softmax=True)

class Answers(torch.nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer
    def forward(self, x):
        return self.answer(x)

def flat():
    model = Means()
    model.weight = torch.nn.Parameter(model.weight[None])
    model.forward = lambda x: x.flatten(1) @ model.weight[0].T + model.bias
    return model

def training(): return Means().train()
def wide(): return Answers(lambda x: x)
def nan(): return Answers(lambda x: x.new_full((len(x), 10), torch.nan))
def narrow(): return Answers(lambda x: x.new_zeros(len(x), 3))
def failing(): return Answers(lambda x: 1 / 0)
def broken(): raise RuntimeError("no\\nluck")
def seven(): return 7
"""

MINE = """
from dataclasses import dataclass
from pathlib import Path
from robustbench_lite import attack

@attack("mine")
@dataclass(frozen=True)
class Mine:
    '''Steps to a corner of the ball.'''
    up: bool = True
    label: str = ""
    access, norms = "labels", frozenset({"linf"})

    def __call__(self, problem):
        Path("calls.txt").open("a").write(f"{len(problem.x)} ")
        return problem.threat.project(problem.x + (9 if self.up else -9), problem.x)
"""

TROUBLE = """
import time
from dataclasses import dataclass
from pathlib import Path
from robustbench_lite import attack, defense
from robustbench_lite.defended import Defended

@attack("crash")
@dataclass(frozen=True)
class Crash:
    access, norms = "labels", frozenset({"linf"})

    def __call__(self, problem):
        raise RuntimeError("[red]no[/red] luck")

@attack("interrupt")
@dataclass(frozen=True)
class Interrupt:
    '''Is stopped, by a key or in its sleep, once a chunk is stored.'''
    access, norms = "labels", frozenset({"linf"})

    def __call__(self, problem):
        if Path("stop").exists() and list(Path("runs").rglob("*.npz")):
            raise KeyboardInterrupt
        if Path("sleep").exists() and list(Path("runs").rglob("*.npz")):
            time.sleep(60)
        return problem.x

@defense("same")
@dataclass(frozen=True)
class Same:
    '''A wrapper that changes nothing.'''
    trains = False

    def __call__(self, model, lab):
        return Defended(model)

@defense("halts")
@dataclass(frozen=True)
class Halts:
    trains = True

    def __call__(self, model, lab):
        raise KeyboardInterrupt
"""

LINEAR = """
from dataclasses import dataclass
import torch
from robustbench_lite import certifier
from robustbench_lite.certificate import Certificate

@certifier("linear")
@dataclass(frozen=True)
class Linear:
    '''Exact for a linear model; ``lie`` adds to every margin.'''
    lie: float = 0.0
    fail: bool = False
    norms = frozenset({"linf"})

    def __call__(self, model, x, y, threat, noise):
        if self.fail:
            raise RuntimeError("no [red]luck[/red]")
        weight, logits = model.model.weight, model(x)
        if weight.dim() != 2:
            raise ValueError("not linear")
        way = (weight - weight[y].unsqueeze(1)).abs().sum(-1)
        gap = logits.gather(1, y.unsqueeze(1)) - logits - threat.eps * way + self.lie
        return Certificate.of_margins(gap.scatter(1, y.unsqueeze(1), torch.inf).amin(1), y, threat.eps)
"""

OWN = "--dataset digits --model model.py:means --n 40"
PGD = f"--attack pgd:steps=5 {OWN}"


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(place: Path) -> Path:
    """With a model and plugins of a user's."""
    Path("model.py").write_text(MODEL)
    Path("mine.py").write_text(MINE)
    Path("trouble.py").write_text(TROUBLE)
    Path("linear.py").write_text(LINEAR)
    return place


def process(line: str, *python: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Our command line in a process of its own; ``python`` stands for ``-m robustbench_lite``."""
    command = [sys.executable, *(python or ("-m", "robustbench_lite")), *shlex.split(line)]
    paths = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, env=paths, timeout=100)


def clean_accuracy(count: int) -> float:
    """Of the nearest class mean on the first test images, worked out anew."""
    x, y = load_digits(return_X_y=True)
    means = np.stack([x[y == label].mean(0) for label in range(10)])
    nearest = ((x[::3, None] - means) ** 2).sum(-1).argmin(1)
    return float((nearest == y[::3])[:count].mean())


# What it computes, and where it goes


def test_a_run_prints_tables_and_writes_every_file(bench):
    options = "--threat linf:0.1,l2:10/11 --seed 3 --device cpu --batch 100 --out results"
    targets = "--csv board.csv --matrix matrix.csv --rows rows.csv --save-adversarials adversarials.npz"
    ran = bench(f"--attack pgd:steps=5,restarts=2 --attack fgsm {OWN} {options} {targets}")
    assert ran.code == 0
    assert "Results are in results, board.csv, matrix.csv, rows.csv, adversarials.npz" in ran.out
    assert ran.out.count("pgd:steps=5,restarts=2") >= 2
    assert ran.errors[0] == "robust-bench 0.1.0: pgd:steps=5,restarts=2, fgsm on model.py:means, digits"

    board, matrix, rows = (pd.read_csv(f"{name}.csv") for name in ("board", "matrix", "rows"))
    assert tuple(board.columns) == LEADERBOARD
    assert list(zip(board["norm"], board["eps"])) == [("linf", 0.1), ("l2", 10 / 11)]
    assert set(board["model"]) == {"model.py:means"}
    assert set(board["defense"]) == {"none"}
    assert set(board["examples"]) == {40}
    assert set(board["seed"]) == {3}
    assert board["clean_accuracy"].tolist() == [pytest.approx(clean_accuracy(40))] * 2
    numbers = set(LEADERBOARD) - {"dataset", "defense", "model", "norm", "worst_attack", "attacks", "version"}
    assert all(pd.api.types.is_numeric_dtype(board[name]) for name in numbers)
    assert set(matrix.columns) == {"dataset", "norm", "eps", "defense", "adaptive", "pgd:steps=5,restarts=2", "fgsm"}
    assert len(rows) == 40 * 2 * 2
    for line in board.itertuples():
        here = rows[(rows["norm"] == line.norm) & (rows["status"] == "held")]
        survived = here.groupby("row")["attack"].nunique().eq(2).sum() / 40
        assert line.robust_accuracy == pytest.approx(survived)
        assert 0 < survived < clean_accuracy(40)

    with np.load("adversarials.npz") as kept:
        broken = rows[rows["status"] == "broken"]
        assert broken.groupby(["norm", "attack"]).size().max() > 16  # which is what is kept unasked
        assert len(kept["x"]) == len(broken)
        clean = data.load("digits").x[torch.from_numpy(kept["row"])].numpy()
        moved, linf = np.abs(kept["x"] - clean).reshape(len(clean), -1), kept["norm"] == "linf"
    assert 0.01 < moved[linf].max() <= 0.1 + 1e-6
    assert 0.1 < np.sqrt((moved[~linf] ** 2).sum(1)).max() <= 10 / 11 + 1e-5


def test_json_is_the_leaderboard_and_nothing_else(bench):
    ran = bench(f"{PGD} --model model.py:training --csv board.csv --json")  # of which a note could be printed
    assert ran.code == 0
    assert ran.err == ""
    [line] = json.loads(ran.out)
    written = pd.read_csv("board.csv").iloc[0].dropna().to_dict()
    assert {name: value for name, value in line.items() if value not in (None, "")} == {
        name: pytest.approx(value) if isinstance(value, float) else value for name, value in written.items()
    }
    again = bench("leaderboard runs --json")
    assert again.err == ""
    assert json.loads(again.out) == [line]


def test_quiet_prints_tables_only_and_verbose_a_line_for_each_piece(bench):
    quiet = bench(f"{PGD} --quiet")
    assert quiet.err == ""
    assert "Leaderboard" in quiet.out
    loud = bench(f"--attack fgsm {OWN} --n 250 --batch 100 -v")
    assert [line for line in loud.errors if line.endswith(" inputs")] == [
        "fgsm on none, linf:0.1: 100 inputs",
        "fgsm on none, linf:0.1: 100 inputs",
        "fgsm on none, linf:0.1: 50 inputs",
    ]
    usual = bench(f"--attack fgsm {OWN} --fresh")
    assert not [line for line in usual.errors if line.endswith(" inputs")]


@pytest.mark.parametrize("columns", [80, 120])
def test_no_heading_is_cut_on_a_narrow_screen(bench, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = bench(PGD).out
    assert max(map(len, out.splitlines())) <= columns
    words = set(out.replace("┃", " ").split())
    assert {"rank", "defense", "threat", "clean", "robust", "worst", "attack", "unknown"} <= words
    assert ({"forwards", "backwards", "seconds"} <= words) == (columns == 120)


def test_on_a_narrow_screen_columns_go_before_words_are_cut(bench, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = bench("--attack pgd:steps=3 --dataset digits --model mlp --defense standard:epochs=1 --n 20").out
    board = out[out.index("Leaderboard") :]
    assert {"clean", "unknown", "standard:epochs=1"} <= set(board.split())
    assert "rank" not in board


@pytest.mark.parametrize(("option", "count"), [("--n all", 599), ("", 599), ("--n 3", 3)])
def test_n_counts_from_the_first_image_and_is_at_most_what_there_is(bench, option, count):
    ran = bench(f"--attack fgsm --dataset digits --model model.py:means --json --rows rows.csv {option}")
    assert ran.code == 0
    assert json.loads(ran.out)[0]["examples"] == count
    assert pd.read_csv("rows.csv")["row"].tolist() == list(range(count))


@pytest.mark.parametrize(
    ("option", "norm", "eps"),
    [
        ("--norm linf --eps 8/255", "linf", 8 / 255),
        ("--eps 0.2", "linf", 0.2),
        ("--norm l2", "l2", 1.0),
        ("--threat l1", None, "no customary eps for digits under l1; give an eps"),
        ("", "linf", 0.1),
        ("--threat linf:2/255", "linf", 2 / 255),
    ],
)
def test_threats_in_every_spelling(bench, option, norm, eps):
    ran = bench(f"{PGD} {option} --csv board.csv")
    if norm is None:
        assert ran.code == 2
        assert eps in ran.errors[-1]
    else:
        board = pd.read_csv("board.csv")
        assert (board["norm"].item(), board["eps"].item()) == (norm, eps)


def test_an_attack_that_does_not_know_a_norm_is_left_out_and_named(bench):
    ran = bench(f"--plugin mine.py --attack mine,fgsm {OWN} --threat linf:0.1,l2:1 --matrix matrix.csv")
    assert ran.code == 0
    assert "note: attack mine is left out under l2:1: it knows linf" in ran.errors
    matrix = pd.read_csv("matrix.csv").set_index("norm")
    assert matrix["mine"].isna().to_dict() == {"linf": False, "l2": True}
    assert matrix["fgsm"].notna().all()


@pytest.mark.parametrize("target", ["3", "next", "random", "least-likely"])
def test_target(bench, target):
    assert bench(f"{PGD} --threat linf:0.3 --target {target} --rows rows.csv").code == 0
    rows = pd.read_csv("rows.csv")
    assert set(rows["attack"]) == {f"pgd:steps=5 to {target}"}
    broken = rows[rows["status"] == "broken"]
    assert len(broken) > 5
    assert (broken["adversarial"] != broken["label"]).all()
    if target == "3":
        assert set(broken["adversarial"]) == {3}
        assert set(rows[(rows["label"] == 3) & (rows["clean"] == 3)]["status"]) == {"skipped"}
    if target == "next":
        assert (broken["adversarial"] == (broken["label"] + 1) % 10).all()


def test_what_a_model_expects_and_returns(bench):
    """The same classifier in other clothes is as right, and as robust."""
    dressed = {
        "means": "",
        "pixels": "--bounds 0:255",
        "normalised": "--mean 0.5 --std 0.5",
        "softmax": "--probabilities",
    }
    found = {}
    for name, option in dressed.items():
        ran = bench(f"--attack fgsm --dataset digits --n 80 --model model.py:{name} {option} --json")
        assert ran.code == 0
        found[name] = {key: json.loads(ran.out)[0][key] for key in ("clean_accuracy", "robust_accuracy")}
    assert found["means"] == found["pixels"] == found["softmax"]
    assert found["normalised"]["clean_accuracy"] < found["means"]["clean_accuracy"]  # 0.5 ((x - 0.5) / 0.5) + 0.25


def test_normalisation_goes_inside_the_model(bench):
    """x -> (x - 0.5) / 2 undoes a model that computes 2x + 0.5 first."""
    Path("model.py").write_text(MODEL.replace("scale=0.5, shift=0.25", "scale=2.0, shift=0.5"))
    plain, dressed = (
        json.loads(bench(f"--attack fgsm --dataset digits --n 80 --model model.py:{name} --json").out)[0]
        for name in ("means", "normalised --mean 0.5 --std 2")
    )
    same = ("clean_accuracy", "robust_accuracy", "worst_attack", "forwards")
    assert {name: plain[name] for name in same} == {name: dressed[name] for name in same}


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_fill_an_architecture(bench, suffix):
    model = models.build("mlp", (1, 8, 8), 10, seed=5)
    path = Path(f"weights.{suffix}")
    if suffix == "pt":
        torch.save(model.state_dict(), path)
    else:
        save(model, path)
    ran = bench(f"--attack fgsm --dataset digits --n all --model mlp --weights {path} --json")
    assert ran.code == 0
    images = data.load("digits")
    with torch.no_grad():
        right = (model(images.x).argmax(1) == images.y).float().mean()
    [line] = json.loads(ran.out)
    assert line["clean_accuracy"] == pytest.approx(right.item())
    assert line["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_a_data_set_of_ones_own(bench):
    x, y = load_digits(return_X_y=True)
    np.savez("mine.npz", x=(x[::3][:30].reshape(-1, 8, 8) / 16).astype(np.float32), y=y[::3][:30])
    ran = bench("--attack pgd:steps=5 --model model.py:means --dataset npz:mine.npz --norm linf --eps 8/255 --json")
    assert ran.code == 0
    [line] = json.loads(ran.out)
    assert (line["dataset"], line["examples"]) == ("npz:mine.npz", 30)
    assert line["clean_accuracy"] == pytest.approx(clean_accuracy(30))


def test_a_model_in_training_mode_is_told_and_evaluated(bench):
    ran = bench(f"{PGD.replace('means', 'training')}")
    assert ran.code == 0
    assert "note: model model.py:training was in training mode; it is evaluated in eval mode" in ran.errors


# Plugins


def test_an_attack_of_ones_own_in_fifteen_lines(bench):
    assert len([line for line in MINE.splitlines() if line.strip()]) <= 15
    ran = bench(f"--plugin mine.py --attack mine,mine:up=no {OWN} --matrix matrix.csv --json")
    assert ran.code == 0
    assert {"mine", "mine:up=false"} <= set(pd.read_csv("matrix.csv").columns)
    listed = bench("--plugin mine.py attacks")
    assert "Steps to a corner of the ball." in listed.out
    explained = bench("--plugin mine.py attacks mine")
    assert "up=true" in explained.out
    assert "(file:" in explained.out


def test_what_is_stored_is_not_computed_again_unless_fresh(bench):
    line = f"--plugin mine.py --attack mine {OWN} --json"
    first, stored = bench(line), bench(line)
    assert stored.out == first.out
    assert Path("calls.txt").read_text().count(" ") == 1
    bench(f"{line} --fresh")
    assert Path("calls.txt").read_text().count(" ") == 2


def test_all_is_every_attack_that_ships(bench, monkeypatch):
    """A table cut to two of them, as all would take minutes; a plugin of ours must be asked for."""
    few = {name: registry.find("attack", name) for name in ("fgsm", "pgd")}
    monkeypatch.setitem(registry._tables, "attack", few)
    assert bench(f"--plugin mine.py --attack all {OWN} --matrix matrix.csv").code == 0
    attacks = set(pd.read_csv("matrix.csv").columns) - {"dataset", "norm", "eps", "defense", "adaptive"}
    assert attacks == {"fgsm", "pgd"}


def test_a_chain_of_defenses_is_trained_once_and_said(bench):
    line = "--plugin trouble.py --attack fgsm --defense standard:epochs=1+same --model mlp --dataset digits --n 40"
    first = bench(line)
    assert first.code == 0
    assert "note: standard:epochs=1 on digits does not ship: training it once" in first.err
    [trained] = Path("cache").rglob("*.safetensors")
    made = trained.stat().st_mtime_ns
    again = bench(f"{line} --fresh --csv board.csv")
    assert "training" not in again.err
    assert trained.stat().st_mtime_ns == made
    assert pd.read_csv("board.csv")["defense"].item() == "standard:epochs=1+same"


# Exit codes


def test_exit_code_3_below_the_accuracy_that_is_asked(bench):
    below = bench(f"{PGD} --threat linf:0.5 --fail-below 0.5")
    assert below.code == 3
    assert below.errors[-1] == "robust accuracy 0.0000 is below 0.5"
    assert bench(f"{PGD} --threat linf:0.5 --fail-below 0").code == 0


def test_exit_code_1_when_something_ended_unknown(bench):
    ran = bench(f"--plugin trouble.py --attack crash {OWN} --csv board.csv --fail-below 0.5")
    assert ran.code == 1
    board = pd.read_csv("board.csv")
    count = board["unknown"].item()
    assert count == round(clean_accuracy(40) * 40)
    assert board["robust_accuracy"].item() == 0
    assert ran.errors[-1] == f"unknown: {count} x error: RuntimeError: [red]no[/red] luck"


def test_exit_code_130_on_ctrl_c_and_going_on(bench):
    line = f"--plugin trouble.py --attack interrupt {OWN} --n 250 --batch 100"
    Path("stop").touch()
    stopped = bench(line)
    assert stopped.code == 130
    assert stopped.errors[-1] == ("stopped; what is finished (100 inputs) is kept in runs: run the same again to go on")
    kept = files(Path("runs"))
    assert sum(path.suffix == ".npz" for path in kept) == 1
    Path("stop").unlink()
    assert bench(f"{line} --csv board.csv").code == 0
    assert pd.read_csv("board.csv")["examples"].item() == 250
    assert kept.items() <= files(Path("runs")).items()


def test_a_real_process_stopped_by_ctrl_c(place):
    """By the signal itself, in the middle of an attack; the handler is set as a terminal would have it."""
    Path("sleep").touch()
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    main = "from robustbench_lite.cli import main; sys.exit(main())"
    line = f"--plugin trouble.py --attack interrupt {OWN} --n 250 --batch 100"
    child = subprocess.Popen(
        [sys.executable, "-c", start + main, *shlex.split(line)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        until = time.monotonic() + 100
        while not list(place.glob("runs/cells/*/*.npz")):
            assert child.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert err.splitlines()[-1].startswith("stopped; what is finished (100 inputs) is kept in runs")
    assert "Traceback" not in err


# Sub-commands


def test_train_writes_weights_that_weights_reads(bench):
    line = "train --defense standard:epochs=1 --dataset digits --model mlp --seed 2 --device cpu"
    ran = bench(f"{line} --out mlp.safetensors -v")
    assert ran.code == 0
    assert ran.errors[0] == "robust-bench 0.1.0: training standard:epochs=1 on digits"
    assert re.match(r"training standard:epochs=1: epoch 1/1  loss [0-9.]+  accuracy [0-9.]+%", ran.errors[1])
    first, measure = ran.out.splitlines()
    assert re.fullmatch(r"standard:epochs=1: wrote mlp.safetensors, SHA-256 [0-9a-f]{64}", first)
    command = measure.removeprefix("measure it: robust-bench ")
    measured = bench(f"{command} --n all --json")
    assert measured.code == 0
    assert json.loads(measured.out)[0]["clean_accuracy"] > 0.2  # one epoch; chance is 0.1

    half = bench(f"{line} --out half.safetensors --half --quiet")
    assert half.err == ""
    assert Path("half.safetensors").stat().st_size < 0.6 * Path("mlp.safetensors").stat().st_size
    other = bench(f"{line.replace('--seed 2', '--seed 3')} --out other.safetensors")
    assert other.code == 0
    assert Path("other.safetensors").read_bytes() != Path("mlp.safetensors").read_bytes()


def test_layers_shows_singular_values_and_the_lipschitz_bound(bench):
    ran = bench("layers --defense parseval:epochs=1 --model mlp --dataset digits")
    assert ran.code == 0
    assert "no logits move further than 1 times the input (l2)" in ran.out
    assert ran.out.count("1.0000 to 1.0000") == 3
    assert bench("layers").errors[-1].startswith("robust-bench: error: defense none needs a trained model")


def test_train_stopped_by_ctrl_c(bench):
    ran = bench("--plugin trouble.py train --defense halts --dataset digits --out w.safetensors")
    assert ran.code == 130
    assert ran.errors[-1] == "stopped; finished epochs are kept: run the same again to go on"
    assert not Path("w.safetensors").exists()


def test_leaderboard_reads_back_what_a_run_wrote(bench):
    bench(f"--attack fgsm,pgd:steps=2 {OWN} --csv a.csv --matrix b.csv --rows c.csv")
    ran = bench("leaderboard runs --csv A.csv --matrix B.csv --rows C.csv")
    assert ran.code == 0
    assert "Leaderboard" in ran.out
    for name in "abc":
        assert Path(f"{name.upper()}.csv").read_bytes() == Path(f"{name}.csv").read_bytes()


def test_leaderboards_are_exported_and_joined_with_what_others_report(bench):
    bench(f"--attack fgsm {OWN} --table a.md")
    entry = {"name": "T", "dataset": "digits", "architecture": "WRN", "eps": 0.1, "clean_acc": 99}
    Path("theirs/Linf").mkdir(parents=True)
    Path("theirs/Linf/Else2020.json").write_text(json.dumps(entry | {"autoattack_acc": "99.0"}))
    assert bench("leaderboard runs --table b.md").code == 0
    assert Path("a.md").read_text() == Path("b.md").read_text()
    ran = bench("leaderboard runs --with-robustbench theirs --csv board.csv --table c.tex --per-class classes.csv")
    board = pd.read_csv("board.csv")
    assert (ran.code, ran.err) == (0, "")
    assert board["source"].tolist() == ["reported", "evaluated"]
    assert "Else2020" in ran.out
    assert "nan" not in ran.out
    assert "Else2020" in Path("c.tex").read_text()
    classes = pd.read_csv("classes.csv")
    assert classes["examples"].sum() == board["examples"][1]
    robust = (classes["robust_accuracy"] * classes["examples"]).sum() / classes["examples"].sum()
    assert robust == pytest.approx(board["robust_accuracy"][1])
    Path("theirs/Linf/Else2020.json").write_text(json.dumps(entry | {"eps": 0.5, "external": 50}))
    (note,) = bench("leaderboard runs --with-robustbench theirs").errors
    assert note == "note: theirs has no entry for a data set and threat model of runs"


def test_compare_says_what_changed_between_two_folders(bench):
    bench(f"--attack fgsm {OWN} --out one")
    bench(f"--attack fgsm,pgd:steps=2 {OWN} --out other")
    same = bench("compare one one")
    assert (same.code, same.err) == (0, "")
    assert same.out == "0 of 3 accuracies differ\n"
    changed = bench("compare one other --csv c.csv")
    assert changed.code == 0
    assert "robust, pgd:steps=2" in changed.out
    assert "robust, fgsm" not in changed.out
    lines = pd.read_csv("c.csv", keep_default_na=False)
    assert lines["plugin"].tolist() == ["", "", "fgsm", "pgd:steps=2"]
    assert lines["same_model"].all()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("attacks", ["pgd", "linf l2 l1", "gradients", "fgsm"]),
        (
            "attacks pgd",
            [
                "pgd  (built-in)",
                "steps=40",
                "length=none",
                "random_start=true",
                "linf l2 l1",
                "@inproceedings{madry2018",
            ],
        ),
        ("defenses", ["madry", "standard"]),
        ("defenses madry", ["warmup=", "@inproceedings{madry2018"]),
        ("datasets", ["cifar10", "linf:0.0313725", "mnist", "linf:0.3, l2:2", "10000", "npz:FILE"]),
        ("models", ["cnn-large", "preact-resnet18", "weights that ship"]),
        ("certifiers", ["certifier"]),
        ("doctor", ["torch", importlib.metadata.version("torch"), "cpu", "cache", "attacks", "pgd", "foolbox"]),
        ("cache", ["is empty"]),
    ],
)
def test_listings(bench, line, shown):
    ran = bench(line)
    assert ran.code == 0
    assert ran.err == ""
    for text in shown:
        assert text in ran.out


def test_doctor_says_what_is_missing(bench, monkeypatch):
    def version(name: str) -> str:
        if name in ("foolbox", "pooch"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(importlib.metadata, "version", version)
    ran = bench("doctor --data-dir somewhere")
    assert ran.code == 0
    assert "not installed (pip install pooch)" in ran.out
    assert "not installed (pip install foolbox)" in ran.out
    assert "somewhere" in ran.out


def test_clearing_the_cache_deletes_what_is_ours_and_nothing_else(bench, place):
    ours = [place / "cache" / name for name in ("trained/a.safetensors", "MNIST/raw/x.gz", "cifar-10-python.tar.gz")]
    theirs = [place / "cache" / name for name in ("thesis.tex", "MNIST/notes.txt", "photos/raw/cat.png")]
    for path in ours + theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 300_000)
    listed = bench("cache")
    assert all(str(path.relative_to(place / "cache")) in listed.out for path in ours)
    assert "0.3" in listed.out
    assert "thesis" not in listed.out
    assert f"deleted 3 files in {place / 'cache'}" in bench("cache --clear").out.replace("\n", "")
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)
    assert "is empty" in bench("cache").out


# Certificates

CERTIFY = "--plugin linear.py certify --method linear"
SMALL = f"{OWN} --eps 0.02"


def test_certify_prints_and_writes_what_is_proved(bench):
    ran = bench(f"{CERTIFY} --method linear:lie=-0.2 {SMALL} --csv proofs.csv --rows rows.csv")
    assert ran.code == 0
    assert ran.errors == ["robust-bench 0.1.0: certifying by linear, linear:lie=-0.2 on model.py:means, digits"]
    assert "Results are in runs, proofs.csv, rows.csv" in ran.out
    assert "Leaderboard" not in ran.out
    table, rows = pd.read_csv("proofs.csv"), pd.read_csv("rows.csv")
    assert tuple(table.columns) == CERTIFICATES
    assert table["certifier"].tolist() == ["linear", "linear:lie=-0.2"]
    assert table["clean_accuracy"].tolist() == [pytest.approx(clean_accuracy(40))] * 2
    for line in table.itertuples():
        here = rows[rows["certifier"] == line.certifier]
        assert line.certified_accuracy == (here["status"] == "verified").mean() == line.verified / 40
        assert line.mean_margin == pytest.approx(here["margin"].mean())
        assert line.verified + line.unknown + (here["status"] == "wrong").sum() == 40
        assert f"{100 * line.certified_accuracy:.1f} [{100 * line.certified_low:.1f}" in ran.out
    assert 0 < table["verified"][1] < table["verified"][0] < 40

    assert json.loads(bench(f"{CERTIFY} {SMALL} --json").out)[0]["verified"] == table["verified"][0]
    shown = bench("leaderboard runs")
    assert "Certificates" in shown.out
    assert "Leaderboard" not in shown.out


def test_certify_searches_radii(bench):
    bench(f"{CERTIFY} {OWN} --eps 0.2 --radius --rows rows.csv")
    radius = pd.read_csv("rows.csv").set_index("row")["radius"]
    bench(f"{CERTIFY} {SMALL} --rows rows.csv")
    verified = pd.read_csv("rows.csv").set_index("row")["status"] == "verified"
    assert radius.nunique() > 20
    assert ((radius > 0.02) == verified).all()


def test_certified_stands_beside_robust_in_the_same_row(bench, monkeypatch):
    ran = bench(f"--plugin linear.py --attack pgd:steps=5 --certify linear {SMALL} --csv board.csv")
    assert ran.code == 0
    board = pd.read_csv("board.csv").iloc[0]
    assert 0 < board["certified_accuracy"] <= board["robust_accuracy"] <= board["clean_accuracy"]
    assert board["certifiers"] == "linear"
    head = next(line for line in ran.out.splitlines() if "rank" in line)
    assert head.index("clean") < head.index("certified [95 %]") < head.index("robust [95 %]")
    assert "certified [95 %]" not in bench(f"--attack fgsm {SMALL} --out other").out
    monkeypatch.setenv("COLUMNS", "80")
    for narrow in (bench("leaderboard runs"), bench(f"{CERTIFY} {SMALL}")):
        assert narrow.code == 0
        assert max(map(len, narrow.out.splitlines())) <= 80
        assert re.search(r" clean +(proved|certified) ", narrow.out, re.MULTILINE)


@pytest.mark.parametrize(
    "line",
    [
        f"--plugin linear.py --attack fgsm --certify linear:lie=1e6 {OWN} --eps 0.3",
        f"{CERTIFY}:lie=1e6 {OWN} --eps 0.3",
        "--plugin linear.py leaderboard runs",
    ],
)
def test_a_certificate_that_an_attack_breaks_stops_the_line(bench, line):
    bench(f"--attack fgsm {OWN} --eps 0.3 --rows rows.csv")
    if "leaderboard" in line:
        bench(f"{CERTIFY}:lie=1e6 {OWN} --eps 0.3")
    ran = bench(line)
    assert ran.code == 1
    violations = [one for one in ran.errors if one.startswith("violation: ")]
    rows = pd.read_csv("rows.csv").query("status == 'broken'")["row"].tolist()
    assert len(rows) > 5
    assert violations == [
        f"violation: input {row} of digits, none: linear:lie=1000000.0 certifies linf:0.3 (seed 0), "
        "but fgsm (seed 0) found an adversarial at 0.3"
        for row in rows
    ]


def test_a_certifier_that_falls_over_or_covers_nothing(bench):
    ran = bench(f"{CERTIFY}:fail=true {SMALL}")
    assert ran.code == 1
    assert ran.errors[-1] == f"unknown: {40 * clean_accuracy(40):.0f} x error: RuntimeError: no [red]luck[/red]"
    text = bench(f"{CERTIFY} {SMALL} --model model.py:flat")
    assert text.code == 0
    assert text.errors[-1] == "note: certifier linear does not cover none: not linear"
    assert bench("certify").errors == ["robust-bench: error: Missing option '--method'."]
    wrong = bench(f"certify --method lineer {SMALL}")
    assert wrong.code == 2
    assert "no certifier 'lineer'" in wrong.errors[-1]


# Help, and how soon it comes


HEAVY = ("torch", "numpy", "pandas", "scipy", "foolbox", "cvxpy", "sklearn", "matplotlib")


def test_help_imports_nothing_heavy():
    watch = (
        "import sys; from robustbench_lite.cli import main; code = main();"
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )
    done = process("--help", "-c", watch)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert "--save-adversarials" in done.stdout
    assert done.stderr == ""


def test_the_first_line_is_printed_before_torch_is_imported():
    start = "import sys; sys.modules['torch'] = None; from robustbench_lite.cli import main; main()"
    done = process("--attack pgd --defense madry", "-c", start)
    assert done.stderr.splitlines()[0] == "robust-bench 0.1.0: pgd on madry, mnist"
    assert "import of torch halted" in done.stderr


def test_help_and_version(bench):
    text = bench("--help")
    assert text.code == 0
    options = (
        "attack defense certify dataset threat norm eps n target plugin model weights mean std bounds probabilities "
        "seed device batch data-dir out fresh csv table matrix rows save-adversarials fail-below json quiet verbose "
        "version"
    )
    commands = "train certify curve leaderboard compare attacks defenses certifiers datasets models cache doctor"
    for option in options.split():
        assert re.search(rf"--{option}\b", text.out)
    for command in commands.split():
        assert re.search(rf"^\W+{command}\b", text.out, re.MULTILINE)
        assert bench(f"{command} -h").code == 0
    assert bench("-h").out == bench("").out == text.out
    assert bench("--version") == (0, "robust-bench 0.1.0\n", "")


def test_as_a_module(place):
    done = process(f"--attack fgsm {OWN} --json --quiet")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)[0]["examples"] == 40
    wrong = process("--attack pgd --n x")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "robust-bench: error: --n wants a whole number or all, not 'x'\n"


# Mistakes: one line, exit code 2, nothing lost, nothing written

NOWHERE = "cuda" if not torch.cuda.is_available() else "mps"

AT_ONCE = {  # said before anything else is printed or loaded
    "--nonsense": "No such option: --nonsense",
    "nonsense": "No such command 'nonsense'",
    "--attack": "Option '--attack' requires an argument",
    "--seed x": "Invalid value for '--seed'",
    f"{PGD} --n 0": "--n must be 1 or more, not 0",
    f"{PGD} --n -3": "--n must be 1 or more, not -3",
    f"{PGD} --n x": "--n wants a whole number or all, not 'x'",
    f"{PGD} --n ²": "--n wants a whole number or all, not '²'",
    "--n x": "--n wants a whole number or all, not 'x'",
    f"{PGD} --batch 0": "--batch must be 1 or more, not 0",
    f"{PGD} --batch few": "--batch wants a whole number or auto, not 'few'",
    f"{PGD} --target up": "--target wants a class's number, next, random or least-likely, not 'up'",
    f"{PGD} --mean 1,x": "--mean wants numbers with commas between, not '1,x'",
    f"{PGD} --bounds 255": "--bounds wants LOW:HIGH, as 0:255, not '255'",
    f"{PGD} --bounds 1:0": "--bounds wants LOW below HIGH, not 1:0",
    f"{PGD} --fail-below 2": "--fail-below is a fraction between 0 and 1, not 2",
    f"{PGD} --fail-below nan": "--fail-below is a fraction between 0 and 1, not nan",
    f"{PGD} --fail-below x": "Invalid value for '--fail-below'",
    f"{PGD} --threat linf:0.1 --eps 0.1": "--threat names whole threat models; leave out --norm and --eps",
    f"{PGD} --csv no/board.csv": "there is no folder no to write board.csv into",
    f"{PGD} --matrix no/m.csv": "there is no folder no to write m.csv into",
    f"{PGD} --rows no/r.csv": "there is no folder no to write r.csv into",
    f"{PGD} --save-adversarials no/x.npz": "there is no folder no to write x.npz into",
    f"{PGD} --csv .": ". is a folder; name a file to write",
    f"{PGD} --attack ''": "an empty item in ''",
    f"{PGD} --attack pgd,,fgsm": "an empty item in 'pgd,,fgsm'",
    f"{PGD} --attack steps=3": "in 'steps=3' a name must come before 'steps=3'",
    f"{PGD} --attack (pgd": "unbalanced parentheses in '(pgd'",
    f"{PGD} --plugin none.py": "no plugin file 'none.py'",
    f"{PGD} --plugin data.npz": "a plugin file ends in .py, not 'data.npz'",
    f"{PGD} --plugin bad_plugin.py": "bad_plugin.py:2: NameError: name 'nonsense' is not defined",
    f"{PGD} --plugin bad_syntax.py": "bad_syntax.py:1: SyntaxError:",
    "train --out w": "Missing option '--defense'",
    "train --defense standard --out no/w": "there is no folder no to write w into",
    "train --defense standard --out .": ". is a folder; name a file to write",
    "leaderboard": "Missing argument",
    "leaderboard none --table b.xlsx": "--table writes .md, .tex, .json; b.xlsx ends in none of them",
    f"{PGD} --table board": "--table writes .md, .tex, .json; board ends in none of them",
    "compare none none": "there are no results in none",
    "leaderboard none": "there are no results in none",
    "leaderboard model.py": "there are no results in model.py",
    "attacks pdg": "no attack 'pdg'; did you mean pgd? There are: ",
    "defenses madri": "no defense 'madri'; did you mean madry? There are: ",
}
LATER = {  # said after the line that says what is about to run
    f"{PGD} --attack pdg": "no attack 'pdg'; did you mean pgd? There are: ",
    f"{PGD} --attack pgd:step=3": "attack pgd has no setting 'step'; did you mean steps? It has: steps, length, ",
    f"{PGD} --attack pgd:steps=many": "attack pgd: steps wants a whole number, not 'many'",
    f"{PGD} --attack pgd:steps=2.5": "attack pgd: steps wants a whole number, not '2.5'",
    f"{PGD} --attack pgd:steps=0": "attack pgd: steps and restarts must be 1 or more",
    f"{PGD} --attack pgd:loss=cw": "attack pgd: loss wants ce or margin, not 'cw'",
    f"{PGD} --attack pgd:steps": "in 'pgd:steps' the setting 'steps' has no '='",
    "--defense madri --dataset digits": "no defense 'madri'; did you mean madry? There are: ",
    "--defense madry:eps=x --dataset digits": "defense madry: eps wants a number or none, not 'x'",
    "--defense madry:eps=-1 --dataset digits": "defense madry: eps must be above 0, not -1",
    "--defense none --dataset digits": "defense none needs a trained model: --model FILE.py:factory, or --weights FILE",
    "--plugin trouble.py --defense same --dataset digits": "defense same guards a trained model; write standard+same",
    "--defense standard+madry --dataset digits": "defense madry trains a model, but only the first of a chain trains",
    f"{PGD} --defense madry": "defense madry trains a model, but the model is evaluated as it is",
    "--dataset digit": "no data set 'digit'; did you mean digits? There are: cifar10, digits, ",
    "--dataset fashion-mnist --data-dir none": "no folder none to read data from",
    f"{PGD} --n 600": "n must be 1 to 599 (the test images of digits), not 600",
    f"{PGD} --eps -0.1": "linf: eps must be 0 or more, not -0.1",
    f"{PGD} --eps 8": "linf: eps 8 is above 1, but pixels run from 0 to 1; did you mean 8/255?",
    f"{PGD} --norm l2 --eps 100": "l2:100: eps is above the range; two images of digits differ by at most 8",
    f"{PGD} --eps much": "'much' is not a number; write 0.3 or 8/255",
    f"{PGD} --eps ''": "'' is not a number; write 0.3 or 8/255",
    f"{PGD} --eps 1/0": "'1/0' is not a number; write 0.3 or 8/255",
    f"{PGD} --eps nan": "linf: eps must be 0 or more, not nan",
    f"{PGD} --norm l7 --eps 1": "no norm 'l7'; there are: linf, l2, l1, l0, patch",
    f"{PGD} --threat l0:3": "none of the attacks runs under l0:3",
    f"{PGD} --device {NOWHERE}": f"no device '{NOWHERE}' here; there are: ",
    f"{PGD} --target 99": "target 99 is no class; the model knows 0 to 9",
    f"{PGD} --target -1": "target -1 is no class; the model knows 0 to 9",
    f"{PGD} --out model.py": "cannot write to the results folder model.py: ",
    f"{PGD} --out model.py/runs": "cannot write to the results folder model.py/runs: ",
    f"{PGD} --model none.py:f": "model 'none.py:f': there is no file none.py",
    f"{PGD} --model model.py": "model 'model.py': it names no function; write model.py:NAME",
    f"{PGD} --model model.py:none": "model 'model.py:none': model.py has no function 'none'",
    f"{PGD} --model model.py:broken": "model 'model.py:broken' could not be made: RuntimeError: no luck",
    f"{PGD} --model model.py:seven": "model 'model.py:seven' returned a int, not an nn.Module",
    f"{PGD} --model bad_plugin.py:f": "model 'bad_plugin.py:f' could not be made: NameError:",
    f"{PGD} --model bad_syntax.py:f": "model 'bad_syntax.py:f' could not be made: SyntaxError:",
    f"{PGD} --model no.package:f": "model 'no.package:f' could not be made: ModuleNotFoundError:",
    f"{PGD} --model model.py:wide": "the model must return logits of shape (32, classes), not (32, 1, 8, 8)",
    f"{PGD} --model model.py:nan": "the model returns NaN or infinite logits, first for input 0",
    f"{PGD} --model model.py:failing": "the model raises on inputs of shape (32, 1, 8, 8): ZeroDivisionError:",
    f"{PGD} --model model.py:softmax": "probabilities, not logits; remove the softmax, or say --probabilities",
    f"{PGD} --model model.py:narrow": "labels out of range: 9, but the model knows 3 classes",
    f"{PGD} --model mlp --weights none.pt": "there is no weights file none.pt",
    f"{PGD} --model mlp --weights model.py": "model.py is no safetensors file and no torch state dict",
    f"{PGD} --std 0": "std must be above 0, not 0",
    "--model nonsense --dataset digits --defense standard:epochs=1": "no model 'nonsense'",
    "--model model.py:means --dataset npz:labels.npz --eps 0.1": "labels out of range: y runs from -1 to 3",
    "--model model.py:means --dataset npz:cut.npz --eps 0.1": "cut.npz: not an .npz file, or a truncated one",
    "--model model.py:means --dataset npz:none.npz --eps 0.1": "no file none.npz",
    "--model model.py:means --dataset npz:data.npz": "no customary eps for npz:data.npz under linf; give an",
    "--model model.py:means --dataset npz:data.npz --eps 0.1 --n 5": "n must be 1 to 4 (the test images of ",
    "train --defense madri --dataset digits --out w": "no defense 'madri'; did you mean madry? There are: ",
    "train --defense none --dataset digits --out w": "defense none needs a trained model",
    "train --defense standard --dataset digit --out w": "no data set 'digit'; did you mean digits?",
    "train --defense standard --dataset digits --model model.py:means --out w": "train builds an architecture by name",
    "train --defense standard --dataset digits --out w --model nonsense": "no model 'nonsense'",
    "--plugin trouble.py train --defense standard:epochs=1+same --dataset digits --out w": "train takes one recipe",
}


@pytest.fixture
def mistakes(bench, place):
    """Files with which something is wrong; runs a line that is, and sees that it leaves no trace."""
    x = np.zeros((4, 1, 8, 8), np.uint8)
    np.savez("data.npz", x=x, y=np.arange(4))
    np.savez("labels.npz", x=x, y=np.array([0, 1, 3, -1]))
    Path("cut.npz").write_bytes(Path("data.npz").read_bytes()[:200])
    Path("bad_plugin.py").write_text("import torch\nnonsense\n")
    Path("bad_syntax.py").write_text("def f(:\n")

    def run(line: str) -> Ran:
        before = files(place)
        ran = bench(line)
        assert ran.code == 2
        assert ran.out == ""
        assert files(place) == before
        return ran

    return run


@pytest.mark.parametrize("line", AT_ONCE)
def test_a_mistake_in_the_options_is_one_line(mistakes, line):
    [error] = mistakes(line).errors
    assert error.startswith(f"robust-bench: error: {AT_ONCE[line]}")


@pytest.mark.parametrize("line", LATER)
def test_a_mistake_found_on_the_way_is_one_line(mistakes, line):
    """After the line that says what is about to run; alone when quiet."""
    [error] = mistakes(f"{line} --quiet").errors
    assert error.startswith("robust-bench: error: ")
    assert LATER[line] in error
    first, *notes, last = mistakes(line).errors
    assert first.startswith("robust-bench 0.1.0: ")
    assert last == error
    assert all(note.startswith("note: ") for note in notes)


@pytest.mark.parametrize("line", ["--attack pdg", "--attack pgd:steps=x", "--defense madri", "--attack fgsm,all,pdg"])
def test_unknown_names_need_no_data(mistakes, monkeypatch, line):
    def load(*_):
        raise AssertionError("read or downloaded data")

    monkeypatch.setattr(data, "load", load)
    [error] = mistakes(f"{line} --dataset cifar10 --quiet").errors
    assert "did you mean" in error or "wants a whole number" in error


def test_a_message_of_several_lines_is_one(mistakes):
    assert mistakes(f"{PGD} --dataset 'npz:no\nne.npz' --quiet").err == "robust-bench: error: no file no ne.npz\n"


def test_a_cache_that_cannot_be_written_is_one_line(mistakes, monkeypatch):
    monkeypatch.setenv("ROBUST_BENCH_CACHE", "model.py")
    line = "--attack fgsm --defense standard:epochs=1 --dataset digits --quiet"
    [error] = mistakes(line).errors
    assert error.startswith("robust-bench: error: [Errno ")
    assert "model.py/trained" in error


def test_results_that_are_there_survive_a_mistake(bench):
    bench(f"{PGD} --csv board.csv")
    before = {**files(Path("runs")), Path("board.csv"): Path("board.csv").read_bytes()}
    assert bench(f"{PGD.replace('means', 'nan')} --csv board.csv").code == 2
    assert bench(f"{PGD} --target 99 --csv board.csv --fresh").code == 2
    assert {**files(Path("runs")), Path("board.csv"): Path("board.csv").read_bytes()} == before


# Names from elsewhere are text

MARKUP = ["[red]x[/red]", "[/]", "[bold]", ":smile:", "[link=x]y[/link]"]


UNKNOWN = (
    "--dataset 'npz:{}' --quiet",
    f"{PGD} --model '{{}}.py:f' --quiet",
    f"{PGD} --model 'model.py:{{}}' --quiet",
    f"{PGD} --target '{{}}' --quiet",
    f"{PGD} --csv '{{}}/x/y.csv' --quiet",
    "--plugin '{}.py'",
    "attacks '{}'",
    "leaderboard '{}'",
    "'{}'",
    "--attack '{}' --quiet",
    "--defense '{}' --quiet",
    f"{PGD} --threat '{{}}:0.1' --quiet",
    "train --defense '{}' --dataset digits --out w --quiet",
)


@pytest.mark.parametrize("name", MARKUP)
def test_markup_in_a_name_that_is_unknown(mistakes, name):
    for line in UNKNOWN:
        spec = "--attack '" in line or "--defense" in line or "--threat" in line
        [error] = mistakes(line.format(name)).errors
        assert error.startswith("robust-bench: error: ")
        assert (name.partition(":")[0] if spec else name) in error


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", MARKUP)
def test_markup_in_a_name_that_is_known(bench, monkeypatch, name, terminal):
    """Paths and a setting's text, in the first line, in notes, progress, tables and the last line."""
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    folder = Path(name)
    folder.mkdir(parents=True)
    x, y = load_digits(return_X_y=True)
    np.savez(folder / "d.npz", x=(x[:20] / 16).astype(np.float32), y=y[:20])
    (folder / "m.py").write_text(MODEL)
    spec = f"mine:label=({name})"
    ran = bench(
        f"--plugin mine.py --attack '{spec},fgsm' --threat linf:0.1,l2:0.1 --dataset 'npz:{name}/d.npz' "
        f"--model '{name}/m.py:training' --out '{name}/runs' --csv '{name}/b.csv' --matrix m.csv --verbose"
    )
    assert ran.code == 0
    out, err = (re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text) for text in (ran.out, ran.err))
    assert f"mine:label=({name}), fgsm on {name}/m.py:training, npz:{name}/d.npz" in err
    assert f"note: model {name}/m.py:training was in training mode" in err
    shown = spec if ":" in name or "=" in name else f"mine:label={name}"
    assert f"note: attack {shown} is left out under l2:0.1" in err
    assert f"{shown} on none, linf:0.1: 20 inputs" in err
    assert shown in out
    assert f"npz:{name}/d.npz, linf eps 0.1" in out
    assert f"Results are in {name}/runs, {name}/b.csv, m.csv" in out
    assert ("\x1b[" in ran.out) == terminal
    assert shown in pd.read_csv("m.csv").columns
    again = bench(f"leaderboard '{name}/runs'")
    assert again.code == 0
    assert shown in re.sub(r"\x1b\[[0-9;]*m", "", again.out)


@pytest.mark.parametrize("label", ["plain", "[red]x[/red]", "[/]"])
def test_progress_on_a_terminal_names_what_runs(bench, monkeypatch, label):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    line = f"--plugin mine.py --attack mine:label={label} {OWN} --n 100"
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", bench(line).err)
    assert re.search(rf"mine:label={re.escape(label)} on none, linf:0.1 .*100/100 .* left", shown)
    assert "100/100" not in bench(f"{line} --quiet").err
