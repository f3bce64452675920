"""The engine of bounds: never wrong, exact where it can be, and as tight as others."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustbench_lite.bounds import Ball, Bounds, Graph, Unbounded, differences, optimised, trace
from robustbench_lite.bounds.graph import RULES
from robustbench_lite.bounds.maps import Convolution, Full, Terms
from robustbench_lite.bounds.relax import GELU, SIGMOID, SILU, TANH, Interval, Rectifier, Smooth
from robustbench_lite.classifiers import Adapted
from robustbench_lite.data import load
from robustbench_lite.models import MODELS, build
from robustbench_lite.norms import NORMS
from robustbench_lite.threat import ThreatModel

METHODS: dict[str, dict] = {
    "ibp": {"slopes": None},
    "crown-ibp": {"refine": False},
    "crown": {},
    "zero": {"slopes": "zero"},
    "parallel": {"slopes": "parallel"},
}
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky": nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
}
SHAPE = (2, 6, 5)
FREE = (-math.inf, math.inf)


class Residual(nn.Module):
    """Two paths of different reach that are added, two that are joined, and one that is subtracted."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = nn.BatchNorm2d(2), activation
        self.first, self.second = nn.Conv2d(2, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1, groups=2)
        self.shortcut = nn.Conv2d(2, 4, 1, 2)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        pre = self.activation(self.norm(x))
        y = self.shortcut(pre) + self.second(self.activation(self.first(pre)))
        y = torch.cat([self.activation(y), 1 - y / 2], 1)
        return self.last(F.adaptive_avg_pool2d(y, 1).flatten(1)) - 0.1


def dense(activation: nn.Module) -> nn.Module:
    layers = [nn.Linear(60, 7), activation, nn.Linear(7, 6), activation, nn.Linear(6, 3)]
    return nn.Sequential(nn.Flatten(), *layers)


def convolutional(activation: nn.Module) -> nn.Module:
    layers = [
        nn.Conv2d(2, 3, 3, (2, 1), (1, 0)),
        activation,
        nn.Conv2d(3, 4, 2, dilation=2, padding=1),
        nn.BatchNorm2d(4),
    ]
    return nn.Sequential(*layers, activation, nn.AvgPool2d((1, 2)), nn.Flatten(), nn.Linear(12, 3))


def pooled(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2, 1), activation, nn.Flatten(), nn.Linear(18, 3))


def deep(activation: nn.Module) -> nn.Module:
    """Convolutions small enough, on images of 14x13, that linear functions of their neurons stay in windows."""
    first, second = nn.Conv2d(2, 3, 3, (1, 2), (1, 0)), nn.Conv2d(3, 3, (3, 2), 1, (2, 1))
    third = nn.Conv2d(3, 4, 2, dilation=(2, 1), padding=(1, 2))
    layers = [first, activation, second, third, activation, nn.Conv2d(4, 4, 2, (2, 1), (1, 0), groups=2), activation]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


STRUCTURES = {"dense": dense, "convolutional": convolutional, "pooled": pooled, "residual": Residual}


def network(structure: str, activation: str = "relu", seed: int = 0) -> nn.Module:
    return randomised(STRUCTURES[structure](ACTIVATIONS[activation]), seed)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same network in float64, with weights that leave many activations unsettled."""
    random = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.6 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64) * scale)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=random)
                module.running_var.uniform_(0.5, 2, generator=random)
    return model


def inputs(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Images of which a quarter of the pixels lie on the edge of the range."""
    random = torch.Generator().manual_seed(seed)
    return (1.5 * torch.rand(count, *shape, generator=random, dtype=torch.float64) - 0.25).clamp(0, 1)


def threat(norm: str = "linf", eps: float = 0.1, within: tuple[float, float] = (0.0, 1.0)) -> ThreatModel:
    return ThreatModel(NORMS[norm], eps, *within)


