"""What recipes that train on bounds minimise, by hand and against attacks; and on digits, what they prove."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.ascent import ascend, input_gradient
from robustbench_lite.bounds import Ball, differences, trace
from robustbench_lite.data import load
from robustbench_lite.defended import Defended
from robustbench_lite.defenses._certified import worst_cross_entropy
from robustbench_lite.evaluation import evaluate
from robustbench_lite.models import build
from robustbench_lite.noise import Noise
from robustbench_lite.registry import make
from robustbench_lite.threat import Goal, ThreatModel

from .nets import many_classes
from .test_recipes import lab_of
from .test_training import assert_same

SPECS = {
    "ibp": "ibp:eps=0.1,epochs=12,warmup=8,rate=0.005,stretch=1,kappa=0,batch=32",
    "crown-ibp": "crown-ibp:eps=0.1,epochs=8,warmup=6,rate=0.005,stretch=1,kappa=0,batch=32,warm_start=false",
    "wong-kolter": "wong-kolter:eps=0.1,epochs=6,warmup=4,rate=0.005,warm_start=false,projections=20",
}
PLAIN = ["standard:epochs=6,rate=0.005,shift=0", "madry:eps=0.1,epochs=6,rate=0.005,warmup=2"]
THREAT = ThreatModel.parse("linf:0.1")


def objective(spec: str, model: nn.Module, x: Tensor, y: Tensor, epoch: float = 99) -> tuple[Tensor, Tensor]:
    return make("defense", spec).objective(model, None)(x, y, Noise(0, torch.arange(len(x))), epoch)


@cache
def trained(spec: str) -> Defended:
    data = load("digits", "train")
    return make("defense", spec)(build("mlp", data.shape, data.classes), lab_of(data))


@cache
def certified(spec: str) -> float:
    """Share of digits that CROWN or intervals certify."""
    test = load("digits", "test").take(slice(150))
    noise = Noise(0, torch.arange(len(test)))
    proof = make("certifier", "crown")(trained(spec), test.x, test.y, THREAT, noise)
    return (proof.radius > 0).double().mean().item()


@pytest.mark.parametrize("name", SPECS)
def test_it_certifies_more_digits_than_training_that_proves_nothing(name: str):
    assert certified(SPECS[name]) > max(map(certified, PLAIN)) + 0.1


@pytest.mark.parametrize("name", SPECS)
def test_what_it_certifies_no_attack_breaks(name: str):
    test = load("digits", "test").take(slice(150))
    proof = make("certifier", "crown")(trained(SPECS[name]), test.x, test.y, THREAT, Noise(0, torch.arange(150)))
    sure = proof.radius > 0
    for attack in ("pgd:steps=20", "apgd:steps=10", "square:queries=200"):
        outcome = evaluate(make("attack", attack), trained(SPECS[name]), test.x[sure], test.y[sure], THREAT)
        assert (outcome.status == "held").all(), attack


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("epoch", "eps", "share"), [(0, 0.0, 1.0), (2, 0.02, 0.7), (4, 0.04, 0.4), (9, 0.04, 0.4)])
def test_on_a_linear_model_the_loss_is_known(name: str, epoch: float, eps: float, share: float):
    """The margin falls by eps times the l1 norm of what tells two classes apart; eps and share move in a line."""
    model, x, y = many_classes(4, 20)
    x = x.detach().clamp(0.1, 0.9)
    cold = {"crown-ibp": ",warm_start=false"}.get(name, "")
    spec = f"{name}:eps=0.02,stretch=2,kappa=0.4,warmup=4{cold}"
    value, logits = objective(spec, model, x, y, epoch)
    torch.testing.assert_close(logits, model(x))
    apart = (model.weight[y].unsqueeze(1) - model.weight).abs().sum(2)
    worst = model(x) + eps * apart  # the label's own is 0 away from itself
    hand = share * F.cross_entropy(model(x), y) + (1 - share) * F.cross_entropy(worst, y)
    torch.testing.assert_close(value, hand)
    torch.testing.assert_close(
        torch.autograd.grad(value, model.weight)[0], torch.autograd.grad(hand, model.weight)[0], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("spec", [*SPECS.values(), PLAIN[0]])
def test_the_worst_cross_entropy_is_above_what_an_attack_reaches(spec: str):
    data = load("digits", "test").take(slice(60))
    model = trained(spec)
    graph, functions = trace(model, data.shape), differences(data.y, 10)
    loss = Goal(data.y).cross_entropy
    moved = ascend(input_gradient(model, loss), data.x, data.x, THREAT, 20, 0.02)
    for name, settings in {"ibp": "", "crown-ibp": ",beta=1", "wong-kolter": ""}.items():
        recipe = make("defense", f"{name}:eps=0.1{settings}")
        margins = recipe.margins(graph, Ball(data.x, THREAT), functions, Noise(0, torch.arange(60)), 1.0)
        assert (worst_cross_entropy(margins) >= loss(model(moved)) - 1e-4).all(), name


def test_the_share_of_linear_bounds_falls_to_beta():
    data = load("digits", "test").take(slice(8))
    model = build("mlp", data.shape, 10)
    given = trace(model, data.shape), Ball(data.x, ThreatModel.parse("linf:0.02")), differences(data.y, 10)
    noise = Noise(0, torch.arange(8))
    intervals = make("defense", "ibp:eps=0.02").margins(*given, noise, 0.5)
    linear = make("defense", "crown-ibp:eps=0.02").margins(*given, noise, 0)
    assert (linear > intervals).all()
    for start in ("true", "false"):
        recipe = make("defense", f"crown-ibp:eps=0.02,beta=0.2,warmup=4,warm_start={start}")
        for epoch, share in {0: 1.0, 2: 0.6, 4: 0.2, 5: 0.2}.items():
            mixed = share * linear + (1 - share) * intervals
            torch.testing.assert_close(recipe.margins(*given, noise, epoch), mixed, rtol=1e-4, atol=1e-5)


def test_where_it_begins_warm_the_ball_is_whole_at_once():
    recipe = make("defense", "crown-ibp:eps=0.1,stretch=1.5,warmup=4")
    assert recipe.threat_at(0).eps == recipe.threat_at(9).eps == pytest.approx(0.15)
    cold = replace(recipe, warm_start=False)
    assert [cold.threat_at(epoch).eps for epoch in (0, 2, 4)] == pytest.approx([0, 0.075, 0.15])


def test_projections_estimate_what_the_dual_network_says():
    data = load("digits", "test").take(slice(20))
    given = trace(build("mlp", data.shape, 10), data.shape), Ball(data.x, ThreatModel.parse("linf:0.02"))
    noise, functions = Noise(0, torch.arange(20)), differences(data.y, 10)
    exact, many, few = (
        make("defense", f"wong-kolter:eps=0.02,projections={count}").margins(*given, functions, noise, 1)
        for count in (0, 2000, 10)
    )
    assert (many - exact).abs().mean() < 0.03 * exact.abs().mean() < (few - exact).abs().mean()


@pytest.mark.parametrize("name", ["crown-ibp", "wong-kolter"])
def test_a_warm_start_is_what_ibp_gives_at_that_eps(name: str):
    data = load("digits", "train").take(slice(256))
    asked, source = [], build("mlp", data.shape, 10, seed=5)

    def sources(spec: str) -> Defended:
        asked.append(spec)
        return Defended(source)

    recipe = make("defense", f"{name}:eps=0.05")
    model = build("mlp", data.shape, 10)
    recipe.begin(model, replace(lab_of(data), sources=sources))
    assert asked == [*recipe.sources] == ["ibp:norm=linf,eps=0.05"]
    assert_same(model, source)
    assert replace(recipe, warm_start=False).sources == ()


@pytest.mark.parametrize("name", SPECS)
def test_a_layer_without_bounds_is_named_before_training(name: str):
    data = load("digits", "train")
    with pytest.raises(ValueError, match=rf"^{name} trains on bounds, and .*norm1 \(BatchNorm2d\) calls batch_norm"):
        make("defense", f"{name}:eps=0.1")(build("preact-resnet18", data.shape, 10), lab_of(data))


@pytest.mark.parametrize(
    "spec",
    [
        "ibp:kappa=1.1",
        "ibp:stretch=0.9",
        "crown-ibp:beta=-1",
        "wong-kolter:projections=-1",
        "wong-kolter:projections=9,norm=l2",
    ],
)
def test_settings_that_cannot_be_are_one_line(spec: str):
    with pytest.raises(ValueError, match=spec.partition(":")[2].partition("=")[0]):
        make("defense", spec)
