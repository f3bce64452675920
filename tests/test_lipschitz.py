"""The certifier ``lipschitz``, and the bounds on layers that it multiplies."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustbench_lite import data
from robustbench_lite.certificate import SOUND
from robustbench_lite.classifiers import Adapted
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate
from robustbench_lite.lipschitz import convolution_norm, layer_norms, pairwise
from robustbench_lite.models import ConvexBlock, ConvexSum, PreActBlock, build
from robustbench_lite.noise import Noise
from robustbench_lite.registry import make
from robustbench_lite.smoothed import Smoothed
from robustbench_lite.threat import ThreatModel

from .nets import convolutional, halfspace, many_classes, nearest

RANDOM = torch.Generator().manual_seed(0)


def certificate(model: nn.Module, x: Tensor, y: Tensor, threat: str):
    defended = model if isinstance(model, Defended) else Defended(model)
    return make("certifier", "lipschitz")(
        defended.eval(), x, y, ThreatModel.parse(threat), Noise(0, torch.arange(len(x)))
    )


def as_layers(model: nn.Module) -> nn.Sequential:
    """A linear model of tests/nets.py, made of layers."""
    layer = nn.Linear(model.weight.shape[1], len(model.weight), dtype=model.weight.dtype)
    layer.weight, layer.bias = model.weight, model.bias
    return nn.Sequential(nn.Flatten(), layer)


def unrolled(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """The norm of a linear layer on inputs of one shape, from its whole matrix."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        columns = (layer(basis) - layer(torch.zeros_like(basis))).flatten(1)
    return float(np.linalg.norm(columns.numpy(), 2))


def stretch(net: nn.Module, shape: tuple[int, ...]) -> float:
    """The most that a net was seen to stretch a difference: by its Jacobians at random points."""
    points = torch.rand(8, 1, *shape, generator=RANDOM, dtype=torch.float64) * 4 - 2
    jacobians = [torch.autograd.functional.jacobian(net, x).reshape(-1, math.prod(shape)) for x in points]
    return torch.linalg.matrix_norm(torch.stack(jacobians), 2).max().item()


def bound(net: nn.Module, shape: tuple[int, ...]) -> float:
    return pairwise(net.eval(), torch.zeros(1, *shape, dtype=torch.float64))[0, 1].item() / math.sqrt(2)


# Layers


@settings(max_examples=40, deadline=None)
@given(
    channels=st.sampled_from([(1, 1, 1), (2, 3, 1), (4, 2, 2), (3, 3, 3)]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 99),
)
def test_the_bound_of_a_convolution_is_never_below_its_norm(channels, kernel, stride, dilation, padding, seed):
    torch.manual_seed(seed)
    inputs, outputs, groups = channels
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, dtype=torch.float64)
    assert layer_norms(nn.Sequential(layer))["0"] >= unrolled(layer, (inputs, 9, 8)) * (1 - 1e-12)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (4, 2, 1, 1), (3, 2, 0, 1), (2, 1, 1, 2), (1, 1, 0, 1)]
)
def test_on_large_images_it_is_the_norm_but_for_a_few_percent(kernel, stride, padding, dilation):
    torch.manual_seed(kernel)
    layer = nn.Conv2d(2, 2, kernel, stride, padding, dilation, dtype=torch.float64)
    truth = unrolled(layer, (2, 18, 18))
    assert truth * (1 - 1e-12) <= layer_norms(nn.Sequential(layer))["0"] < 1.05 * truth


def test_it_covers_the_frequencies_between_the_samples():
    """A kernel cos(w t) peaks at the frequency w, halfway between two samples of the 32 of three taps."""
    peak = 2 * math.pi * 5.5 / 32
    kernel = torch.cos(peak * torch.arange(3, dtype=torch.float64)).view(1, 1, 1, 3)
    dense = torch.fft.fft(kernel.flatten(), 4096).abs().max().item()
    assert dense <= convolution_norm(kernel, (1, 1), (1, 1)) < 1.02 * dense