def points(ball: Ball, count: int, model: nn.Module, seed: int) -> Tensor:
    """Points of the ball (count, B, ...): random ones, corners, and some that climb or descend a logit."""
    random = torch.Generator().manual_seed(seed)
    many = ball.x.expand(count, *ball.x.shape).flatten(0, 1).clone().requires_grad_()
    (gradient,) = torch.autograd.grad((model(many) * torch.randn(len(many), 3, generator=random).double()).sum(), many)
    way = torch.randn(many.shape, generator=random, dtype=many.dtype)
    way[::3] = ball.threat.norm.steepest(gradient[::3])
    way[1::3] = way[1::3].sign()
    length = ball.threat.eps * (1 + 9 * torch.rand(len(many), *[1] * (many.dim() - 1), generator=random))
    clean = many.detach()
    return ball.threat.project(clean + way * length, clean).view(count, *ball.x.shape)


def values(graph: Graph, x: Tensor) -> list[Tensor]:
    """What every node computes."""
    found: list[Tensor] = []
    for node in graph.nodes:
        found.append(node(*(found[parent.index] for parent in node.parents)) if node.op else x)
    return found


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(STRUCTURES)),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.sampled_from(["linf", "l2", "l1"]),
    st.floats(0, 1),
    st.integers(0, 2**16),
)
def test_no_point_of_the_ball_leaves_a_bound(structure, activation, norm, size, seed):
    model, x = network(structure, activation, seed), inputs(2, seed)
    ball = Ball(x, threat(norm, size * {"linf": 0.5, "l2": 1.5, "l1": 5}[norm], (0.0, 1.0) if seed % 4 else FREE))
    graph, functions = trace(model, SHAPE), differences(torch.tensor([seed % 3, 1]), 3)
    tried = points(ball, 90, model, seed)
    assert ball.threat.allows(tried.flatten(0, 1), x.repeat(90, 1, 1, 1), 1e-9).all()
    with torch.no_grad():
        reached = [
            value.view(90, 2, *node.shape) for value, node in zip(values(graph, tried.flatten(0, 1)), graph.nodes)
        ]
        margins = torch.einsum("bsc,kbc->kbs", functions.double(), reached[-1]).amin(0)
        for name, options in METHODS.items():
            bounds = Bounds(graph, ball, **options)
            assert (bounds.lower(functions) <= margins + 1e-9).all(), name
            for node, (lower, upper) in zip(graph.nodes, bounds.intervals):
                assert (reached[node.index] >= lower - 1e-9).all(), (name, node)
                assert (reached[node.index] <= upper + 1e-9).all(), (name, node)
    assert (optimised(graph, ball, functions, iterations=3) <= margins + 1e-9).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("within", [(0.0, 1.0), FREE])
def test_a_linear_function_is_bounded_exactly_over_ball_and_range(norm, within):
    import cvxpy

    ball = Ball(inputs(3, 5, (12,)), threat(norm, {"linf": 0.3, "l2": 0.7, "l1": 1.5}[norm], within))
    slopes = torch.randn(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slopes[0, :4] = 0
    least = ball.minimum(Full(slopes, torch.arange(3)))
    order = {"linf": "inf", "l2": 2, "l1": 1}[norm]
    for clean, slope, found in zip(ball.x.numpy(), slopes.numpy(), least):
        x = cvxpy.Variable(12)
        inside = [cvxpy.norm(x - clean, order) <= ball.threat.eps]
        inside += [x >= 0, x <= 1] if within == (0.0, 1.0) else []
        assert found.item() == pytest.approx(cvxpy.Problem(cvxpy.Minimize(slope @ x), inside).solve(), abs=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", METHODS)
def test_affine_networks_are_bounded_exactly(name, norm):
    model = nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 4), nn.Linear(4, 3))
    model, x, y = model.double().eval(), inputs(4), torch.tensor([0, 2, 1, 0])
    ball = Ball(x, threat(norm, 0.2, FREE))
    with torch.no_grad():
        weight = torch.stack(
            [model(one) - model(torch.zeros_like(one)) for one in torch.eye(60).double().view(-1, 1, *SHAPE)], 2
        )
        functions = differences(y, 3).double()
        logits = (functions @ model(x).unsqueeze(2)).squeeze(2)
        dual = torch.linalg.vector_norm(functions @ weight[0], {"linf": 1, "l2": 2, "l1": math.inf}[norm], dim=2)
    torch.testing.assert_close(Bounds(trace(model, SHAPE), ball, **METHODS[name]).lower(functions), logits - 0.2 * dual)


