"""The loop in which every recipe trains: keyed batches, schedules, early stopping, checkpoints that resume."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite import registry
from robustbench_lite.ascent import ascend, customary_length, input_gradient
from robustbench_lite.data import SOURCES, Images
from robustbench_lite.defended import Defended, Sources
from robustbench_lite.files import replacing
from robustbench_lite.history import Epoch, History
from robustbench_lite.noise import Noise
from robustbench_lite.threat import Goal, ThreatModel, find_norm

MEASURED = 500  # images at most on which an epoch is measured; where training stops early, a tenth of fewer than 5,000


class Measured(NamedTuple):
    """Accuracies after an epoch; the greater of two is the one with more robust, then with more clean accuracy."""

    robust: float | None  # by the recipe's own measure; None where nothing says at which eps
    clean: float


@dataclass(frozen=True)
class Progress:
    """Where a training stands: means over the epoch so far; ``accuracy`` is on the inputs that it trained on.

    ``measured`` is None until an epoch is finished: then on a few hundred images, held out where training stops early.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    measured: Measured | None = None


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


@dataclass(frozen=True)
class Recipe(ABC):
    """A defense that trains, with Adam (Kingma & Ba, 2015): its settings and its :meth:`objective`.

    The ``schedule`` of the rate: half a cosine down to 0; steps to a tenth at one half and three quarters of the
    epochs; or cyclic, in a line from 0 up to ``rate`` at two fifths of them and down to 0. Images are moved by up to
    ``shift`` pixels. With a ``patience`` above 0 up to 500 images are held out, training stops after so many epochs
    without better robust accuracy on them, and the best epoch's weights are kept (Rice, Wong & Kolter, 2020).
    """

    epochs: int = 24
    batch: int = 128
    rate: float = 1e-3
    schedule: Literal["cosine", "step", "cyclic"] = "cosine"
    shift: int = 0
    patience: int = 0

    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or not self.rate > 0:
            asked = f"{self.epochs}, {self.batch} and {self.rate:g}"
            raise ValueError(f"epochs and batch must be 1 or more and rate above 0, not {asked}")
        if self.shift < 0 or self.patience < 0:
            raise ValueError(f"shift and patience must be 0 or more, not {self.shift} and {self.patience}")

    def __call__(self, model: nn.Module, lab: Lab) -> Defended:
        history = fit(self, model, lab)
        defended = Defended(model).eval()
        defended.history = history
        return defended

    @abstractmethod
    def objective(self, model: nn.Module, lab: Lab) -> Loss:
        """The loss to minimise."""

    def after_step(self, model: nn.Module, noise: Noise) -> None:  # noqa: B027 - a hook, which most leave as it is
        """What is done to the weights after each step; ``noise`` is keyed by that step and has one row."""

    def threat(self, data: Images) -> ThreatModel | None:
        """What robust accuracy is measured under: the data set's customary linf, where it has one."""
        return ThreatModel(find_norm("linf"), SOURCES[data.name].eps["linf"]) if data.name in SOURCES else None

    def survives(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> Tensor:
        """Which inputs count as robust after an epoch, (B,): those that PGD-10 from a random start leaves right."""
        start, length = threat.sample(noise, x), customary_length(threat.eps, 10)
        moved = ascend(input_gradient(model, Goal(y).cross_entropy), start, x, threat, 10, length)
        with torch.no_grad():
            right: Tensor = model(moved).argmax(1) == y
        return right

    @property
    def easing(self) -> int:
        """Epochs at the beginning that no patience counts."""
        return 0

    def rate_at(self, epoch: float) -> float:
        share = epoch / self.epochs
        if self.schedule == "step":
            return self.rate * 0.1 ** ((share >= 0.5) + (share >= 0.75))
        if self.schedule == "cyclic":
            return self.rate * min(share / 0.4, (1 - share) / 0.6)
        return self.rate * (1 + math.cos(math.pi * epoch / self.epochs)) / 2


@dataclass(frozen=True)
class AdversarialRecipe(Recipe):
    """A recipe against a threat model: none stands for the data set's customary eps.

    eps rises from 0 over the first ``warmup`` epochs, without which training at 0.3 on MNIST stays at chance.
    """

    norm: Literal["linf", "l2", "l1"] = "linf"
    eps: float | None = None
    warmup: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps is not None and not self.eps > 0:
            raise ValueError(f"eps must be above 0, not {self.eps:g}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be 0 or more, not {self.warmup}")

    def threat(self, data: Images | None = None) -> ThreatModel:
        return self.threat_at(self.warmup)

    def threat_at(self, epoch: float) -> ThreatModel:
        """What it trains against; ``epoch`` counts from 0 in fractions."""
        assert self.eps is not None, "completed by the harness"
        return ThreatModel(find_norm(self.norm), self.eps * self.grown(epoch))

    def grown(self, epoch: float) -> float:
        """How much of eps the warm-up allows, from 0 to 1."""
        return min(1.0, epoch / self.warmup) if self.warmup else 1.0

    @property
    def easing(self) -> int:
        return self.warmup


@dataclass
class _State:
    """How far a training is, beside its weights and its optimiser's."""

    epoch: int = 0  # finished ones
    measured: Measured | None = None
    best: Measured | None = None
    best_epoch: int = 0
    weights: dict[str, Tensor] | None = None  # of the best epoch
    history: History = ()

    def note(self, measured: Measured, model: nn.Module) -> None:
        if self.best is None or measured > self.best:
            self.best, self.best_epoch = measured, self.epoch
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}


