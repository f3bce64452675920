"""AutoAttack: a cascade, whatever its order."""

from itertools import permutations

import numpy as np
import pytest

from robustbench_lite.attacks.autoattack import AutoAttack, cascade
from robustbench_lite.evaluation import evaluate
from robustbench_lite.outcome import BROKEN, HELD, WRONG
from robustbench_lite.registry import make, spec
from tests.nets import Scripted, convolutional

SMALL = AutoAttack(steps=6, targets=2, queries=30)
EPS = {"linf": 0.03, "l2": 0.2}


@pytest.fixture(scope="module")
def net():
    net, x, y = convolutional(60)
    y[::20] = (y[::20] + 1) % 4
    return net, x, y


def status(outcome):
    assert set(outcome.status) == {BROKEN, HELD, WRONG}
    return outcome.status


def test_the_standard_version():
    assert [spec(stage) for stage in AutoAttack().attacks] == ["apgd", "apgd:loss=dlr-t", "fab", "square"]
    small = ["apgd:steps=6", "apgd:steps=6,loss=dlr-t,targets=2", "fab:steps=6,targets=2", "square:queries=30"]
    assert [spec(stage) for stage in SMALL.attacks] == small


@pytest.mark.parametrize("norm", EPS)
def test_the_order_does_not_change_what_is_broken(net, norm):
    threat = f"{norm}:{EPS[norm]}"
    wanted = status(evaluate(SMALL, *net, threat))
    for order in list(permutations(SMALL.attacks))[1::4]:
        attack = Scripted(lambda problem, order=order: cascade(order, problem))
        np.testing.assert_array_equal(status(evaluate(attack, *net, threat)), wanted)


@pytest.mark.parametrize("norm", EPS)
def test_breaks_exactly_what_its_parts_break(net, norm):
    threat = f"{norm}:{EPS[norm]}"
    parts = [evaluate(stage, *net, threat).status == BROKEN for stage in SMALL.attacks]
    np.testing.assert_array_equal(status(evaluate(SMALL, *net, threat)) == BROKEN, np.logical_or.reduce(parts))
    assert len({tuple(part) for part in parts}) > 1


def test_each_attack_sees_only_what_survived(net):
    seen = []

    def stage(attack):
        def call(problem):
            seen.append(problem.noise.rows.tolist())
            found = attack(problem)
            survived.append(problem.noise.rows[problem.open].tolist())
            return found

        return Scripted(call)

    survived = []
    evaluate(Scripted(lambda problem: cascade([stage(attack) for attack in SMALL.attacks], problem)), *net, "linf:0.03")
    assert len(seen) == 4
    assert seen[1:] == survived[:-1]
    assert len(seen[1]) < len(seen[0]) < 60


def test_stops_once_all_are_broken(net):
    called = []

    def stage(problem):
        called.append(len(problem))
        return problem.x

    attack = Scripted(lambda problem: cascade([*SMALL.attacks, Scripted(stage)], problem))
    assert set(evaluate(attack, *net, "linf:0.5").status) == {BROKEN, WRONG}
    assert called == []


@pytest.mark.parametrize("norm", EPS)
def test_what_fab_finds_beyond_eps_is_not_proposed(net, norm):
    attack = Scripted(lambda problem: cascade([make("attack", "fab:steps=5")], problem))
    outcome = evaluate(attack, *net, f"{norm}:{EPS[norm] / 4}")
    assert (status(outcome) == HELD).sum() > 20
    broken = outcome.status == BROKEN
    assert (outcome.distance[broken] <= EPS[norm] / 4).all()


def test_the_answer_for_an_input_does_not_depend_on_who_was_broken_beside_it(net):
    model, x, y = net
    whole = evaluate(SMALL, model, x, y, "linf:0.03")
    held = np.flatnonzero(whole.status == HELD)
    alone = evaluate(SMALL, model, x[held[:1]], y[held[:1]], "linf:0.03", first_row=int(held[0]))
    assert alone.status[0] == HELD
    assert alone.forwards[0] == whole.forwards[held[0]]
    assert alone.backwards[0] == whole.backwards[held[0]]


@pytest.mark.parametrize("text", ["steps=0", "targets=0", "queries=0"])
def test_refuses_settings_that_make_no_sense(text):
    with pytest.raises(ValueError, match="autoattack"):
        make("attack", f"autoattack:{text}")
