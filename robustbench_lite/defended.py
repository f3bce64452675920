"""A model behind its defense, and how it is asked: the same answer whatever the batch."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from robustbench_lite.kernels import ImageGradients
from robustbench_lite.noise import Noise

CACHED = 256  # rows that stay in a CPU's cache; measured 1.05 to 1.35 times faster than larger pieces
ROUND = 16  # rows below which a batch is padded at least: with so few, kernels give other bits than with more


class Defended(nn.Module):
    """Images in the threat model's range to logits; normalisation is its own business.

    A defense that is not differentiable overrides :meth:`surrogate` as well as :meth:`forward`: attacks then see the
    value of the one and the gradient of the other (BPDA; Athalye, Carlini & Wagner, 2018, section 4.1).
    """

    least: int = ROUND  # rows below which a batch is padded, see :func:`steady`

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Logits, (B, C)."""
        logits: Tensor = self.model(x)
        return logits

    def surrogate(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """A differentiable stand-in; by default the defense itself."""
        return self.forward(x, noise)

    def differentiable(self, x: Tensor) -> Tensor:
        """The value of :meth:`forward` with the gradient of :meth:`surrogate`."""
        if type(self).surrogate is Defended.surrogate:
            return self.forward(x)
        stand_in = self.surrogate(x)
        return self.forward(x).detach() + (stand_in - stand_in.detach())  # adds 0: not a bit of the value changes


Sources = Callable[[str], Defended]  # a defended model by its spec, as madry:eps=0.3@mlp


def no_sources(spec: str) -> Defended:
    """The sources of one who gave none.

    Raises:
        ValueError: always; says what to give.
    """
    raise ValueError(f"nothing says which model {spec!r} is; give sources, such as robustbench_lite.load_defense")


def ask(model: Defended, x: Tensor, batch: int, differentiable: bool = False) -> Tensor:
    """Logits of any number of inputs, sent in even pieces of about ``batch`` rows, padded to ``model.least``."""
    call = model.differentiable if differentiable else model.forward
    kernels = ImageGradients() if differentiable else nullcontext()
    limit = min(batch, CACHED) if x.device.type == "cpu" else batch
    even = math.ceil(len(x) / max(1, math.ceil(len(x) / limit)) / ROUND) * ROUND
    answers = []
    for piece in x.split(max(ROUND, min(even, limit - limit % ROUND))):
        missing = max(0, model.least - len(piece)) if len(piece) else 0
        # A copy even where nothing is missing: a model that works in place must not change what is judged.
        padded = torch.cat([piece, piece[-1:].detach().expand(missing, *piece.shape[1:])])
        with kernels:
            answers.append(call(padded)[: len(piece)])
    return answers[0] if len(answers) == 1 else torch.cat(answers)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def steady(model: Defended, x: Tensor) -> int:
    """The fewest rows from which on the model's answers to ``x`` have the same bits whatever the batch.

    Matrix products add up in another order when they are split among threads; from how many rows on they no longer do
    depends on the layer, the library and the threads, so it is measured.
    """
    rows = x[torch.arange(CACHED, device=x.device) % len(x)]
    with torch.no_grad():
        whole = model.forward(rows.clone())

        def same(size: int) -> bool:
            """Whether pieces of so many rows get the answers that they get together; what is left over is not asked."""
            pieces = rows.split(size)[: CACHED // size]
            answers = torch.cat([model.forward(piece.clone()) for piece in pieces])
            return torch.equal(answers, whole[: len(answers)])

        for least in (ROUND, 2 * ROUND, 4 * ROUND, 8 * ROUND):
            if same(least) and same(least + 5):  # one a multiple of what a processor's registers hold, and one not
                return least
    return CACHED
