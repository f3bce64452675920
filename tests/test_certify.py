"""The certifiers on linear bounds: exact where that is known, in their order, and never broken by an attack."""

import os
import sys
from collections.abc import Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite import load_defense
from robustbench_lite.bounds import Ball, Bounds, differences, estimated, trace
from robustbench_lite.certificate import Certificate
from robustbench_lite.data import load
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate, frozen
from robustbench_lite.models import build
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import BROKEN
from robustbench_lite.registry import builtin, make
from robustbench_lite.smoothed import Smoothed
from robustbench_lite.testing import Check, certifier_checks
from robustbench_lite.threat import ThreatModel, find_norm
from tests.test_attacks import ATTACKS
from tests.test_bounds import inputs, network, points, threat

CERTIFIERS = {
    "ibp": "ibp",
    "crown-ibp": "crown-ibp",
    "crown": "crown",
    "wong-kolter": "wong-kolter",
    "wong-kolter-whole": "wong-kolter:clip=false",
    "alpha-crown": "alpha-crown:iterations=4",
    "best": "best:iterations=4",
}
ORDER = ("ibp", "crown-ibp", "crown", "alpha-crown")


def certify(name: str, model: nn.Module, x: Tensor, y: Tensor, within: ThreatModel) -> Certificate:
    defended = model if isinstance(model, Defended) else Defended(model)
    with frozen(defended):
        return make("certifier", CERTIFIERS.get(name, name))(defended, x, y, within, Noise(0, torch.arange(len(x))))


def verified(certificate: Certificate) -> Tensor:
    return torch.tensor([status == "verified" for status in certificate.status])


def contracts() -> Iterator[tuple[str, Check]]:
    """Every check of every certifier; solvers are slow, and held to the truth in test_exact.py."""
    for name, spec in CERTIFIERS.items():
        yield from (
            (f"{name}-{title}", check) for title, check in certifier_checks(make("certifier", spec), exact=True)
        )
    for name, checks in {
        "lipschitz": certifier_checks(make("certifier", "lipschitz")),
        "smoothing": certifier_checks(make("certifier", "smoothing:n=2000"), partial(Smoothed, sigma=0.003)),
    }.items():
        yield from ((f"{name}-{title}", check) for title, check in checks)
    for name in ("lp", "milp"):
        checks = certifier_checks(make("certifier", name))
        yield from ((f"{name}-{title}", check) for title, check in checks if title in QUICK)


QUICK = {"declaration", "a_model_that_says_nothing_is_never_certified-linf"}


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in contracts()])
def test_contract(check):
    check()


def test_every_certifier_is_held_to_the_contract():
    named = {make("certifier", spec).name for spec in CERTIFIERS.values()}
    assert named | {"lipschitz", "smoothing", "lp", "milp"} == set(builtin("certifier"))


def centred(structure: str) -> nn.Module:
    """A random network that gives every label to some inputs."""
    model = network(structure)
    last = model.last if structure == "residual" else model[-1]
    with torch.no_grad():
        last.bias -= model(inputs(100)).median(0).values
    return model


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("structure", ["dense", "convolutional", "residual"])
def test_each_method_is_at_least_as_tight_as_the_cheaper_ones(structure, norm):
    model, x = centred(structure), inputs(30)
    y = model(x).argmax(1)
    within = threat(norm, {"linf": 0.02, "l2": 0.1, "l1": 0.3}[norm])
    said = {name: certify(name, model, x, y, within) for name in CERTIFIERS}
    for loose, tight in pairwise(ORDER):
        assert (said[tight].margin >= said[loose].margin - 1e-9).all(), (loose, tight)
    assert (said["ibp"].margin < said["crown"].margin - 1e-3).any()
    if structure == "dense" and norm == "linf":  # where CROWN leaves something to be won
        assert (said["crown"].margin < said["alpha-crown"].margin - 1e-3).any()
    assert said["wong-kolter-whole"].margin.mean() < said["wong-kolter"].margin.mean()
    parts = torch.stack([verified(said[name]) for name in ORDER]).any(0)
    assert torch.equal(verified(said["best"]), parts)
    best = torch.stack([said[name].margin for name in ORDER]).amax(0)
    fooled = torch.tensor([status == "falsified" for status in said["best"].status])
    assert (said["best"].margin >= best - 1e-9)[~parts & ~fooled].all()
    logits = model(points(Ball(x, within), 60, model, seed=0).flatten(0, 1)).view(60, len(x), -1)
    margins = torch.einsum("bsc,kbc->kbs", differences(y, 3).double(), logits).amin((0, 2))
    for name, certificate in said.items():
        assert (certificate.margin <= margins + 1e-9).all(), name


