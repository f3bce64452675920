"""One table of attacks drives the contract that every built-in attack keeps."""

import math
from dataclasses import fields
from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_lite import evaluation
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import frozen
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import BROKEN, COLUMNS, HELD, REJECTED, SKIPPED, UNKNOWN, WRONG, Outcome
from robustbench_lite.problem import Problem
from robustbench_lite.registry import builtin, find, make
from robustbench_lite.threat import Goal, ThreatModel, find_norm
from tests.nets import GUARDED, Guarded, Linear, convolutional, guarded, halfspace, many_classes, nearest


class Entry(NamedTuple):
    """How an attack is set up for the contract: the norms it attacks under, each with the spec that should win."""

    kind: Literal["gradient", "query", "coarse", "pixels"]
    specs: dict[str, str]
    random: bool  # whether the seed changes what it finds


ATTACKS = {
    "fgsm": Entry("gradient", {"linf": "fgsm", "l2": "fgsm", "l1": "fgsm"}, random=False),
    # A sparse step moves one coordinate here; sixty of them push the whole random start out of the l1 ball.
    "pgd": Entry("gradient", {"linf": "pgd", "l2": "pgd", "l1": "pgd:steps=60"}, random=True),
    "apgd": Entry("gradient", {"linf": "apgd:steps=30", "l2": "apgd:steps=30"}, random=True),
    "square": Entry("coarse", {"linf": "square:queries=200", "l2": "square:queries=250,p=0.1"}, random=True),
    "fab": Entry("gradient", {"linf": "fab:steps=10", "l2": "fab:steps=10"}, random=False),
    "autoattack": Entry(
        "gradient", dict.fromkeys(("linf", "l2"), "autoattack:steps=20,targets=2,queries=50"), random=True
    ),
    "r-fgsm": Entry("gradient", dict.fromkeys(("linf", "l2", "l1"), "r-fgsm:share=0.02"), random=True),
    "mi-fgsm": Entry("gradient", {"linf": "mi-fgsm", "l2": "mi-fgsm"}, random=False),
    "one-pixel": Entry("pixels", {"l0": "one-pixel:population=30,generations=10"}, random=True),
    "patch": Entry("pixels", {"patch": "patch:steps=20"}, random=True),  # it learns first: see test_patch.py
    "deepfool": Entry("gradient", {"linf": "deepfool", "l2": "deepfool"}, random=False),
    "cw": Entry("gradient", {"l2": "cw:search_steps=3,steps=40", "l0": "cw:steps=60"}, random=False),
    "cw-linf": Entry("gradient", {"linf": "cw-linf:steps=40"}, random=False),
    "cw-linf-tau": Entry("gradient", {"linf": "cw-linf-tau:steps=10,initial_c=10000,decay=0.7"}, random=False),
    "zoo": Entry("query", {"l2": "zoo:queries=1200,search_steps=3,coordinates=20,initial_c=0.2"}, random=True),
    "boundary": Entry("query", {"l2": "boundary:queries=1000"}, random=True),
    "transfer": Entry(
        "gradient", {**dict.fromkeys(("linf", "l2"), "transfer"), "l1": "transfer:attack=(pgd:steps=60)"}, random=True
    ),
}
NEEDS_A_START = {"boundary"}  # of a model that gives one label to all images it learns nothing
# an attack must fail at, and win at, this many times the exact distance (coarse: in squares, where weights are noise)
REACH = {"gradient": (0.95, 1.1), "query": (0.95, 1.5), "coarse": (0.95, 2.5), "pixels": (0.8, 4.0)}
DISTANCE = {"linf": 0.05, "l2": 0.4, "l1": 0.2, "l0": 1.25}  # l0: one pixel is too few, two are enough
SHAPES = [(1, 1, 1), (1, 6, 7), (3, 5, 4), (7,)]
CASES = [
    pytest.param(name, norm, id=f"{name}-{norm}")
    for name, entry in ATTACKS.items()
    for norm in entry.specs
    if norm in DISTANCE  # patch has tests of its own
]
RANDOM = [case for case in CASES if ATTACKS[case.values[0]].random]


def evaluate(attack, model, *inputs, **settings) -> Outcome:
    """The attack's outcome, where whatever source it asks for is the model itself."""
    return evaluation.evaluate(attack, model, *inputs, sources=lambda spec: model, **settings)


def built(name: str, norm: str):
    return make("attack", ATTACKS[name].specs[norm])


def reach(name: str, norm: str) -> tuple[float, float]:
    return REACH["pixels" if norm == "l0" else ATTACKS[name].kind]


def minimises(name: str) -> bool:
    """Whether it seeks the nearest adversarial: what lies beyond eps is held, and its label forgotten."""
    return getattr(find("attack", name), "minimises", False)


