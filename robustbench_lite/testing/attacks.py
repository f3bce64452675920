"""The contract of an attack, check by check, on models whose exact distances are known."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_lite import evaluation
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import Bench, Target, frozen
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import BROKEN, COLUMNS, HELD, REJECTED, SKIPPED, UNKNOWN, WRONG, Outcome
from robustbench_lite.plugins import Attack, learns
from robustbench_lite.testing.common import Check, declaration, hold, keyed, require
from robustbench_lite.testing.nets import (
    GUARDED,
    Brittle,
    Guarded,
    Linear,
    Watched,
    convolutional,
    guarded,
    halfspace,
    many_classes,
    nearest,
)
from robustbench_lite.threat import Goal, ThreatModel, find_norm

DISTANCE = {"linf": 0.05, "l2": 0.4, "l1": 0.2, "l0": 1.25}  # l0: one pixel is too few, two are enough
SHAPES = [(1, 10, 10), (1, 1, 1), (1, 6, 7), (3, 5, 4), (7,)]
TARGETS: list[Target] = [1, "next", "random", "least-likely"]


@dataclass(frozen=True)
class Bar:
    """How good an attack has to be, in times the exact distance of a linear model: it fails at ``fails``, and wins at
    ``wins``."""

    fails: float = 0.95
    wins: float = 1.1
    seeded: bool | None = None  # whether another seed gives other candidates; None where either will do
    needs_a_start: bool = False  # of a model that gives one label to everything it learns nothing: unknown, not held
    evades: bool = False  # finds what a detector lets pass beyond the nearest adversarial, which it rejects


def check_attack(attack: Attack, bar: Bar = Bar()) -> None:
    """Holds an attack to its contract.

    Raises:
        AssertionError: says which contract is broken, and what was seen.
    """
    hold(attack_checks(attack, bar))


def attack_checks(
    attack: Attack, bar: Bar = Bar(), norms: Collection[str] = tuple(DISTANCE)
) -> Iterator[tuple[str, Check]]:
    """Every check of an attack with its name, for tests of their own; of one that learns first, its declaration alone.

    They are made under those of its ``norms`` that have exact distances: all but patch.
    """
    yield "declaration", partial(declaration, "attack", attack)
    if learns(attack):
        return
    for norm in sorted(attack.norms & set(norms) & DISTANCE.keys()):
        for check, *extra in _applicable(attack, norm, bar):
            name = "-".join([check.__name__, norm, *map(str, extra)])
            yield name, partial(check, attack, norm, bar, *extra)


def _applicable(attack: Attack, norm: str, bar: Bar) -> Iterator[tuple[Any, ...]]:
    """The checks for a norm, each with what else it is told."""
    yield from ((fails_inside_and_wins_beyond, shape) for shape in SHAPES)
    yield from ((reaches_its_target, target, classes) for target, classes in product(TARGETS, (2, 3)))
    yield from ((zero_gradients_end_as_held, dtype) for dtype in (torch.float32, torch.float64))
    yield from ((check,) for check in ALWAYS)
    if bar.seeded is not False:
        yield (random_targets_do_not_depend_on_the_chunk,)
    if not minimises(attack):
        yield (solved_inputs_cost_nothing_more,)
    if norm in GUARDED:
        yield (finds_the_nearest_that_is_not_rejected,)


def judged(attack: Attack, model: nn.Module, *inputs: Any, **settings: Any) -> Outcome:
    """The attack's outcome, where whatever source it asks for is the model itself."""
    return evaluation.evaluate(attack, model, *inputs, **{"sources": lambda spec: model, **settings})


def threat(norm: str, eps: float) -> ThreatModel:
    return ThreatModel(find_norm(norm), eps)


def minimises(attack: Attack) -> bool:
    """Whether it seeks the nearest adversarial: what lies beyond eps is held, and its label forgotten."""
    return getattr(attack, "minimises", False)


