"""A short look at a model, for what it says of attacks on it."""

import time
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_lite.ascent import ascend, customary_length
from robustbench_lite.defended import ask, device_of
from robustbench_lite.evaluation import Bench, predicted
from robustbench_lite.noise import Noise
from robustbench_lite.norms import NORMS
from robustbench_lite.outcome import FINITE, NAN, SATURATED, UNKNOWN, UNSEEN, WRONG, ZERO, Outcome, Probed
from robustbench_lite.plugins import Attack
from robustbench_lite.problem import Access, Problem
from robustbench_lite.threat import Goal

VERSION = 1  # raised when what is probed changes
STEPS = 20  # of the unbounded attack
DRAWS = 10  # of random noise


@dataclass(frozen=True)
class _Ascent(Attack):
    """PGD from the clean input: a random start would hide that its gradients lead nowhere."""

    name: ClassVar[str] = "ascent"
    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf"})

    def __call__(self, problem: Problem) -> Tensor:
        threat, clean = problem.threat, problem.x
        length = customary_length(threat.eps, STEPS)
        x = ascend(lambda x: problem.gradient(x)[0], clean, clean, threat, STEPS, length)
        problem.labels(x)
        return x


@dataclass(frozen=True)
class _Shaking(Attack):
    """Random points of the ball."""

    name: ClassVar[str] = "shaking"
    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[str]] = frozenset(NORMS)

    def __call__(self, problem: Problem) -> Tensor:
        for draw in range(DRAWS):
            x = problem.threat.sample(problem.noise.at("shaking", draw), problem.x)
            problem.labels(x)
        return x


def probe(bench: Bench, x: Tensor, y: Tensor, rows: Tensor) -> Probed:
    """What inputs ``x`` (N, ...) with labels ``y`` show, attacked as ``bench`` has it (its target does not matter)."""
    began, count, noise = time.perf_counter(), len(x), Noise(bench.seed, rows)
    here = x.to(device_of(bench.model))
    with torch.no_grad():
        first, second = (ask(bench.model, here, bench.batch, noise=noise.at("probe")) for _ in range(2))
    scores = first[:, : bench.classes]
    low, high = scores.amin(1), scores.amax(1)
    moved = (second - first).abs().amax(1) / (high - low).clamp_min(torch.finfo(first.dtype).tiny)

    # The same probe, whatever the attacks do.
    bench = replace(bench, target=None, eot=None, precision="float32", asked=None)
    whole = replace(bench.threat, norm=NORMS["linf"], eps=bench.threat.upper - bench.threat.lower)
    clean, white = predicted(bench.model, first).cpu().numpy(), bench.known.access == "gradients"
    unbounded = replace(bench, threat=whole)
    return Probed(
        row=rows.numpy(),
        label=y.numpy(),
        clean=clean,
        again=predicted(bench.model, second).cpu().numpy(),
        moved=moved.double().cpu().numpy(),
        status=_attacked(unbounded, _Ascent(), x, y, rows).status
        if white
        else np.where(clean == y.numpy(), UNKNOWN, WRONG),
        noise=_attacked(bench, _Shaking(), x, y, rows).status,
        gradient=_gradients(bench, here, y.to(here.device), rows) if white else np.full(count, UNSEEN),
        low=low.double().cpu().numpy(),
        high=high.double().cpu().numpy(),
        seconds=np.full(count, (time.perf_counter() - began) / count),
        imaged=np.zeros(0, np.int64),
        images=np.zeros((0, *x.shape[1:]), np.float32),
    )


def _attacked(bench: Bench, attack: Attack, x: Tensor, y: Tensor, rows: Tensor) -> Outcome:
    return Outcome.join(bench.run(attack, x, y, rows))


def _gradients(bench: Bench, x: Tensor, y: Tensor, rows: Tensor) -> NDArray[np.str_]:
    """What kind of gradient an attack meets at each input; where none can be taken, ``zero``."""
    problem = bench.problem(x, Goal(y), bench.threat, Noise(bench.seed, rows), "gradients", minimises=True)
    try:
        slope, margin = (_largest(problem.gradient(x, loss)[0]) for loss in (Goal.cross_entropy, Goal.margin))
    except Exception:  # a model raises anything; an attack that asks for gradients meets the same
        return np.full(len(x), ZERO)
    flat = np.where((slope == 0) & (margin > 0), SATURATED, np.where(slope == 0, ZERO, FINITE))
    return np.where(np.isfinite(slope), flat, NAN)


def _largest(gradient: Tensor) -> NDArray[np.float32]:
    """The largest entry of each input's gradient; NaN where there is one."""
    largest: NDArray[np.float32] = gradient.flatten(1).abs().amax(1).cpu().numpy()
    return largest
