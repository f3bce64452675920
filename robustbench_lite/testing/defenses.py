"""The contract of a defense, check by check: wrappers around small models, recipes on small data."""

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from robustbench_lite.data import load
from robustbench_lite.defended import Defended, Sources, ask, no_sources
from robustbench_lite.evaluation import check as looked_at
from robustbench_lite.evaluation import frozen
from robustbench_lite.models import build
from robustbench_lite.noise import Noise
from robustbench_lite.plugins import Defense
from robustbench_lite.testing.common import Check, declaration, hold, keyed, require
from robustbench_lite.testing.nets import Coarse, convolutional
from robustbench_lite.threat import ThreatModel, find_norm
from robustbench_lite.training import Lab, Progress, Recipe

CLASSES, ROWS = 10, 48
NOISE = Noise(0, torch.arange(ROWS))
FLAT = 0.05  # the share of inputs whose gradient may be exactly zero


def check_defense(defense: Defense, sources: Sources = no_sources) -> None:
    """Holds a defense to its contract; a recipe trains on 256 digits, with the settings that it has.

    Raises:
        AssertionError: says which contract is broken, and what was seen.
    """
    hold(defense_checks(defense, sources))


def defense_checks(defense: Defense, sources: Sources = no_sources) -> Iterator[tuple[str, Check]]:
    """Every check of a defense with its name, for tests of their own; those of a recipe share one training, and one
    test."""
    yield "declaration", partial(declaration, "defense", defense)
    for check in RECIPE if defense.trains else WRAPPER:
        yield check.__name__, partial(check, defense, sources)


def lab(sources: Sources) -> Lab:
    data = load("digits", "train").take(slice(256))
    return Lab(lambda: data, Noise(0, torch.zeros(1, dtype=torch.int64)), sources)


def guarded_by(defense: Defense, sources: Sources, model: nn.Module) -> Defended:
    given = lab(sources)
    with keyed("lab.noise.at(...)"):
        made = defense(model, given)
    require(isinstance(made, Defended), f"a defense returns a Defended, not {type(made).__name__}")
    return made


def around(defense: Defense, sources: Sources) -> tuple[Defended, Tensor, Tensor]:
    """The defense around a small network, and inputs with the labels that this gives them."""
    net, x, y = convolutional(ROWS, CLASSES)
    return guarded_by(defense, sources, net), x, y


def leaves_the_model_within_alone(defense: Defense, sources: Sources) -> None:
    """The model that it is given says afterwards what it said before."""
    net, x, _ = convolutional(ROWS, CLASSES)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    made = guarded_by(defense, sources, net)
    with torch.no_grad():
        ask(made, x, ROWS, noise=NOISE)
    now = net.state_dict()
    changed = [name for name, value in weights.items() if name not in now or not torch.equal(value, now[name])]
    require(not changed, f"it changes the model that it is given, in place: {', '.join(changed)}")


def gives_logits(defense: Defense, sources: Sources) -> None:
    """It answers in eval mode, with logits (B, C)."""
    well_formed(*around(defense, sources))


def answers_are_keyed(defense: Defense, sources: Sources) -> None:
    """Two passes agree; those of a stochastic defense where the noise is the same."""
    repeatable(around(defense, sources)[0], convolutional(ROWS)[1])


def answers_do_not_depend_on_the_batch(defense: Defense, sources: Sources) -> None:
    """An input gets the same answer, and the same noise the same draw, whoever is beside it."""
    batchless(*around(defense, sources))


def gradients_are_declared(defense: Defense, sources: Sources) -> None:
    """What attacks follow is a gradient: where the defense has none, its surrogate's; the value is its own."""
    followable(*around(defense, sources))


def same_seed_same_defense(defense: Defense, sources: Sources) -> None:
    """What it learns of the data, it learns again."""
    one, x, _ = around(defense, sources)
    other = around(defense, sources)[0]
    same_weights(one, other)
    with torch.no_grad():
        same = torch.equal(ask(one, x, ROWS, noise=NOISE), ask(other, x, ROWS, noise=NOISE))
    require(same, "made twice of one model and one seed, it gives two answers")


def works_around_another_wrapper(defense: Defense, sources: Sources) -> None:
    """Around a defense that rounds and answers at random it hands on noise and surrogate: it asks ``self.within``."""
    net, x, y = convolutional(ROWS, CLASSES)
    inner = Coarse(net).eval()
    made = guarded_by(defense, sources, inner)
    require(made.stochastic, "around a defense that answers at random it does not say that it does: stochastic")
    try:
        repeatable(made, x)
        followable(made, x, y)
    except ValueError as error:
        raise AssertionError(f"around a defense that answers at random it raises: {error}") from error


