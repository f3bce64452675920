"""The only door from an attack to a model: it counts what is asked and keeps the best answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustbench_lite.defended import LEVELS, Defended, Precision, Sources, ask, ask_finally, no_sources
from robustbench_lite.defended import Access as Access
from robustbench_lite.noise import Noise
from robustbench_lite.norms import by_row
from robustbench_lite.threat import Goal, ThreatModel

LEAVE = 10  # queries from one at which solved inputs leave to the next, where to look is to wait


class AccessError(ValueError):
    """An attack asked for more than it declared."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How many forwards an input may cost; a spent input is closed and its further queries answer NaN."""

    forwards: int | None = None


class Ledger:
    """What each input has cost, and the nearest adversarial in the pixel range that was seen, at any distance."""

    def __init__(self, x: Tensor) -> None:
        self.best = x.clone()
        self.distance = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        self.forwards = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.backwards = torch.zeros_like(self.forwards)
        self.given_up = torch.zeros_like(self.forwards, dtype=torch.bool)
        self.reasons = [""] * len(x)


class Problem:
    """A batch to attack: ``x`` (B, ...) in the pixel range, the ``goal``, the ``threat``, keyed ``noise``.

    Only inputs that are open are sent to the model, charged and remembered: nothing found within eps yet (unless the
    attack ``minimises``), not given up and budget left. The others answer NaN, and their gradient is 0.
    Of a model with a detector an attack sees what :meth:`Goal.seen` makes of its answers. A stochastic one draws anew
    for each query; one under access "gradients" that is differentiable is the mean probability of ``eot`` draws
    (expectation over transformation; Athalye et al., 2018, section 4.2), each charged. What a query hits there, in a
    ``precision`` below float32, or where another ``judge`` than ``model`` says what counts, counts only if
    :func:`ask_finally` agrees, which is charged to nobody.
    """

    def __init__(
        self,
        model: Defended,
        x: Tensor,
        goal: Goal,
        threat: ThreatModel,
        noise: Noise,
        *,
        classes: int,
        access: Access = "gradients",
        budget: Budget = Budget(),
        minimises: bool = False,
        batch: int = 256,
        sources: Sources = no_sources,
        eot: int | None = None,
        precision: Precision = "float32",
        judge: Defended | None = None,
    ) -> None:
        self.x, self.goal, self.threat, self.noise = x.clone(), Goal(goal.labels.clone(), goal.targeted), threat, noise
        self.classes, self._access, self._budget, self._minimises = classes, access, budget, minimises
        self._model, self._batch, self._sources = model, batch, sources
        self._eot = (eot or model.draws) if model.stochastic else 1
        self._clean, self._goal, self._threat = x, goal, threat  # an attack may spoil its own copy, not these
        self._noise, self._precision = noise, precision
        self._judge = judge or model
        self._provisional = model.stochastic or precision != "float32" or self._judge is not model
        metered = budget.forwards is not None or model.access != "gradients"
        self._looks = metered or self._provisional or not waits(x.device)  # at masks, to see where they hold
        self._ledger, self._rows = Ledger(x), torch.arange(len(x), device=x.device)
        self._queries, self._going = 0, self._rows

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, mask: Tensor) -> Problem:
        """The same problem, on the same ledger, for fewer inputs: ``mask`` is (B,) bool, or distinct positions."""
        part = object.__new__(Problem)
        part.__dict__.update(self.__dict__)
        part.x, part.goal, part.noise = self.x[mask], self.goal[mask], self.noise[mask]
        part._clean, part._goal, part._rows = self._clean[mask], self._goal[mask], self._rows[mask]
        part._noise, part._queries = self._noise[mask], 0
        return part

    def unclosed(self) -> Problem:
        """The same problem, on the same ledger, where inputs that are solved stay open and are charged: for an attack
        that cannot bear a NaN."""
        part = self[torch.arange(len(self), device=self.x.device)]
        part._minimises = True
        return part

    def on(self, source: str, access: Access) -> Problem:
        """The same inputs, goal, threat and noise on another model, with a ledger of its own where no input closes:
        what is asked there is no query of the model that is attacked."""
        return Problem(
            self._sources(source),
            self._clean,
            self._goal,
            self._threat,
            self.noise,
            classes=self.classes,
            access=access,
            minimises=True,
            batch=self._batch,
            precision=self._precision,
        )

    @property
    def open(self) -> Tensor:
        """Which inputs an attack should still work on: (B,) bool."""
        is_open = ~self._ledger.given_up[self._rows]
        if not self._minimises:
            is_open = is_open & (self._ledger.distance[self._rows] > self._threat.reach(self._clean))
        if self._budget.forwards is not None:
            cost = self._eot if self._access == "gradients" else 1
            is_open = is_open & (self._ledger.forwards[self._rows] + cost <= self._budget.forwards)
        return is_open

    @property
    def best(self) -> Tensor:
        """The nearest adversarial seen of each input, (B, ...); the clean input where there is none."""
        return self._ledger.best[self._rows]

    @property
    def distance(self) -> Tensor:
        """How far :attr:`best` lies from the clean input, (B,); infinite where there is none."""
        return self._ledger.distance[self._rows]

    @property
    def forwards(self) -> Tensor:
        """What each input has cost so far, in forwards: (B,)."""
        return self._ledger.forwards[self._rows]

    @property
    def backwards(self) -> Tensor:
        """What each input has cost so far, in backwards: (B,)."""
        return self._ledger.backwards[self._rows]

    @property
    def reasons(self) -> list[str]:
        """Why each input was given up; empty where it was not."""
        return [self._ledger.reasons[row] for row in self._rows.tolist()]

    def give_up(self, mask: Tensor, reason: str) -> None:
        """Closes the inputs of ``mask`` (B,) bool; ``reason`` says why it stays unknown whether they hold."""
        rows = self._rows[mask]
        self._ledger.given_up[rows] = True
        for row in rows.tolist():
            self._ledger.reasons[row] = reason

    def labels(self, x: Tensor) -> Tensor:
        """Labels of ``x`` (B, ...), or of K candidates an input (B, K, ...): (B,) or (B, K), -1 for closed inputs."""
        logits = self._ask(x, differentiable=False)
        return torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)

    def logits(self, x: Tensor) -> Tensor:
        """Logits, (B, C) or (B, K, C); differentiable under access "gradients", where each backward is counted."""
        self._need("scores")
        return self._ask(x, differentiable=self._access == "gradients" and x.requires_grad)

    def gradient(self, x: Tensor, loss: Callable[[Goal, Tensor], Tensor] = Goal.cross_entropy) -> tuple[Tensor, Tensor]:
        """Gradient of ``loss`` at ``x`` (B, ...), and the logits (B, C), from one forward and one backward."""
        self._need("gradients")
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = self._ask(x, differentiable=True)
            (gradient,) = torch.autograd.grad(loss(self.goal, logits).sum(), x)
        return gradient, logits.detach()

    def _need(self, level: Access) -> None:
        if LEVELS.index(self._access) < LEVELS.index(level):
            raise AccessError(f"the attack asked for {level}, but declares access to {self._access} only")

    def _ask(self, x: Tensor, differentiable: bool) -> Tensor:
        alone = x.dim() == self._clean.dim()
        candidates = x.unsqueeze(1) if alone else x
        if candidates.shape != (len(self), candidates.shape[1], *self._clean.shape[1:]):
            raise ValueError(f"asked about inputs of shape {tuple(x.shape)} in a batch of {tuple(self._clean.shape)}")
        draws = self._eot if differentiable else 1
        sent = self._sendable(candidates.shape[1], draws)
        chosen = self._chosen(sent)
        flat, everything, owners = candidates.flatten(0, 1), len(chosen) == sent.numel(), chosen // sent.shape[1]
        counts = sent.flatten()[chosen]
        if not everything:
            flat = flat.index_select(0, chosen)
        noise = self._fresh(sent, draws) if self._model.stochastic else None
        self._ledger.forwards[self._rows] += draws * sent.sum(1)
        if not len(flat):
            answers = flat.flatten(1)[:, :1].expand(0, self.classes)  # still on the graph of x
        elif differentiable:
            each = flat if draws == 1 else flat.repeat_interleave(draws, 0)
            charged = self._rows[owners], counts.long()
            counted = _Counted.apply(each, self._ledger.backwards, *(of.repeat_interleave(draws) for of in charged))
            answers = ask(self._model, counted, self._batch, True, noise, self._precision)
            answers = self._seen(_mean(answers, draws), owners)
        else:
            with torch.no_grad():
                answers = self._seen(ask(self._model, flat, self._batch, False, noise, self._precision), owners)
        if not self._looks:
            answers = answers.where(counts.unsqueeze(1), torch.nan)
        self._remember(flat.detach(), answers.detach(), owners)
        if not everything:
            answers = answers.new_full((sent.numel(), self.classes), torch.nan).index_copy(0, chosen, answers)
        return answers if alone else answers.view(*sent.shape, self.classes)

    def _seen(self, answers: Tensor, owners: Tensor) -> Tensor:
        """The logits that an attack sees, (N, C), of inputs that belong to ``owners``."""
        return self._meant(owners).seen(answers, self.classes)

    def _fresh(self, sent: Tensor, draws: int) -> Noise:
        """A stream of its own for each draw of each candidate that is ``sent``: keyed by the input and by how many
        queries it has cost, not by who else is asked about."""
        number = self._ledger.forwards[self._rows].unsqueeze(1) + draws * (sent.cumsum(1) - 1)
        number = (number[sent].unsqueeze(1) + torch.arange(draws, device=sent.device)).flatten().cpu()
        owners = sent.nonzero()[:, 0].repeat_interleave(draws)
        rows = self._noise[owners].rows
        return Noise(self._noise.seed, rows + (number << 32)).at("query")

    def _sendable(self, count: int, draws: int) -> Tensor:
        """Which of ``count`` candidates an input are sent: (B, count) bool."""
        sent = self.open.unsqueeze(1).expand(-1, count)
        if self._budget.forwards is not None:
            left = self._budget.forwards - self._ledger.forwards[self._rows]
            sent = sent & (draws * torch.arange(1, count + 1, device=left.device) <= left.unsqueeze(1))
        return sent

    def _chosen(self, sent: Tensor) -> Tensor:
        """Positions of the candidates that go to the model: those that are ``sent``, or, so that not every step waits
        for the device, those that were a few queries ago, of which some have been solved since."""
        if self._looks or sent.shape[1] > 1:
            return sent.flatten().nonzero()[:, 0]
        if self._queries % LEAVE == 0:
            self._going = sent.flatten().nonzero()[:, 0]
        self._queries += 1
        return self._going

    def _those(self, mask: Tensor) -> Tensor:
        """The positions where ``mask`` holds; all positions where to look is to wait."""
        return mask.nonzero()[:, 0] if self._looks else torch.arange(len(mask), device=mask.device)

    def _remember(self, x: Tensor, logits: Tensor, owners: Tensor) -> None:
        """Keeps the nearest hit of each input, if it is nearer than what the ledger has."""
        hit = self._meant(owners).met(logits)
        some = self._those(hit)
        if not len(some):
            return
        x, owners, known = x[some], owners[some], self._ledger.distance[self._rows]
        size = self._threat.norm.size(x - self._clean[owners])
        nearer = hit[some] & (size < known[owners]) & self._threat.inside(x, slack=1e-5)
        if self._provisional:
            nearer = nearer & self._agreed(x, owners, nearer)
        size = size.where(nearer, torch.inf)
        best = nearer & (size == known.scatter_reduce(0, owners, size, "amin")[owners])
        none = len(some)
        order = torch.arange(none, device=x.device).where(best, none)
        first = torch.full_like(self._rows, none).scatter_reduce(0, owners, order, "amin")
        found = self._those(first < none)
        rows, first = self._rows[found], first[found]
        better, first = first < none, first.clamp_max(none - 1)
        self._ledger.best[rows] = x[first].where(by_row(better, x), self._ledger.best[rows])
        self._ledger.distance[rows] = size[first].where(better, self._ledger.distance[rows])

    def _agreed(self, x: Tensor, owners: Tensor, asked: Tensor) -> Tensor:
        """Which of ``x`` hold when those that are ``asked`` about are judged: (N,) bool."""
        agreed, those = torch.zeros_like(asked), asked.nonzero()[:, 0]
        if len(those):
            answers = ask_finally(self._judge, x[those], self._batch, self._noise[owners[those]])
            agreed[those] = self._meant(owners[those]).met(self._seen(answers, owners[those]))
        return agreed

    def _meant(self, owners: Tensor) -> Goal:
        """The goal of inputs that belong to ``owners``."""
        return Goal(self._goal.labels[owners], self._goal.targeted)


def waits(device: torch.device) -> bool:
    """Whether to look at what a tensor holds is to wait for everything that a device was asked to compute."""
    return device.type != "cpu"


def _mean(answers: Tensor, draws: int) -> Tensor:
    """Logits of the mean probabilities of ``draws`` answers an input, (N, C)."""
    if draws == 1:
        return answers
    probabilities = answers.view(-1, draws, answers.shape[1]).log_softmax(2)
    return probabilities.logsumexp(1) - math.log(draws)


class _Counted(torch.autograd.Function):
    """The identity; each backward through it is charged, so many times each, to the rows that it carries."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backwards: Tensor, rows: Tensor, times: Tensor) -> Tensor:
        ctx.backwards, ctx.rows, ctx.times = backwards, rows, times
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.backwards.index_add_(0, ctx.rows, ctx.times)
        return grads[0], None, None, None