def test_of_what_is_fooled_nothing_slow_is_asked(monkeypatch):
    model, x = centred("dense"), inputs(200)
    y, within, asked = model(x).argmax(1), threat(eps=0.03), []
    home = sys.modules[type(make("certifier", "best")).__module__]
    crown = home.linear
    monkeypatch.setattr(home, "linear", lambda graph, ball, of: asked.append(ball.x) or crown(graph, ball, of))
    said = certify("best", model, x, y, within)
    fooled = torch.tensor([status == "falsified" for status in said.status])
    assert fooled.any()
    assert verified(said).any()
    points = said.counterexample[fooled]
    assert within.allows(points, x[fooled], slack=1e-12).all()
    assert (model(points).argmax(1) != y[fooled]).all()
    assert not (torch.cat(asked)[:, None] == x[fooled]).flatten(2).all(2).any()


def test_single_precision_changes_nothing():
    model, x = network("convolutional"), inputs(60)
    y = model(x).argmax(1)
    for name in CERTIFIERS.keys() - {"best"}:  # which may stop elsewhere in single precision
        exact = certify(name, model.double(), x, y, threat(eps=0.03))
        assert exact.margin.dtype == torch.float64
        rough = certify(name, model.float(), x.float(), y, threat(eps=0.03))
        torch.testing.assert_close(rough.margin.double(), exact.margin, atol=1e-3, rtol=1e-3, msg=name)


class Squeezed(Defended):
    """Rounds to a few grey levels, and shows attacks the identity in their place."""

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        return self.model((x * 7).round() / 7)


class Squashed(Defended):
    def surrogate(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        return self.model(x * 2)


class Jittered(Defended):
    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        return self.model(x + 0.1 * torch.rand_like(x))


@pytest.mark.parametrize("name", CERTIFIERS)
def test_what_is_not_covered_is_refused_by_name(name):
    net, x, y = nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 1])
    for model, said in (
        (Defended(nn.Sequential(net, nn.Softmax(1))), r"model\.1 \(Softmax\) calls softmax"),
        (Squeezed(net), "Squeezed.* calls round"),
        (Jittered(net), "rand"),
        (Defended(Squashed(net)), "Squashed has a surrogate"),
    ):
        with pytest.raises(ValueError, match=said):
            certify(name, model, x, y, threat())
    with pytest.raises(ValueError, match="not for l0"):
        certify(name, net, x, y, ThreatModel(find_norm("l0"), 1))


@pytest.mark.parametrize("spec", ["alpha-crown:iterations=0", "alpha-crown:rate=0", "best:iterations=0"])
def test_settings_that_make_no_sense_are_refused(spec):
    with pytest.raises(ValueError, match=spec.partition(":")[0]):
        make("certifier", spec)


def test_projections_estimate_how_far_the_neurons_of_the_dual_network_reach():
    model, x = network("dense"), inputs(30)
    graph, ball, functions = (
        trace(model, x.shape[1:]),
        Ball(x, threat(eps=0.02)),
        differences(torch.zeros(30).long(), 3),
    )
    noise = Noise(0, torch.arange(30))
    first, second = model[1], model[3]
    lower, upper = (side.flatten(1) for side in ball.box)
    radius, centre = (upper - lower) / 2, first((upper + lower) / 2)
    reach = radius @ first.weight.abs().T
    slope = ((centre + reach) / (2 * reach)).clamp(0, 1)
    relaxed = slope * (reach - centre).clamp_min(0) / 2
    through = torch.einsum("kj,bj,ji,bi->bkji", second.weight, slope, first.weight, radius).sum(2).abs().sum(2)
    layers = [node.index for node in graph.nodes if "Linear" in node.layer][:2]
    found = estimated(graph, ball, noise, 4000)
    for layer, exact in zip(layers, (reach, through + relaxed @ second.weight.abs().T)):
        lower, upper = found.intervals[layer]
        assert ((upper - lower) / 2 / exact).mean().item() == pytest.approx(1, abs=0.01)
    margins = found.lower(functions)
    assert (margins - Bounds(graph, ball, "parallel").lower(functions)).abs().mean() < 0.01
    (gradient,) = torch.autograd.grad(margins.sum(), first.weight)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(("structure", "activation", "norm"), [("dense", "tanh", "linf"), ("dense", "relu", "l2")])
