"""The contract checks are no use unless each catches what breaks it: a table of broken plugins."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.certificate import Certificate
from robustbench_lite.defended import Defended
from robustbench_lite.noise import Noise
from robustbench_lite.problem import Problem
from robustbench_lite.registry import attack, make
from robustbench_lite.testing import (
    Bar,
    attack_checks,
    certifier_checks,
    check_attack,
    check_certifier,
    check_defense,
    defense_checks,
)
from robustbench_lite.testing.nets import DUAL, Flattened
from robustbench_lite.threat import Goal, ThreatModel
from robustbench_lite.training import Lab
from tests.nets import Scripted


def step(problem: Problem, loss: Callable[[Goal, Tensor], Tensor] = Goal.cross_entropy) -> Tensor:
    """What all these attacks do, but for what is wrong with them."""
    gradient, _ = problem.gradient(problem.x, loss)
    x = problem.threat.step(problem.x, problem.x, gradient, problem.threat.eps)
    problem.labels(x)
    return x


def by_hand(problem: Problem) -> Tensor:
    x = problem.x.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(problem._model(x).sum(), x)
    problem.labels(problem.x)
    return problem.x + 0 * gradient


def leaving(problem: Problem) -> Tensor:
    return problem.x + 2 * (step(problem) - problem.x) + 1e-3


def shaken(noise: Tensor, problem: Problem) -> Tensor:
    x = problem.threat.project(step(problem) + 0.1 * problem.threat.eps * noise, problem.x)
    problem.labels(x)
    return x


def by_place(problem: Problem) -> Tensor:
    return shaken(torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(0)), problem)


def drifting(number: count) -> Callable[[Problem], Tensor]:
    return lambda problem: shaken(next(number) + 0 * problem.x, problem)


def untargeted(problem: Problem) -> Tensor:
    return step(problem, lambda goal, logits: Goal(goal.labels).cross_entropy(logits))


def swallowing(problem: Problem) -> Tensor:
    try:
        return step(problem)
    except RuntimeError:
        return problem.x


def numb(problem: Problem) -> Tensor:
    """Asks in double precision whatever it is given."""
    gradient, _ = problem.gradient(problem.x.float())
    return problem.threat.step(problem.x, problem.x, gradient, problem.threat.eps)


def dividing(problem: Problem) -> Tensor:
    gradient, _ = problem.gradient(problem.x)
    way = gradient / gradient.flatten(1).norm(dim=1).view(-1, *[1] * (problem.x.dim() - 1))
    return problem.x + way * problem.threat.eps


def reciprocal(problem: Problem) -> Tensor:
    return step(problem) * (1 + 0 / problem.threat.eps)


def insatiable(problem: Problem) -> Tensor:
    for _ in range(20):
        x = step(problem.unclosed())
    return x


ASKS_MORE = Scripted(step, access="labels")
BROKEN_ATTACKS = [
    ("sees_no_more_than_it_declares-linf", ASKS_MORE, "declares access to labels, and asked for more"),
    ("sees_no_more_than_it_declares-linf", Scripted(by_hand, access="scores"), "followed the model's gradients"),
    ("stays_within-linf", Scripted(leaving), "outside the ball"),
    ("same_seed_same_answer-linf", Scripted(lambda p: shaken(torch.randn_like(p.x), p)), "generator of torch"),
    ("same_seed_same_answer-linf", Scripted(drifting(count())), "same seed gives"),
    ("same_rows_whatever_the_batch_and_the_order-linf", Scripted(by_place), "in batches of 16"),
    ("random_targets_do_not_depend_on_the_chunk-linf", Scripted(by_place), "the last chunk alone"),
    ("reaches_its_target-linf-1-3", Scripted(untargeted), "target"),
    ("a_model_that_raises_is_never_robust-linf", Scripted(swallowing), "a model that raises"),
    ("a_model_that_says_nothing_is_never_robust-linf", Scripted(lambda p: p.x), "turns to NaN"),
    ("works_in_float64-linf", Scripted(numb), "in float64"),
    ("zero_gradients_end_as_held-linf-torch.float32", Scripted(dividing), "constant are held, but it left 10 unknown"),
    ("an_eps_of_zero_breaks_nothing-linf", Scripted(reciprocal), "ZeroDivisionError"),
    ("solved_inputs_cost_nothing_more-linf", Scripted(insatiable), "cost 40 forwards"),
    ("fails_inside_and_wins_beyond-linf-(7,)", Scripted(lambda p: p.x), "should break all inputs"),
    ("never_beats_the_exact_distance_among_many_classes-linf", Scripted(lambda p: p.x), "but 60 held"),
    ("finds_the_nearest_that_is_not_rejected-linf", Scripted(lambda p: p.x), "has to reject"),
    ("an_input_that_is_rejected_is_not_broken-linf", Scripted(lambda p: p.x), "fewer inputs to break"),
    ("declaration", ASKS_MORE, "not registered"),
]


def named(table):
    return [pytest.param(*row, id=f"{number}-{row[0]}") for number, row in enumerate(table)]


@pytest.mark.parametrize(("check", "broken", "said"), named(BROKEN_ATTACKS))
def test_a_broken_attack_is_caught(check, broken, said):
    with pytest.raises(AssertionError, match=said):
        dict(attack_checks(broken))[check]()


def test_the_attack_that_they_spoil_is_sound():
    checks = dict(attack_checks(Scripted(step), norms={"linf"}))
    assert {row[0] for row in BROKEN_ATTACKS} <= checks.keys()
    for name in checks.keys() - {"declaration"}:
        checks[name]()


@pytest.mark.parametrize(("spec", "seeded", "said"), [("fgsm", True, "changes nothing"), ("pgd", False, "changes it")])
def test_what_a_seed_does_is_held_to_what_is_said(spec, seeded, said):
    with pytest.raises(AssertionError, match=said):
        dict(attack_checks(make("attack", spec), Bar(seeded=seeded)))["same_seed_same_answer-linf"]()


def declared(**fields):
    """A registered attack whose class says this, beside what is usual."""
    usual = {"__doc__": "Something.", "access": "gradients", "norms": frozenset({"linf"}), "__call__": step}
    return attack("declared-oddly")(dataclass(frozen=True)(type("Odd", (), usual | fields)))()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"__doc__": None}, "no docstring"),
        ({"norms": {"linf"}}, "names its norms"),
        ({"norms": frozenset({"l7"})}, "names its norms"),
        ({"access": "everything"}, "labels, scores, gradients, not 'everything'"),
        ({"__eq__": lambda self, other: False, "__hash__": id}, "makes another one"),
    ],
    ids=["docstring", "set", "norm", "access", "equality"],
)
def test_a_declaration_that_says_too_little_is_caught(fields, said):
    with pytest.raises(AssertionError, match=said):
        dict(attack_checks(declared(**fields)))["declaration"]()


def test_a_sentence_says_which_check_it_comes_from():
    for hold, plugin in ((check_attack, ASKS_MORE), (check_defense, Guards(Defended)), (check_certifier, Says(flat))):
        with pytest.raises(AssertionError, match=r"^declaration: .* is not registered"):
            hold(plugin)


# Defenses


@dataclass(frozen=True)
class Guards:
    """A wrapper that does what it is told."""

    call: Callable[[nn.Module], nn.Module]
    trains: ClassVar[bool] = False

    def __call__(self, model: nn.Module, lab: Lab) -> nn.Module:
        return self.call(model).eval()


@dataclass(frozen=True)
class Trains(Guards):
    trains: ClassVar[bool] = True


class Told(Defended):
    """Says what it is told."""

    def __init__(self, model: nn.Module, said: Callable[[Defended, Tensor, Noise | None], Tensor], chance=False):
        super().__init__(model)
        self.said, self.stochastic = said, chance or self.stochastic

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        return self.said(self, x, noise)


def told(said, chance=False) -> Guards:
    return Guards(lambda model: Told(model, said, chance))


def halved(model: nn.Module) -> Defended:
    for weight in model.parameters():
        weight.data /= 2
    return Defended(model)


def biased(number: count) -> Callable[[nn.Module], Defended]:
    def call(model: nn.Module) -> Defended:
        made = Told(model, lambda self, x, noise: self.within(x, noise) + self.bias)
        made.bias = nn.Parameter(torch.tensor(float(next(number))))
        return made

    return call


def rising(number: count) -> Callable[[Defended, Tensor, Noise | None], Tensor]:
    return lambda self, x, noise: self.within(x, noise) + next(number)


class Wakeful(Defended):
    def eval(self):
        return self.train()


BROKEN_DEFENSES = [
    ("leaves_the_model_within_alone", Guards(halved), "changes the model that it is given, in place"),
    ("gives_logits", told(lambda self, x, noise: self.within(x, noise).softmax(1)), "probabilities"),
    ("gives_logits", Guards(Wakeful), "training mode"),
    ("gives_logits", Guards(nn.Sequential), "returns a Defended, not Sequential"),
    (
        "answers_are_keyed",
        told(lambda self, x, noise: self.within(x + torch.rand_like(x), noise)),
        "generator of torch",
    ),
    ("answers_are_keyed", told(rising(count())), "say stochastic"),
    ("answers_are_keyed", told(rising(count()), True), "same noise"),
    (
        "answers_do_not_depend_on_the_batch",
        told(lambda self, x, noise: self.within(x - x.mean(0), noise)),
        "in another",
    ),
    (
        "answers_do_not_depend_on_the_batch",
        told(lambda self, x, noise: self.within(x + noise.over(torch.arange(len(x))).normal(x)), True),
        "in another batch",
    ),
    ("gradients_are_declared", told(lambda self, x, noise: self.within((x * 9).round() / 9)), "exactly zero for 100%"),
    (
        "gradients_are_declared",
        told(lambda self, x, noise: self.within(x.detach())),
        "no gradient: give it a surrogate",
    ),
    ("same_seed_same_defense", Guards(biased(count())), "other weights: bias"),
    ("works_around_another_wrapper", told(lambda self, x, noise: self.model(x, noise)), "zero for 100%"),
    ("works_around_another_wrapper", told(lambda self, x, noise: self.within(x)), "asked without noise"),
    ("trains_the_same_again", Trains(biased(count())), "other weights: bias"),
    (
        "trains_the_same_again",
        Trains(lambda model: Defended(model).to(torch.rand(1).dtype)),
        "global generator of torch",
    ),
    ("declaration", Guards(Defended), "not registered"),
]


@pytest.mark.parametrize(("check", "broken", "said"), named(BROKEN_DEFENSES))
def test_a_broken_defense_is_caught(check, broken, said):
    with pytest.raises(AssertionError, match=said):
        dict(defense_checks(broken))[check]()


def test_the_defense_that_they_spoil_is_sound():
    for defense in (Guards(Defended), Trains(Defended)):
        checks = dict(defense_checks(defense))
        for name in checks.keys() - {"declaration"}:
            checks[name]()


# Certifiers

BATCHES = "same_answer_whatever_the_batch_and_the_order-linf"


@dataclass(frozen=True)
class Says:
    """A certifier that is exact on linear models, and makes of its margins what it is told."""

    call: Callable[[Callable[[float], Tensor], float], Tensor]  # margins at any eps, and the eps that is asked about
    surrogate: bool = False  # goes by what attacks are shown
    norms: ClassVar[frozenset[str]] = frozenset({"linf"})

    def __call__(self, model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Certificate:
        if not self.surrogate and any(isinstance(module, Flattened) for module in model.modules()):
            raise ValueError("it is not for a model with a surrogate")
        with torch.enable_grad():
            at, label = x.clone().requires_grad_(), y.unsqueeze(1)
            logits = model.differentiable(at)
            gap = logits.gather(1, label) - logits
            ways = [torch.autograd.grad(one.sum(), at, retain_graph=True)[0].flatten(1) for one in gap.unbind(1)]
        slopes = DUAL[threat.norm.name](torch.stack(ways, 1))

        def margins(eps: float) -> Tensor:
            return (gap.detach() - eps * slopes).scatter(1, label, torch.inf).amin(1)

        return Certificate.of_margins(self.call(margins, threat.eps), y, threat.eps)


class Spoils(Says):
    def __call__(self, model: Defended, *asked) -> Certificate:
        for weight in model.parameters():
            weight.data /= 2
        return super().__call__(model, *asked)


def flat(margins: Callable[[float], Tensor], eps: float) -> Tensor:
    return margins(eps)


BROKEN_CERTIFIERS = [
    ("never_beyond_the_exact_distance-linf", Says(lambda m, eps: m(eps) * 0 + 1), "verified within .*, though"),
    ("never_beyond_the_exact_distance-linf", Says(lambda m, eps: m(eps / 1.1)), "verified within .*, though"),
    ("never_beyond_the_exact_distance-linf", Says(lambda m, eps: m(eps) * 2), "margins are larger"),
    ("goes_by_what_the_model_answers-linf", Says(flat, surrogate=True), "verified within .*, though"),
    ("proves_something-linf", Says(lambda m, eps: m(eps) - 1e9), "verifies nothing"),
    ("a_wrong_label_is_never_certified-linf", Says(lambda m, eps: m(eps).abs()), "what the model does not say"),
    ("a_model_that_says_nothing_is_never_certified-linf", Says(lambda m, eps: m(eps).nan_to_num() + 1), "with NaN"),
    (BATCHES, Says(lambda m, eps: m(eps) - m(eps) + m(eps).mean()), "its answer is another"),
    (BATCHES, Says(lambda m, eps: m(eps) + 0 * torch.rand(1)), "generator of torch"),
    (BATCHES, Spoils(flat), "changes the model"),
    ("as_far_as_the_exact_distance-linf", Says(lambda m, eps: m(eps / 0.9)), "that hold within .* are not verified"),
    ("declaration", Says(flat), "not registered"),
]


@pytest.mark.parametrize(("check", "broken", "said"), named(BROKEN_CERTIFIERS))
def test_a_broken_certifier_is_caught(check, broken, said):
    with pytest.raises(AssertionError, match=said):
        dict(certifier_checks(broken, exact=True))[check]()


def test_the_certifier_that_they_spoil_is_sound():
    checks = dict(certifier_checks(Says(flat), exact=True))
    assert checks.keys() == {row[0] for row in BROKEN_CERTIFIERS}
    for name in checks.keys() - {"declaration"}:
        checks[name]()
