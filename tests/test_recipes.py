"""What each recipe trains on and minimises, by hand; and on digits, what it is for."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustbench_lite import lipschitz
from robustbench_lite.data import Images, load
from robustbench_lite.defended import Defended
from robustbench_lite.defenses import parseval
from robustbench_lite.defenses.parseval import retracted
from robustbench_lite.defenses.trades import divergence
from robustbench_lite.evaluation import evaluate
from robustbench_lite.models import ConvexSum, build
from robustbench_lite.noise import Noise
from robustbench_lite.registry import builtin, make
from robustbench_lite.testing import Check, defense_checks
from robustbench_lite.trained import fill, save
from robustbench_lite.training import Lab

from .nets import many_classes
from .test_training import no_sources

RECIPES = [
    "fast:eps=0.1",
    "fgsm-training:eps=0.1",
    "trades:eps=0.1,steps=2",
    "gaussian",
    "parseval",
    "ibp:eps=0.1",
    "crown-ibp:eps=0.1,warm_start=false",
    "wong-kolter:eps=0.1,warm_start=false,projections=5",
]


WRAPPERS = ["smoothed", "feature-squeezing", "feature-squeezing:detect=true"]


def static(spec: str) -> Defended:
    return Defended(build("mlp", (1, 8, 8), 10, seed=5).requires_grad_(False)).eval()


def lab_of(data: Images) -> Lab:
    return Lab(lambda: data, Noise(0, torch.zeros(1, dtype=torch.int64)), no_sources)


def objective(spec: str, model: nn.Module, x: Tensor, y: Tensor, epoch: float = 9) -> tuple[Tensor, Tensor]:
    return make("defense", spec).objective(model, None)(x, y, Noise(0, torch.arange(len(x))), epoch)


@cache
def robust(spec: str) -> float:
    """Share of digits that a small recipe's model holds against PGD at 0.1."""
    data, test = load("digits", "train"), load("digits", "test").take(slice(150))
    model = make("defense", spec)(build("mlp", data.shape, data.classes), lab_of(data))
    outcome = evaluate(make("attack", "pgd:steps=10"), model, test.x, test.y, "linf:0.1")
    assert (outcome.status != "wrong").mean() > 0.85, "clean"
    return float((outcome.status == "held").mean())


def contracts() -> Iterator[tuple[str, Check]]:
    """Every check of every recipe and wrapper."""
    for spec in CONTRACT:
        defense = make("defense", spec)
        if defense.trains:
            defense = replace(defense, epochs=2, patience=1, **({"warmup": 1} if hasattr(defense, "warmup") else {}))
        yield from ((f"{spec}-{title}", check) for title, check in defense_checks(defense, static))


CONTRACT = [*RECIPES, "standard", "madry:eps=0.1,steps=2", "ensemble:eps=0.1", *WRAPPERS]


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in contracts()])
def test_contract(check: Check):
    check()


def test_every_defense_is_held_to_the_contract():
    assert {spec.partition(":")[0] for spec in CONTRACT} == set(builtin("defense"))


@pytest.mark.parametrize("name", ["fast", "fgsm-training", "trades"])
@pytest.mark.parametrize("eps", ["0", "-0.1"])
def test_eps_is_above_0(name: str, eps: str):
    with pytest.raises(ValueError, match=f"defense {name}: eps must be above 0"):
        make("defense", f"{name}:eps={eps}")


@pytest.mark.parametrize(
    "spec",
    [
        "trades:beta=0",
        "trades:steps=0",
        "gaussian:sigma=0",
        "parseval:beta=0.6",
        "parseval:temperature=0",
        "fast:warmup=-1",
    ],
)
def test_settings_that_cannot_be_are_one_line(spec: str):
    with pytest.raises(ValueError, match=spec.partition(":")[2].partition("=")[0]):
        make("defense", spec)


@pytest.mark.parametrize("spec", [*RECIPES[:3], "parseval"])
def test_it_holds_more_digits_than_standard_training(spec: str):
    more = ",epochs=6,rate=0.005" + (",warmup=2" if "eps" in spec else ",shift=0")
    spec = spec.replace("eps=0.1", "eps=0.1" + more) if "eps" in spec else f"{spec}:{more[1:]}"
    assert robust(spec) > robust("standard:epochs=6,rate=0.005,shift=0") + 0.1


