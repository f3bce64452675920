"""Security curves: exact where every distance is known, one run where one is enough, and files that others read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from robustbench_lite import cli
from robustbench_lite.chance import wilson
from robustbench_lite.curves import ALL, CURVES, curves, grid, plot
from robustbench_lite.entries import Entry
from robustbench_lite.matrix import benchmark, load
from robustbench_lite.outcome import Unfinished
from robustbench_lite.problem import Access, Problem
from tests.nets import halfspace, many_classes, nearest
from tests.outcomes import made

SETTING: dict = {"dataset": "digits", "defense": "madry", "model": "mlp", "parameters": 10, "norm": "linf", "seed": 0}


def stored(x: Tensor, y: Tensor) -> str:
    np.savez("data.npz", x=x.numpy(), y=y.numpy())
    return "npz:data.npz"


def accuracy(frame: pd.DataFrame, attack: str) -> dict[float, float]:
    rows = frame[frame["attack"] == attack]
    return dict(zip(rows["eps"], rows["robust_accuracy"]))


# Against distances that are known

DISTANCES = {"linf": (0.02, 0.05, 0.09), "l2": (0.15, 0.4, 0.6)}


@pytest.mark.parametrize("norm", DISTANCES)
def test_the_curve_steps_where_the_distances_are(place, norm: str):
    """30 inputs, ten at each distance, and one in ten mislabelled."""
    spaces = [halfspace(norm, distance, count=10) for distance in DISTANCES[norm]]
    x, y = torch.cat([space.x for space in spaces]), torch.cat([space.y for space in spaces])
    y[::10] = 1 - y[::10]
    around = [distance * factor for distance in DISTANCES[norm] for factor in (0.97, 1.03)]
    attacks = ["pgd:steps=20", "deepfool", *["cw:search_steps=5,steps=100"] * (norm == "l2")]
    results = benchmark(
        attacks,
        dataset=stored(x, y),
        threats=[f"{norm}:{eps!r}" for eps in around],
        n=None,
        model=spaces[0].model,
        probe=False,
    )
    frame = results.curves()
    exact = dict(zip([0.0, *around], [0.9, 0.9, 0.6, 0.6, 0.3, 0.3, 0.0]))
    assert set(frame["attack"]) == {*attacks, ALL}
    for attack in (*attacks, ALL):
        assert accuracy(frame, attack) == pytest.approx(exact), attack
    assert (frame["robust_low"][1], frame["robust_high"][1]) == wilson(27, 30)
    assert len(list(place.glob("runs/cells/*/cell.json"))) == 6 + len(attacks) - 1


def test_the_curve_of_many_classes_is_the_share_that_lies_further(place):
    model, x, y = many_classes(5, 40)
    distance = nearest(model, x, "linf").sort().values
    apart = (distance[1:] > 1.1 * distance[:-1]).nonzero()[:, 0]  # a gap wide enough to name an eps in
    between = (distance[apart] * 1.05).tolist()
    assert len(between) > 5
    threats = [f"linf:{eps!r}" for eps in between]
    frame = benchmark("fab", dataset=stored(x, y), threats=threats, n=None, model=model, probe=False).curves()
    further = [1.0, *(1 - (apart + 1) / len(x)).tolist()]
    assert list(accuracy(frame, "fab").values()) == pytest.approx(further)


# What is known at one eps counts at others


def entry(attack: str, eps: float, letters: str, distance: list[float] | None = None, **others: object) -> Entry:
    columns = {} if distance is None else {"distance": distance}
    return Entry(**{**SETTING, **others}, eps=eps, attack=attack, outcome=made(letters, **columns))


INF = float("inf")


def test_what_breaks_at_one_eps_is_broken_from_its_size_on():
    """Input 1 breaks at 0.1 alone; input 2, in the run at 0.3, by a point of size 0.15; input 3 just above 0.2."""
    found = [
        entry("pgd", 0.1, "hbhhw", [INF, 0.1, INF, INF, INF]),
        entry("pgd", 0.2, "hhhhw"),
        entry("pgd", 0.3, "hhbbw", [INF, INF, 0.15, 0.2000001, INF]),
    ]
    frame = curves(reversed(found))
    assert accuracy(frame, "pgd") == {0: 0.8, 0.1: 0.6, 0.2: 0.4, 0.3: 0.2}
    assert accuracy(frame, ALL) == accuracy(frame, "pgd")
    assert set(frame["unknown"]) == {0}


def test_the_union_knows_what_each_attack_found_and_no_attack_what_another_did():
    fab = entry("fab", 0.1, "bhh", [0.05, INF, INF])
    frame = curves([fab, entry("pgd", 0.1, "hhh"), entry("pgd", 0.2, "hbh", [INF, 0.2, 0])])
    left = {(row["attack"], row["eps"]): round(3 * row["robust_accuracy"]) for _, row in frame.iterrows()}
    alone = {("fab", 0): 3, ("fab", 0.1): 2, ("pgd", 0): 3, ("pgd", 0.1): 3, ("pgd", 0.2): 2}
    assert left == alone | {(ALL, 0): 3, (ALL, 0.1): 2, (ALL, 0.2): 1}


def test_nobody_vouches_for_an_unknown_input_at_a_larger_eps():
    frame = curves([entry("pgd", 0.1, "uuh"), entry("pgd", 0.2, "hbh", [INF, 0.2, INF])])
    rows = frame[frame["attack"] == "pgd"]
    assert rows["robust_accuracy"].tolist() == pytest.approx([1, 1 / 3, 1 / 3])
    assert rows["unknown"].tolist() == [0, 2, 1]


def test_an_input_that_no_attack_was_run_on_is_not_robust_and_another_label_than_the_target_breaks_it_for_all():
    strayed = entry("pgd to 3", 0.1, "hsh", [np.nan, np.nan, np.nan])
    strayed.outcome.adversarial[2] = 4
    assert accuracy(curves([strayed]), "pgd to 3") == {0: 1, 0.1: pytest.approx(1 / 3)}


def test_curves_are_apart_by_model_seed_norm_and_what_the_attack_knows():
    others = [{"defense": "b"}, {"subject": "x"}, {"seed": 1}, {"norm": "l2"}, {"adaptive": False}]
    frame = curves([entry("pgd", 0.1, "hh"), *(entry("pgd", 0.1, "bb", [0.1, 0.1], **other) for other in others)])
    assert frame["robust_accuracy"].tolist() == [1] * 4 + [1, 0, 1, 0] * 5


def test_every_point_is_over_the_same_inputs():
    frame = curves([entry("pgd", 0.1, "hhhh"), entry("pgd", 0.2, "bh", [0.2, INF])])
    assert set(frame["examples"]) == {2}


# One run


@dataclass(frozen=True)
class Nearest:
    """Of a linear model, the nearest point but for a hair; or, on a bad day, no answer."""

    name: ClassVar[str] = "nearest"
    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    minimises: ClassVar[bool] = True
    calls: ClassVar[list[int]] = []
    ill: ClassVar[bool] = False

    def __call__(self, problem: Problem) -> Tensor:
        self.calls.extend(problem.noise.rows.tolist())
        if self.ill:
            raise Unfinished("no time")
        gradient, _ = problem.gradient(problem.x)
        return problem.x + 0.0501 * gradient.sign()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("ill", [False, True])
def test_an_attack_that_minimises_runs_once_for_all_eps(place, monkeypatch, fresh: bool, ill: bool):
    half = halfspace("linf", 0.05)
    monkeypatch.setattr(Nearest, "calls", [])
    monkeypatch.setattr(Nearest, "ill", ill)
    asked: dict = {"threats": ["linf:0.04", "linf:0.06", "linf:0.08"], "model": half.model, "probe": False}
    asked |= {"dataset": stored(half.x, half.y), "n": None, "fresh": fresh}
    frame = benchmark([Nearest()], **asked).curves()
    assert sorted(Nearest.calls) == list(range(20))
    assert list(accuracy(frame, "nearest").values()) == ([1, 0, 0, 0] if ill else [1, 1, 0, 0])
    assert sorted(load("runs").leaderboard()["eps"]) == [0.04, 0.06, 0.08]
    benchmark([Nearest()], **asked)
    assert len(Nearest.calls) == (40 if fresh or ill else 20)


# Which eps


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("0:0.4:0.1", [0, 0.1, 0.2, 0.3, 0.4]),
        ("0.1:0.35:0.1", [0.1, 0.2, 0.3]),
        ("0:8/255:4/255", [0, 4 / 255, 8 / 255]),
        ("0.2,0,8/255,0.2", [0, 8 / 255, 0.2]),
        ("0.3:0.3:1", [0.3]),
    ],
)
def test_a_grid_has_the_numbers_that_one_would_type(text: str, points: list[float]):
    assert grid(text) == points


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.4:0:0.1", "eps 0.4:0:0.1 is empty"),
        ("0:0.4:0", "is empty"),
        ("0:0.4", "eps wants START:STOP:STEP"),
        ("0:1:0.001", "1001 points, of at most 200"),
        ("0:1:1e-300", "points, of at most 200"),
        (",".join(map(str, range(201))), "201 points, of at most 200"),
        ("-0.1:0.3:0.1", "must be 0 or more, not -0.1"),
        ("0", "nothing above 0"),
        ("nan", "nothing above 0"),
        ("0:inf:0.1", "'inf' is not a finite number"),
        ("0:x:0.1", "'x' is not a number"),
        ("0.1,", "'' is not a number"),
        ("0:1/0:0.1", "'1/0' is not a number"),
    ],
)
def test_what_is_no_grid(text: str, said: str):
    with pytest.raises(ValueError, match=r"^.*$") as error:
        grid(text)
    assert said in str(error.value)


# The command

MODEL = """
import torch
from tests.nets import halfspace