def threat(norm: str, eps: float) -> ThreatModel:
    return ThreatModel(find_norm(norm), eps)


def assert_same(one: Outcome, other: Outcome) -> None:
    """Equal in everything but the seconds."""
    for field in fields(Outcome):
        if field.name != "seconds":
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


def test_every_attack_is_in_the_table():
    assert set(ATTACKS) == set(builtin("attack"))
    for name, entry in ATTACKS.items():
        assert set(entry.specs) == find("attack", name).norms
        assert all(spec.partition(":")[0] == name for spec in entry.specs.values())


@pytest.mark.parametrize("shape", [(1, 10, 10), *SHAPES], ids=str)
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_fails_just_inside_the_exact_distance_and_wins_beyond(name, norm, shape):
    distance = 0.25 if norm == "l0" and math.prod(shape) < 20 else DISTANCE[norm]
    model, x, y = halfspace(norm, distance, shape=shape)
    short, far = reach(name, norm)
    inside = evaluate(built(name, norm), model, x, y, threat(norm, short * distance))
    beyond = evaluate(built(name, norm), model, x, y, threat(norm, far * distance))
    assert set(inside.status) == {HELD}
    np.testing.assert_array_equal(inside.adversarial, torch.full_like(y, -1) if minimises(name) else y)
    assert set(beyond.status) == {BROKEN}
    np.testing.assert_array_equal(beyond.adversarial, 1 - y)
    assert (beyond.distance >= distance * (1 - 1e-4)).all()
    assert (beyond.distance <= far * distance).all()


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_works_in_float64(name, norm):
    model, x, y = halfspace(norm, DISTANCE[norm], dtype=torch.float64)
    far = reach(name, norm)[1] * DISTANCE[norm]
    assert set(evaluate(built(name, norm), model, x, y, threat(norm, far)).status) == {BROKEN}


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_never_beats_the_exact_distance_among_many_classes(name, norm):
    model, x, y = many_classes(5, count=60, size=200 if norm == "l0" else 30)  # of 30 one is enough for all
    exact = nearest(model, x, norm).double().numpy()
    eps = float(np.median(exact)) * 1.2
    outcome = evaluate(built(name, norm), model, x, y, threat(norm, eps))
    broken = outcome.status == BROKEN
    assert 0 < broken.sum() < 60
    assert set(outcome.status) == {BROKEN, HELD}
    assert (outcome.distance[broken] >= exact[broken] - 1e-4).all()
    assert (outcome.distance[broken] <= eps).all()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("target", [1, "next", "random", "least-likely"])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_targeted_reaches_the_target(name, norm, target, classes):
    model, x, y = many_classes(classes, count=40)
    far = float(2 * nearest(model, x, norm).max())
    outcome = evaluate(built(name, norm), model, x, y, threat(norm, far), target=target)
    logits = model(x)
    wanted = {1: torch.full_like(y, 1), "next": (y + 1) % classes, "least-likely": logits.argmin(1)}.get(target)
    broken = outcome.status == BROKEN
    if wanted is not None:
        np.testing.assert_array_equal(outcome.status == SKIPPED, wanted == y)
        np.testing.assert_array_equal(outcome.adversarial[broken], wanted[broken])
    assert broken.sum() >= 0.3 * (outcome.status != SKIPPED).sum()
    assert (outcome.adversarial[broken] != outcome.label[broken]).all()
    assert not outcome.forwards[outcome.status == SKIPPED].any()
    if target == "random":
        assert SKIPPED not in outcome.status
        ahead = (outcome.adversarial - outcome.label)[broken] % classes
        assert set(ahead) == set(range(1, classes))


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_same_seed_same_answer(name, norm):
    net, x, y = convolutional(40)
    run = [
        evaluate(built(name, norm), net, x, y, threat(norm, 2 * DISTANCE[norm]), seed=seed, keep_all=True)
        for seed in (0, 0, 1)
    ]
    assert BROKEN in run[0].status
    assert_same(run[0], run[1])
    common = np.isin(run[0].imaged, run[2].imaged), np.isin(run[2].imaged, run[0].imaged)
    assert np.array_equal(run[0].images[common[0]], run[2].images[common[1]]) != ATTACKS[name].random


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_same_rows_whatever_the_batch_and_the_order(name, norm):
    net, x, y = convolutional(220)
    y[::9] = (y[::9] + 1) % 4
    settings = {"threat": threat(norm, DISTANCE[norm])}
    whole = evaluate(built(name, norm), net, x, y, batch=300, **settings)
    assert {BROKEN, HELD} < set(whole.status)
    for batch in (16, 100):
        assert_same(evaluate(built(name, norm), net, x, y, batch=batch, **settings), whole)
    starts = (200, 0, 100)
    parts = [evaluate(built(name, norm), net, x[s : s + 100], y[s : s + 100], first_row=s, **settings) for s in starts]
    assert_same(parts[0], whole.part(200, 300))
    assert_same(Outcome.join(parts), whole)
    few = evaluate(built(name, norm), net, x[37:64], y[37:64], first_row=37, **settings)
    assert_same(few, evaluate(built(name, norm), net, x[37:64], y[37:64], first_row=37, batch=16, **settings))
    for column in set(COLUMNS) - {"seconds"}:
        np.testing.assert_array_equal(getattr(few, column), getattr(whole.part(37, 64), column))


