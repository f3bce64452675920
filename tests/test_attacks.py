"""One table of attacks drives the contract that every built-in attack keeps."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import pytest
import torch

from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate, frozen
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import BROKEN, HELD, UNKNOWN
from robustbench_lite.problem import Problem
from robustbench_lite.registry import builtin, find, make
from robustbench_lite.testing import Bar, Check, attack_checks
from robustbench_lite.threat import Goal, ThreatModel, find_norm
from tests.nets import convolutional, halfspace


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
NEEDS_A_START = {"boundary"}
STUCK = {"fgsm", "r-fgsm", "mi-fgsm", "pgd", "transfer", "deepfool", "fab", "square"}  # on a detector
# an attack must fail at, and win at, this many times the exact distance (coarse: in squares, where weights are noise)
REACH = {"gradient": (0.95, 1.1), "query": (0.95, 1.5), "coarse": (0.95, 2.5), "pixels": (0.8, 4.0)}


def contract(name: str, norm: str) -> Iterator[tuple[str, Check]]:
    entry = ATTACKS[name]
    bar = Bar(
        *REACH["pixels" if norm == "l0" else entry.kind],
        seeded=entry.random,
        needs_a_start=name in NEEDS_A_START,
        evades=name not in STUCK,
    )
    return attack_checks(make("attack", entry.specs[norm]), bar, norms={norm})


CONTRACT = [
    pytest.param(check, id=f"{name}-{norm}-{title}")
    for name, entry in ATTACKS.items()
    for norm in entry.specs
    for title, check in contract(name, norm)
]


def threat(norm: str, eps: float) -> ThreatModel:
    return ThreatModel(find_norm(norm), eps)


def test_every_attack_is_in_the_table():
    assert set(ATTACKS) == set(builtin("attack"))
    for name, entry in ATTACKS.items():
        assert set(entry.specs) == find("attack", name).norms
        assert all(spec.partition(":")[0] == name for spec in entry.specs.values())


@pytest.mark.parametrize("check", CONTRACT)
def test_contract(check):
    check()


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
