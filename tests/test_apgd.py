"""Auto-PGD: its step rule worked out by hand, its path against the algorithm written out for one input."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_lite.attacks.apgd import Pace, checkpoints, climb, dlr, rivals, spread, towards
from robustbench_lite.data import load
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate, frozen
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import BROKEN, HELD
from robustbench_lite.problem import Problem
from robustbench_lite.registry import make
from robustbench_lite.threat import Goal, ThreatModel, find_norm
from tests.nets import convolutional, halfspace, many_classes


def problem(net, x, goal, norm, eps, classes=4):
    threat = ThreatModel(find_norm(norm), eps)
    return Problem(Defended(net), x, goal, threat, Noise(0, torch.arange(len(x))), classes=classes)


def test_checkpoints_of_the_paper():
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(checkpoints(20)) == [5, 9, 12, 14, 16, 18, 19, 20]
    assert checkpoints(1) == {1}


def test_lengths_halve_under_the_two_conditions_of_the_paper():
    rows = {
        "climbs": (0, [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]),
        "three of four steps rise": (0, [1, 2, 3, 2.5], [3, 4, 5, 4.5], [5, 6, 7, 6.5]),
        "two of four steps rise": (0, [1, 2, 1, 0], [3, 4, 3, 2], [5, 6, 5, 4]),
        "rises below its best": (5, [1, 2, 3, 4], [4.1, 4.2, 4.3, 4.4], [4.5, 4.6, 4.7, 4.8]),
        "stands still": (1, [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]),
        "no number": (-math.inf, [-math.inf] * 4, [-math.inf] * 4, [-math.inf] * 4),
    }
    # Below its best the loss halves by condition 2, which spares the checkpoint after a halving. There the first of
    # the second four steps falls, from the best point (5) to 4.1; three rises are enough. So it halves at 1 and 3.
    expected = {
        "climbs": [1, 1, 1],
        "three of four steps rise": [1, 1, 1],
        "two of four steps rise": [0.5, 0.25, 0.125],
        "rises below its best": [0.5, 0.5, 0.25],
        "stands still": [0.5, 0.25, 0.125],
        "no number": [0.5, 0.25, 0.125],
    }
    pace = Pace(torch.ones(len(rows)), torch.tensor([float(row[0]) for row in rows.values()]))
    for checkpoint in (1, 2, 3):
        before = pace.length
        for losses in zip(*(row[checkpoint] for row in rows.values())):
            pace.watch(torch.tensor(losses, dtype=torch.float32))
        halved = pace.halve(4 * checkpoint)
        assert dict(zip(rows, pace.length.tolist())) == {row: want[checkpoint - 1] for row, want in expected.items()}
        assert (halved == (pace.length < before)).all()


def written_out(net, x, y, start, eps, norm, steps):
    """Algorithm 1 of the paper for one input, (D,) float64, inside [0, 1]; the best point and how often it halved."""

    def project(z):
        delta = np.clip(z, 0, 1) - x
        if norm == "linf":
            return x + np.clip(delta, -eps, eps)
        return x + delta * min(1.0, eps / max(np.linalg.norm(delta), 1e-300))

    def f(z):
        z = torch.tensor(z).view(1, 1, 8, 8).requires_grad_()
        loss = nn.functional.cross_entropy(net(z), torch.tensor([y]))
        (gradient,) = torch.autograd.grad(loss, z)
        gradient = gradient.flatten().numpy()
        return loss.item(), np.sign(gradient) if norm == "linf" else gradient / np.linalg.norm(gradient)

    points = [0, 0.22]
    while points[-1] < 1:
        points.append(points[-1] + max(points[-1] - points[-2] - 0.03, 0.06))
    w = [math.ceil(round(point * steps, 9)) for point in points]
    eta, halvings = 2 * eps, []
    xs, values = [start], [f(start)[0]]
    xs.append(project(start + eta * f(start)[1]))
    values.append(f(xs[1])[0])
    top, x_max = max(zip(values, xs), key=lambda pair: pair[0])
    etas, tops, rises = {0: eta}, {0: values[0]}, [values[1] > values[0]]
    for k in range(1, steps):
        z = project(xs[k] + eta * f(xs[k])[1])
        xs.append(project(xs[k] + 0.75 * (z - xs[k]) + 0.25 * (xs[k] - xs[k - 1])))
        values.append(f(xs[k + 1])[0])
        rises.append(values[k + 1] > values[k])
        if values[k + 1] > top:
            top, x_max = values[k + 1], xs[k + 1]
        if k + 1 in w:
            last = w[w.index(k + 1) - 1]
            few = sum(rises[last:]) < 0.75 * (k + 1 - last)
            stuck = etas[last] == eta and tops[last] == top
            etas[k + 1], tops[k + 1] = eta, top
            if few or stuck:
                eta, xs[k + 1], values[k + 1] = eta / 2, x_max, top
                halvings.append(k + 1)
    return x_max, halvings


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.6)])
def test_takes_the_path_of_the_algorithm(norm, eps):
    net, x, _ = convolutional(12, low=0.2)
    net, x = net.double(), x.double()
    unlikely = net(x).argmin(1)  # a goal that few reach: a solved input would not walk on
    random = torch.Generator().manual_seed(0)
    start = x + 0.05 * (torch.rand(x.shape, generator=random, dtype=x.dtype) - 0.5)
    with frozen(net):
        asked = problem(net, x, Goal(unlikely, targeted=True), norm, eps)

        def away(goal, logits):
            return nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="none")

        ours = climb(asked, start.clamp(0, 1), away, 60)
        solved = ~asked.open
        halvings = []
        for row in (~solved).nonzero()[:, 0].tolist():
            theirs, at = written_out(
                net, x[row].flatten().numpy(), 0, start.clamp(0, 1)[row].flatten().numpy(), eps, norm, 60
            )
            np.testing.assert_allclose(ours[row].flatten().numpy(), theirs, atol=1e-9)
            halvings.append(at)
    assert len(halvings) >= 6
    assert len(set(map(tuple, halvings))) > 1


def test_the_losses_by_hand():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 0.0, 3.0]])
    goal = Goal(torch.tensor([3, 1]))
    torch.testing.assert_close(dlr(goal, logits), torch.tensor([(3 - 4) / (4 - 2), (4 - 1) / (4 - 1)]))
    target = torch.tensor([0, 3])
    targeted = towards(target)(goal, logits) / spread(logits, 4)
    torch.testing.assert_close(targeted, torch.tensor([(1 - 4) / (4 - 1.5), (3 - 1) / (4 - 0.5)]))
    torch.testing.assert_close(dlr(goal, 7 * logits + 5), dlr(goal, logits))
    towards_goal = dlr(Goal(torch.tensor([0, 0]), targeted=True), logits)
    torch.testing.assert_close(towards_goal, torch.tensor([(1 - 4) / (4 - 1.5), (4 - 3) / (4 - 0.5)]))


def test_the_losses_below_four_classes():
    """Where a ratio would be constant: of three classes with the target third, and of any two."""
    three, two = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 4.0]])
    goal, target = Goal(torch.tensor([1])), torch.tensor([0])
    torch.testing.assert_close(towards(target)(goal, three) / spread(three, 4), torch.tensor([1 - 2.0]))
    torch.testing.assert_close(dlr(goal, two), torch.tensor([1 - 4.0]))
    torch.testing.assert_close(towards(target)(goal, two) / spread(two, 4), torch.tensor([1 - 4.0]))


@pytest.mark.parametrize("classes", [2, 3, 4, 12])
@pytest.mark.parametrize("loss", ["dlr", "dlr-t"])
def test_breaks_models_of_few_and_many_classes(loss, classes):
    model, x, y = many_classes(classes, count=30)
    best = evaluate(make("attack", "pgd:steps=20"), model, x, y, "linf:0.05")
    outcome = evaluate(make("attack", f"apgd:loss={loss},steps=20"), model, x, y, "linf:0.05")
    assert 0 < (best.status == BROKEN).sum() <= (outcome.status == BROKEN).sum()


def test_rivals_are_the_likeliest_other_classes():
    model, x, y = many_classes(5, count=30)
    with frozen(model):
        order = model(x).argsort(1, descending=True)
        first = problem(model, x, Goal(y), "linf", 0.1, classes=5)
        assert (rivals(first, 2) == order[:, 1:3]).all()
        assert (rivals(first, 9) == order[:, 1:]).all()
        wrong = problem(model, x, Goal(order[:, 1]), "linf", 0.1, classes=5)
        assert (rivals(wrong, 1)[:, 0] == order[:, 0]).all()
        assert (rivals(problem(model, x, Goal(y, True), "linf", 0.1, classes=5), 3) == y.unsqueeze(1)).all()


@pytest.mark.parametrize(
    ("spec", "forwards", "backwards"),
    [
        ("apgd:steps=7", 8, 7),
        ("apgd:steps=1", 2, 1),
        ("apgd:steps=7,restarts=2", 16, 14),
        ("apgd:steps=7,loss=dlr-t", 1 + 3 * 8, 3 * 7),
        ("apgd:steps=7,loss=dlr-t,targets=2", 1 + 2 * 8, 2 * 7),
    ],
)
def test_what_it_costs(spec, forwards, backwards):
    model, x, y = many_classes(4, count=20)
    outcome = evaluate(make("attack", spec), model, x, y, "linf:0.0001")
    held = outcome.status == HELD
    assert held.sum() >= 15
    assert set(outcome.forwards[held]) == {forwards}
    assert set(outcome.backwards[held]) == {backwards}


@pytest.fixture(scope="module")
def trained():
    digits = load("digits", "train")
    random = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    with torch.no_grad():
        for parameter in net.parameters():
            bound = 1 / math.sqrt(parameter[0].numel())
            parameter.copy_(2 * bound * torch.rand(parameter.shape, generator=random) - bound)
    adam = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(40):
        adam.zero_grad()
        nn.functional.cross_entropy(net(digits.x), digits.y).backward()
        adam.step()
    test = load("digits").take(slice(0, 100))
    return net.eval(), test.x, test.y


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("l2", 0.4)])
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-t"])
def test_at_least_as_strong_as_pgd_on_a_trained_net(trained, loss, norm, eps):
    count = {
        spec: (evaluate(make("attack", spec), *trained, f"{norm}:{eps}").status == BROKEN).sum()
        for spec in ("pgd:steps=40", f"apgd:steps=40,loss={loss}")
    }
    assert 20 <= count["pgd:steps=40"] <= 90
    assert count[f"apgd:steps=40,loss={loss}"] >= count["pgd:steps=40"]


def test_each_restart_and_each_target_starts_elsewhere():
    model, x, y = halfspace("linf", 0.1)
    asked = []

    class Recorder(nn.Module):
        def forward(self, z):
            asked.append(z.detach().clone())
            return model(z)

    evaluate(make("attack", "apgd:steps=1,restarts=3"), Recorder(), x, y, "linf:0.05")
    starts = [z[: len(x)] for z in asked if len(z) >= len(x) and (z[: len(x)] - x).abs().max() > 0]
    assert len({tuple(start.flatten().tolist()) for start in starts}) >= 3


@pytest.mark.parametrize("text", ["steps=0", "restarts=0", "targets=0", "loss=cw"])
def test_refuses_settings_that_make_no_sense(text):
    with pytest.raises(ValueError, match="apgd"):
        make("attack", f"apgd:{text}")