# one step


def test_fast_steps_from_anywhere_in_the_ball_to_its_corners_or_near_them():
    model, _, _ = many_classes(2, 1)
    x, y, seen = torch.full((500, 30), 0.05), torch.zeros(500, dtype=torch.int64), []
    way = (model.weight[1] - model.weight[0]).sign().detach()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    objective("fast:eps=0.1", model, x, y)
    start, end = seen
    assert 0.099 < (start - x).abs().max() <= 0.1 + 1e-6
    assert start.min() < -0.04  # outside the pixel range, as in the paper
    assert (start - x).mean().abs() < 0.002
    torch.testing.assert_close(end, (start + 0.125 * way).clamp(0, 0.15))


def test_fgsm_training_takes_equal_parts_of_clean_and_fgsm():
    model, x, y = many_classes(4, 20)
    x = x.requires_grad_(False)
    moved = x.clone().requires_grad_()
    F.cross_entropy(model(moved), y).backward()
    moved = (x + 0.1 * moved.grad.sign()).clamp(0, 1)
    value, logits = objective("fgsm-training:eps=0.1", model, x, y)
    torch.testing.assert_close(logits, model(moved))
    torch.testing.assert_close(value, (F.cross_entropy(model(x), y) + F.cross_entropy(model(moved), y)) / 2)
    torch.testing.assert_close(objective("fgsm-training:eps=0.1", model, x, y, epoch=0)[1], model(x))  # warming up


# trades


def test_the_divergence_is_that_of_torch_distributions():
    a, b = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)) * 3
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
    )
    torch.testing.assert_close(divergence(a, b), theirs)


def test_trades_adds_beta_times_a_divergence_that_its_ascent_has_raised():
    model, x, y = many_classes(4, 20)
    value, logits = objective("trades:eps=0.1,steps=4,beta=3", model, x, y)
    clean = model(x)
    torch.testing.assert_close(value, F.cross_entropy(clean, y) + 3 * divergence(clean, logits).mean())
    signs = Noise(1, torch.arange(20)).signs(x)
    assert divergence(clean, logits).mean() > 5 * divergence(clean, model(x + 0.1 * signs)).mean() > 0
    (at_clean,) = torch.autograd.grad(value, model.bias)
    (of_moved,) = torch.autograd.grad(divergence(clean.detach(), logits).mean(), model.bias)
    (cross,) = torch.autograd.grad(F.cross_entropy(model(x), y), model.bias)
    assert not torch.allclose(at_clean, cross + 3 * of_moved)  # the clean answer is drawn towards the moved one too


# gaussian


def test_gaussian_trains_on_noise_of_its_deviation_that_no_pixel_range_cuts():
    model, _, _ = many_classes(2, 1)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.zeros(2000, 30)
    objective("gaussian:sigma=0.5", model, x, torch.zeros(2000, dtype=torch.int64))
    assert seen[0].std().item() == pytest.approx(0.5, rel=0.02)
    assert abs(seen[0].mean().item()) < 0.01


def test_gaussian_is_right_more_often_under_noise():
    data, test = load("digits", "train"), load("digits", "test")
    noisy = test.x + 0.4 * Noise(1, torch.arange(len(test))).normal(test.x)
    right = {}
    for name in ("standard", "gaussian:sigma=0.4"):
        recipe = replace(make("defense", name), epochs=6, rate=0.005, shift=0)
        model = recipe(build("mlp", data.shape, 10), lab_of(data))
        right[name] = (model(noisy).argmax(1) == test.y).double().mean().item()
    assert right["gaussian:sigma=0.4"] > right["standard"] + 0.03


# parseval