def trains_the_same_again(defense: Defense, sources: Sources) -> None:
    """The same seed gives the same weights, as does a training that was stopped and goes on; and what it gives answers
    as every defended model does."""
    data = lab(sources).data
    once = guarded_by(defense, sources, build("mlp", data.shape, CLASSES))
    if isinstance(defense, Recipe) and defense.epochs > 1:
        same_weights(once, _stopped(defense, lab(sources)))
    else:
        same_weights(once, guarded_by(defense, sources, build("mlp", data.shape, CLASSES)))
    x, y = data.x[:ROWS], data.y[:ROWS]
    well_formed(once, x, y)
    repeatable(once, x)
    batchless(once, x, y)
    followable(once, x, y)


class _Killed(BaseException):
    pass


def _stopped(recipe: Recipe, lab: Lab) -> Defended:
    """Stopped after an epoch, and gone on with from another start, of which nothing may be left."""

    def report(progress: Progress) -> None:
        if progress.epoch == 1:
            raise _Killed

    with tempfile.TemporaryDirectory() as folder:
        lab = replace(lab, checkpoint=Path(folder) / "checkpoint")
        with suppress(_Killed):
            recipe(build("mlp", lab.data.shape, CLASSES), replace(lab, report=report))
        return recipe(build("mlp", lab.data.shape, CLASSES, seed=1), lab)


def same_weights(one: Defended, other: Defended) -> None:
    pair = one.state_dict(), other.state_dict()
    require(pair[0].keys() == pair[1].keys(), "made twice, it has weights of other names")
    apart = [name for name, value in pair[0].items() if not torch.equal(value, pair[1][name])]
    require(not apart, f"the same seed gives other weights: {', '.join(apart)}; draw from lab.noise.at(...)")


def well_formed(made: Defended, x: Tensor, y: Tensor) -> None:
    require(not made.training, "it is in training mode: return it with .eval()")
    require(not made.stochastic or made.draws >= 1, f"a stochastic defense has draws of 1 or more, not {made.draws}")
    try:
        classes = looked_at(made, x, y, ThreatModel(find_norm("linf"), 0.1))
    except ValueError as error:
        raise AssertionError(f"what it answers are no logits: {error}") from error
    require(classes == CLASSES, f"it answers with {classes} logits to a model's {CLASSES}")


@torch.no_grad()
def repeatable(made: Defended, x: Tensor) -> None:
    first = ask(made, x, ROWS, noise=NOISE)
    with keyed("the noise that forward is given"):
        same = torch.equal(first, ask(made, x, ROWS, noise=NOISE))
    when = "of the same noise differ" if made.stochastic else "differ, and it does not say stochastic = True"
    require(same, f"two passes {when}: draw from the noise that forward is given alone")


def batchless(made: Defended, x: Tensor, y: Tensor) -> None:
    looked_at(made, x, y, ThreatModel(find_norm("linf"), 0.1))  # finds how many rows make bits steady
    order = torch.arange(ROWS).flip(0)
    with torch.no_grad():
        whole = ask(made, x, ROWS, noise=NOISE)
        parts = [ask(made, x[rows], ROWS, noise=NOISE.over(rows)) for rows in order.split([1, 20, 27])]
    off = (torch.cat(parts) != whole[order]).any(1)
    require(not off.any(), f"{int(off.sum())} of {ROWS} inputs get another answer in another batch")


def followable(made: Defended, x: Tensor, y: Tensor) -> None:
    with frozen(made):
        at = x.clone().requires_grad_()
        answers = ask(made, at, ROWS, differentiable=True, noise=NOISE)
        with torch.no_grad():
            plain = ask(made, x, ROWS, noise=NOISE)
        require(torch.equal(answers, plain), "with gradients it answers something else than without")
        require(answers.requires_grad, "its answers have no gradient: give it a surrogate")
        loss = nn.functional.cross_entropy(answers[:, :CLASSES], y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, at)
    require(gradient.isfinite().all(), "its gradient is NaN or infinite: give it a surrogate")
    flat = (gradient == 0).flatten(1).all(1).float().mean().item()
    require(flat <= FLAT, f"its gradient is exactly zero for {flat:.0%} of the inputs: give it a surrogate")


WRAPPER = (
    leaves_the_model_within_alone,
    gives_logits,
    answers_are_keyed,
    answers_do_not_depend_on_the_batch,
    gradients_are_declared,
    same_seed_same_defense,
    works_around_another_wrapper,
)
RECIPE = (trains_the_same_again,)
