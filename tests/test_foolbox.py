"""Foolbox's attacks as plugins, against Foolbox itself."""

import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from robustbench_lite import cli, registry
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate, frozen
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import BROKEN, HELD, SKIPPED, UNKNOWN
from robustbench_lite.problem import Budget, Problem
from robustbench_lite.registry import builtin, families, find, identity, make, spec
from robustbench_lite.threat import Goal, ThreatModel
from tests.nets import Linear, convolutional

peers = pytest.importorskip("foolbox")
MEMBERS = {cls.name: cls for cls in families("attack")["foolbox"]().values()}
RUN = sorted(name for name, cls in MEMBERS.items() if not cls.cannot)
CANNOT = sorted(MEMBERS.keys() - RUN)
THREATS = {"l2": "l2:1.5", "linf": "linf:0.1", "l1": "l1:5", "l0": "l0:8"}
FEW = {
    "steps": "5",
    "binary_search_steps": "2",
    "repeats": "3",
    "directions": "20",
    "initial_gradient_eval_steps": "5",
    "max_gradient_eval_steps": "10",
    "population": "4",
    "l2_binary_search": "false",
}


def hurried(name):
    settings = [f"{field.name}={FEW[field.name]}" for field in fields(MEMBERS[name]) if field.name in FEW]
    return f"{name}:{','.join(settings)}" if settings else name


def problem(net, x, y, threat, attack, seed=0, budget=None):
    threat = ThreatModel.parse(threat)
    if attack.minimises:
        threat = ThreatModel(threat.norm, float("inf"))
    more = {"access": attack.access, "minimises": attack.minimises, "classes": 4, "budget": budget or Budget()}
    return Problem(Defended(net), x, Goal(y), threat, Noise(seed, torch.arange(len(x))), **more)


def error(text):
    with pytest.raises(ValueError, match="foolbox") as raised:
        make("attack", text)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_every_class_of_foolbox_is_a_plugin():
    classes = {cls for cls in vars(peers.attacks).values() if isinstance(cls, type)} - {peers.attacks.Attack}
    assert {cls.peer for cls in MEMBERS.values()} == classes
    assert len(MEMBERS) == len(classes) == 58
    assert not any(name.startswith("foolbox/") for name in builtin("attack"))


@pytest.mark.parametrize("name", RUN)
def test_runs_and_is_judged(name):
    net, x, y = convolutional(4)
    norm = next(norm for norm in THREATS if norm in MEMBERS[name].norms)
    outcome = evaluate(hurried(name), net, x, y, THREATS[norm], target="next" if name == "foolbox/linf-gen" else None)
    assert set(outcome.status) <= {HELD, BROKEN, SKIPPED}
    assert (outcome.backwards > 0).any() == (MEMBERS[name].access == "gradients")
    assert outcome.forwards.max() >= (name != "foolbox/inversion")  # it asks nothing


@pytest.mark.parametrize(
    ("text", "peer", "threat"),
    [
        ("foolbox/linf-pgd:steps=5,rel_stepsize=0.3", peers.attacks.LinfPGD(steps=5, rel_stepsize=0.3), "linf:0.05"),
        (
            "foolbox/l2-carlini-wagner:steps=30,binary_search_steps=3,initial_const=1,stepsize=0.05",
            peers.attacks.L2CarliniWagnerAttack(steps=30, binary_search_steps=3, initial_const=1, stepsize=0.05),
            "l2:1",
        ),
        ("foolbox/l2-ddn:steps=20", peers.attacks.DDNAttack(steps=20), "l2:1"),
        ("foolbox/l2-boundary:steps=20", peers.attacks.BoundaryAttack(steps=20), "l2:1"),
    ],
)
def test_agrees_with_foolbox(text, peer, threat):
    net, x, y = convolutional(32)
    ours = make("attack", text)
    asked = problem(net, x, y, threat, ours)
    with frozen(net):
        found = ours(asked)
        model = peers.PyTorchModel(net, bounds=(0, 1), device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(asked.noise.at("foolbox").integers(2**32, x.flatten(1)[:, :1])[0]))
            epsilons = None if ours.minimises else ThreatModel.parse(threat).eps
            _, theirs, broken = peer(model, x, peers.criteria.Misclassification(y), epsilons=epsilons)
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=0)
    assert broken.sum() > 8
    assert asked.distance[broken].isfinite().all()


def test_counts_every_question_of_every_input_solved_or_not():
    net, x, y = convolutional(20)
    outcome = evaluate("foolbox/linf-pgd:steps=7", net, x, y, "linf:0.1")
    assert BROKEN in outcome.status
    assert set(outcome.forwards) == {8}  # one a step, and one for what came out
    assert set(outcome.backwards) == {7}


def test_the_seed_decides_and_the_global_generators_are_left_alone():
    net, x, y = convolutional(8)
    attack = make("attack", "foolbox/l2-salt-and-pepper-noise:steps=5")  # draws from torch
    pointwise = make("attack", "foolbox/pointwise:l2_binary_search=false,init_attack=(foolbox/inversion)")  # from numpy
    for ours, count in ((attack, 8), (pointwise, 1)):
        before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        one, same, other = (ours(problem(net, x[:count], y[:count], "l2:1", ours, seed)) for seed in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), before)
        np.testing.assert_array_equal(np.random.get_state()[1], numpys)  # noqa: NPY002
        assert torch.equal(one, same)
        assert ours is pointwise or not torch.equal(one, other)


