"""A model behind its defense, and how it is asked: the same answer whatever the batch."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, cast

import torch
from torch import Tensor, nn

from robustbench_lite.history import History
from robustbench_lite.kernels import ImageGradients
from robustbench_lite.noise import Noise

CACHED = 128  # rows that stay in the cache of a CPU: up to 1.5 times faster than twice as many
Access = Literal["labels", "scores", "gradients"]
LEVELS: tuple[Access, ...] = ("labels", "scores", "gradients")
ROUND = 16  # rows below which a batch is padded at least: with so few, kernels give other bits than with more


class Defended(nn.Module):
    """Images in the threat model's range to logits; normalisation is its own business.

    A defense that is not differentiable overrides :meth:`surrogate` as well as :meth:`forward`: attacks then see the
    value of the one and the gradient of the other (BPDA; Athalye, Carlini & Wagner, 2018, section 4.1). One that can
    refuse to answer overrides :meth:`rejection`. One that answers at random is ``stochastic``: it draws from ``noise``,
    its only source of chance; attacks that follow gradients average over ``draws`` (EOT; Athalye et al., 2018, section
    4.2), and as many vote on what the defense finally says.
    """

    stochastic: bool = False
    draws: int = 16
    least: int = ROUND  # rows below which a batch is padded, see :func:`steady`
    history: History = ()  # of its training

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        if isinstance(model, Defended) and model.stochastic:
            self.stochastic, self.draws = True, model.draws

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Logits, (B, C); of a stochastic defense those of one draw, which only ``noise``, of B rows, decides."""
        return self.within(x, noise)

    def within(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """What the model within says, (B, C), by way of its surrogate if it has one; of a model that answers with an
        object, its ``logits``."""
        answer = self.model.differentiable(x, noise) if isinstance(self.model, Defended) else self.model(x)
        return cast(Tensor, getattr(answer, "logits", answer))

    def surrogate(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """A differentiable stand-in; by default the defense itself."""
        return self.forward(x, noise)

    def differentiable(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """The value of :meth:`forward` with the gradient of :meth:`surrogate`."""
        value = self.forward(x, noise)
        if type(self).surrogate is Defended.surrogate or not torch.is_grad_enabled():
            return value
        return straight_through(value, self.surrogate(x, noise))

    def rejection(self, x: Tensor, noise: Noise | None = None) -> Tensor | None:
        """A detector's score, (B,), above 0 where the input is rejected, differentiable by way of a surrogate; by
        default that of the model within, if it has one."""
        return self.model.rejection(x, noise) if isinstance(self.model, Defended) else None

    @property
    def threshold(self) -> float | None:
        """Above what a detector's statistic is rejected, for the tables; None where there is no detector."""
        if type(self).rejection is not Defended.rejection:
            return 0.0
        return self.model.threshold if isinstance(self.model, Defended) else None

    @property
    def access(self) -> Access:
        """What can be seen of it: everything, unless there is a black box within."""
        return self.model.access if isinstance(self.model, Defended) else "gradients"

    @property
    def detects(self) -> bool:
        """Whether there is a detector."""
        return self.threshold is not None

    def answer(self, x: Tensor, differentiable: bool = False, noise: Noise | None = None) -> Tensor:
        """Logits, (B, C); with a detector (B, C + 1), the last of "rejected": the largest logit plus the score."""
        logits = self.differentiable(x, noise) if differentiable else self.forward(x, noise)
        score = self.rejection(x, noise)
        return logits if score is None else torch.cat([logits, (logits.amax(1) + score).unsqueeze(1)], 1)


def straight_through(value: Tensor, stand_in: Tensor) -> Tensor:
    """``value``, not a bit of it changed, with the gradient of ``stand_in``."""
    return value.detach() + (stand_in - stand_in.detach())


Precision = Literal["float32", "bf16"]
Sources = Callable[[str], Defended]  # a defended model by its spec, as madry:eps=0.3@mlp


def no_sources(spec: str) -> Defended:
    """The sources of one who gave none.

    Raises:
        ValueError: always; says what to give.
    """
    raise ValueError(f"nothing says which model {spec!r} is; give sources, such as robustbench_lite.load_defense")


def ask(
    model: Defended,
    x: Tensor,
    batch: int,
    differentiable: bool = False,
    noise: Noise | None = None,
    precision: Precision = "float32",
) -> Tensor:
    """What the model answers to any number of inputs, sent in even pieces of about ``batch`` rows, padded to
    ``model.least``: logits, or those and one of "rejected", see :meth:`Defended.answer`. A stochastic model draws from
    ``noise``, of as many rows."""
    kernels = ImageGradients() if differentiable and precision == "float32" else nullcontext()
    limit = min(batch, CACHED) if x.device.type == "cpu" else batch
    even = math.ceil(len(x) / max(1, math.ceil(len(x) / limit)) / ROUND) * ROUND
    if model.stochastic and noise is None:
        raise ValueError("the model answers at random; say from which noise")
    noise = noise if model.stochastic else None
    size, answers = max(ROUND, min(even, limit - limit % ROUND)), []
    for start, piece in enumerate(x.split(size)):
        missing = max(0, model.least - len(piece)) if len(piece) else 0
        drawn = noise and noise[start * size : (start + 1) * size].padded(missing)
        # A copy even where nothing is missing: a model that works in place must not change what is judged.
        filling = [piece[-1:].detach().expand(missing, *piece.shape[1:])] if missing else []
        with kernels, computing_in(precision, x.device):
            answer = model.answer(torch.cat([piece, *filling]), differentiable, drawn)
        answer = answer[: len(piece)] if missing else answer
        answers.append(answer.to(x.dtype) if precision == "bf16" else answer)
    return answers[0] if len(answers) == 1 else torch.cat(answers)


@torch.no_grad()
def ask_finally(model: Defended, x: Tensor, batch: int, noise: Noise) -> Tensor:
    """What counts as the model's answers, as :func:`ask` has them; of a stochastic model the share of its draws that
    say each class, NaN where one of them says nothing.

    The draws depend on the seed and the row alone, not on the path of ``noise``: the same inputs get the same answers,
    whoever asks.
    """
    if not model.stochastic:
        return ask(model, x, batch)
    keyed, shares = Noise(noise.seed, noise.rows).at("vote"), []
    for draw in range(model.draws):
        answers = ask(model, x, batch, noise=keyed.at(draw))
        votes = nn.functional.one_hot(answers.argmax(1), answers.shape[1]).to(answers)
        shares.append(votes.where(answers.isfinite().all(1, keepdim=True), torch.nan))
    return torch.stack(shares).mean(0)


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Computes layers in that precision, where they are made for it."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def computing(threads: int) -> Iterator[None]:
    """Computes with so many threads of the CPU: other numbers add up in another order, and give other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def steady(model: Defended, x: Tensor, precision: Precision = "float32") -> int:
    """The fewest rows from which on the model's answers to ``x`` have the same bits whatever the batch.

    Matrix products add up in another order when they are split among threads; from how many rows on they no longer do
    depends on the layer, the library and the threads, so it is measured; not of a black box, where each row may cost.
    """
    if model.access != "gradients":
        return 1
    rows, noise = x[torch.arange(CACHED, device=x.device) % len(x)], Noise(0, torch.arange(CACHED))
    with torch.no_grad(), computing_in(precision, x.device):
        whole = model.answer(rows.clone(), noise=noise)

        def same(size: int) -> bool:
            """Whether pieces of so many rows get the answers that they get together; what is left over is not asked."""
            pieces = rows.split(size)[: CACHED // size]
            parts = [noise.over(part) for part in noise.rows.split(size)]
            answers = torch.cat([model.answer(piece.clone(), noise=part) for piece, part in zip(pieces, parts)])
            return torch.equal(answers, whole[: len(answers)])

        for least in (ROUND, 2 * ROUND, 4 * ROUND):
            if same(least) and same(least + 5):  # one a multiple of what a processor's registers hold, and one not
                return least
    return CACHED