def load():
    return halfspace("linf", 0.05).model
"""

STOPS = """
from dataclasses import dataclass
from pathlib import Path
from robustbench_lite import attack

@attack("stops")
@dataclass(frozen=True)
class Stops:
    '''Steps along the gradient; stopped by Ctrl-C once two of its cells are stored.'''
    access, norms = "gradients", frozenset({"linf"})

    def __call__(self, problem):
        if Path("stop").exists() and len(list(Path("runs").rglob("*.npz"))) == 2:
            raise KeyboardInterrupt
        gradient, _ = problem.gradient(problem.x)
        return problem.threat.step(problem.x, problem.x, gradient, problem.threat.eps)
"""

Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose inputs all lie 0.05 from the boundary."""
    monkeypatch.setenv("COLUMNS", "120")
    half = halfspace("linf", 0.05)
    stored(half.x, half.y)
    Path("model.py").write_text(MODEL)
    Path("stops.py").write_text(STOPS)


OWN = "--dataset npz:data.npz --model model.py:load"
TEXT = "{http://www.w3.org/2000/svg}text"


def test_the_command_writes_a_table_a_csv_and_a_figure_and_runs_nothing_twice(model: None, bench: Run):
    assert bench(f"--attack pgd:steps=5 --eps 0.06 --no-audit {OWN}")[0] == 0
    (first,) = Path("runs").rglob("*.npz")
    before = first.stat().st_mtime_ns
    line = f"curve --attack pgd:steps=5,deepfool --eps 0:0.09:0.03 {OWN}"
    code, out, err = bench(f"{line} --csv curve.csv --plot curve.svg")
    assert code == 0
    assert err.splitlines()[0].startswith("robust-bench 0.1.0: pgd:steps=5, deepfool at 3 eps on model.py:load")
    assert "0.03  100.0 [83.9, 100.0]  100.0 [83.9, 100.0]  100.0 [83.9, 100.0]" in out
    assert "0.06  0.0 [0.0, 16.1]      0.0 [0.0, 16.1]      0.0 [0.0, 16.1]" in out
    assert "Results are in runs, curve.csv, curve.svg" in out
    table = pd.read_csv("curve.csv")
    assert tuple(table.columns) == CURVES
    assert list(zip(table["attack"], table["eps"])) == [
        (attack, eps) for attack in ("deepfool", "pgd:steps=5", ALL) for eps in (0, 0.03, 0.06, 0.09)
    ]
    assert table["robust_accuracy"].tolist() == [1, 1, 0, 0] * 3
    assert first.stat().st_mtime_ns == before
    assert len(list(Path("runs").rglob("*.npz"))) == 4
    assert sorted(load("runs").leaderboard()["eps"]) == [0.03, 0.06, 0.09]
    assert ElementTree.parse("curve.svg").getroot().tag.endswith("svg")