@given(rows=st.integers(1, 6), more=st.integers(0, 6), beta=st.sampled_from([0.05, 0.3, 0.5]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_retraction_moves_every_singular_value_towards_1_and_turns_nothing(
    rows: int, more: int, beta: float, seed: int
):
    matrix = torch.rand(rows, rows + more, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix / torch.linalg.matrix_norm(matrix, 2), full_matrices=False)
    once = retracted(left * values @ right, beta)
    torch.testing.assert_close(once, left * ((1 + beta) * values - beta * values**3) @ right)


def test_retraction_brings_a_random_matrix_to_orthonormal_rows():
    matrix = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4
    for _ in range(60):
        matrix = retracted(matrix, 0.3)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(5, dtype=torch.float64))


def trained_by_parseval(model: str, **more: object) -> tuple[Defended, Tensor]:
    data = load("digits", "train").take(slice(256))
    recipe = replace(make("defense", "parseval"), epochs=1, shift=0, **more)
    return recipe(build(model, data.shape, 10), lab_of(data)), data.x


@pytest.mark.parametrize("name", ["mlp", "cnn", "convex-resnet"])
def test_parseval_leaves_frames_in_a_net_that_stretches_nothing(name: str, tmp_path: Path):
    model, x = trained_by_parseval(name)
    for values in lipschitz.singular_values(model).values():
        torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-5, atol=0)
    assert max(lipschitz.layer_norms(model).values()) < 1.00001
    assert lipschitz.constant(model, x) < 1.00001
    moved = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert ((model(moved) - model(x)).norm(dim=1) <= (moved - x).flatten(1).norm(dim=1)).all()
    save(model.model, tmp_path / "w.safetensors", half=True)
    plain = build(name, (1, 8, 8), 10, seed=5)
    fill(plain, tmp_path / "w.safetensors")
    assert all(abs(values - 1).max() < 0.01 for values in lipschitz.singular_values(plain).values())


def test_parseval_keeps_residual_sums_convex():
    model = build("convex-resnet", (1, 8, 8), 10)
    sums = [layer for layer in model.modules() if isinstance(layer, ConvexSum)]
    for layer, weights in zip(sums, ([0.9, 0.5], [2.0, 0.1], [-1.0, -1.0])):
        layer.weights.data = torch.tensor(weights)
    make("defense", "parseval").after_step(model, Noise(0, torch.zeros(1, dtype=torch.int64)))
    nearest = torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.5, 0.5]])
    torch.testing.assert_close(torch.stack([layer.weights.data for layer in sums]), nearest)


def test_parseval_learns_the_weights_of_residual_sums():
    model, _ = trained_by_parseval("convex-resnet", rate=0.01)
    weights = torch.stack([layer.weights.detach() for layer in model.modules() if isinstance(layer, ConvexSum)])
    assert (weights[:, 0] - 0.5).abs().max() > 1e-3
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_retraction_alone_keeps_layers_near_frames(monkeypatch: pytest.MonkeyPatch):
    def furthest(beta: float) -> float:
        ends = iter([parseval._tighten, lambda model: None])
        with monkeypatch.context() as patch:
            patch.setattr(parseval, "_tighten", lambda model: next(ends)(model))
            model, _ = trained_by_parseval("mlp", batch=16, rate=0.005, beta=beta)
        return max(abs(values - 1).max().item() for values in lipschitz.singular_values(model).values())

    assert furthest(0.5) < furthest(1e-6) / 2


def test_of_large_layers_a_share_of_the_rows_is_retracted():
    model = build("mlp", (1, 8, 8), 10)
    before = [layer.weight.detach().clone() for layer in model if isinstance(layer, nn.Linear)]
    make("defense", "parseval").after_step(model, Noise(0, torch.zeros(1, dtype=torch.int64)))
    after = [layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)]
    # 256x64 has 64 columns, all of them; 128x256 has 128 rows, 30 % of them; 10x128 has 10 rows, all of them
    changed = [int((a != b).any(dim).sum()) for a, b, dim in zip(after, before, (0, 1, 1))]
    assert changed == [64, 38, 10]


def test_parseval_refuses_what_it_has_no_frame_for():
    with pytest.raises(
        ValueError, match=r"^parseval trains chains of .* not PreActBlock: it has no frame for batch norm"
    ):
        trained_by_parseval("preact-resnet18")
