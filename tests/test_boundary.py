"""The boundary attack: where it starts, how it steps, what it costs, and how near it comes."""

import numpy as np
import pytest
import torch

from robustbench_lite.attacks.boundary import CANDIDATES, Boundary, _candidates
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate
from robustbench_lite.noise import Noise
from robustbench_lite.norms import l2
from robustbench_lite.outcome import BROKEN, UNKNOWN
from robustbench_lite.problem import Problem
from robustbench_lite.registry import make
from robustbench_lite.threat import Goal, ThreatModel
from tests.nets import Linear, convolutional, halfspace

ANYWHERE = ThreatModel(l2, 100.0)


def bright(count: int, border: float) -> Linear:
    """Says 1 where the mean is above the ``border``, else 0, and never 2."""
    weight = torch.stack([torch.zeros(count), torch.full((count,), 1 / count), torch.zeros(count)])
    return Linear(weight, torch.tensor([0.0, -border, -9.0]))


def test_comes_near_the_exact_distance():
    model, x, y = halfspace("l2", 0.4)
    outcome = evaluate(Boundary(queries=2000), model, x, y, ANYWHERE)
    assert (outcome.distance >= 0.4 * (1 - 1e-5)).all()
    assert np.median(outcome.distance) <= 1.06 * 0.4


def test_no_farther_than_foolbox_after_as_many_queries():
    foolbox = pytest.importorskip("foolbox")
    net, x, y = convolutional(20)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = foolbox.attacks.BoundaryAttack(steps=400).run(  # and 50 for a start, 40 to learn a rate
            foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), x, foolbox.criteria.Misclassification(y)
        )
    ours = evaluate(Boundary(queries=490), net, x, y, ANYWHERE)
    assert set(ours.forwards) == {490}
    assert np.median(ours.distance) <= float(l2.size(theirs - x).median())


@pytest.mark.parametrize("shape", [(1,), (3, 5, 4), (60,)], ids=str)
def test_a_candidate_lies_on_its_sphere(shape):
    """Of radius ``distance`` for the first, ``(1 - advance) * distance`` for the others; within, where pixels bind."""
    model, x, y = halfspace("l2", 0.2, shape=shape)
    problem = Problem(Defended(model), x, Goal(y), ANYWHERE, Noise(0, torch.arange(20)), classes=2, minimises=True)
    problem.labels(halfspace("l2", 0.2, shape=shape).across(x, 0.25))
    turn, advance = torch.full((20,), 0.3), torch.linspace(0.1, 0.3, 20)
    points = _candidates(problem, problem.noise, turn, advance)
    radius = (points - x.unsqueeze(1)).flatten(2).norm(dim=2) / 0.25
    torch.testing.assert_close(radius[:, 0], torch.ones(20))
    torch.testing.assert_close(radius[:, 1:], (1 - advance).unsqueeze(1).expand(-1, CANDIDATES - 1))
    if len(x[0].flatten()) > 1:
        angle = torch.cosine_similarity((points - x.unsqueeze(1)).flatten(2), (problem.best - x).flatten(1)[:, None], 2)
        assert angle.amin() > 0.9
        assert angle.amax() < 0.9999
        assert (points[:, 1] - points[:, 2]).flatten(1).norm(dim=1).amin() > 0.01
    problem.threat = ThreatModel(l2, 100.0, float(x.min()), float(x.max()))
    clipped = _candidates(problem, problem.noise, turn, advance)
    assert ((clipped - x.unsqueeze(1)).flatten(2).norm(dim=2) / 0.25 <= radius + 1e-4).all()
    assert clipped.min() >= x.min() - 1e-6
    assert clipped.max() <= x.max() + 1e-6


@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 6, 5), (90,)], ids=str)
def test_starts_are_more_than_noise(shape):
    """No noise of so many pixels has a mean of 0.62; large blocks and single colours do."""
    x = torch.rand(30, *shape, generator=torch.Generator().manual_seed(0)) * 0.2
    outcome = evaluate(
        Boundary(queries=400), bright(x[0].numel(), 0.62), x, torch.zeros(30, dtype=torch.long), ANYWHERE
    )
    assert set(outcome.status) == {BROKEN}


def test_an_input_without_a_start_is_unknown_and_costs_no_more():
    x = torch.cat([torch.full((10, 4), 0.4), torch.full((10, 4), 0.6)])
    y = torch.arange(20) // 10
    outcome = evaluate(Boundary(queries=600), bright(4, 0.5), x, y, ANYWHERE, target="next")
    assert outcome.status.tolist() == [BROKEN] * 10 + [UNKNOWN] * 10  # the targets are 1 and 2
    assert set(outcome.reason[10:]) == {"no start found"}
    assert set(outcome.forwards[10:]) == {200}
    assert (outcome.distance[:10] < 0.21).all()


@pytest.mark.parametrize("queries", [100, 135, 400])
def test_no_input_costs_more_than_was_allowed(queries):
    x = torch.rand(40, 12, generator=torch.Generator().manual_seed(0)) * 0.3
    y = torch.zeros(40, dtype=torch.long)
    outcome = evaluate(Boundary(queries=queries), bright(12, 0.85), x, y, ANYWHERE)
    assert {BROKEN} <= set(outcome.status) <= {BROKEN, UNKNOWN}
    assert (outcome.forwards[outcome.status == BROKEN] > queries - CANDIDATES).all()
    assert (outcome.forwards <= queries).all()


def test_a_walk_that_has_converged_ends():
    model, x, y = halfspace("l2", 0.3, shape=(1,))
    outcome = evaluate(Boundary(), model, x, y, ANYWHERE)
    np.testing.assert_allclose(outcome.distance, 0.3, rtol=1e-3)
    assert (outcome.forwards < 5000).all()


def test_too_few_queries_are_refused():
    with pytest.raises(ValueError, match="boundary: queries must be 90 or more"):
        make("attack", "boundary:queries=89")


def test_mosaics_are_asked_about_only_where_no_noise_is_a_start(monkeypatch: pytest.MonkeyPatch):
    """Inputs of 16 pixels whose first candidates are noise, all pixels different; a mosaic repeats some."""
    asked = []
    monkeypatch.setattr(Problem, "labels", lambda self, x, ask=Problem.labels: asked.append(x) or ask(self, x))
    x, y = torch.full((3, 1, 4, 4), 0.2), torch.zeros(3, dtype=torch.long)

    def repeats(starts: torch.Tensor) -> bool:
        return any(len(start.unique()) < 16 for start in starts.flatten(0, 1))

    evaluate(
        Boundary(queries=200), torch.nn.Sequential(torch.nn.Flatten(), bright(16, 0.95)), x, y, ANYWHERE
    )  # no noise is as bright as that
    first, second = [starts for starts in asked if len(starts)][:2]
    assert (repeats(first), repeats(second)) == (False, True)
