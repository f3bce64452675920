"""DeepFool on models that are linear, where one step is enough, and against foolbox where they are not."""

import numpy as np
import pytest
import torch

from robustbench_lite.attacks.deepfool import FURTHER, DeepFool
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate, frozen
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import BROKEN
from robustbench_lite.problem import Problem
from robustbench_lite.registry import make
from robustbench_lite.threat import Goal, ThreatModel, find_norm
from tests.nets import Linear, convolutional, halfspace, many_classes, nearest


def found(attack, model, x, goal, norm):
    with frozen(model), torch.no_grad():
        classes = model(x[:1]).shape[1]
        threat, noise = ThreatModel(find_norm(norm), float("inf")), Noise(0, torch.arange(len(x)))
        problem = Problem(Defended(model), x, goal, threat, noise, classes=classes, minimises=True)
        return attack(problem), problem


@pytest.mark.parametrize("overshoot", [0.02, 0.1])
@pytest.mark.parametrize(("norm", "distance"), [("l2", 0.4), ("linf", 0.05)])
def test_one_step_crosses_the_boundary_of_a_linear_model(norm, distance, overshoot):
    model, x, y = halfspace(norm, distance)
    end, problem = found(DeepFool(overshoot=overshoot), model, x, Goal(y), norm)
    expected = torch.full((20,), (1 + overshoot) * (distance + FURTHER))
    torch.testing.assert_close(find_norm(norm).size(end - x), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(problem.distance, expected, atol=1e-5, rtol=0)
    assert set(problem.forwards.tolist()) == {2}
    assert set(problem.backwards.tolist()) == {1}


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_heads_for_the_nearest_of_many_boundaries(norm):
    model, x, y = many_classes(6, count=50)
    _, problem = found(DeepFool(overshoot=0), model, x, Goal(y), norm)
    exact = nearest(model, x, norm)
    inside = (exact < 0.25) if norm == "linf" else torch.ones(50, dtype=torch.bool)
    assert inside.sum() > 40
    torch.testing.assert_close(problem.distance[inside], exact[inside] + FURTHER, atol=1e-4, rtol=1e-3)
    assert set(problem.backwards[inside].tolist()) == {5}


def test_candidates_are_the_likeliest_rivals():
    model = Linear(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 100.0]]), torch.tensor([0.0, -0.6, -52.0]))
    x, y = torch.full((4, 2), 0.5), torch.zeros(4).long()  # class 1 is likelier, class 2 nearer
    ends = [found(DeepFool(candidates=count), model, x, Goal(y), "l2")[0] for count in (1, 2)]
    assert model(ends[0]).argmax(1).tolist() == [1] * 4
    assert model(ends[1]).argmax(1).tolist() == [2] * 4


def test_targeted_goes_to_the_target():
    model, x, y = many_classes(5, count=40)
    goal = Goal((y + 1) % 5, True)
    end, problem = found(DeepFool(), model, x, goal, "l2")
    assert (model(end).argmax(1) == goal.labels).all()
    assert (problem.distance >= nearest(model, x, "l2") - 1e-4).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_pixels_held_at_a_bound_take_no_part(norm):
    """Half of the way's pixels are black and would have to go below 0: the others alone must cover the gap."""
    model = Linear(torch.stack([torch.zeros(8), torch.tensor([-3.0] * 4 + [1.0] * 4)]), torch.tensor([0.0, -2.4]))
    x = torch.tensor([[0.0] * 4 + [0.5] * 4] * 3)
    _, problem = found(DeepFool(), model, x, Goal(torch.zeros(3).long()), norm)
    exact = 0.1 if norm == "linf" else 0.2
    assert set(problem.forwards.tolist()) == {2}
    torch.testing.assert_close(problem.distance, torch.full((3,), 1.02 * (exact + FURTHER)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("norm", "peer"), [("l2", "L2DeepFoolAttack"), ("linf", "LinfDeepFoolAttack")])
def test_agrees_with_foolbox(norm, peer):
    foolbox = pytest.importorskip("foolbox")
    net, x, y = convolutional(40, low=0.4, high=0.6)
    with frozen(net):
        theirs = getattr(foolbox.attacks, peer)(candidates=4).run(
            foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), x, foolbox.criteria.Misclassification(y)
        )
    ours, problem = found(DeepFool(), net, x, Goal(y), norm)
    free = ((theirs > 0) & (theirs < 1)).flatten(1).all(1)
    assert free.sum() > 30
    assert (problem.forwards > 2).any()
    torch.testing.assert_close(ours[free], theirs[free], atol=1e-4, rtol=0)


def test_solved_inputs_leave_and_others_go_on():
    net, x, y = convolutional(60, classes=4)
    outcome = evaluate(DeepFool(), net, x, y, "l2:5")
    assert set(outcome.status) == {BROKEN}
    assert len(set(outcome.forwards)) > 1
    np.testing.assert_array_equal(outcome.backwards, 3 * outcome.forwards // 2)


@pytest.mark.parametrize("text", ["deepfool:steps=0", "deepfool:candidates=0", "deepfool:overshoot=-1"])
def test_refuses_settings_that_make_no_sense(text):
    with pytest.raises(ValueError, match="deepfool"):
        make("attack", text)
