"""The contract of a certifier, check by check, on linear models whose exact distances are known."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_lite.certificate import FALSIFIED, VERIFIED, Certificate
from robustbench_lite.certifying import Court, certify_inputs
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import frozen
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import ERROR, Certified
from robustbench_lite.plugins import Certifier
from robustbench_lite.testing.common import Check, declaration, hold, keyed, require
from robustbench_lite.testing.nets import DUAL, Flattened, convolutional, many_classes, nearest
from robustbench_lite.threat import ThreatModel, find_norm
from robustbench_lite.wording import one_line

Guard = Callable[[nn.Module], Defended]
SLACK = 1e-2  # of an exact distance, on either side of which nothing is asked
NEAR = 0.4  # up to which distance the pixel range does not bind


def check_certifier(certifier: Certifier, guard: Guard = Defended, exact: bool = False) -> None:
    """Holds a certifier to its contract.

    ``guard`` puts a model behind the defense that the certifier is for; an ``exact`` one proves of a linear model all
    that is true.

    Raises:
        AssertionError: says which contract is broken, and what was seen.
    """
    hold(certifier_checks(certifier, guard, exact))


def certifier_checks(certifier: Certifier, guard: Guard = Defended, exact: bool = False) -> Iterator[tuple[str, Check]]:
    """Every check of a certifier with its name, for tests of their own, under those of its norms that are linf, l2 or
    l1."""
    yield "declaration", partial(declaration, "certifier", certifier)
    for norm in sorted(certifier.norms & DUAL.keys()):
        for check in (
            never_beyond_the_exact_distance,
            goes_by_what_the_model_answers,
            proves_something,
            a_wrong_label_is_never_certified,
            a_model_that_says_nothing_is_never_certified,
            same_answer_whatever_the_batch_and_the_order,
        ):
            yield f"{check.__name__}-{norm}", partial(check, certifier, norm, guard)
        if exact:
            name = f"{as_far_as_the_exact_distance.__name__}-{norm}"
            yield name, partial(as_far_as_the_exact_distance, certifier, norm, guard)


class Case(NamedTuple):
    """A linear model, inputs in the middle of the pixel range, and an eps within which half of them hold."""

    model: nn.Module
    x: Tensor
    y: Tensor
    distance: Tensor  # exact, (B,)
    slopes: Tensor  # by which a margin falls with eps at most, (B, C)
    eps: float


def case(norm: str) -> Case:
    linear, x, _ = many_classes(5, count=120)
    x = 0.5 + 0.1 * (x - 0.5)
    y, distance = linear(x).argmax(1), nearest(linear, x, norm)
    classes, size = linear.weight.shape
    layer = nn.Linear(size, classes)
    layer.load_state_dict(linear.state_dict())
    slopes = DUAL[norm](linear.weight - linear.weight[y].unsqueeze(1)).detach()
    return Case(nn.Sequential(nn.Flatten(), layer), x, y, distance, slopes, float(distance.clamp(max=NEAR).median()))


def never_beyond_the_exact_distance(certifier: Certifier, norm: str, guard: Guard) -> None:
    """What it verifies of a linear model is true, and so are its radii and its margins."""
    _true(certifier, norm, guard)


def goes_by_what_the_model_answers(certifier: Certifier, norm: str, guard: Guard) -> None:
    """Of a defense whose surrogate is flatter than itself it proves what holds of the defense, or nothing."""
    _true(certifier, norm, lambda model: guard(Flattened(model)))


def _true(certifier: Certifier, norm: str, guard: Guard) -> None:
    model, x, y, distance, slopes, eps = case(norm)
    said = certify_inputs(certifier, guard(model), x, y, ThreatModel(find_norm(norm), eps))
    no_error(said)
    exact, verified = distance.double().numpy(), said.status == VERIFIED
    beyond = verified & (exact < eps * (1 - SLACK))
    least = exact[beyond].min(initial=np.inf)
    count = f"{beyond.sum()} of {len(x)} inputs"
    require(not beyond.any(), f"{count} are verified within {eps:g}, though adversarials lie as near as {least:g}")
    beyond = (exact < NEAR) & (said.radius > exact * (1 + SLACK))
    require(not beyond.any(), f"{beyond.sum()} of {len(x)} radii are larger than the exact distance")
    loose = (said.status == FALSIFIED) & (exact > eps * (1 + SLACK))
    require(not loose.any(), f"{loose.sum()} of {len(x)} inputs are falsified that nothing within {eps:g} breaks")
    with torch.no_grad():
        logits, label = model(x), y.unsqueeze(1)
        gap = logits.gather(1, label) - logits - eps * slopes
        margin = gap.scatter(1, label, torch.inf).amin(1).double().numpy()
    beyond = said.margin > margin + 1e-3  # never where it is NaN
    require(not beyond.any(), f"{beyond.sum()} of {len(x)} margins are larger than the exact ones")


def as_far_as_the_exact_distance(certifier: Certifier, norm: str, guard: Guard) -> None:
    """It verifies of a linear model all that is true."""
    model, x, y, distance, _, eps = case(norm)
    said = certify_inputs(certifier, guard(model), x, y, ThreatModel(find_norm(norm), eps))
    holds = (distance > eps).numpy()
    clear = ((distance / eps - 1).abs() > SLACK).numpy()
    missed = clear & holds & (said.status != VERIFIED)
    require(not missed.any(), f"{missed.sum()} of {len(x)} inputs that hold within {eps:g} are not verified")
    told = (said.certified == np.where(holds, y.numpy(), -1)) & (said.radius == np.where(holds, eps, 0.0))
    require(told[clear].all(), f"where {eps:g} is verified, label and radius are those asked about; else -1 and 0")


def proves_something(certifier: Certifier, norm: str, guard: Guard) -> None:
    """Of a linear model it verifies something at a hundredth of the distance."""
    model, x, y, _, _, eps = case(norm)
    said = certify_inputs(certifier, guard(model), x, y, ThreatModel(find_norm(norm), eps / 100))
    no_error(said)
    why = [f" ({reason})" for reason in said.reason.tolist() if reason]
    require((said.status == VERIFIED).any(), f"it verifies nothing of a linear model at {eps / 100:g}{[*why, ''][0]}")


def a_wrong_label_is_never_certified(certifier: Certifier, norm: str, guard: Guard) -> None:
    """Asked about labels that the model does not give, it verifies none, and no margin is above 0."""
    model, x, y, _, _, eps = case(norm)
    other = (y + 1) % 5
    said = asked(certifier, guard(model), x, other, ThreatModel(find_norm(norm), eps / 100))
    verified = torch.tensor([status == VERIFIED for status in said.status])
    wrong = (verified & (said.label != y)) | (said.label == other) | (said.margin > 0)
    require(not wrong.any(), f"{int(wrong.sum())} of {len(x)} inputs are certified for what the model does not say")


def a_model_that_says_nothing_is_never_certified(certifier: Certifier, norm: str, guard: Guard) -> None:
    """Where the model answers with NaN it refuses, or verifies nothing."""
    model, x, y, _, _, eps = case(norm)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(torch.nan)
    try:
        said = asked(certifier, guard(model), x, torch.zeros_like(y), ThreatModel(find_norm(norm), eps / 100))
    except AssertionError:
        return
    proved = said.status.count(VERIFIED)
    require(not proved, f"{proved} of {len(x)} inputs are verified, though the model answers with NaN")


def asked(certifier: Certifier, model: Defended, x: Tensor, y: Tensor, within: ThreatModel) -> Certificate:
    """What the certifier says itself, before the harness has looked at it."""
    try:
        with frozen(model):
            return certifier(model, x, y, within, Noise(0, torch.arange(len(x))))
    except Exception as error:
        raise AssertionError(f"it refuses a linear model: {one_line(error)}") from error


def same_answer_whatever_the_batch_and_the_order(certifier: Certifier, norm: str, guard: Guard) -> None:
    """The answer for an input depends on neither its neighbours nor its place, and chance comes from noise alone."""
    net, x, y = convolutional(40)
    net, x = net.double(), x.double()
    weights = [value.clone() for value in net.state_dict().values()]
    defended = guard(net)
    within = ThreatModel(find_norm(norm), 0.01)
    with frozen(defended):
        court = Court(defended, certifier, within)
        whole = court.hear(x, y, torch.arange(len(x)))
        no_error(whole)
        kept = all(torch.equal(*pair) for pair in zip(weights, net.state_dict().values()))
        require(kept, "it changes the model that it is given")
        order = torch.arange(len(x)).flip(0).split([1, 20, 19])
        with keyed("noise.at(...)"):
            parts = [court.hear(x[rows], y[rows], rows) for rows in order]
    for name in ("status", "certified", "radius", "margin"):
        one, other = getattr(whole, name), np.concatenate([getattr(part, name) for part in parts])[::-1]
        numbers = one.dtype.kind == "f"
        same = np.allclose(one, other, rtol=1e-6, atol=1e-9, equal_nan=True) if numbers else (one == other).all()
        require(same, f"in other batches and another order its answer is another: {name} differs")


def no_error(said: Certified) -> None:
    errors = [reason for reason in said.reason.tolist() if reason.startswith(ERROR)]
    require(not errors, f"the harness does not accept what it says of {len(errors)} inputs: {[*errors, ''][0]}")