@pytest.mark.parametrize(("name", "norm"), RANDOM)
def test_random_targets_do_not_depend_on_the_chunk(name, norm):
    model, x, y = many_classes(4, count=120)
    eps = threat(norm, float(2 * nearest(model, x, norm).median()))
    whole = evaluate(built(name, norm), model, x, y, eps, target="random")
    last = evaluate(built(name, norm), model, x[100:], y[100:], eps, target="random", first_row=100)
    assert_same(whole.part(100, 120), last)


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if not minimises(case.values[0])])
def test_solved_inputs_cost_nothing_more(name, norm):
    distance = DISTANCE[norm]
    model, x, y = halfspace(norm, distance)
    easy = halfspace(norm, 0.1 * distance).x[:10]
    x = torch.cat([easy, x[10:]])
    outcome = evaluate(built(name, norm), model, x, y, threat(norm, 0.9 * distance))
    assert (outcome.status == [BROKEN] * 10 + [HELD] * 10).all()
    assert (outcome.forwards[:10] <= outcome.forwards[10:]).all()
    if outcome.forwards[10:].min() > 10:
        assert (2 * outcome.forwards[:10] <= outcome.forwards[10:]).all()


@pytest.mark.parametrize(
    ("spec", "forwards", "backwards"),
    [("fgsm", 1, 1), ("pgd:steps=7", 8, 7), ("pgd:steps=5,restarts=3", 18, 15)],
)
def test_counts_are_what_the_paper_says(spec, forwards, backwards):
    model, x, y = halfspace("linf", 0.1)
    outcome = evaluate(make("attack", spec), model, x, y, "linf:0.05")
    assert set(outcome.status) == {HELD}
    assert set(outcome.forwards) == {forwards}
    assert set(outcome.backwards) == {backwards}