def seen(outcome: Outcome) -> str:
    """How inputs ended, and why the first that is unknown is."""
    said = ", ".join(f"{count} {status}" for status, count in sorted(Counter(outcome.status.tolist()).items()))
    reasons = sorted({*outcome.reason.tolist()} - {""})
    return f"{said} ({reasons[0]})" if reasons else said


def differs(one: Outcome, other: Outcome) -> str:
    """The first column, but for the seconds, that two outcomes do not share; empty where they share all."""
    for field in fields(Outcome):
        if field.name != "seconds":
            pair = getattr(one, field.name), getattr(other, field.name)
            if not np.array_equal(*pair, equal_nan=pair[0].dtype.kind == "f"):
                return field.name
    return ""


def every(outcome: Outcome, status: str) -> bool:
    return set(outcome.status) == {status}


def fails_inside_and_wins_beyond(attack: Attack, norm: str, bar: Bar, shape: tuple[int, ...]) -> None:
    """It breaks nothing just inside the exact distance of a linear model, and everything just beyond."""
    distance = 0.25 if norm == "l0" and math.prod(shape) < 20 else DISTANCE[norm]
    model, x, y = halfspace(norm, distance, shape=shape)
    inside = judged(attack, model, x, y, threat(norm, bar.fails * distance))
    where = f"at {bar.fails:g} times the exact distance of a linear model on inputs of shape {shape}"
    require(every(inside, HELD), f"{where} all inputs hold, but it left {seen(inside)}")
    left = np.full(len(y), -1) if minimises(attack) else y.numpy()
    require((inside.adversarial == left).all(), f"{where} the last point judged has another label than the input")
    beyond = judged(attack, model, x, y, threat(norm, bar.wins * distance))
    where = f"at {bar.wins:g} times the exact distance of a linear model on inputs of shape {shape}"
    require(every(beyond, BROKEN), f"{where} it should break all inputs, but it left {seen(beyond)}")
    require((beyond.adversarial == 1 - y.numpy()).all(), f"{where} what it found is not of the other class")
    right = (beyond.distance >= distance * (1 - 1e-4)) & (beyond.distance <= bar.wins * distance)
    require(right.all(), f"{where} distances lie from {beyond.distance.min():g} to {beyond.distance.max():g}")


def works_in_float64(attack: Attack, norm: str, bar: Bar) -> None:
    """Inputs and models of double precision are inputs and models."""
    model, x, y = halfspace(norm, DISTANCE[norm], dtype=torch.float64)
    outcome = judged(attack, model, x, y, threat(norm, bar.wins * DISTANCE[norm]))
    require(every(outcome, BROKEN), f"in float64 it should break all inputs, but it left {seen(outcome)}")


def never_beats_the_exact_distance_among_many_classes(attack: Attack, norm: str, bar: Bar) -> None:
    """Of a linear model of five classes it breaks some inputs, none nearer than can be, and holds the others."""
    model, x, y = many_classes(5, count=60, size=200 if norm == "l0" else 30)  # of 30 one is enough for all
    exact = nearest(model, x, norm).double().numpy()
    eps = float(np.median(exact)) * 1.2
    outcome = judged(attack, model, x, y, threat(norm, eps))
    broken = outcome.status == BROKEN
    known = set(outcome.status) == {BROKEN, HELD}
    require(known, f"at 1.2 times the median distance of five classes some hold and some do not, but {seen(outcome)}")
    over = (outcome.distance[broken] < exact[broken] - 1e-4) | (outcome.distance[broken] > eps)
    require(not over.any(), f"{over.sum()} adversarials lie nearer than can be, or beyond eps")