def fit(recipe: Recipe, model: nn.Module, lab: Lab) -> History:
    """Trains ``model`` by ``recipe``, and leaves it in eval mode; returns how it went.

    After every epoch the state goes to ``lab.checkpoint``, from where a training that was killed goes on.

    Raises:
        ValueError: when a class has no image, the loss is no longer finite (names the step and what to lower), or the
            checkpoint is another training's.
    """
    x, y = lab.data.x, lab.data.y
    rows, watched = _split(recipe, lab)
    _require_every_class(lab.data.take(rows))
    model.to(lab.device).train()
    optimiser = torch.optim.Adam(model.parameters(), recipe.rate)
    state = _resume(recipe, model, optimiser, lab)
    loss, count = recipe.objective(model, lab), math.ceil(len(rows) / recipe.batch)
    one = lab.noise.over(torch.zeros(1, dtype=torch.int64))
    for epoch in range(state.epoch, recipe.epochs):
        if recipe.patience and epoch - max(state.best_epoch, recipe.easing) >= recipe.patience:
            break
        order = rows[one.at("order", epoch).permutation(torch.empty(1, len(rows)))[0]]
        total = right = seen = 0.0
        for step, some in enumerate(order.split(recipe.batch)):
            now = epoch + step / count
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate_at(now)
            noise, labels = lab.noise.at("epoch", epoch).over(some), y[some].to(lab.device)
            inputs = shifted(x[some].to(lab.device), noise.at("shift"), recipe.shift)
            value, logits = loss(inputs, labels, noise, now)
            if not math.isfinite(value.item()):
                lower = " or ".join(name for name in ("rate", "eps", "beta") if hasattr(recipe, name))
                raise ValueError(f"the loss is {value.item()} at epoch {epoch + 1}, step {step + 1}; lower {lower}")
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            recipe.after_step(model, one.at("after", epoch, step))
            total, seen = total + value.item() * len(some), seen + len(some)
            right += (logits.argmax(1) == labels).sum().item()
            if step + 1 == count:
                state.epoch, state.measured = epoch + 1, _measure(recipe, model, lab, watched)
            lab.report(Progress(epoch, recipe.epochs, step + 1, count, total / seen, right / seen, state.measured))
        assert state.measured is not None
        robust, clean = state.measured
        state.history += (Epoch(state.epoch, total / seen, right / seen, clean, robust),)
        if recipe.patience:
            state.note(state.measured, model)
        _save(recipe, model, optimiser, lab, state)
    if state.weights is not None:
        model.load_state_dict(state.weights)
    model.eval()
    return state.history


