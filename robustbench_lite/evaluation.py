"""One attack against one defended model: the attack proposes, this module judges."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustbench_lite import registry
from robustbench_lite.defended import (
    LEVELS,
    Defended,
    Precision,
    Sources,
    ask,
    ask_finally,
    device_of,
    no_sources,
    steady,
)
from robustbench_lite.layout import Layout, channels_last
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import (
    BROKEN,
    CHUNK,
    ERROR,
    HELD,
    KEPT,
    REJECTED,
    SKIPPED,
    UNKNOWN,
    WRONG,
    Outcome,
    Unfinished,
)
from robustbench_lite.plugins import Attack, Certifier, Learner, crafted, learns
from robustbench_lite.problem import Access, Problem
from robustbench_lite.threat import Goal, ThreatModel
from robustbench_lite.wording import one_line, require_one_of

BATCH = 500  # inputs attacked at once, in whole chunks: fewer cost more Python, more are longer in coming
REASON = 200  # characters that a reason keeps
Target = int | Literal["next", "random", "least-likely"]


def evaluate(
    attack: Attack | str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel | str,
    *,
    seed: int = 0,
    target: Target | None = None,
    batch: int = BATCH,
    keep_all: bool = False,
    first_row: int = 0,
    adaptive: bool = True,
    sources: Sources = no_sources,
    eot: int | None = None,
    precision: Precision = "float32",
    layout: Layout = "as-built",
) -> Outcome:
    """Runs an attack, an object or a spec such as ``"pgd:steps=10"``, on a classifier and judges what it finds.

    ``model`` takes images ``x`` (N, ...) in the threat's pixel range to logits; ``y`` is (N,). The answer for an input
    depends on ``seed`` and on its row (``first_row`` is that of ``x[0]``), not on ``batch`` or on the other inputs.
    Unless ``adaptive``, the attack is blind: it is run on the model behind the last wrapper, and judged on the whole.
    ``sources`` is a function, such as ``load_defense``, from a spec to the model that an attack like ``transfer`` is
    crafted on. ``eot`` is over how many draws of a stochastic defense gradients are averaged (None: as the defense has
    it). ``precision`` is what the attack's queries are computed in, and ``layout`` how the model lies in memory for
    them, see :func:`channels_last`; what counts is always computed in float32, by the model as it is.

    Raises:
        ValueError: where a model's answers are no logits for these labels, the attack does not know the norm, or it
            wants a source that is not given.
    """
    require_one_of("precision", precision, Precision)
    require_one_of("layout", layout, Layout)
    attack = registry.make("attack", attack) if isinstance(attack, str) else attack
    threat = ThreatModel.parse(threat) if isinstance(threat, str) else threat
    require_norm("attack", attack, threat)
    if learns(attack) and attack.learned is None:
        raise ValueError(f"attack {attack.name} learns first: give fit_attack(attack, model, x_train, y_train, threat)")
    defended = model if isinstance(model, Defended) else Defended(model)
    require_access(attack, defended)
    if not adaptive and not isinstance(defended.model, Defended):
        raise ValueError("there is no wrapper that the attack could be blind to")
    with frozen(defended):
        classes = check(defended, x, y, threat, precision)
        sources = checked(sources, classes, x, y, threat, precision)
        if crafted(attack):
            sources(attack.source)  # what is wrong with it is the person's to know, and no result
        bench = Bench(defended, threat, classes, seed, target, batch, keep_all, adaptive, sources, eot, precision)
        if not adaptive:
            check(bench.known, x, y, threat, precision)
        bench = replace(bench, asked=laid_out(bench.known, layout, x, y, threat, precision))
        rows = torch.arange(first_row, first_row + len(x))
        pieces = zip(x.split(bench.stride), y.split(bench.stride), rows.split(bench.stride))
        outcome = Outcome.join([part for piece in pieces for part in bench.run(attack, *piece)])
    return outcome.within(threat.norm.limit(threat.eps, x)) if getattr(attack, "minimises", False) else outcome


def fit_attack(
    attack: Attack | str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel | str,
    *,
    seed: int = 0,
    target: Target | None = None,
    batch: int = BATCH,
) -> Attack:
    """The attack with what it learns about a classifier from training data, ready for :func:`evaluate`.

    Raises:
        ValueError: for an attack that learns nothing, and as :func:`evaluate` does.
    """
    attack = registry.make("attack", attack) if isinstance(attack, str) else attack
    threat = ThreatModel.parse(threat) if isinstance(threat, str) else threat
    require_norm("attack", attack, threat)
    if not learns(attack):
        raise ValueError(f"attack {attack.name} learns nothing; evaluate it as it is")
    defended = model if isinstance(model, Defended) else Defended(model)
    with frozen(defended):
        return Bench(defended, threat, check(defended, x, y, threat), seed, target, batch).fit(attack, x, y)


def require_norm(kind: registry.Kind, plugin: Attack | Certifier, threat: ThreatModel) -> None:
    if threat.norm.name not in plugin.norms:
        known = ", ".join(sorted(plugin.norms))
        raise ValueError(f"{kind} {plugin.name} does not run under {threat.norm.name}; it knows {known}")


def require_access(attack: Attack, model: Defended) -> None:
    if LEVELS.index(attack.access) > LEVELS.index(model.access):
        raise ValueError(f"attack {attack.name} needs the model's {attack.access}, not only {model.access}")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients of parameters; both as before afterwards."""
    training = [module for module in model.modules() if module.training]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in parameters:
            parameter.requires_grad_(True)


