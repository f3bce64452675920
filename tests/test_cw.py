"""What the attacks of Carlini & Wagner promise beyond the contract that test_attacks.py holds for every attack."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from robustbench_lite.attacks import cw as module
from robustbench_lite.attacks.cw import CW, Descent
from robustbench_lite.attacks.cw_linf import CWLinf, CWLinfTau
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate, frozen
from robustbench_lite.noise import Noise
from robustbench_lite.norms import l0, l2, linf
from robustbench_lite.outcome import BROKEN
from robustbench_lite.problem import Problem
from robustbench_lite.registry import make
from robustbench_lite.threat import Goal, ThreatModel, find_norm
from tests.nets import Linear, convolutional, halfspace, many_classes

TAU = CWLinfTau(steps=10, initial_c=1e4, decay=0.8)  # cheap: at this c nothing is tried twice


def unbounded(model, x, goal, norm="l2") -> Problem:
    """The problem that an attack sees that minimises."""
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    threat, noise = ThreatModel(find_norm(norm), float("inf")), Noise(0, torch.arange(len(x)))
    return Problem(Defended(model), x, goal, threat, noise, classes=classes, minimises=True)


def found(attack, model, x, goal, norm="l2"):
    """What an attack returns, and the ledger's distances."""
    with frozen(model):
        problem = unbounded(model, x, goal, norm)
        return attack(problem).detach(), problem.distance


def test_pixels_at_the_ends_of_their_range_move():
    random = torch.Generator().manual_seed(5)
    x = torch.randint(0, 2, (6, 1, 5, 10), generator=random).float()
    x[:] = x[:1]
    w = (1 - 2 * x[0].flatten()) * (0.5 + torch.rand(50, generator=random))
    bias = -(x[0].flatten() @ w) - 0.6 * w.norm()
    model, y = Linear(torch.stack([torch.zeros(50), w]), torch.stack([torch.zeros(()), bias])), torch.zeros(6).long()
    _, distance = found(CW(search_steps=3, steps=100, rate=0.02), model, x, Goal(y))
    assert (distance >= 0.6 * (1 - 1e-4)).all()
    assert (distance <= 0.63).all()


def test_a_descent_ends_where_its_loss_is_least():
    """On a line: |d|^2 + c max(w (gap - d), 0) is least at d = min(c w / 2, gap)."""
    x, w, gap = torch.full((3, 1), 1.0), 4.0, torch.tensor([0.3, 0.3, 0.3])
    model = Linear(torch.tensor([[0.0], [w]]), torch.tensor([0.0, -w * 1.3]))
    c = torch.tensor([0.05, 0.1, 3.0])
    with frozen(model):
        problem = unbounded(model, x, Goal(torch.zeros(3).long()))
        problem.threat = ThreatModel(l2, float("inf"), lower=-1.0, upper=3.0)
        end, least = Descent(400, 0.0, abort=False)(problem, x, c, torch.full_like(c, 0.02))
    torch.testing.assert_close((end - x)[:, 0], torch.minimum(c * w / 2, gap), atol=2e-3, rtol=0)
    assert least.isinf().tolist() == [True, True, False]
    torch.testing.assert_close(least[2], gap[2] ** 2, atol=2e-3, rtol=0)


def test_the_binary_search_is_kept_per_input(monkeypatch):
    asked, needed = [], torch.tensor([5.0, 0.3, 1e9])

    class Stub:
        def __init__(self, *settings, **more):
            pass

        def __call__(self, problem, start, c, rate):
            asked.append(c.tolist())
            return problem.x + c.view(-1, 1), torch.where(c >= needed, c, torch.inf)

    monkeypatch.setattr(module, "Descent", Stub)
    model, x, y = many_classes(3, count=3)
    end, _ = found(CW(search_steps=5, initial_c=1.0), model, x, Goal(y))
    assert asked == [
        [1.0, 1.0, 1.0],
        [10.0, 0.5, 10.0],
        [5.5, 0.25, 100.0],
        [3.25, 0.375, 1000.0],
        [4.375, 0.3125, 10000.0],
    ]
    torch.testing.assert_close((end - x)[:, 0], torch.tensor([5.5, 0.3125, 10000.0]))


def test_logits_that_are_all_negative_change_nothing():
    model, x, y = many_classes(4, count=30)
    shifted = Linear(model.weight.detach(), model.bias.detach() - 1000)
    attack = CW(search_steps=2, steps=40)
    distance = [found(attack, net, x.double(), Goal(y))[1] for net in (model.double(), shifted.double())]
    assert distance[0].isfinite().all()
    torch.testing.assert_close(distance[0], distance[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("attack", "norm"),
    [
        (CW(steps=60, kappa=2.0), "l2"),
        (CW(steps=60, kappa=2.0), "l0"),
        (replace(TAU, kappa=2.0), "linf"),
    ],
)
def test_kappa_is_the_margin_of_what_is_returned(attack, norm, targeted):
    model, x, y = many_classes(4, count=12)
    goal = Goal((y + 1) % 4, True) if targeted else Goal(y)
    end, _ = found(attack, model, x, goal, norm)
    margin = goal.margin(model(end))
    assert (margin >= 2 - 1e-4).all()
    assert (margin.median() < 4) | (norm == "l0")


def test_l2_finds_no_further_than_foolbox():
    foolbox = pytest.importorskip("foolbox")
    net, x, y = convolutional(32)
    with frozen(net):
        theirs = foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=4, steps=100, stepsize=0.02, initial_const=1.0
        ).run(foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), x, foolbox.criteria.Misclassification(y))
        broken = net(theirs).argmax(1) != y
    _, ours = found(CW(search_steps=4, steps=100, rate=0.02), net, x, Goal(y))
    assert broken.sum() > 24
    assert ours.isfinite().all()
    assert ours.median() <= l2.size(theirs - x)[broken].median()
    assert (ours[broken] <= 1.1 * l2.size(theirs - x)[broken]).all()


