"""The loop in which every recipe trains: keyed batches, one schedule, checkpoints that resume to the same weights."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.data import Images
from robustbench_lite.defended import Sources
from robustbench_lite.noise import Noise


@dataclass(frozen=True)
class Progress:
    """Where a training stands: means over the epoch so far; ``accuracy`` is on the inputs that it trained on."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float


def _silent(progress: Progress) -> None:
    pass


@dataclass(frozen=True)
class Lab:
    """What a defense is handed to work with."""

    images: Callable[[], Images]  # the training split; read when first asked for
    noise: Noise
    sources: Sources  # defended models, frozen and in eval mode
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    checkpoint: Path | None = None
    report: Callable[[Progress], None] = _silent

    @property
    def data(self) -> Images:
        return self.images()


class Loss(Protocol):
    """What a recipe minimises."""

    def __call__(self, x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
        """Mean loss of a batch, and the logits that it trained on; ``epoch`` counts from 0 in fractions."""


def fit(model: nn.Module, lab: Lab, loss: Loss, *, epochs: int, batch: int = 128, rate: float = 1e-3) -> None:
    """Minimises ``loss`` with Adam (Kingma & Ba, 2015) under a cosine schedule; leaves the model in eval mode.

    After every epoch the state goes to ``lab.checkpoint``, from where a training that was killed goes on.

    Raises:
        ValueError: when the loss is no longer finite; names the step and what to lower.
    """
    if epochs < 1 or batch < 1 or not rate > 0:
        raise ValueError(f"epochs and batch must be 1 or more and rate above 0, not {epochs}, {batch} and {rate:g}")
    model.to(lab.device).train()
    optimiser = torch.optim.Adam(model.parameters(), rate)
    x, y = lab.data.x, lab.data.y
    count = math.ceil(len(y) / batch)
    start = _resume(lab.checkpoint, model, optimiser)
    for epoch in range(start, epochs):
        everything = lab.noise.at("order", epoch).over(torch.zeros(1, dtype=torch.int64))
        order = everything.permutation(torch.empty(1, len(y)))[0]
        total = right = seen = 0.0
        for step, rows in enumerate(order.split(batch)):
            now = epoch + step / count
            for group in optimiser.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * now / epochs)) / 2
            inputs, labels = x[rows].to(lab.device), y[rows].to(lab.device)
            value, logits = loss(inputs, labels, lab.noise.at("epoch", epoch).over(rows), now)
            if not math.isfinite(value.item()):
                raise ValueError(f"the loss is {value.item()} at epoch {epoch + 1}, step {step + 1}; lower rate or eps")
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            total, seen = total + value.item() * len(rows), seen + len(rows)
            right += (logits.argmax(1) == labels).sum().item()
            lab.report(Progress(epoch, epochs, step + 1, count, total / seen, right / seen))
        _save(lab.checkpoint, model, optimiser, epoch + 1)
    model.eval()


def cross_entropy(model: nn.Module, shift: int = 0) -> Loss:
    """The loss of standard training, on images moved by up to ``shift`` pixels."""

    def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
        logits = model(shifted(x, noise.at("shift"), shift) if shift and x.dim() == 4 else x)
        return F.cross_entropy(logits, y), logits

    return loss


def shifted(x: Tensor, noise: Noise, most: int) -> Tensor:
    """Images (B, C, H, W) moved up or down and sideways by up to ``most`` pixels; what is left free is 0."""
    batch, _, height, width = x.shape
    down, along = noise.integers(2 * most + 1, x.new_empty(batch, 2)).unbind(1)
    rows = down.view(-1, 1, 1) + torch.arange(height, device=x.device).view(1, -1, 1)
    columns = along.view(-1, 1, 1) + torch.arange(width, device=x.device).view(1, 1, -1)
    images = torch.arange(batch, device=x.device).view(-1, 1, 1)
    return (
        F.pad(x, (most, most, most, most)).permute(0, 2, 3, 1)[images, rows, columns].permute(0, 3, 1, 2).contiguous()
    )


def _save(checkpoint: Path | None, model: nn.Module, optimiser: torch.optim.Optimizer, epoch: int) -> None:
    if checkpoint is not None:
        part = checkpoint.with_name(checkpoint.name + ".part")
        torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "epoch": epoch}, part)
        os.replace(part, checkpoint)


def _resume(checkpoint: Path | None, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Loads what :func:`_save` kept; the epoch to go on with."""
    if checkpoint is None or not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["epoch"])