def reaches_its_target(attack: Attack, norm: str, bar: Bar, target: Target, classes: int) -> None:
    """Given a target it reaches that class, and asks nothing about inputs that are of it."""
    model, x, y = many_classes(classes, count=40)
    far = float(2 * nearest(model, x, norm).max())
    outcome = judged(attack, model, x, y, threat(norm, far), target=target)
    logits = model(x)
    goals = {1: torch.full_like(y, 1), "next": (y + 1) % classes, "least-likely": logits.argmin(1)}
    wanted = goals.get(target)
    broken, skipped = outcome.status == BROKEN, outcome.status == SKIPPED
    if wanted is not None:
        require((skipped == (wanted == y).numpy()).all(), "inputs that are of the target are skipped, and no others")
        hit = outcome.adversarial[broken] == wanted.numpy()[broken]
        require(hit.all(), f"{(~hit).sum()} inputs ended in another class than the target")
    require(broken.sum() >= 0.3 * (~skipped).sum(), f"at twice the distance it reached few targets: {seen(outcome)}")
    require((outcome.adversarial[broken] != outcome.label[broken]).all(), "a target is never the label")
    require(not outcome.forwards[skipped].any(), "inputs that are of the target were asked about")
    if target == "random":
        require(not skipped.any(), "a random target is never the label")
        ahead = (outcome.adversarial - outcome.label)[broken] % classes
        require(set(ahead) == set(range(1, classes)), "of the random targets it reached some classes only")


def same_seed_same_answer(attack: Attack, norm: str, bar: Bar) -> None:
    """Chance comes from the problem's noise alone."""
    net, x, y = convolutional(40)
    run = partial(judged, attack, net, x, y, threat(norm, 2 * DISTANCE[norm]), keep_all=True)
    first = run(seed=0)
    require(BROKEN in first.status, f"of a small network at {2 * DISTANCE[norm]:g} it breaks nothing: {seen(first)}")
    with keyed("problem.noise.at(...)"):
        again = differs(first, run(seed=0))
    require(not again, f"the same seed gives another answer, {again} differs: draw from problem.noise.at(...)")
    other = run(seed=1)
    common = np.isin(first.imaged, other.imaged), np.isin(other.imaged, first.imaged)
    same = np.array_equal(first.images[common[0]], other.images[common[1]])
    seeded = (
        "changes nothing, though it is said to be random" if same else "changes it, though it is said not to be random"
    )
    require(bar.seeded in (None, not same), f"another seed {seeded}")


def same_rows_whatever_the_batch_and_the_order(attack: Attack, norm: str, bar: Bar) -> None:
    """The answer for an input depends on neither its neighbours nor its place among them."""
    net, x, y = convolutional(220)
    y[::9] = (y[::9] + 1) % 4
    run = partial(judged, attack, net, threat=threat(norm, DISTANCE[norm]))
    whole = run(x=x, y=y, batch=300)
    mixed = {BROKEN, HELD, WRONG} == set(whole.status)
    require(mixed, f"of a small network at {DISTANCE[norm]:g} some inputs hold and some do not, but {seen(whole)}")
    for batch in (16, 100):
        column = differs(run(x=x, y=y, batch=batch), whole)
        require(not column, f"in batches of {batch} its answer is another than all at once: {column} differs")
    starts = (200, 0, 100)
    parts = [run(x=x[s : s + 100], y=y[s : s + 100], first_row=s) for s in starts]
    column = differs(parts[0], whole.part(200, 300)) or differs(Outcome.join(parts), whole)
    require(not column, f"in chunks, in another order, its answer is another than all at once: {column} differs")
    few = run(x=x[37:64], y=y[37:64], first_row=37)
    column = differs(few, run(x=x[37:64], y=y[37:64], first_row=37, batch=16))
    require(not column, f"for some of the inputs in batches of 16 its answer is another: {column} differs")
    for column in sorted(set(COLUMNS) - {"seconds"}):
        pair = getattr(few, column), getattr(whole.part(37, 64), column)
        same = np.array_equal(*pair, equal_nan=pair[0].dtype.kind == "f")
        require(same, f"for some of the inputs its answer is another than for all: {column} differs")


def random_targets_do_not_depend_on_the_chunk(attack: Attack, norm: str, bar: Bar) -> None:
    """What is keyed by the row stays with the row, targets too."""
    model, x, y = many_classes(4, count=120)
    eps = threat(norm, float(2 * nearest(model, x, norm).median()))
    whole = judged(attack, model, x, y, eps, target="random")
    last = judged(attack, model, x[100:], y[100:], eps, target="random", first_row=100)
    column = differs(whole.part(100, 120), last)
    require(not column, f"with random targets the last chunk alone has another answer: {column} differs")