def test_a_curve_of_attacks_that_are_blind_or_have_a_target(model: None, bench: Run):
    line = f"curve --attack fgsm --eps 0.06 --defense smoothed:sigma=0.01,draws=3 --eot 2 {OWN}"
    assert bench(f"{line} --adaptive both --target next --csv curve.csv")[0] == 0
    table = pd.read_csv("curve.csv")
    assert table.groupby("adaptive")["attack"].first().to_dict() == {
        False: "fgsm to next",
        True: "fgsm to next (eot 2)",
    }


def test_ctrl_c_keeps_what_is_finished(model: None, bench: Run):
    line = f"--plugin stops.py curve --attack stops --eps 0.02:0.08:0.02 {OWN}"
    assert bench(f"{line} --out peace --csv peace.csv")[0] == 0
    Path("stop").touch()
    code, _, err = bench(f"{line} --csv curve.csv")
    assert code == cli.STOPPED
    assert "kept in runs: run the same again to go on" in err
    assert not Path("curve.csv").exists()
    Path("stop").unlink()
    assert bench(f"{line} --csv curve.csv")[0] == 0
    assert Path("curve.csv").read_bytes() == Path("peace.csv").read_bytes()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--eps 0.4:0:0.1", "eps 0.4:0:0.1 is empty: from START up to STOP, by a STEP above 0"),
        ("--eps 0:2:0.5", "linf: eps 1.5 is above 1"),
        ("--eps 0.1 --norm l3", "no norm 'l3'; there are: linf"),
        ("--eps 0.1 --attack pdg", "no attack 'pdg'; did you mean pgd?"),
        ("--eps 0.1 --attack cw", "none of the attacks runs under linf:0.1"),
        ("--eps 0.1 --plot curve.jpg", "a plot is written as svg, pdf, png; curve.jpg is none of these"),
        ("--eps 0.1 --plot gone/curve.svg", "there is no folder gone"),
        ("", "Missing option '--eps'"),
    ],
)
def test_a_mistake_is_one_line(model: None, bench: Run, line: str, said: str):
    code, out, err = bench(f"curve {line} {OWN} --quiet")
    assert (code, out) == (cli.USAGE, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not Path("runs").exists()


# The figure


def test_names_are_shown_as_they_are_and_the_same_curves_make_the_same_file(tmp_path):
    names = ["$x_1$ <b> & co", "_private"]
    frame = curves([entry("pgd", eps, "hb", [INF, eps], defense=name) for name in names for eps in (0.1, 0.2)])
    plot(frame, tmp_path / "one.svg", "svg")
    plot(frame, tmp_path / "two.svg", "svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    shown = ["".join(text.itertext()).strip() for text in ElementTree.parse(tmp_path / "one.svg").iter(TEXT)]
    assert {f"pgd on {name}" for name in names} <= set(shown)
    assert {"robust accuracy (%)", "ℓ∞ perturbation (pixel range 0 to 1)"} <= set(shown)


@pytest.mark.parametrize(("kind", "magic"), [("pdf", b"%PDF"), ("png", b"\x89PNG")])
@pytest.mark.filterwarnings("error")
def test_other_formats_and_several_panels(tmp_path, kind: str, magic: bytes):
    found = [entry("pgd", 0.1, "hb", [INF, 0.1], norm=norm) for norm in ("linf", "l2", "l0", "patch")]
    plot(curves(found), tmp_path / "figure", kind)
    assert (tmp_path / "figure").read_bytes().startswith(magic)


def test_a_figure_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there are no curves to draw"):
        plot(curves([]), tmp_path / "figure", "svg")