def one_neuron(activation: nn.Module) -> Graph:
    """From x to activation(x) + 1/2 and 0."""
    model = nn.Sequential(nn.Linear(1, 1), activation, nn.Linear(1, 2))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), ([[1.0]], [0.0], [[1.0], [0.0]], [0.5, 0.0])):
            parameter.copy_(torch.tensor(value))
    return trace(model, (1,))


def test_a_network_of_one_neuron_is_bounded_as_by_hand():
    graph, ball = one_neuron(nn.ReLU()), Ball(torch.tensor([[1.0]]), threat(eps=2.0, within=FREE))
    up, down = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[-1.0, 1.0]]])
    # over [-1, 3] the ReLU lies below 3/4 (x + 1), and above x, 0 or 3/4 x
    expected = {"ibp": 0.5, "crown-ibp": -0.5, "crown": -0.5, "zero": 0.5, "parallel": 0.5 - 0.75}
    for name, options in METHODS.items():
        bounds = Bounds(graph, ball, **options)
        assert bounds.lower(up).item() == pytest.approx(expected[name])
        assert bounds.lower(down).item() == pytest.approx(-3.5)
    assert optimised(graph, ball, up).item() == pytest.approx(0.5)
    left = Ball(torch.tensor([[-0.25]]), threat(eps=0.75, within=FREE))
    assert optimised(one_neuron(nn.LeakyReLU(0.2)), left, up).item() == pytest.approx(0.5 - 0.2)


@pytest.mark.parametrize(("make", "shape"), [(Residual, SHAPE), (dense, SHAPE), (deep, (2, 14, 13))])
def test_windows_memory_and_batches_change_nothing(make, shape, monkeypatch):
    model, x = randomised(make(nn.ReLU())), inputs(4, shape=shape)
    graph, functions = trace(model, shape), differences(torch.tensor([0, 1, 2, 0]), 3)
    ball = Ball(x, threat(eps=0.15))
    whole = Bounds(graph, ball).lower(functions)
    torch.testing.assert_close(Bounds(graph, ball, memory=2**18).lower(functions), whole)
    torch.testing.assert_close(Bounds(graph, Ball(x[2:3], ball.threat)).lower(functions[2:3]), whole[2:3])
    transpose = Convolution.transpose

    def without_windows(self: Convolution, terms: Terms) -> Terms:
        return transpose(self, terms.inside().full())

    monkeypatch.setattr(Convolution, "transpose", without_windows)
    torch.testing.assert_close(Bounds(graph, ball).lower(functions), whole)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_methods_are_in_order_and_agree_without_a_perturbation(structure):
    model, x, y = network(structure, seed=3), inputs(8), torch.arange(8) % 3
    graph, functions = trace(model, SHAPE), differences(y, 3)

    def lower(eps: float, name: str) -> Tensor:
        return Bounds(graph, Ball(x, threat(eps=eps)), **METHODS[name]).lower(functions)

    with torch.no_grad():
        margins = torch.einsum("bsc,bc->bs", functions.double(), model(x))
        for name in METHODS:
            torch.testing.assert_close(lower(0.0, name), margins)
        assert (lower(0.02, "ibp") >= lower(0.021, "ibp")).all()
        ibp, crown_ibp, crown = (lower(0.03, name) for name in ("ibp", "crown-ibp", "crown"))
    assert (ibp < crown_ibp + 1e-9).all()
    assert (crown_ibp < crown + 1e-9).all()
    optimal = optimised(graph, Ball(x, threat(eps=0.03)), functions)
    assert (crown <= optimal).all()
    assert structure == "pooled" or optimal.mean() > crown.mean() + 1e-4