@pytest.mark.parametrize(("name", "norm"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_gradients_end_as_held(name, norm, dtype):
    model = Linear(torch.zeros(3, 12), torch.tensor([1.0, 0.0, -1.0])).to(dtype)
    x = torch.rand(10, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    y = torch.zeros(10, dtype=torch.long)
    outcome = evaluate(built(name, norm), model, x, y, threat(norm, DISTANCE[norm]))
    assert set(outcome.status) == {UNKNOWN if name in NEEDS_A_START else HELD}
    assert set(outcome.adversarial) == {-1 if minimises(name) else 0}


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_an_eps_of_zero_breaks_nothing(name, norm):
    model, x, y = halfspace(norm, DISTANCE[norm])
    assert set(evaluate(built(name, norm), model, x, y, threat(norm, 0)).status) == {HELD}


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_a_model_that_turns_to_nan_is_never_robust(name, norm):
    class Overflows(nn.Module):
        def forward(self, x):
            known = (x.unsqueeze(1) == clean).all(2).any(1, keepdim=True)
            return torch.stack([x.sum(1), 0.2 - x.sum(1)], 1) / known

    clean = torch.rand(20, 5, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    eps = 1 if norm == "l0" else 0.0123
    outcome = evaluate(built(name, norm), Overflows(), clean, torch.zeros(20, dtype=torch.long), threat(norm, eps))
    assert set(outcome.status) == {UNKNOWN}


@pytest.mark.parametrize("text", ["pgd:steps=0", "pgd:restarts=0", "pgd:length=0", "pgd:length=-1", "pgd:loss=cw"])
def test_pgd_refuses_settings_that_make_no_sense(text):
    with pytest.raises(ValueError, match="pgd"):
        make("attack", text)


def test_restarts_and_the_other_loss_are_used():
    net, x, y = convolutional(100)
    broken = {
        spec: (evaluate(make("attack", spec), net, x, y, "linf:0.03").status == BROKEN).sum()
        for spec in ("pgd:steps=2", "pgd:steps=2,restarts=8")
    }
    assert broken["pgd:steps=2"] < broken["pgd:steps=2,restarts=8"]
    sources = [make("attack", f"pgd:loss={loss},steps=3,random_start=false") for loss in ("ce", "margin")]
    ends = [proposed(attack, net, x, y, threat("l2", 0.05)) for attack in sources]
    both = (ends[0] + ends[1]).isfinite().flatten(1).all(1)
    assert both.sum() >= 16
    assert ((ends[0] - ends[1])[both].abs() > 1e-4).any()


def proposed(attack, net, x, y, threat):
    """What an attack returns, NaN in rows that it broke."""
    with frozen(net):
        problem = Problem(Defended(net), x, Goal(y), threat, Noise(0, torch.arange(len(x))), classes=4)
        found = attack(problem)
        return torch.where(problem.open.view(-1, 1, 1, 1), found, torch.nan)


@pytest.mark.parametrize(
    ("spec", "peer", "norm", "settings"),
    [
        ("fgsm", "LinfFastGradientAttack", "linf", {}),
        ("fgsm", "L2FastGradientAttack", "l2", {}),
        ("pgd:steps=12,length=0.007,random_start=false", "LinfPGD", "linf", {"steps": 12, "abs_stepsize": 0.007}),
        ("pgd:steps=12,length=0.02,random_start=false", "L2PGD", "l2", {"steps": 12, "abs_stepsize": 0.02}),
    ],
)
def test_agrees_with_foolbox(spec, peer, norm, settings):
    foolbox = pytest.importorskip("foolbox")
    # foolbox's l2 also spends length on coordinates held at a pixel bound: compare away from the bounds
    low, high, eps = (0.0, 1.0, 0.03) if norm == "linf" else (0.25, 0.75, 0.1)
    net, x, y = convolutional(64, low=low, high=high)
    theirs = getattr(foolbox.attacks, peer)(random_start=False, **settings).run(
        foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), x, foolbox.criteria.Misclassification(y), epsilon=eps
    )
    ours = proposed(make("attack", spec), net, x, y, threat(norm, eps))
    unbroken = ours.isfinite().flatten(1).all(1)
    assert unbroken.sum() >= 16
    torch.testing.assert_close(ours[unbroken], theirs[unbroken], atol=1e-5, rtol=0)
    assert ((ours - x)[unbroken].abs().flatten(1).amax(1) > 1e-3).all()


def test_agrees_with_foolbox_on_what_breaks():
    foolbox = pytest.importorskip("foolbox")
    net, x, y = convolutional(100)
    settings = {"steps": 12, "abs_stepsize": 0.01, "random_start": False}
    theirs = foolbox.attacks.LinfPGD(**settings)(
        foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), x, y, epsilons=0.05
    )[2].numpy()
    ours = evaluate(make("attack", "pgd:steps=12,length=0.01,random_start=false"), net, x, y, "linf:0.05")
    assert 10 < theirs.sum() < 90
    assert (ours.status[theirs] == BROKEN).all()  # ours keeps every iterate, theirs the last
    assert UNKNOWN not in ours.status


# Detectors

WAY = torch.linspace(-1, 1, 64).sign() * torch.linspace(0.5, 1, 64)
STUCK = {
    "fgsm",
    "r-fgsm",
    "mi-fgsm",
    "pgd",
    "transfer",
    "deepfool",
    "fab",
    "square",
}  # they do not always get round the corner


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case.values[1] in GUARDED])
def test_the_nearest_adversarial_that_is_not_rejected(name, norm):
    model, x, y = guarded()
    held = evaluate(built(name, norm), model, x, y, threat(norm, 0.97 * GUARDED[norm]))
    assert set(held.status) == {HELD}
    assert REJECTED in held.adversarial or minimises(name)
    if name not in STUCK:
        far = evaluate(built(name, norm), model, x, y, threat(norm, 1.5 * GUARDED[norm]))
        assert set(far.status) == {BROKEN}
        assert set(far.adversarial) == {1}


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_an_input_that_is_rejected_is_not_broken(name, norm):
    net, x, y = convolutional(32)
    score = x.flatten(1) @ WAY
    model = Guarded(net, WAY, float(score.quantile(0.9)))
    free, outcome = (
        evaluate(built(name, norm), one, x, y, threat(norm, 2 * DISTANCE[norm]), keep_all=True) for one in (net, model)
    )
    rejected = (score > model.level).numpy()
    np.testing.assert_array_equal(outcome.clean, np.where(rejected, REJECTED, y))
    np.testing.assert_array_equal(outcome.status == WRONG, rejected)
    broken = outcome.status == BROKEN
    assert 0 < broken.sum() < (free.status == BROKEN).sum()
    images = torch.from_numpy(outcome.images)
    assert (model.rejection(images) <= 0).all()
    np.testing.assert_array_equal(net(images).argmax(1), outcome.adversarial[broken])
    assert not outcome.fooled[outcome.adversarial == REJECTED].any()