def test_what_foolbox_refuses_is_tried_without_the_input_it_refuses():
    # The mean decides: above 0.3 it is class 1. The negative of the second input is of its own class: no start.
    net = Linear(torch.stack([torch.zeros(16), torch.full((16,), 1 / 16)]), torch.tensor([0.3, 0.0]))
    x = torch.tensor([0.9, 0.5, 0.8, 0.95, 0.1]).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    attack = "foolbox/l2-boundary:steps=5,init_attack=foolbox/inversion"
    outcome = evaluate(attack, net, x, torch.tensor([1, 1, 1, 1, 0]), "l2:4")
    np.testing.assert_array_equal(outcome.status, [BROKEN, UNKNOWN, BROKEN, BROKEN, BROKEN])
    assert outcome.reason[1] == "foolbox: ValueError: init_attack failed for 1.0 of 1 inputs"


def test_an_unsupported_goal_is_unknown_not_robust():
    net, x, y = convolutional(4)
    outcome = evaluate("foolbox/linf-gen", net, x, y, "linf:0.1")
    assert set(outcome.status) == {UNKNOWN}
    assert "unsupported criterion" in outcome.reason[0]


def test_stops_at_the_budget():
    net, x, y = convolutional(6)
    attack = make("attack", "foolbox/l2-ddn")
    asked = problem(net, x, y, "l2:1", attack, budget=Budget(9))
    assert torch.equal(attack(asked), asked.best)
    assert asked.forwards.tolist() == [9] * 6


@pytest.mark.parametrize(
    "text",
    ["foolbox/linf-pgd:steps=3", "foolbox/l2-boundary:steps=3,init_attack=foolbox/inversion", "foolbox/l2-ddn:steps=3"],
)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 4), (7,)], ids=str)
def test_any_shape_two_classes_float64_and_a_target(text, shape):
    size = torch.Size(shape).numel()
    net = Linear(torch.stack([torch.zeros(size), torch.ones(size)]), torch.tensor([size / 2, 0])).double()
    x = torch.linspace(0.1, 0.9, 6, dtype=torch.float64).view(-1, *[1] * len(shape)).expand(-1, *shape).contiguous()
    norm = min(make("attack", text).norms)
    outcome = evaluate(text, net, x, (x.flatten(1).mean(1) > 0.5).long(), f"{norm}:0.9", target="next")
    assert UNKNOWN not in outcome.status


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_run_says_why(name):
    assert error(name) == f"attack {name}: cannot run: {MEMBERS[name].cannot}"
    assert find("attack", name).__doc__.startswith("Cannot run: ")


def test_is_handed_to_another_process_as_its_spec():
    attack = make("attack", "foolbox/linf-pgd:steps=7")
    assert pickle.loads(pickle.dumps(attack)) == attack


def test_settings_are_foolbox_s_arguments():
    attack = make("attack", "foolbox/linf-pgd:steps=5,rel_stepsize=0.1")
    assert (attack.steps, attack.rel_stepsize, attack.random_start) == (5, 0.1, True)
    assert spec(attack) == "foolbox/linf-pgd:rel_stepsize=0.1,steps=5"
    assert make("attack", spec(attack)) == attack
    assert identity(attack)["version"] == peers.__version__
    assert type(make("attack", "foolbox/linf-projected-gradient-descent")) is type(attack)
    assert make("attack", "foolbox/l1-ead:decision_rule=L1").decision_rule == "L1"
    assert set(find("attack", "foolbox/hop-skip-jump").norms) == {"l2", "linf"}
    assert (
        make("attack", "foolbox/l1-fmn:init_attack=foolbox/hop-skip-jump")._built("l1").init_attack.constraint == "l2"
    )
    assert make("attack", "foolbox/hop-skip-jump")._built("linf").constraint == "linf"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("foolbox/linf-pgd:step=5", "no setting 'step'; did you mean steps? It has: rel_stepsize, "),
        ("foolbox/linf-pgd:steps=many", "steps wants a whole number, not 'many'"),
        ("foolbox/l2-virtual-adversarial", "needs steps"),
        ("foolbox/sparse-l1-descent:quantile=2", "quantile needs to be between 0 and 1, got 2.0"),
        ("foolbox/l2-boundary:init_attack=pgd", "init_attack wants a foolbox/... that minimises, not pgd"),
        ("foolbox/l2-dnn", "did you mean foolbox/l2-ddn? "),
        ("foolbox/nope", "robust-bench attacks foolbox lists them all"),
        ("foolbox", "foolbox/..."),
    ],
)
def test_errors_say_what_there_is(text, said):
    assert said in error(text)


def test_without_foolbox_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    monkeypatch.setitem(registry._families, "foolbox", families("attack")["foolbox"].__wrapped__)
    assert "needs foolbox (pip install foolbox)" in error("foolbox/l2-ddn")


def shown(monkeypatch, capsys, *line):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["robust-bench", *line])
    assert cli.main() == 0
    return capsys.readouterr().out


def test_listings(monkeypatch, capsys):
    assert "foolbox/...: The attacks of Foolbox 3.3" in shown(monkeypatch, capsys, "attacks")
    listed = shown(monkeypatch, capsys, "attacks", "foolbox")
    assert "foolbox/linf-pgd  (linf; gradients)\n    Linf Projected Gradient Descent" in listed
    assert listed.count("\nfoolbox/") == 57  # and the first
    explained = shown(monkeypatch, capsys, "attacks", "foolbox/l2-ddn")
    assert "The Decoupled Direction and Norm L2 adversarial attack (DDNAttack)." in explained
    assert "init_epsilon=1.0, steps=100, gamma=0.05" in explained


def test_nothing_imports_foolbox_before_it_is_asked_for():
    code = "import sys; from robustbench_lite.registry import builtin, make; make('attack', 'pgd'); builtin('attack')"
    code += "; print('foolbox' in sys.modules)"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