def test_linear_layers_are_exact():
    layer = nn.Linear(7, 5, dtype=torch.float64)
    assert layer_norms(nn.Sequential(layer))["0"] == pytest.approx(unrolled(layer, (7,)), rel=1e-12)


def test_norms_known_by_hand():
    norm = nn.BatchNorm2d(2, eps=0).eval()
    norm.weight.data, norm.running_var = torch.tensor([3.0, -8.0]), torch.tensor([1.0, 4.0])
    by_hand = [
        (norm, 4),
        (nn.ReLU(), 1),
        (nn.LeakyReLU(2.0), 2),
        (nn.AvgPool2d(2), 1 / 2),
        (nn.AvgPool2d(3, divisor_override=3), 1),
        (nn.AvgPool2d(3, 1), 1),
        (nn.MaxPool2d(3, 2), 2),
        (nn.MaxPool2d(2), 1),
        (nn.MaxPool2d(3, 2, dilation=2), 3),
        (nn.AdaptiveAvgPool2d(1), 1),
        (nn.Dropout().eval(), 1),
    ]
    found = layer_norms(nn.Sequential(*(layer for layer, _ in by_hand)))
    for (layer, expected), one in zip(by_hand, found.values()):
        assert expected * (1 - 1e-12) <= one < 1.02 * expected + 1e-9, layer


# Networks


class Branches(nn.Module):
    """A sum, a difference with a constant, and both branches side by side; an argument that is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
        self.register_buffer("centre", torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        x = x.view(x.shape[0], -1) - self.centre if noise is None else 9 * x
        x = torch.relu(x + self.one(x))
        return torch.cat([x + x, self.two(x)], dim=1).view(x.size(0), -1)


def test_sums_and_branches_by_hand():
    net = Branches()
    one, two = (layer_norms(net)[name] for name in ("one", "two"))
    assert bound(net, (2, 2)) == pytest.approx((1 + one) * math.hypot(2, two))


class Mixed(nn.Module):
    """What doubles and what takes four times, mixed 1 to 3: no more than 3.5 times."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(2))
        self.one.weight.data, self.two.weight.data = 2 * torch.eye(4).double(), 4 * torch.eye(4).double()
        self.sum = ConvexSum()
        self.sum.weights.data = torch.tensor([0.25, 0.75])

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(self.one(x), self.two(x))


def test_a_convex_sum_by_hand():
    assert bound(Mixed(), (4,)) == pytest.approx(3.5)


@pytest.mark.parametrize("seed", range(3))
def test_a_network_never_stretches_more_than_its_bound(seed: int):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, 1, 1),
        PreActBlock(4, 4, 1),
        ConvexBlock(4, 4, 1),
        PreActBlock(4, 6, 2),
        nn.MaxPool2d(2, 1),
        nn.Sigmoid(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
        nn.Tanh(),
    ).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    assert 0 < stretch(net.eval(), (1, 6, 6)) <= bound(net, (1, 6, 6))


def test_pixel_ranges_and_plain_wrappers_are_seen_through():
    net = nn.Sequential(nn.Linear(4, 3, dtype=torch.float64))
    adapted = Adapted(net, mean=[0.5] * 4, std=[0.5, 0.2, 0.4, 0.4], bounds=(0, 10))
    torch.testing.assert_close(
        pairwise(Defended(Defended(adapted)), torch.zeros(1, 4).double()),
        50 * pairwise(net, torch.zeros(1, 4).double()),
    )


class Broadcast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.pool(x)).flatten(1)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        skip = x = x.flatten(1)
        x += torch.relu(x)
        return x + skip


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 9 * x.flatten(1)


@pytest.mark.parametrize(
    ("net", "complaint"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Softplus()), r"Softplus \(layer 2\); it covers .*Linear"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), "padding by zeros, not circular"),
        (nn.AvgPool2d(2, 2, 1, count_include_pad=False), "count_include_pad"),
        (nn.AdaptiveAvgPool2d(2), "to 1, not to 2"),
        (Smoothed(nn.Flatten()), "behind Smoothed"),
        (Adapted(nn.Flatten(), probabilities=True), "probabilities"),
        (Broadcast(), "does not cover add"),
        (InPlace(), "InPlace: its graph answers otherwise"),
        (Scaled(), "does not cover mul"),
        (Branching(), "cannot trace Branching"),
    ],
)
def test_what_is_not_covered_says_so_in_one_line(net: nn.Module, complaint: str):
    with pytest.raises(ValueError, match=complaint) as error:
        pairwise(net.eval(), torch.ones(1, 1, 4, 4))
    assert "\n" not in str(error.value)


