"""ZOO's derivatives, steps and choice of variables, each against what it should be."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks.zoo import ZOO, Adam, Canvas, Newton, enlarged, important
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate, frozen
from robustbench_lite.noise import Noise
from robustbench_lite.problem import Problem
from robustbench_lite.registry import make
from robustbench_lite.threat import Goal, ThreatModel, find_norm
from tests.nets import halfspace, many_classes

THREAT = ThreatModel(find_norm("l2"), torch.inf)


def smooth(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A net with derivatives of every order, and inputs in double precision with the labels that it gives them."""
    random = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random, dtype=torch.float64) / 3
    x = 0.2 + 0.6 * torch.rand(count, 2, 3, 4, generator=random, dtype=torch.float64)
    return net.eval(), x, net(x).argmax(1)


def problem_of(net: nn.Module, x: Tensor, y: Tensor) -> Problem:
    rows = torch.arange(len(x))
    return Problem(
        Defended(net), x, Goal(y), THREAT, Noise(0, rows), classes=3, access="scores", minimises=True, batch=64
    )


@pytest.mark.parametrize("tanh", [False, True])
def test_derivatives_agree_with_autograd(tanh):
    net, x, y = smooth(5)
    canvas = Canvas(x, THREAT, tanh)
    z = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    c, kappa = torch.linspace(0.5, 2, 5, dtype=x.dtype), 20.0

    def objective(flat: Tensor, row: int) -> Tensor:
        change = flat.view(x.shape[1:])
        image = 0.5 + torch.tanh(torch.atanh(1.8 * (x[row] - 0.5)) + change) / 1.8 if tanh else x[row] + change
        margin = Goal(y[row : row + 1]).margin(net(image.unsqueeze(0)).log_softmax(1))
        return ((image - x[row]).square().sum() + c[row] * (kappa - margin)).squeeze()

    index = Noise(0, torch.arange(5)).permutation(z.flatten(1))[:, :7]
    with frozen(net):
        _, value, slope, bend = ZOO(kappa=kappa, width=1e-4)._probe(problem_of(net, x, y), canvas, z, c, index)
        for row in range(5):
            at = z[row].flatten()
            first = torch.autograd.functional.jacobian(partial(objective, row=row), at)
            second = torch.autograd.functional.hessian(partial(objective, row=row), at).diagonal()
            torch.testing.assert_close(value[row], objective(at, row))
            torch.testing.assert_close(slope[row], first[index[row]], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(bend[row], second[index[row]], atol=1e-4, rtol=1e-3)


def test_newton_reaches_the_least_of_a_parabola_and_descends_a_hill():
    z, least = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[0.5, -2.0, 3.0]], dtype=torch.float64)
    curvature = torch.tensor([[4.0, 0.5, 1.0]], dtype=torch.float64)
    step = Newton(z)(torch.arange(3).unsqueeze(0), curvature * (z - least), curvature)
    torch.testing.assert_close(z - step, least)
    assert Newton(z)(torch.tensor([[0]]), torch.tensor([[0.3]]), torch.tensor([[-5.0]])).item() == pytest.approx(0.3)


def test_adam_agrees_with_torch_for_each_variable_by_its_own_turns():
    slopes = torch.randn(9, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    optimiser, rule, ours = torch.optim.Adam([theirs], lr=1.0), Adam(theirs.detach()), torch.zeros(2, 4).double()
    index = torch.tensor([[3, 1], [0, 2]])
    for slope in slopes:
        theirs.grad = slope
        optimiser.step()
        ours = ours.scatter_add(1, index, -rule(index, slope.gather(1, index), slope))
    torch.testing.assert_close(ours.gather(1, index), theirs.detach().gather(1, index))
    assert int((ours != 0).sum()) == 4
    rule.forget(torch.tensor([True, False]))
    assert not rule.mean[0].any()
    assert rule.turns[1].sum() == 18


@pytest.mark.parametrize(("size", "forwards"), [(7, 6 * 15), (30, 1 * 61)])
def test_a_step_costs_two_queries_a_variable_and_one(size, forwards):
    model, x, y = many_classes(3, count=8, size=size)
    assert set(evaluate(ZOO(queries=100, coordinates=100), model, x, y, "l2:1").forwards) == {forwards}


def test_queries_bound_the_cost_of_every_level():
    model, x, y = halfspace("l2", 0.4, count=4)
    outcome = evaluate(ZOO(queries=500, coordinates=25, coarse=4), model, x, y, "l2:1")
    assert set(outcome.forwards) == {5 * 33 + 3 * 45 + 3 * 51}  # 16 variables, 64 in threes, 100 in fours


def test_coarse_grids_double_and_carry_the_image_over():
    clean = torch.full((1, 2, 12, 9), 0.5)
    assert Canvas(clean, THREAT, False).shapes(3) == [(2, 3, 3), (2, 6, 6), (2, 12, 9)]
    assert Canvas(clean, THREAT, False).shapes(None) == [(2, 12, 9)]
    assert Canvas(torch.zeros(1, 7), THREAT, False).shapes(3) == [(7,)]
    ramp = torch.tensor([[0.0, 1.0]]).expand(1, 1, 2, 2)
    expected = torch.tensor([0.0, 0.25, 0.75, 1.0]).expand(1, 1, 4, 4)  # centres of pixels, edges held
    torch.testing.assert_close(enlarged(ramp, (1, 4, 4)), expected)
    torch.testing.assert_close(enlarged(ramp, (1, 2, 2)), ramp)


def test_importance_prefers_pixels_whose_region_has_changed():
    change = torch.zeros(400, 16, 16)
    change[:, 5, 4] = 0.5  # in the region of rows 4 and 5, columns 4 and 5
    noise, z = Noise(0, torch.arange(400)), torch.zeros(400, 3, 16, 16)
    index = important(noise, change, z, 12)
    assert all(len(set(row)) == 12 for row in index.tolist())
    pixel = index % 256
    share = ((pixel // 16 // 2 == 2) & (pixel % 16 // 2 == 2)).double().mean()
    # twelve of the 768 variables lie there; with 641 times the others' weight they are drawn first, most of them
    assert share > 0.8
    flat = important(noise, torch.zeros(400, 16, 16), z, 12)
    assert ((flat % 256 // 32 == 2).double().mean() - 1 / 8).abs() < 0.03


@pytest.mark.parametrize("settings", ["solver=adam,rate=0.03", "solver=adam,tanh=true,rate=0.06", "importance=true"])
def test_nears_the_exact_distance(settings):
    model, x, y = halfspace("l2", 0.4)
    spec = f"zoo:queries=2000,search_steps=3,coordinates=20,initial_c=0.2,{settings}"
    distance = evaluate(make("attack", spec), model, x, y, "l2:10").distance
    assert (distance >= 0.4 * 0.9999).all()
    assert (distance <= 0.4 * 1.3).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_black_and_white_pixels_can_move_in_tanh_space(value):
    clean = torch.full((1, 4), value)
    canvas = Canvas(clean, THREAT, True)
    torch.testing.assert_close(canvas.image(torch.zeros(1, 1, 4))[:, 0], clean)
    moved = canvas.image(torch.full((1, 1, 4), 0.2 - 0.4 * value))
    assert ((moved - value).abs() > 0.01).all()


@pytest.mark.parametrize(
    "text", ["zoo:queries=2", "zoo:coordinates=0", "zoo:rate=0", "zoo:width=-1", "zoo:kappa=-1", "zoo:coarse=0"]
)
def test_refuses_settings_that_make_no_sense(text):
    with pytest.raises(ValueError, match="zoo"):
        make("attack", text)