def test_what_is_proved_or_hopeless_is_left_as_it_is_whatever_else_is_in_its_batch():
    model, x, y = network("dense", seed=3), inputs(30), torch.arange(30) % 3
    graph, functions, ball = trace(model, SHAPE), differences(y, 3), Ball(x, threat(eps=0.1))
    enough = Bounds(graph, ball).lower(functions).amin(1).median().item() + 1e-6
    every = optimised(graph, ball, functions)
    left = optimised(graph, ball, functions, enough=enough)
    torch.testing.assert_close(optimised(graph, ball, functions, batch=1, enough=enough), left)
    assert (left <= every + 1e-9).all()
    proved = every.amin(1) > enough
    assert torch.equal(left.amin(1) > enough, proved)
    for which in (proved, ~proved):
        assert (left < every - 1e-6)[which].any(), "nothing was saved"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("structure", "activation", "norm"),
    [
        ("convolutional", "relu", "l2"),
        ("residual", "leaky", "linf"),
        ("dense", "gelu", "linf"),
        ("pooled", "relu", "l1"),
    ],
)
def test_gradients_of_bounds_are_those_of_finite_differences(name, structure, activation, norm):
    model, x, functions = network(structure, activation, 1), inputs(2), differences(torch.tensor([0, 1]), 3)
    ball = Ball(x, threat(norm, 0.05))

    def lower() -> Tensor:
        return Bounds(trace(model, SHAPE), ball, **METHODS[name]).lower(functions).sum()

    parameters = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    gradients = torch.autograd.grad(lower(), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients):
            way = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            parameter += 1e-6 * way
            above = lower()
            parameter -= 2e-6 * way
            slope = (above - lower()) / 2e-6
            parameter += 1e-6 * way
            assert slope.item() == pytest.approx((gradient * way).sum().item(), rel=1e-4, abs=1e-5)


def test_float32_agrees_with_float64():
    model, x, functions = network("residual"), inputs(4), differences(torch.arange(4) % 3, 3)
    for name, options in METHODS.items():
        exact = Bounds(trace(model.double(), SHAPE), Ball(x, threat()), **options).lower(functions)
        rough = Bounds(trace(model.float(), SHAPE), Ball(x.float(), threat()), **options).lower(functions)
        torch.testing.assert_close(rough.double(), exact, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_our_models_become_graphs(name):
    shape = (3, 8, 8)
    model = Adapted(build(name, shape, 10), mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], bounds=(-1, 1)).eval()
    x = torch.rand(5, *shape)
    torch.testing.assert_close(trace(model, shape)(x), model(x), rtol=1e-4, atol=1e-5)


class Calls(nn.Module):
    def __init__(self, call) -> None:
        super().__init__()
        self.inner, self.call = nn.Linear(4, 4), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner(x))


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Softmax(1), "1 (Softmax) calls softmax, which cannot be bounded; what can: adaptive_avg_pool2d, add,"),
        (nn.LayerNorm(4), "1 (LayerNorm) calls layer_norm"),
        (nn.BatchNorm1d(4), "1 (BatchNorm1d) calls batch_norm, which cannot be bounded here: it normalises with"),
        (nn.Dropout(), "1 (Dropout) calls dropout, which cannot be bounded here: it is random"),
        (nn.LeakyReLU(1.5), "slope below zero is 1.5"),
        (nn.GELU(approximate="tanh"), "approximated by tanh"),
        (Calls(lambda x: x * x), "1 (Calls) calls mul"),
        (Calls(lambda x: x / x.sum()), "1 (Calls) calls sum"),
        (Calls(lambda x: 1 / x), "calls __rdiv__"),
        (Calls(lambda x: x if (x > 0).any() else -x), "calls gt"),
        (Calls(lambda x: x + torch.arange(float(len(x))).view(-1, 1)), "it differs from input to input"),
        (Calls(lambda x: x - x.mean(0)), "calls mean across inputs"),
        (Calls(lambda x: x.double()), "another type of numbers"),
        (Calls(lambda x: x[torch.arange(len(x) - 1, -1, -1)]), "it picks among the inputs"),
        (Calls(lambda x: x.transpose(0, -1)), "across inputs"),
        (Calls(lambda x: torch.ones(len(x), 2)), "does not depend on its input"),
        (Calls(lambda x: x + torch.rand(4)), "answers otherwise"),
    ],
)
def test_what_cannot_be_bounded_is_named(layer, said):
    with pytest.raises(Unbounded) as error:
        trace(nn.Sequential(nn.Linear(4, 4), layer), (4,))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"norm": "l0"}, "not for l0"), ({"eps": math.inf}, "infinite eps"), ({"within": (0.5, 1)}, "outside [0.5, 1]")],
)
def test_balls_that_have_no_bounds_are_refused(change, said):
    with pytest.raises(ValueError) as error:
        Ball(inputs(1), threat(**change))
    assert said in str(error.value)