def test_layers_that_learn_on_the_way_are_refused():
    with pytest.raises(ValueError, match="eval mode"):
        layer_norms(nn.Sequential(nn.BatchNorm2d(1)))
    with pytest.raises(ValueError, match="eval mode"):
        layer_norms(nn.Sequential(nn.Dropout()))


# Certificates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exact_distance_of_a_halfspace(dtype: torch.dtype):
    model, x, y = halfspace("l2", 0.3, shape=(1, 5, 5), dtype=dtype)
    net = as_layers(model)
    inside, outside = certificate(net, x, y, "l2:0.299"), certificate(net, x, y, "l2:0.301")
    assert inside.label.tolist() == y.tolist()
    assert set(inside.status) == {"verified"}
    assert set(outside.status) == {"unknown"}
    torch.testing.assert_close(inside.radius, torch.full((20,), 0.3, dtype=dtype), atol=1e-4, rtol=0)
    slope = (model.weight[0] - model.weight[1]).norm().item()
    torch.testing.assert_close(inside.margin, torch.full((20,), 0.001 * slope, dtype=dtype), atol=1e-5, rtol=0)


def test_with_many_classes_the_nearest_counts():
    model, x, y = many_classes(5, 20)
    found = certificate(as_layers(model), x, y, "l2:0.01")
    torch.testing.assert_close(found.radius, nearest(model, x, "l2"), atol=SOUND[torch.float32], rtol=0)
    for norm, factor in (("l1", 1), ("linf", math.sqrt(30))):
        other = certificate(as_layers(model), x, y, f"{norm}:0.01")
        torch.testing.assert_close(other.radius, found.radius / factor)
        assert (other.radius <= nearest(model, x, norm)).all()


def test_a_wrong_label_has_no_radius():
    model, x, y = many_classes(3, 6)
    found = certificate(as_layers(model), x, (y + 1) % 3, "l2:0")
    assert found.radius.tolist() == [0] * 6
    assert found.label.tolist() == [-1] * 6


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_verified_is_a_radius_that_reaches_eps(norm: str):
    net, x, y = convolutional(8)
    net, x = net.double(), x.double()
    radius = certificate(net, x, y, f"{norm}:0.01").radius
    for one, reached in ((radius - 1e-12, "verified"), (radius + 1e-12, "unknown")):
        found = [certificate(net, x, y, f"{norm}:{eps!r}").status[row] for row, eps in enumerate(one.tolist())]
        assert found == [reached] * 8


def test_no_attack_wins_inside_on_digits():
    """A net trained with its weights kept small, so that its certificates are worth attacking."""
    images = data.load("digits")
    net = build("mlp", images.shape, 10)
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=1)
    order = torch.randperm(len(images.y), generator=torch.Generator().manual_seed(0))
    for rows in order.repeat(6).split(128):
        optimiser.zero_grad()
        F.cross_entropy(net(images.x[rows]), images.y[rows]).backward()
        optimiser.step()
    right = (net(images.x).argmax(1) == images.y).nonzero()[:32, 0]
    x, y = images.x[right], images.y[right]
    for threat, attack in (("l2:0.15", "pgd:steps=20"), ("linf:0.02", "pgd:steps=20"), ("l2:0.4", "fab:steps=10")):
        found, outcome = certificate(net, x, y, threat), evaluate(attack, net, x, y, threat)
        verified, broken = np.array(found.status) == "verified", outcome.status == "broken"
        assert verified.any()
        assert broken.any()
        assert not (verified & broken).any()
        assert (found.radius.numpy()[broken] < outcome.distance[broken]).all()
