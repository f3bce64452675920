"""Linear and mixed-integer programs: worked out by hand, on a grid, and held to other bounds and to attacks."""

from itertools import pairwise

import cvxpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.bounds import Ball, Bounds, Unbounded, differences, optimised, trace
from robustbench_lite.certificate import FALSIFIED, UNDECIDED, VERIFIED, Certificate
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import BROKEN
from robustbench_lite.registry import make
from robustbench_lite.threat import ThreatModel

from .nets import convolutional

SOLVED = 2e-6  # what the solver may leave, and what is taken off for it


def certify(spec: str, model: nn.Module, x: Tensor, y: Tensor, threat: str) -> Certificate:
    noise = Noise(0, torch.arange(len(x)))
    return make("certifier", spec)(Defended(model), x, y, ThreatModel.parse(threat), noise)


def dense(seed: int, sizes: tuple[int, ...] = (2, 8, 8, 3), activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    random = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
        for parameter in layers[-2].parameters():
            parameter.data = torch.randn(parameter.shape, generator=random, dtype=torch.float64) * 1.5 / before**0.5
    return nn.Sequential(*layers[:-1]).double().eval().requires_grad_(False)


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_two_equal_neurons_are_as_by_hand(slope):
    # over [-1, 1] the logits' difference is r(x) - r(x) + 1/4, and where x = 0 triangles leave it as low as -(1 - s)/2
    model = nn.Sequential(nn.Linear(1, 2), nn.LeakyReLU(slope), nn.Linear(2, 2))
    for parameter, value in zip(model.parameters(), ([[1], [1]], [0, 0], [[1, -1], [0, 0]], [0.25, 0])):
        parameter.data = torch.tensor(value, dtype=torch.float32)
    x, y = torch.zeros(1, 1), torch.tensor([0])
    threat = ThreatModel(ThreatModel.parse("linf:1").norm, 1.0, -1.0, 1.0)
    for spec, margin, status in [
        ("lp", 0.25 - (1 - slope) / 2, UNDECIDED),
        ("milp:least=true", 0.25, VERIFIED),
        ("milp", 0.25, VERIFIED),
    ]:
        said = make("certifier", spec)(Defended(model), x, y, threat, Noise(0, torch.arange(1)))
        assert said.status == [status]
        assert said.margin.item() == pytest.approx(margin, abs=SOLVED) or spec == "milp"


def least_on_a_grid(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int = 401) -> Tensor:
    """The least margins (B,) over points of each two-dimensional ball."""
    line = torch.linspace(-threat.eps, threat.eps, steps, dtype=torch.float64)
    offsets = torch.cartesian_prod(line, line)
    offsets = offsets[threat.norm.size(offsets) <= threat.eps]
    points = (x.unsqueeze(1) + offsets).clamp(threat.lower, threat.upper)
    logits = model(points.flatten(0, 1)).view(len(x), len(offsets), -1)
    return (differences(y, logits.shape[2]).double().unsqueeze(1) @ logits.unsqueeze(3)).flatten(2).amin((1, 2))


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.2), ("l1", 0.3)])
def test_methods_are_in_order_and_the_last_is_the_truth(norm, eps):
    threat, gains = ThreatModel.parse(f"{norm}:{eps}"), []
    for seed in range(10):
        model = dense(seed, activation=[nn.ReLU, nn.LeakyReLU][seed % 2])
        x = torch.rand(1, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        y = model(x).argmax(1)
        graph, ball, functions = trace(model, (2,)), Ball(x, threat), differences(y, 3)
        margins = [
            Bounds(graph, ball, slopes=None).lower(functions).amin(1),
            Bounds(graph, ball, refine=False).lower(functions).amin(1),
            Bounds(graph, ball).lower(functions).amin(1),
            optimised(graph, ball, functions, batch=1).amin(1),
            certify("lp", model, x, y, f"{norm}:{eps}").margin,
            certify("milp:least=true", model, x, y, f"{norm}:{eps}").margin,
            least_on_a_grid(model, x, y, threat),
        ]
        margins = torch.cat([margin.double() for margin in margins])
        assert (margins.diff() > -SOLVED * margins.abs().clamp_min(1).amax()).all(), (seed, margins)
        assert margins[-1] - margins[-2] < 0.01
        gains.append(margins.diff())
    assert (torch.stack(gains).amax(0)[3:5] > 0.01).all()


class Residual(nn.Module):
    """A convolution whose ReLU is added to what it came from, behind a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.BatchNorm2d(1), nn.Conv2d(1, 3, 3, 2, 1), nn.Conv2d(3, 3, 3, 1, 1)
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.norm(x) - 0.5)
        y = F.leaky_relu(y + self.second(F.relu(y)), 0.1)
        return self.last(F.avg_pool2d(y, 2).flatten(1))


def residual(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    net = Residual().eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.5)
    x = torch.rand(count, 1, 8, 8, generator=random)
    net.last.bias -= net(x).mean(0)
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize(
    ("net", "threat"), [(convolutional, "linf:0.03"), (residual, "linf:0.03"), (residual, "l1:0.5")]
)
def test_what_is_verified_is_never_broken_and_what_is_falsified_has_a_counterexample(net, threat):
    model, x, y = net(12)
    linear, exact = (certify(spec, model, x, y, threat) for spec in ("lp:refine=false", "milp"))
    attacked = evaluate(make("attack", "pgd:steps=20,restarts=2"), model, x, y, threat).status
    for lp, milp, pgd in zip(linear.status, exact.status, attacked):
        assert milp == FALSIFIED if pgd == BROKEN else milp in (VERIFIED, FALSIFIED)
        assert lp != VERIFIED or milp == VERIFIED
    assert {VERIFIED, FALSIFIED} == set(exact.status)
    falsified = torch.tensor([status == FALSIFIED for status in exact.status])
    points = exact.counterexample[falsified]
    assert (model(points).argmax(1) != y[falsified]).all()
    assert ThreatModel.parse(threat).allows(points, x[falsified], slack=0).all()
    assert (exact.label == torch.where(falsified, -1, y)).all()
    assert (exact.radius == torch.where(falsified, 0, ThreatModel.parse(threat).eps)).all()


@pytest.fixture(scope="module")
def toy() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network of two inputs, some of them, and their least margins within linf 0.1."""
    model, x = dense(30, (2, 10, 10, 3)), torch.rand(20, 2, generator=torch.Generator().manual_seed(1)).double()
    model[-1].bias -= model(x).mean(0)
    y = model(x).argmax(1)
    return model, x, y, least_on_a_grid(model, x, y, ThreatModel.parse("linf:0.1"))


def test_verdicts_are_those_of_exhaustive_search(toy):
    model, x, y, least = toy
    said = certify("milp", model, x, y, "linf:0.1")
    assert said.status == [FALSIFIED if margin < 0 else VERIFIED for margin in least]
    assert 5 < said.status.count(FALSIFIED) < 15
    assert (said.margin <= least + SOLVED).all()
    alone = certify("milp", model, x[5:7], y[5:7], "linf:0.1")
    assert alone.status == said.status[5:7]
    torch.testing.assert_close(alone.margin, said.margin[5:7])


@pytest.fixture(scope="module")
def hard(toy) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """What holds within linf 0.1 though CROWN does not prove it, and what CROWN says."""
    model, x, y, least = toy
    crown = Bounds(trace(model, (2,)), Ball(x, ThreatModel.parse("linf:0.1"))).lower(differences(y, 3)).amin(1)
    rows = (least > 0.01) & (crown < -0.01)
    assert rows.sum() >= 2
    return model, x[rows], y[rows], crown[rows].float()


def test_no_time_leaves_what_was_known_before(hard):
    model, x, y, crown = hard
    said = certify("milp:seconds=1e-9", model, x, y, "linf:0.1")
    assert said.status == [UNDECIDED] * len(x)
    assert said.reason == ["HiGHS ended with user_limit (1e-09 s were allowed)"] * len(x)
    torch.testing.assert_close(said.margin, crown)


@pytest.mark.parametrize("spec", ["lp", "milp", "milp:least=true"])
@pytest.mark.parametrize("failure", ["infeasible", "unbounded", "optimal_inaccurate", "user_limit", "raises"])
def test_a_solver_that_fails_never_verifies(spec, failure, hard, monkeypatch):
    def fail(problem: cvxpy.Problem, **_: object) -> None:
        if failure == "raises":
            raise cvxpy.SolverError("out\nof luck")
        solve(problem, solver="HIGHS")
        problem._status, problem._value = failure, float("inf")
        stats.mip_dual_bound = float("inf")

    solve = cvxpy.Problem.solve
    stats = type("Stats", (), {})()
    monkeypatch.setattr(cvxpy.Problem, "solve", fail)
    monkeypatch.setattr(cvxpy.Problem, "solver_stats", type("Stats", (), {"extra_stats": stats}), raising=False)
    model, x, y, _ = hard
    said = certify(spec, model, x, y, "linf:0.1")
    assert said.status == [UNDECIDED] * len(x)
    assert all(("SolverError: out of luck" if failure == "raises" else failure) in reason for reason in said.reason)


@pytest.mark.parametrize("spec", ["lp", "milp"])
@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)], "1 (Sigmoid) is neither affine nor a (leaky) ReLU"),
        ([nn.Unflatten(1, (1, 2, 2)), nn.MaxPool2d(2), nn.Flatten()], "1 (MaxPool2d) is neither"),
        ([nn.Linear(4, 4), nn.Softmax(1)], "1 (Softmax) calls softmax"),
        ([nn.Linear(4, 10_001), nn.ReLU(), nn.Linear(10_001, 2)], "small networks: this one has 10,001 neurons"),
    ],
)
def test_what_is_not_covered_is_named(spec, layers, said):
    with pytest.raises(Unbounded) as error:
        certify(spec, nn.Sequential(*layers), torch.rand(1, 4), torch.tensor([0]), "linf:0.1")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="seconds must be above 0"):
        make("certifier", "milp:seconds=0")