def test_what_changes_in_place_is_followed():
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x - 0.5
            y += x
            return F.relu_(y) - x

    x = torch.rand(4, 3)
    torch.testing.assert_close(trace(InPlace(), (3,))(x), InPlace()(x))


def test_a_layer_is_added_by_a_rule(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 3), nn.Softplus())
    with pytest.raises(Unbounded, match="softplus"):
        trace(model, (4,))
    monkeypatch.setitem(
        RULES, "softplus", lambda shape, x, beta, threshold: (Smooth(F.softplus, torch.sigmoid, ()), (x,))
    )
    x = torch.rand(2, 4)
    bounds = Bounds(trace(model, (4,)), Ball(x, threat())).lower(torch.eye(3).expand(2, 3, 3))
    assert (bounds <= model(x)).all()
    assert (bounds > model(x) - 1).all()


OPS = {"relu": Rectifier(), "leaky": Rectifier(0.2), "sigmoid": SIGMOID, "tanh": TANH, "gelu": GELU, "silu": SILU}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("slopes", ["adaptive", "zero", "parallel"])
def test_an_activation_lies_between_its_lines_and_touches_them(op, slopes):
    ends = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    inside = Interval(ends.amin(1), ends.amax(1))
    lines = op.lines(inside, slopes)
    x = inside.lower + (inside.upper - inside.lower) * torch.linspace(0, 1, 2001, dtype=torch.float64).unsqueeze(1)
    above = (lines.lower + lines.gap) * x + lines.upper_offset - op(x)
    below = op(x) - lines.lower * x - (lines.lower_offset if lines.lower_offset is not None else 0)
    for gap in (above, below):
        assert gap.amin() >= -1e-12
        assert gap.amin(0).amax() < 5e-3  # as near as 2001 points show


@pytest.mark.reference
def test_the_bounds_on_wong_and_kolters_checkpoint_are_those_of_others():
    reference = Path(os.environ.get("ROBUST_BENCH_REFERENCE", "."))
    theirs = np.load(reference / "bounds_wong_kolter_first20.npz")
    model = build("cnn", (1, 28, 28), 10)
    model.load_state_dict(torch.load(reference / "wong_kolter_mnist_eps01.pth", map_location="cpu", weights_only=True))
    data = Path(os.environ["ROBUST_BENCH_DATA"]) if "ROBUST_BENCH_DATA" in os.environ else None
    images = load("mnist", "test", data).take(slice(20))
    graph, functions = trace(model.eval(), (1, 28, 28)), differences(images.y, 10)
    clipped, whole = Ball(images.x, threat()), Ball(images.x, threat(within=FREE))

    def surplus(key: str, ball: Ball, **options) -> Tensor:
        with torch.no_grad():
            return Bounds(graph, ball, **options).lower(functions) - torch.from_numpy(theirs[key])

    for key in ("ibp", "crown-ibp"):
        assert surplus(key.replace("-", "_"), clipped, **METHODS[key]).abs().amax() < 1e-3
    assert surplus("dual_unclipped", whole, **METHODS["parallel"]).abs().amax() < 1e-3
    assert surplus("crown", clipped).amin() > -1e-3
    assert surplus("crown_unclipped", whole).amin() > -1e-3
    learned = optimised(graph, clipped, functions) - torch.from_numpy(theirs["alpha_crown"])
    assert learned.amin() > -1e-3
    assert learned.mean() > 0