@pytest.mark.parametrize("initial_c", [0.01, 10.0])
def test_abort_leaves_a_c_that_is_too_small_and_no_other(initial_c):
    settings = {"search_steps": 3, "steps": 60, "initial_c": initial_c}
    model, x, y = halfspace("l2", 1.0)
    full, short = (evaluate(CW(abort=abort, **settings), model, x, y, "l2:5") for abort in (False, True))
    assert set(full.status) == {BROKEN}
    assert set(full.forwards) == {180}
    np.testing.assert_allclose(short.distance, full.distance, rtol=0.02)
    assert (short.forwards.mean() < 170) == (initial_c == 0.01)


def fewest(model: Linear, x: torch.Tensor) -> np.ndarray:
    """How few pixels suffice on a two-class linear model: those that gain most at the ends of their range."""
    w = (model.weight[1] - model.weight[0]).detach().view(x.shape[1:])
    logits = model(x).detach()
    side = 1 - 2 * logits.argmax(1).view(-1, 1, 1, 1)
    gains = torch.maximum(side * w * (1 - x), -side * w * x).sum(1).flatten(1).sort(1, descending=True).values
    short = (logits[:, 0] - logits[:, 1]).abs().unsqueeze(1)
    return ((gains.cumsum(1) < short).sum(1) + 1).numpy()


@pytest.mark.parametrize("shape", [(1, 10, 10), (3, 6, 7)])
def test_l0_comes_close_to_the_fewest_pixels_and_leaves_the_others_alone(shape):
    model, x, y = halfspace("l2", 1.0, shape=shape)
    exact = fewest(model, x)
    end, distance = found(CW(steps=60), model, x, Goal(y), "l0")
    assert exact.min() >= 3
    assert (distance.numpy() >= exact).all()
    assert (distance.numpy() <= exact + 1).all()
    changed = (end != x).any(1).flatten(1).sum(1)
    np.testing.assert_array_equal(changed, l0.size(end - x))
    assert (model(end).argmax(1) != y).all()


def test_l0_takes_vectors_and_targets():
    model, x, y = many_classes(4, count=20)
    goal = Goal((y + 1) % 4, True)
    end, distance = found(CW(steps=60), model, x, goal, "l0")
    assert (model(end).argmax(1) == goal.labels).all()
    assert (distance < 20).all()


def test_l0_gives_up_where_nothing_helps():
    model, x = Linear(torch.zeros(2, 6), torch.tensor([1.0, 0.0])), torch.full((4, 6), 0.5)
    _, distance = found(CW(steps=20), model, x, Goal(torch.zeros(4).long()), "l0")
    assert distance.isinf().all()


def test_one_run_of_tau_gives_the_curve_and_cw_linf_agrees_with_it():
    net, x, y = convolutional(32)
    curve = evaluate(TAU, net, x, y, "linf:1")
    assert set(curve.status) == {BROKEN}
    eps = float(np.median(curve.distance))
    at = evaluate(CWLinf(), net, x, y, ThreatModel(find_norm("linf"), eps)).status == BROKEN
    near = abs(curve.distance / eps - 1) < 1 / TAU.decay - 1
    assert near.sum() < 20
    np.testing.assert_array_equal(at[~near], (curve.distance <= eps)[~near])


def test_tau_returns_what_it_found_within_the_last_bound():
    model, x, y = many_classes(4, count=20)
    end, distance = found(TAU, model, x, Goal(y), "linf")
    assert (model(end).argmax(1) != y).all()
    assert (linf.size(end - x) <= 1.3 * distance).all()


def test_cw_linf_breaks_what_pgd_breaks():
    net, x, y = convolutional(100)
    ours, theirs = (
        evaluate(make("attack", spec), net, x, y, "linf:0.03").status == BROKEN
        for spec in ("cw-linf:steps=40", "pgd:steps=40")
    )
    assert 10 < theirs.sum() < 90
    assert not (theirs & ~ours).any()


@pytest.mark.parametrize(
    "text",
    [
        *("cw:steps=0", "cw:search_steps=0", "cw:rate=0", "cw:initial_c=0", "cw:kappa=-1", "cw:drop=1", "cw:drop=0"),
        *("cw-linf:steps=0", "cw-linf:rate=-1", "cw-linf-tau:steps=0", "cw-linf-tau:decay=1", "cw-linf-tau:kappa=-1"),
    ],
)
def test_refuses_settings_that_make_no_sense(text):
    with pytest.raises(ValueError, match=text.partition(":")[0]):
        make("attack", text)
