"""FAB: its projection against cvxpy, its first steps by hand, its distances on linear models."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_lite.attacks.fab import FAB, nearby, onto
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate, frozen
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import BROKEN, UNKNOWN
from robustbench_lite.problem import Problem
from robustbench_lite.registry import make
from robustbench_lite.threat import Goal, ThreatModel, find_norm
from tests.nets import Linear, convolutional, halfspace, many_classes, nearest

NORMS = ["linf", "l2"]


def problem(net, x, y, norm, eps=float("inf"), classes=4, minimises=True):
    threat = ThreatModel(find_norm(norm), eps)
    noise = Noise(0, torch.arange(len(x)))
    return Problem(Defended(net), x, Goal(y), threat, noise, classes=classes, minimises=minimises)


def hyperplanes(count, size, dtype=torch.float64):
    """Points of the unit cube, some coordinates at its faces, and hyperplanes; some out of reach within the cube."""
    random = torch.Generator().manual_seed(size)
    x = (1.4 * torch.rand(count, size, generator=random, dtype=torch.float64) - 0.2).clamp(0, 1)
    weight = torch.randn(count, size, generator=random, dtype=torch.float64)
    weight[:, 0] = 0
    gap = torch.randn(count, generator=random, dtype=torch.float64) * 0.4 * size
    return x.to(dtype), weight.to(dtype), gap.to(dtype)


@pytest.mark.parametrize("size", [5, 12, 30])
@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_agrees_with_cvxpy(norm, size):
    cvxpy = pytest.importorskip("cvxpy")
    x, weight, gap = hyperplanes(16, size)
    threat = ThreatModel(find_norm(norm), 1.0)
    change = onto(threat, x, weight, gap)
    assert ((x + change >= -1e-12) & (x + change <= 1 + 1e-12)).all()
    met, bound = 0, 0
    for row in range(len(x)):
        move = cvxpy.Variable(size)
        inside = [x[row].numpy() + move >= 0, x[row].numpy() + move <= 1]
        gain = weight[row].numpy() @ move
        most = cvxpy.Problem(cvxpy.Maximize(gain * float(gap[row].sign())), inside).solve(solver="CLARABEL")
        ours = float(weight[row] @ change[row])
        if most <= abs(float(gap[row])):
            assert abs(ours) == pytest.approx(most, abs=1e-6)
            continue
        met += 1
        assert ours == pytest.approx(float(gap[row]), abs=1e-9)
        length = cvxpy.norm(move, "inf" if norm == "linf" else 2)
        best = cvxpy.Problem(cvxpy.Minimize(length), [*inside, gain == float(gap[row])]).solve(solver="CLARABEL")
        assert float(threat.norm.size(change[row : row + 1])) == pytest.approx(best, abs=1e-6)
        ends = ((x[row] + change[row]) < 1e-9) | ((x[row] + change[row]) > 1 - 1e-9)
        bound += bool((ends & (change[row] != 0)).any())
    assert met >= 3
    assert bound >= 2


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_the_projection_in_float32_at_any_scale(norm, scale):
    x, weight, gap = hyperplanes(64, 200, torch.float32)
    threat = ThreatModel(find_norm(norm), 1.0)
    exact = onto(threat, x.double(), weight.double(), gap.double() / 4)
    change = onto(threat, x, weight * scale, gap / 4 * scale)
    torch.testing.assert_close(change.double(), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_of_a_row_does_not_depend_on_the_others(norm):
    x, weight, gap = hyperplanes(40, 50, torch.float32)
    threat = ThreatModel(find_norm(norm), 1.0)
    whole = onto(threat, x, weight, gap)
    alone = [onto(threat, *(part[i : i + 1] for part in (x, weight, gap))) for i in range(40)]
    assert torch.equal(torch.cat(alone), whole)


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_where_there_is_no_direction(norm):
    x = torch.full((3, 4), 0.5)
    weight, gap = torch.zeros(3, 4), torch.tensor([1.0, 0.0, -1.0])
    assert (onto(ThreatModel(find_norm(norm), 1.0), x, weight, gap) == 0).all()
    weight[1] = 1
    assert (onto(ThreatModel(find_norm(norm), 1.0), x, weight, gap) == 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_first_two_steps_by_hand(norm):
    """On a linear model with the boundary at distance d along a line, in units of d.

    Both projections reach the boundary at 1, from the clean input 0: the first step ends at 1.05, goes back to
    0.9 x 1.05 = 0.945, is then 0.055 from the boundary, so that alpha is 0.055 / 1.055, and ends at
    (1 - alpha) (0.945 + 1.05 x 0.055) + alpha 1.05.
    """
    distance = 0.1
    model, x, y = halfspace(norm, distance)
    alpha = 0.055 / 1.055
    expected = {1: 1.05, 2: (1 - alpha) * (0.945 + 1.05 * 0.055) + alpha * 1.05}
    for steps, want in expected.items():
        with frozen(model):
            asked = problem(model, x, y, norm, classes=2)
            FAB(steps=steps, search=0)(asked)
        torch.testing.assert_close(asked.distance, torch.full_like(asked.distance, want * distance), rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_alpha_stays_below_its_largest(norm):
    """From beyond the boundary by as much as before it, far and near are equal: alpha is its largest, 0.1."""
    model, x, y = halfspace(norm, 0.1, dtype=torch.float64)
    gradient = torch.ones_like(y).double()
    with frozen(model):
        asked = problem(model, x, y, norm, classes=2)
        direction = onto(asked.threat, x, (model.weight[1 - y] - model.weight[y]).view_as(x), gradient)
        direction = direction / asked.threat.norm.size(direction).view(-1, 1, 1, 1) * 0.1
        start = x + 3 * direction
        end = FAB(steps=1, beta=1.0)._walk(asked, start, 1 - y)
    torch.testing.assert_close(end, x + (0.9 * (3 - 1.05 * 2) + 0.1 * 1.05) * direction, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targets", [0, 9])
def test_finds_the_exact_distance_among_many_classes(norm, targets):
    model, x, y = many_classes(5, count=60)
    exact = nearest(model, x, norm)
    with frozen(model):
        asked = problem(model, x, y, norm, classes=5)
        FAB(steps=12, targets=targets)(asked)
    unbound = exact < 0.25  # farther out the pixel range may bind
    assert unbound.sum() >= 30
    ratio = (asked.distance / exact)[unbound]
    assert ratio.min() >= 1 - 1e-4
    assert ratio.max() <= 1.01


def test_the_nearest_boundary_need_not_be_that_of_the_runner_up():
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 20.0]])
    model = Linear(weight, torch.tensor([0.0, -0.7, -11.0]))
    x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])  # class 1 lags by 0.2 and lies 0.2 away, class 2 by 1 and 0.05
    found = {}
    for targets in (0, 1, 2):
        with frozen(model):
            asked = problem(model, x, y, "l2", classes=3)
            FAB(steps=10, targets=targets)(asked)
        found[targets] = float(asked.distance)
    assert found[1] == pytest.approx(0.2, rel=0.01)
    assert found[0] == pytest.approx(0.05, rel=0.01)
    assert found[2] == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_restarts_and_the_final_search_come_nearer(norm):
    net, x, y = convolutional(60)
    distance = {}
    for spec in ("steps=3,search=0", "steps=3", "steps=20", "steps=20,restarts=4", "steps=3,targets=0"):
        with frozen(net):
            asked = problem(net, x, y, norm)
            make("attack", f"fab:{spec}")(asked)
        distance[spec] = asked.distance
    assert all(values.isfinite().all() for values in distance.values())
    chain = ["steps=3,search=0", "steps=3", "steps=20", "steps=20,restarts=4"]
    for worse, better in pairwise(chain):
        assert (distance[better] <= distance[worse] * (1 + 1e-6)).float().mean() > 0.95
        assert distance[better].mean() < distance[worse].mean()
    assert (distance["steps=3,targets=0"] / distance["steps=3"]).median() < 1.1


@pytest.mark.parametrize("norm", NORMS)
def test_comes_as_near_as_pgd_on_a_net(norm):
    net, x, y = convolutional(100)
    eps = {"linf": 0.03, "l2": 0.2}[norm]
    theirs = evaluate(make("attack", "pgd:steps=40,restarts=3"), net, x, y, f"{norm}:{eps}")
    ours = evaluate(make("attack", "fab:steps=40"), net, x, y, f"{norm}:{eps}")
    assert 20 < (theirs.status == BROKEN).sum() < 80
    assert (ours.status == BROKEN).sum() >= (theirs.status == BROKEN).sum()


def test_restarts_begin_within_half_the_best_distance():
    net, x, y = convolutional(50)
    with frozen(net):
        asked = problem(net, x, y, "l2")
        wide = nearby(asked, "a") - x
        FAB(steps=5)(asked)
        close = nearby(asked, "a") - x
    assert (wide.flatten(1).norm(dim=1) > 0.5).all()
    assert (close.flatten(1).norm(dim=1) <= asked.distance / 2 + 1e-6).all()
    assert (close.flatten(1).norm(dim=1) > 0).all()
    finite = problem(net, x, y, "l2", eps=0.1, minimises=False)
    assert (nearby(finite, "a") - x).flatten(1).norm(dim=1).max() <= 0.05 + 1e-6


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targets", [0, 2])
def test_a_model_that_turns_to_nan_is_not_asked_about_nan(targets, norm):
    asked = []

    class Breaks(nn.Module):
        def forward(self, x):
            asked.append(bool(x.isnan().any()))
            total = x.sum(1, keepdim=True)
            return torch.cat([total * 0 + 1, total], 1) / (total < 0.95)

    x = torch.full((4, 5), 0.15) + 0.01 * torch.arange(4).view(4, 1)
    attack = make("attack", f"fab:steps=5,targets={targets}")
    outcome = evaluate(attack, Breaks(), x, torch.zeros(4, dtype=torch.long), f"{norm}:0.1")
    assert not any(asked)
    assert set(outcome.status) == {UNKNOWN}


@pytest.mark.parametrize(
    "text", ["steps=0", "restarts=0", "targets=-1", "search=-1", "alpha_max=2", "eta=0.9", "beta=0", "beta=1.5"]
)
def test_refuses_settings_that_make_no_sense(text):
    with pytest.raises(ValueError, match="fab"):
        make("attack", f"fab:{text}")


def test_costs():
    model, x, y = many_classes(4, count=10)
    for spec, forwards, backwards in (("steps=5,search=0", 1 + 3 * 10, 15), ("steps=5,targets=0,search=0", 10, 20)):
        outcome = evaluate(make("attack", f"fab:{spec}"), model, x, y, "linf:0.01")
        np.testing.assert_array_equal(outcome.forwards, forwards)
        np.testing.assert_array_equal(outcome.backwards, backwards)
