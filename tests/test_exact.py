"""Linear and mixed-integer programs: worked out by hand, on a grid, and held to other bounds and to attacks."""

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
    for before, after in zip(sizes, sizes[1:]):
        layers += [nn.Linear(before, after), activation()]
        for parameter in layers[-2].parameters():
            parameter.data = torch.randn(parameter.shape, generator=random, dtype=torch.float64) * 1.5 / before**0.5
    return nn.Sequential(*layers[:-1]).double().eval()


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


def least_on_a_grid(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int = 301) -> Tensor:
    """The least margins (B,) over points of each two-dimensional ball."""
    line = torch.linspace(-threat.eps, threat.eps, steps, dtype=torch.float64)
    offsets = torch.cartesian_prod(line, line)
    offsets = offsets[threat.norm.size(offsets) <= threat.eps]
    points = (x.unsqueeze(1) + offsets).clamp(threat.lower, threat.upper)
    logits = model(points.flatten(0, 1)).view(len(x), len(offsets), -1)
    return (differences(y, logits.shape[2]).double().unsqueeze(1) @ logits.unsqueeze(3)).flatten(2).amin((1, 2))


@torch.no_grad()
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
    assert (torch.stack(gains).amax(0)[3:5] > 0.05).all()