def solved_inputs_cost_nothing_more(attack: Attack, norm: str, bar: Bar) -> None:
    """An input that is broken is asked about no more."""
    distance = DISTANCE[norm]
    model, x, y = halfspace(norm, distance)
    x = torch.cat([halfspace(norm, 0.1 * distance).x[:10], x[10:]])
    outcome = judged(attack, model, x, y, threat(norm, 0.9 * distance))
    known = (outcome.status == [BROKEN] * 10 + [HELD] * 10).all()
    require(known, f"ten inputs at a tenth of the distance break and ten at all of it hold, but {seen(outcome)}")
    easy, hard = outcome.forwards[:10], outcome.forwards[10:]
    fewer = (easy <= hard).all() and (hard.min() <= 10 or (2 * easy <= hard).all())
    require(fewer, f"inputs that break at once cost {easy.max()} forwards, those that hold {hard.min()}")


def zero_gradients_end_as_held(attack: Attack, norm: str, bar: Bar, dtype: torch.dtype) -> None:
    """A model that always says the same is not broken, and no division by a gradient of zero is NaN."""
    model = Linear(torch.zeros(3, 12), torch.tensor([1.0, 0.0, -1.0])).to(dtype)
    x = torch.rand(10, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    y = torch.zeros(10, dtype=torch.long)
    outcome = judged(attack, model, x, y, threat(norm, DISTANCE[norm]))
    wanted = UNKNOWN if bar.needs_a_start else HELD
    require(every(outcome, wanted), f"inputs of a model that is constant are {wanted}, but it left {seen(outcome)}")
    label = -1 if minimises(attack) else 0
    require((outcome.adversarial == label).all(), "what was judged last has another label than the only one there is")


def an_eps_of_zero_breaks_nothing(attack: Attack, norm: str, bar: Bar) -> None:
    """An adversary who may do nothing does nothing."""
    model, x, y = halfspace(norm, DISTANCE[norm])
    outcome = judged(attack, model, x, y, threat(norm, 0))
    require(every(outcome, HELD), f"at an eps of 0 all inputs hold, but it left {seen(outcome)}")


def a_model_that_says_nothing_is_never_robust(attack: Attack, norm: str, bar: Bar) -> None:
    """Where the model answers with NaN, inputs end as unknown."""
    _brittle(attack, norm, raises=False)


def a_model_that_raises_is_never_robust(attack: Attack, norm: str, bar: Bar) -> None:
    """Where the model raises, inputs end as unknown: the error is not the attack's to swallow."""
    _brittle(attack, norm, raises=True)


def _brittle(attack: Attack, norm: str, raises: bool) -> None:
    clean = torch.rand(20, 5, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    eps = 1 if norm == "l0" else 0.0123
    y = torch.zeros(20, dtype=torch.long)
    outcome = judged(attack, Brittle(clean, raises), clean, y, threat(norm, eps))
    how = "raises" if raises else "turns to NaN"
    require(every(outcome, UNKNOWN), f"of a model that {how} all inputs are unknown, but it left {seen(outcome)}")


def sees_no_more_than_it_declares(attack: Attack, norm: str, bar: Bar) -> None:
    """It gets by on the access that it declares, and follows gradients only where it declares them."""
    model, x, y = halfspace(norm, DISTANCE[norm])
    watched = Watched(model)
    outcome = judged(
        attack, watched, x, y, threat(norm, bar.wins * DISTANCE[norm]), sources=lambda spec: Defended(model)
    )
    refused = [reason for reason in outcome.reason.tolist() if "AccessError" in reason]
    require(not refused, f"it declares access to {attack.access}, and asked for more: {[*refused, ''][0]}")
    allowed = attack.access == "gradients" or not watched.followed
    require(allowed, f"it declares access to {attack.access}, but followed the model's gradients")


def stays_within(attack: Attack, norm: str, bar: Bar) -> None:
    """What it returns lies inside the ball and the pixel range, at whose ends half of these pixels are."""
    net, x, y = convolutional(40)
    x = torch.where(x < 0.25, 0.0, torch.where(x > 0.75, 1.0, x))
    eps = 1.0 if norm == "l0" else 0.2 * DISTANCE[norm]
    within = threat(norm, math.inf if minimises(attack) else eps)
    defended, rows = Defended(net), torch.arange(len(x))
    with frozen(defended):
        y = net(x).argmax(1)
        bench = Bench(defended, within, 4, sources=lambda spec: Defended(net))
        problem = bench.problem(x, Goal(y), within, Noise(0, rows), attack.access, minimises(attack))
        found = attack(problem)
    require(
        isinstance(found, Tensor) and found.shape == x.shape, "it returns one candidate an input, shaped as the inputs"
    )
    outside = problem.open & ~within.allows(found.detach(), x)
    where = "pixel range" if minimises(attack) else "ball and pixel range"
    require(not outside.any(), f"{int(outside.sum())} of {len(x)} candidates lie outside the {where}; project them")


def finds_the_nearest_that_is_not_rejected(attack: Attack, norm: str, bar: Bar) -> None:
    """With a detector nothing is broken nearer than the nearest adversarial that it lets pass."""
    model, x, y = guarded()
    held = judged(attack, model, x, y, threat(norm, 0.97 * GUARDED[norm]))
    require(every(held, HELD), f"nearer than what a detector lets pass all inputs hold, but it left {seen(held)}")
    tried = REJECTED in held.adversarial or minimises(attack)
    require(tried, "it proposes nothing that the detector has to reject")
    if bar.evades:
        far = judged(attack, model, x, y, threat(norm, 1.5 * GUARDED[norm]))
        broken = every(far, BROKEN) and set(far.adversarial) == {1}
        require(broken, f"beyond what a detector lets pass all inputs break, but it left {seen(far)}")


def an_input_that_is_rejected_is_not_broken(attack: Attack, norm: str, bar: Bar) -> None:
    """What it finds is of another class, and the detector lets it pass."""
    net, x, y = convolutional(32)
    way = torch.linspace(-1, 1, 64).sign() * torch.linspace(0.5, 1, 64)
    score = x.flatten(1) @ way
    model = Guarded(net, way, float(score.quantile(0.9)))
    free, outcome = (judged(attack, one, x, y, threat(norm, 2 * DISTANCE[norm]), keep_all=True) for one in (net, model))
    rejected = (score > model.level).numpy()
    told = (outcome.clean == np.where(rejected, REJECTED, y)).all() and ((outcome.status == WRONG) == rejected).all()
    require(told, "clean inputs that the detector rejects are wrong, and no others")
    broken = outcome.status == BROKEN
    fewer = 0 < broken.sum() < (free.status == BROKEN).sum()
    require(
        fewer, f"a detector leaves an attack fewer inputs to break, but it left {seen(outcome)}, without {seen(free)}"
    )
    images = torch.from_numpy(outcome.images)
    require((model.rejection(images) <= 0).all(), "what counts as broken is rejected")
    fooled = (net(images).argmax(1).numpy() == outcome.adversarial[broken]).all()
    require(fooled, "what counts as broken is of another class than said")
    require(not outcome.fooled[outcome.adversarial == REJECTED].any(), "what was rejected counts as fooled")


ALWAYS: list[Callable[[Attack, str, Bar], None]] = [
    works_in_float64,
    never_beats_the_exact_distance_among_many_classes,
    same_seed_same_answer,
    same_rows_whatever_the_batch_and_the_order,
    an_eps_of_zero_breaks_nothing,
    a_model_that_says_nothing_is_never_robust,
    a_model_that_raises_is_never_robust,
    sees_no_more_than_it_declares,
    stays_within,
    an_input_that_is_rejected_is_not_broken,
]