def test_projections_are_for_relu_and_linf(structure, activation, norm):
    model, x = network(structure, activation), inputs(2)
    with pytest.raises(ValueError, match="projections estimate"):
        estimated(trace(model, x.shape[1:]), Ball(x, threat(norm)), Noise(0, torch.arange(2)))


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small net trained on the digits, and some test images."""
    train, test = load("digits", "train"), load("digits", "test")
    net = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 24), nn.ReLU())
    net = net.append(nn.Linear(24, 10))
    random = torch.Generator().manual_seed(0)
    for weight in net.parameters():
        scale = (2 / weight[0].numel()) ** 0.5 if weight.dim() > 1 else 0.0
        weight.data = torch.randn(weight.shape, generator=random) * scale
    for step in range(150):
        rows = torch.randint(len(train.x), (128,), generator=random)
        gradients = torch.autograd.grad(F.cross_entropy(net(train.x[rows]), train.y[rows]), list(net.parameters()))
        for weight, gradient in zip(net.parameters(), gradients):
            weight.data -= (0.3 if step < 100 else 0.1) * gradient
    return net.eval(), test.x, test.y


SHIPPED = {"madry": 0.1, "standard": 0.01}  # and an eps at which something is certified


@cache
def prepared(which: str, count: int) -> tuple[nn.Module, Tensor, Tensor, ThreatModel, dict[str, Tensor]]:
    """A model, inputs that it gets right, a threat, and what each attack breaks."""
    if which == "digits":
        (model, x, y), eps = digits(), 0.06
    else:
        images, eps = load("mnist", "test"), SHIPPED[which]
        model, x, y = load_defense(which), images.x, images.y
    with torch.no_grad():
        right = (model(x[: 2 * count]).argmax(1) == y[: 2 * count]).nonzero()[:count, 0]
    x, y, within = x[right], y[right], ThreatModel(find_norm("linf"), eps)
    specs = {name: entry.specs["linf"] for name, entry in ATTACKS.items() if "linf" in entry.specs}
    own = {"sources": lambda spec: model}  # what transfer is crafted on: at its strongest, the model itself
    outcomes = {name: evaluate(spec, model, x, y, within, **own) for name, spec in specs.items()}
    return model, x, y, within, {name: torch.from_numpy(found.status == BROKEN) for name, found in outcomes.items()}


@pytest.mark.parametrize("name", CERTIFIERS)
@pytest.mark.parametrize("which", ["digits", *SHIPPED])
def test_no_attack_wins_inside_a_certified_radius(which, name):
    nothing_is_broken_that(name, *prepared(which, 32))


@pytest.mark.soak
@pytest.mark.parametrize("name", CERTIFIERS)
@pytest.mark.parametrize("which", ["digits", *SHIPPED])
def test_no_attack_wins_inside_a_certified_radius_among_many(which, name):
    nothing_is_broken_that(name, *prepared(which, 300))


def nothing_is_broken_that(name, model, x, y, within, broken) -> None:
    proved = verified(certify(name, model, x, y, within))
    if name == "best":
        assert proved.any()
    for attack, hit in broken.items():
        assert not (hit & proved).any(), f"{attack} breaks what {name} certifies"


@pytest.fixture(scope="module")
def checkpoint() -> nn.Module:
    reference = Path(os.environ.get("ROBUST_BENCH_REFERENCE", "."))
    model = build("cnn", (1, 28, 28), 10)
    model.load_state_dict(torch.load(reference / "wong_kolter_mnist_eps01.pth", map_location="cpu", weights_only=True))
    return model.eval()


def mnist(count: int) -> tuple[Tensor, Tensor]:
    data = Path(os.environ["ROBUST_BENCH_DATA"]) if "ROBUST_BENCH_DATA" in os.environ else None
    images = load("mnist", "test", data).take(slice(count))
    return images.x, images.y


@pytest.mark.reference
@pytest.mark.parametrize(
    ("name", "share", "margin"),
    [("ibp", 0, -85.24), ("crown-ibp", 0, -20.29), ("crown", 0.965, 5.79), ("wong-kolter", 0.96, 5.66)],
)
def test_the_figures_on_wong_and_kolters_checkpoint(checkpoint, name, share, margin):
    said = certify(name, checkpoint, *mnist(200), threat())
    assert verified(said).float().mean().item() == pytest.approx(share)
    assert said.margin.mean().item() >= margin - 0.005
    if name != "crown":  # of which ours is the best of three
        assert said.margin.mean().item() < margin + 0.005


@pytest.mark.reference
def test_the_robust_error_of_wong_and_kolters_paper(checkpoint):
    said = certify("wong-kolter:clip=false", checkpoint, *mnist(10_000), threat())
    assert 1 - verified(said).float().mean().item() == pytest.approx(0.0582, abs=0.0002)