def check(model: Defended, x: Tensor, y: Tensor, threat: ThreatModel, precision: Precision = "float32") -> int:
    """How many classes the model knows, after a look at its answers to the first inputs; sets its ``least`` rows.

    Raises:
        ValueError: where the model raises, or its answers are not finite logits, (B, C), with C above every label.
    """
    if not len(x):
        raise ValueError("there are no inputs")
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise ValueError(
            f"labels must be {len(x)} whole numbers, one an input, not {y.dtype} of shape {tuple(y.shape)}"
        )
    if not bool(threat.inside(x).all()):
        raise ValueError(f"inputs must lie in [{threat.lower:g}, {threat.upper:g}]; scale them, or give --bounds")
    if int(y.min()) < 0:
        raise ValueError(f"labels out of range: {int(y.min())} is negative")
    sample = x[:32].to(device_of(model))
    try:
        with torch.no_grad():
            logits = ask(model, sample, 32, noise=Noise(0, torch.arange(len(sample))))
    except Unfinished as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        raise ValueError(f"the model raises on inputs of shape {tuple(sample.shape)}: {one_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(sample) or logits.shape[1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits of shape ({len(sample)}, classes), not {shape}")
    if not logits.isfinite().all():
        row = int((~logits.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"the model returns NaN or infinite logits, first for input {row}")
    logits = logits[:, : logits.shape[1] - model.detects]
    if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError("the model returns probabilities, not logits; remove the softmax, or say --probabilities")
    if int(y.max()) >= logits.shape[1]:
        raise ValueError(f"labels out of range: {int(y.max())}, but the model knows {logits.shape[1]} classes")
    model.least = max(steady(model, sample, one) for one in dict.fromkeys(("float32", precision)))
    return logits.shape[1]


def checked(
    sources: Sources, classes: int, x: Tensor, y: Tensor, threat: ThreatModel, precision: Precision = "float32"
) -> Sources:
    """The same sources, each made once, looked at as the attacked model is, and in eval mode.

    Raises:
        ValueError: where one's answers are no logits for these labels, or for other ``classes``; when it is asked for.
    """

    @cache
    def source(spec: str) -> Defended:
        model: nn.Module = sources(spec)
        defended = (model if isinstance(model, Defended) else Defended(model)).eval()
        try:
            known = check(defended, x, y, threat, precision)
        except ValueError as error:
            raise ValueError(f"source {spec}: {error}") from error
        if known != classes:
            raise ValueError(f"source {spec} knows {known} classes, but the model that is attacked {classes}")
        return defended

    return source


def laid_out(
    model: Defended, layout: Layout, x: Tensor, y: Tensor, threat: ThreatModel, precision: Precision
) -> Defended | None:
    """A copy of that ``layout``, looked at as the model is; None for the model as it was built.

    Raises:
        ValueError: as :func:`channels_last` does.
    """
    if layout == "as-built":
        return None
    laid = channels_last(model, x[:32].to(device_of(model)))
    check(laid, x, y, threat, precision)
    return laid


def predicted(model: Defended, answers: Tensor) -> Tensor:
    """The labels that a model's answers say, (B,); ``REJECTED`` where its detector does."""
    label = answers.argmax(1)
    return torch.where(label == answers.shape[1] - 1, REJECTED, label) if model.detects else label


def share_right(model: Defended, answers: Tensor, y: Tensor) -> Tensor:
    """The share of final ``answers`` that are labels ``y``, (B,) float64; of a model that answers once, 0 or 1."""
    if not model.stochastic:
        return (predicted(model, answers) == y).double()
    return answers.gather(1, y.unsqueeze(1))[:, 0].double()


def predict(model: Defended, x: Tensor, noise: Noise, batch: int) -> Tensor:
    """The final answers to clean inputs, see :func:`ask_finally`.

    Raises:
        ValueError: where they are not finite.
    """
    logits = ask_finally(model, x, batch, noise)
    if not logits.isfinite().all():
        row = int(noise.rows[(~logits.isfinite().all(1)).nonzero()[0, 0].cpu()])
        raise ValueError(f"the model returns NaN or infinite logits for input {row}")
    return logits


Proposal = tuple[Tensor, Tensor]  # points, and which of them lie within the threat model


@dataclass
class Verdict:
    """What the model says of proposed points: the ``label``, -1 where it says nothing, for which ``why`` is the reason,
    and which ``hit``; of several hits the nearest. ``share`` is that of right answers at the point."""

    label: Tensor
    hit: Tensor
    distance: Tensor
    share: Tensor
    points: Tensor
    why: str = "the model answered the attack with NaN or infinite logits"

    @classmethod
    def none(cls, x: Tensor) -> Verdict:
        """Before anything was proposed for inputs ``x``."""
        label = torch.full((len(x),), -1, device=x.device)
        distance, share = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
        return cls(label, torch.zeros_like(label, dtype=torch.bool), distance, share, x.clone())


@dataclass
class Room:
    """How many inputs at once fit in the device's memory, as far as is known."""

    inputs: int = sys.maxsize


@dataclass(frozen=True)
class Bench:
    """A defended model set up to be attacked, piece by piece; unless ``adaptive`` by one who is blind to its last
    wrapper."""

    model: Defended
    threat: ThreatModel
    classes: int
    seed: int = 0
    target: Target | None = None
    batch: int = BATCH
    keep_all: bool = False
    adaptive: bool = True
    sources: Sources = no_sources
    eot: int | None = None
    precision: Precision = "float32"
    asked: Defended | None = None  # answers the attack's queries in place of the model that it is run on
    room: Room = field(default_factory=Room, compare=False)

    @property
    def known(self) -> Defended:
        """The model that the attack is run on."""
        return self.model if self.adaptive else cast(Defended, self.model.model)

    @property
    def stride(self) -> int:
        """How many inputs are attacked at once: as many whole chunks as fit a batch."""
        return max(1, self.batch // CHUNK) * CHUNK

    def fit(self, attack: Learner, x: Tensor, y: Tensor) -> Learner:
        """The attack with what it learns from as many keyed inputs of ``x`` as it asks for."""
        every = Noise(self.seed, torch.zeros(1, dtype=torch.int64)).at("fit", "images")
        rows = every.permutation(torch.empty(1, len(x)))[0, : attack.images]
        device = device_of(self.model)
        x, y = x[rows].to(device), y[rows].to(device)
        noise = Noise(self.seed, rows).at("fit")
        goal = self._goal(ask_finally(self.known, x, self.batch, noise), y, rows)
        return attack.fit(self.problem(x, goal, self.threat, noise, attack.access, minimises=True))

    def problem(
        self, x: Tensor, goal: Goal, threat: ThreatModel, noise: Noise, access: Access, minimises: bool
    ) -> Problem:
        """What an attack meets."""
        return Problem(
            self.asked or self.known,
            x,
            goal,
            threat,
            noise,
            classes=self.classes,
            access=access,
            minimises=minimises,
            batch=self.batch,
            sources=self.sources,
            eot=self.eot,
            precision=self.precision,
            judge=self.known,
        )

    def run(self, attack: Attack, x: Tensor, y: Tensor, rows: Tensor) -> list[Outcome]:
        """Attacks inputs at once; after an error chunk by chunk, so that one bad input costs its own chunk only, and in
        pieces half as large, from then on, where they do not fit in the device's memory."""
        if len(rows) > self.room.inputs:
            return self._piecewise(self.room.inputs, attack, x, y, rows)
        try:
            outcome = self._run(attack, x, y, rows)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            outcome = None  # tried again outside, where the error no longer keeps what filled the memory
        except Unfinished as error:  # of a black box
            outcome = _unanswered(x, y, rows, f"{ERROR}{one_line(error)}"[:REASON])
        if outcome is None:
            torch.cuda.empty_cache()  # does nothing where there is no such device
            self.room.inputs = (len(rows) + 1) // 2
            return self.run(attack, x, y, rows)
        if len(rows) > CHUNK and any(reason.startswith(ERROR) for reason in outcome.reason):
            return self._piecewise(CHUNK, attack, x, y, rows)
        return [outcome]

    def _piecewise(self, size: int, attack: Attack, x: Tensor, y: Tensor, rows: Tensor) -> list[Outcome]:
        pieces = zip(x.split(size), y.split(size), rows.split(size))
        return [outcome for piece in pieces for outcome in self.run(attack, *piece)]

    def _run(self, attack: Attack, x: Tensor, y: Tensor, rows: Tensor) -> Outcome:
        began, count = time.perf_counter(), len(x)
        device = device_of(self.model)
        x, y = x.to(device), y.to(device)
        answers = predict(self.model, x, Noise(self.seed, rows), self.batch)
        clean = predicted(self.model, answers)
        goal, right = self._goal(answers, y, rows), clean == y
        skipped = right & (goal.labels == y) if goal.targeted else torch.zeros_like(right)
        attacked = right & ~skipped
        columns: dict[str, Any] = {
            "row": rows.numpy(),
            "label": y.cpu().numpy(),
            "clean": clean.cpu().numpy(),
            "adversarial": np.full(count, -1),
            "status": np.where(right.cpu().numpy(), np.where(skipped.cpu().numpy(), SKIPPED, UNKNOWN), WRONG),
            "reason": np.full(count, "", dtype=f"U{REASON}"),
            "distance": np.full(count, np.nan),
            "share": share_right(self.model, answers, y).cpu().numpy(),
            "forwards": np.zeros(count, np.int64),
            "backwards": np.zeros(count, np.int64),
        }
        points = x.clone()
        if attacked.any():
            judged = self._attack(attack, x[attacked], goal[attacked], y[attacked], rows[attacked.cpu()])
            points[attacked] = judged.pop("points")
            for name, values in judged.items():
                columns[name][attacked.cpu().numpy()] = values
        broken = np.flatnonzero(columns["status"] == BROKEN)
        imaged = broken if self.keep_all else _first_of_each_chunk(broken, columns["row"])
        return Outcome(
            **columns,
            seconds=np.full(count, (time.perf_counter() - began) / count),
            imaged=columns["row"][imaged],
            images=points[torch.from_numpy(imaged)].float().cpu().numpy(),
        )

    def _goal(self, answers: Tensor, y: Tensor, rows: Tensor) -> Goal:
        if self.target is None:
            return Goal(y)
        if self.target == "next":
            return Goal((y + 1) % self.classes, targeted=True)
        if self.target == "least-likely":
            return Goal(answers[:, : self.classes].argmin(1), targeted=True)
        if self.target == "random":
            ahead = 1 + Noise(self.seed, rows).at("target").integers(self.classes - 1, y.unsqueeze(1))[:, 0]
            return Goal((y + ahead) % self.classes, targeted=True)
        if not isinstance(self.target, int):
            raise ValueError(f"no target {self.target!r}; there are: a class's number, next, random, least-likely")
        if not 0 <= self.target < self.classes:
            raise ValueError(f"target {self.target} is no class; the model knows 0 to {self.classes - 1}")
        return Goal(torch.full_like(y, self.target), targeted=True)

    def _attack(self, attack: Attack, x: Tensor, goal: Goal, y: Tensor, rows: Tensor) -> dict[str, Any]:
        """Lets the attack propose, and judges; columns of the attacked inputs, and the ``points`` that were judged."""
        minimises = getattr(attack, "minimises", False)
        threat = replace(self.threat, eps=float("inf")) if minimises else self.threat
        noise = Noise(self.seed, rows)
        problem = self.problem(x, goal, threat, noise, attack.access, minimises)
        candidates, failure = _propose(attack, problem, x)
        near = problem.distance.isfinite() & (problem.distance <= threat.reach(x))
        admissible = threat.allows(candidates, x)
        reason = np.array([failure or given_up for given_up in problem.reasons], dtype=f"U{REASON}")
        reason[(reason == "") & ~admissible.cpu().numpy()] = "the attack returned a point outside the threat model"
        found = near.cpu().numpy()
        reason[found] = "what the attack found did not hold when the model was asked again" if self.adaptive else ""

        verdict = self._judge(x, goal, y, noise, threat, ((candidates, admissible), (problem.best, near)))
        label, broken = verdict.label.cpu().numpy(), verdict.hit.cpu().numpy()
        reason[(reason == "") & (label == -1)] = verdict.why
        reason[broken] = failure if minimises else ""  # had it gone on, it might have come nearer
        return {
            "status": np.where(broken, BROKEN, np.where(reason == "", HELD, UNKNOWN)),
            "reason": reason,
            "adversarial": label,
            "distance": np.where(broken | (label == REJECTED), verdict.distance.cpu().numpy(), np.nan),
            "share": verdict.share.cpu().numpy(),
            "forwards": problem.forwards.cpu().numpy(),
            "backwards": problem.backwards.cpu().numpy(),
            "points": verdict.points,
        }

    def _judge(
        self, x: Tensor, goal: Goal, y: Tensor, noise: Noise, threat: ThreatModel, proposals: Iterable[Proposal]
    ) -> Verdict:
        """Asks the model about what is proposed, as it finally answers."""
        verdict = Verdict.none(x)
        for proposed, valid in proposals:
            which = valid.nonzero()[:, 0]
            if not len(which):
                continue
            points, meant = threat.project_strictly(proposed[which], x[which]), goal[which]
            try:
                answers = ask_finally(self.model, points, self.batch, noise[which])
            except (Unfinished, torch.OutOfMemoryError):
                raise
            except Exception as error:  # what a model raises at an attack's point is a result, as its NaN is
                verdict.why = f"{ERROR}the model raised: {one_line(error)}"[:REASON]
                answers = x.new_full((len(which), self.classes), torch.nan)
            met, distance = meant.met(meant.seen(answers, self.classes)), threat.norm.size(points.double() - x[which])
            better = met & ~(verdict.hit[which] & (distance >= verdict.distance[which]))
            first = better | ((verdict.label[which] == -1) & answers.isfinite().all(1))
            said, held = which[first], share_right(self.model, answers, y[which])
            verdict.label[said], verdict.distance[said] = predicted(self.model, answers)[first], distance[first]
            verdict.share[said] = held[first]
            verdict.points[which[better]], verdict.hit[which[better]] = points[better], True
        return verdict


def _propose(attack: Attack, problem: Problem, x: Tensor) -> tuple[Tensor, str]:
    """What the attack returns, or NaN and what went wrong: an attack's failure is a result, not ours to raise."""
    nothing = torch.full_like(x, torch.nan)
    try:
        candidates = attack(problem)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) and len(x) > 1:
            raise
        return nothing, f"{ERROR}{one_line(error)}"[:REASON]
    if not isinstance(candidates, Tensor) or candidates.shape != x.shape:
        shape = tuple(candidates.shape) if isinstance(candidates, Tensor) else type(candidates).__name__
        return nothing, f"{ERROR}the attack returned {shape} for a batch of {tuple(x.shape)}"
    return candidates.detach().to(x), ""


def _unanswered(x: Tensor, y: Tensor, rows: Tensor, reason: str) -> Outcome:
    """Inputs of which not even the label that the model gives them is known."""
    count = len(rows)
    return Outcome(
        row=rows.numpy(),
        label=y.cpu().numpy(),
        clean=np.full(count, -1),
        adversarial=np.full(count, -1),
        status=np.full(count, UNKNOWN),
        reason=np.full(count, reason, dtype=f"U{REASON}"),
        distance=np.full(count, np.nan),
        share=np.zeros(count),
        forwards=np.zeros(count, np.int64),
        backwards=np.zeros(count, np.int64),
        seconds=np.zeros(count),
        imaged=np.zeros(0, np.int64),
        images=np.zeros((0, *x.shape[1:]), np.float32),
    )


def _first_of_each_chunk(broken: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first few of ``broken`` (positions) in every chunk."""
    chunk = row[broken] // CHUNK
    rank = np.arange(len(broken)) - np.searchsorted(chunk, chunk)
    return broken[rank < KEPT]
