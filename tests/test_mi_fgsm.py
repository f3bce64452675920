"""The momentum of mi-fgsm, worked out by hand."""

import pytest
import torch
from torch import nn

from robustbench_lite.attacks.mi_fgsm import MIFGSM
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate, frozen
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import HELD
from robustbench_lite.problem import Problem
from robustbench_lite.registry import make
from robustbench_lite.threat import Goal, ThreatModel, find_norm
from tests.nets import convolutional, halfspace


def proposed(attack, net, x, goal, norm, eps):
    """What the attack returns for the inputs that it does not break, and which these are."""
    with frozen(net):
        problem = Problem(
            Defended(net), x, goal, ThreatModel(find_norm(norm), eps), Noise(0, torch.arange(len(x))), classes=4
        )
        return attack(problem)[problem.open], problem.open


def by_hand(net, x, y, norm, eps, steps, decay, sign):
    """Algorithm 1 of the paper, one input at a time; ``sign`` is -1 towards a target."""
    found = []
    for clean, label in zip(x, y):
        point, momentum = clean.clone(), torch.zeros_like(clean)
        for _ in range(steps):
            point.requires_grad_()
            loss = sign * nn.functional.cross_entropy(net(point.unsqueeze(0)), label.unsqueeze(0))
            gradient = torch.autograd.grad(loss, point)[0]
            momentum = decay * momentum + gradient / gradient.abs().sum()
            way = momentum.sign() if norm == "linf" else momentum / momentum.square().sum().sqrt()
            point = (point + eps / steps * way).detach()
        found.append(point)
    return torch.stack(found)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.1)])
def test_agrees_with_the_algorithm(norm, eps, decay, targeted):
    net, x, y = convolutional(40, low=0.2, high=0.8)
    labels = (y + 1) % 4 if targeted else y
    ours, unbroken = proposed(MIFGSM(steps=6, decay=decay), net, x, Goal(labels, targeted), norm, eps)
    theirs = by_hand(net, x, labels, norm, eps, 6, decay, -1 if targeted else 1)[unbroken]
    assert len(ours) >= 10
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_momentum_matters_and_without_it_foolbox_agrees():
    foolbox = pytest.importorskip("foolbox")
    net, x, y = convolutional(40)
    theirs = foolbox.attacks.LinfBasicIterativeAttack(steps=6, abs_stepsize=0.02 / 6, random_start=False).run(
        foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), x, foolbox.criteria.Misclassification(y), epsilon=0.02
    )
    plain, unbroken = proposed(MIFGSM(steps=6, decay=0), net, x, Goal(y), "linf", 0.02)
    torch.testing.assert_close(plain, theirs[unbroken], atol=1e-5, rtol=0)
    ours, unbroken = proposed(MIFGSM(steps=6), net, x, Goal(y), "linf", 0.02)
    assert ((ours - theirs[unbroken]).abs() > 1e-3).any()


def test_costs_a_forward_and_a_backward_a_step():
    model, x, y = halfspace("linf", 0.1)
    outcome = evaluate(MIFGSM(steps=7), model, x, y, "linf:0.05")
    assert set(outcome.status) == {HELD}
    assert set(outcome.forwards) == set(outcome.backwards) == {7}


@pytest.mark.parametrize("text", ["mi-fgsm:steps=0", "mi-fgsm:decay=-1"])
def test_refuses_settings_that_make_no_sense(text):
    with pytest.raises(ValueError, match="mi-fgsm"):
        make("attack", text)
