"""Defenses that answer at random: gradients over several draws, a vote that judges, and one answer for one key."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.audit import findings
from robustbench_lite.certifying import certify_inputs
from robustbench_lite.defended import Defended, ask, ask_finally
from robustbench_lite.entries import Entry, Probe, by_draw
from robustbench_lite.evaluation import Bench, check, evaluate
from robustbench_lite.matrix import benchmark, load
from robustbench_lite.models import build
from robustbench_lite.noise import Noise
from robustbench_lite.probing import probe
from robustbench_lite.problem import Budget, Problem
from robustbench_lite.threat import Goal, ThreatModel
from tests.nets import Halfspace, halfspace
from tests.outcomes import assert_same, made


class Shaken(Defended):
    """Adds noise of deviation ``size`` to the margin of two classes."""

    stochastic = True

    def __init__(self, model: nn.Module, size: float, draws: int = 51) -> None:
        super().__init__(model)
        self.size, self.draws = size, draws

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        logits = self.within(x)
        assert noise is not None
        return logits + self.size * noise.at("shaken").normal(logits[:, :1]) * torch.tensor([0.5, -0.5]).to(logits)


class Tilted(Defended):
    """Adds a random linear function that is zero on average, and so large that one gradient says nothing."""

    stochastic = True
    draws = 400

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        assert noise is not None
        way = noise.at("tilt").signs(x) * 3
        extra = (way * (x - x.detach())).flatten(1).sum(1, keepdim=True)
        return self.within(x) + torch.cat([extra, -extra], 1)


def line(distance: float, count: int = 20) -> Halfspace:
    """Inputs whose margin is ``2 * distance`` times the length of the weights."""
    return halfspace("l2", distance, count=count, shape=(1, 4, 4))


def margins(found: Halfspace) -> Tensor:
    logits = found.model(found.x).detach()
    return (logits.gather(1, found.y.unsqueeze(1)) - logits.gather(1, 1 - found.y.unsqueeze(1)))[:, 0]


def problem(model: Defended, found: Halfspace, **settings) -> Problem:
    keyed = Noise(0, torch.arange(len(found.x)))
    return Problem(model, found.x, Goal(found.y), ThreatModel.parse("l2:0.5"), keyed, classes=2, **settings)


def test_the_vote_is_as_likely_as_worked_out_by_hand():
    found = line(0.3, count=200)
    size = float(margins(found).mean()) / NormalDist().inv_cdf(0.7)  # seven draws in ten are right
    model = Shaken(found.model, size, draws=100)
    answers = ask_finally(model, found.x, 64, Noise(0, torch.arange(200)))
    right = answers.gather(1, found.y.unsqueeze(1))
    torch.testing.assert_close(answers.sum(1), torch.ones(200))
    assert abs(float(right.mean()) - 0.7) < 4 * math.sqrt(0.21 / 20000)
    assert torch.equal(answers[50:60], ask_finally(model, found.x[50:60], 3, Noise(0, torch.arange(50, 60)).at("x")))
    assert not torch.equal(answers, ask_finally(model, found.x, 64, Noise(1, torch.arange(200))))


def test_gradients_are_those_of_the_mean_probability_and_every_draw_is_charged():
    found = line(0.3, count=5)
    model, keyed = Shaken(found.model, 2.0, draws=7), Noise(0, torch.arange(5))
    asked = problem(model, found)
    gradient, logits = asked.gradient(found.x)
    x = found.x.clone().requires_grad_()
    streams = [Noise(0, torch.arange(5) + (draw << 32)).at("query") for draw in range(7)]
    mean = torch.stack([model(x, stream).softmax(1) for stream in streams]).mean(0)
    torch.testing.assert_close(logits.exp(), mean)
    loss = -mean.gather(1, found.y.unsqueeze(1)).log().sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, x)[0])
    assert (asked.forwards.tolist(), asked.backwards.tolist()) == ([7] * 5, [7] * 5)
    keyed = Noise(0, torch.arange(5) + (7 << 32)).at("query")
    torch.testing.assert_close(asked.logits(found.x), model(found.x, keyed))  # one draw, the eighth, for who has no use
    assert asked.forwards.tolist() == [8] * 5


def test_a_budget_is_never_overdrawn_by_draws():
    found = line(0.3, count=3)
    asked = problem(Shaken(found.model, 0.1, draws=4), found, budget=Budget(10))
    rounds = 0
    while asked.open.any():
        asked.gradient(found.x)
        rounds += 1
    assert (rounds, asked.forwards.tolist()) == (2, [8, 8, 8])


def test_a_lucky_draw_is_no_hit():
    """Three draws in ten are wrong: thirty queries of labels meet nine of them, and the vote none."""
    found = line(0.3)
    size = float(margins(found).mean()) / NormalDist().inv_cdf(0.7)
    model = Shaken(found.model, size, draws=101)
    asked = problem(model, found, access="labels")
    wrong = sum(int((asked.labels(found.x) != found.y).sum()) for _ in range(30))
    assert abs(wrong - 180) < 4 * math.sqrt(600 * 0.21)
    assert asked.open.all()
    outcome = evaluate("boundary:queries=300", model, found.x, found.y, "l2:0.05")
    assert (outcome.status == "held").all()


def test_the_vote_is_broken_where_the_median_crosses_and_not_before():
    found = line(0.3)
    model = Shaken(found.model, float(margins(found).mean()) / 4, draws=101)
    near, far = (evaluate("pgd:steps=10", model, found.x, found.y, f"l2:{eps}", eot=8) for eps in (0.27, 0.33))
    assert (near.status == "held").all()
    assert (far.status == "broken").all()
    assert (near.share[near.status == "held"] > 0.5).all()
    assert (far.share < 0.5).all()


def test_one_gradient_says_nothing_where_many_do():
    found = line(0.3, count=40)
    model = Tilted(found.model)
    one, many = (evaluate("pgd:steps=20", model, found.x, found.y, "l2:0.4", eot=eot) for eot in (1, 64))
    assert (one.status == "broken").mean() < 0.5 < 0.9 < (many.status == "broken").mean()


def test_the_answer_does_not_depend_on_the_batch():
    found = line(0.3, count=12)
    model = Shaken(found.model, 0.5, draws=5)
    for attack in ("pgd:steps=4", "square:queries=30"):
        whole = evaluate(attack, model, found.x, found.y, "l2:0.3")
        parts = [
            evaluate(attack, model, found.x[part], found.y[part], "l2:0.3", batch=100, first_row=part.start)
            for part in (slice(0, 5), slice(5, 12))
        ]
        assert_same(whole, type(whole).join(parts), but=["seconds"])


def test_a_wrapper_around_chance_is_left_to_chance():
    found = line(0.3)
    outer = Defended(Shaken(found.model, 1.0, draws=9))
    assert (outer.stochastic, outer.draws) == (True, 9)
    keyed = Noise(0, torch.arange(20))
    assert torch.equal(outer(found.x, keyed), outer.model(found.x, keyed))
    with pytest.raises(ValueError, match="at random"):
        ask(outer, found.x, 20)
    assert not Defended(found.model).stochastic


def test_bounds_do_not_cover_chance():
    found = line(0.3)
    for certifier, norm in (("crown", "l2"), ("lp", "linf"), ("lipschitz", "l2")):
        proved = certify_inputs(certifier, Shaken(found.model, 0.01), found.x, found.y, f"{norm}:0.01")
        assert set(proved.status.tolist()) == {"unsupported"}, certifier
        assert "Shaken" in proved.reason[0] if certifier == "lipschitz" else "at random" in proved.reason[0]


def test_a_declared_draw_is_no_flaw():
    found = line(0.3)
    model, rows = Shaken(found.model, 0.1), torch.arange(20)
    bench = Bench(model, ThreatModel.parse("l2:0.5"), check(model, found.x, found.y, ThreatModel.parse("l2:0.5")))
    probed = probe(bench, found.x, found.y, rows)
    assert (probed.moved == 0).all()
    assert (probed.clean == probed.again).all()
    row = {"dataset": "d", "defense": "shaken", "model": "m", "parameters": 1, "norm": "l2", "eps": 0.5, "seed": 0}
    found = findings([Entry(**row, attack="pgd", outcome=made("b" * 20))], [Probe(**row, probed=probed, classes=2)])
    assert "random" not in {finding.flag for finding in found}


def test_the_figures_of_a_single_draw_by_hand():
    """Of four inputs two are never right under the worst attack, one half of the time, one always."""
    one = made("hhhb", share=[0.5, np.nan, 1.0, 0.0])
    two = made("hbhb", share=[0.8, 0.0, 1.0, 0.0])
    found = by_draw([one, two])
    assert found == {"draw_mean": (0.5 + 0 + 1 + 0) / 4, "draw_std": 0.5 / 4}
    lost = replace(one, status=np.array(["unknown", "held", "held", "broken"]))
    assert by_draw([lost])["draw_mean"] == (0 + 1 + 1 + 0) / 4


SETTINGS = {
    "attacks": ["pgd:steps=3", "square:queries=20"],
    "defenses": "smoothed:sigma=0.1,draws=5",
    "dataset": "digits",
    "threats": ["linf:0.01"],
    "n": 150,
    "model": build("mlp", (1, 8, 8), 10),
}


def test_a_run_says_what_one_draw_is_worth_and_another_eot_is_another_cell(tmp_path: Path):
    one, again = benchmark(out=tmp_path, **SETTINGS), benchmark(out=tmp_path, **SETTINGS)
    pd.testing.assert_frame_equal(one.rows(), again.rows())
    (row,) = one.leaderboard().to_dict("records")
    assert row["draws"] == 5
    assert 0 < row["draw_std"] < 0.05
    assert row["flags"] == ""
    other = benchmark(out=tmp_path, eot=2, **SETTINGS)
    pgd, pgd2 = one.entries[0].outcome, other.entries[0].outcome
    assert pgd.backwards.max() == 15
    assert pgd2.backwards.max() == 6
    names = [entry.attack for entry in load(tmp_path).entries]
    assert sorted(names) == ["pgd:steps=3", "pgd:steps=3 (eot 2)", "square:queries=20"]


def test_workers_change_no_byte(tmp_path: Path):
    one = benchmark(out=tmp_path / "one", **SETTINGS)
    two = benchmark(out=tmp_path / "two", workers=2, **SETTINGS)
    pd.testing.assert_frame_equal(one.rows().drop(columns="seconds"), two.rows().drop(columns="seconds"))


def test_eot_below_one_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="eot must be 1 or more, not 0"):
        benchmark(out=tmp_path, eot=0, **SETTINGS)