def shifted(x: Tensor, noise: Noise, most: int) -> Tensor:
    """Images (B, C, H, W) moved up or down and sideways by up to ``most`` pixels; what is left free is 0.

    Other inputs stay where they are.
    """
    if not most or x.dim() != 4:
        return x
    batch, _, height, width = x.shape
    down, along = noise.integers(2 * most + 1, x.new_empty(batch, 2)).unbind(1)
    rows = down.view(-1, 1, 1) + torch.arange(height, device=x.device).view(1, -1, 1)
    columns = along.view(-1, 1, 1) + torch.arange(width, device=x.device).view(1, 1, -1)
    images = torch.arange(batch, device=x.device).view(-1, 1, 1)
    return (
        F.pad(x, (most, most, most, most)).permute(0, 2, 3, 1)[images, rows, columns].permute(0, 3, 1, 2).contiguous()
    )


def _split(recipe: Recipe, lab: Lab) -> tuple[Tensor, Tensor]:
    """The rows to train on, ascending, and those on which an epoch is measured."""
    size = len(lab.data)
    order = lab.noise.at("measured").over(torch.zeros(1, dtype=torch.int64)).permutation(torch.empty(1, size))[0]
    if not recipe.patience:
        return torch.arange(size), order[:MEASURED]
    held = min(MEASURED, size // 10)
    if held < 1:
        raise ValueError(f"patience needs 10 training images or more to hold some out; {lab.data.name} has {size}")
    return order[held:].sort().values, order[:held]


def _require_every_class(data: Images) -> None:
    lacking = (torch.bincount(data.y, minlength=data.classes) == 0).nonzero().flatten().tolist()
    if lacking:
        which = f"class{'es' if len(lacking) > 1 else ''} {', '.join(map(str, lacking))}"
        raise ValueError(f"the training data of {data.name} has no image of {which}")


def _measure(recipe: Recipe, model: nn.Module, lab: Lab, rows: Tensor) -> Measured:
    """What the model is worth on these rows, in eval mode."""
    threat = recipe.threat(lab.data)
    clean = robust = 0
    model.eval()
    for some in rows.split(recipe.batch):
        x, y = lab.data.x[some].to(lab.device), lab.data.y[some].to(lab.device)
        with torch.no_grad():
            right = model(x).argmax(1) == y
        clean += int(right.sum())
        if threat is not None:
            robust += int((right & recipe.survives(model, x, y, threat, lab.noise.at("measured").over(some))).sum())
    model.train()
    return Measured(None if threat is None else robust / len(rows), clean / len(rows))


def _made_of(recipe: Recipe, lab: Lab) -> str:
    """All that decides what a training ends in, beside the model's first weights."""
    made_of = (registry.identity(recipe), lab.data.fingerprint, len(lab.data), lab.noise.seed)
    return json.dumps(made_of, sort_keys=True)


def _save(recipe: Recipe, model: nn.Module, optimiser: torch.optim.Optimizer, lab: Lab, state: _State) -> None:
    if lab.checkpoint is not None:
        kept = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "of": _made_of(recipe, lab)}
        plain = {"measured": state.measured and tuple(state.measured), "best": state.best and tuple(state.best)}
        with replacing(lab.checkpoint) as part:
            torch.save({**kept, **vars(state), **plain, "history": [*map(tuple, state.history)]}, part)


def _resume(recipe: Recipe, model: nn.Module, optimiser: torch.optim.Optimizer, lab: Lab) -> _State:
    """Loads what :func:`_save` kept."""
    if lab.checkpoint is None or not lab.checkpoint.exists():
        return _State()
    kept = torch.load(lab.checkpoint, map_location="cpu", weights_only=True)
    if kept.get("of") != _made_of(recipe, lab):
        raise ValueError(f"{lab.checkpoint} belongs to a training with other settings, data or seed; delete it")
    model.load_state_dict(kept["model"])
    optimiser.load_state_dict(kept["optimiser"])
    measured, best = (kept[name] and Measured(*kept[name]) for name in ("measured", "best"))
    history = tuple(Epoch(*epoch) for epoch in kept.get("history", ()))  # which older checkpoints have not
    return _State(kept["epoch"], measured, best, kept["best_epoch"], kept["weights"], history)
