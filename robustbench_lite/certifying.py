"""One certifier for one defended model: the certifier states, this module holds it to what it may state."""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustbench_lite import registry
from robustbench_lite.certificate import Certificate
from robustbench_lite.defended import Defended, ask_finally, device_of
from robustbench_lite.evaluation import REASON, check, frozen, predict, predicted, require_norm
from robustbench_lite.noise import Noise
from robustbench_lite.norms import by_row
from robustbench_lite.outcome import CHUNK, ERROR, FALSIFIED, UNKNOWN, UNSUPPORTED, VERIFIED, WRONG, Certified
from robustbench_lite.plugins import Certifier
from robustbench_lite.threat import ThreatModel
from robustbench_lite.wording import one_line

HALVINGS = 12  # of the bracket that holds an input's largest certified radius
NARROW = 1e-3  # of a bracket's upper end: narrower than that, it is not halved again


def certify_inputs(
    certifier: Certifier | str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel | str,
    *,
    seed: int = 0,
    radius: bool = False,
    batch: int = CHUNK,
    first_row: int = 0,
) -> Certified:
    """What a certifier, an object or a spec such as ``"crown"``, proves of a classifier's answers within ``threat``.

    ``model`` takes images ``x`` (N, ...) in the threat's pixel range to logits; ``y`` is (N,). ``radius`` searches each
    input's largest certified radius, up to eps. ``batch`` inputs are certified at once; ``first_row`` is the row of
    ``x[0]`` in its data set.

    Raises:
        ValueError: where the model's answers are no logits for these labels, or the certifier does not know the norm.
    """
    certifier = registry.make("certifier", certifier) if isinstance(certifier, str) else certifier
    threat = ThreatModel.parse(threat) if isinstance(threat, str) else threat
    require_norm("certifier", certifier, threat)
    defended = model if isinstance(model, Defended) else Defended(model)
    with frozen(defended):
        check(defended, x, y, threat)
        court = Court(defended, certifier, threat, seed, radius)
        rows = torch.arange(first_row, first_row + len(x))
        pieces = zip(x.split(batch), y.split(batch), rows.split(batch))
        return Certified.join([court.hear(*piece) for piece in pieces])


def searches(certifier: Certifier, radius: bool) -> bool:
    """Whether the largest radius has to be searched: asked for, and not what the certifier answers anyway."""
    return radius and not getattr(certifier, "exact_radius", False)


@dataclass(frozen=True)
class Court:
    """A defended model and a certifier, which is heard piece by piece."""

    model: Defended
    certifier: Certifier
    threat: ThreatModel
    seed: int = 0
    radius: bool = False

    def hear(self, x: Tensor, y: Tensor, rows: Tensor) -> Certified:
        """What is proved of inputs; of those that the model gets wrong nothing is asked."""
        began, count = time.perf_counter(), len(x)
        x, y = x.to(device_of(self.model)), y.to(device_of(self.model))
        clean = predicted(self.model, predict(self.model, x, Noise(self.seed, rows), count))
        right = clean == y
        columns: dict[str, Any] = {
            "row": rows.numpy(),
            "label": y.cpu().numpy(),
            "clean": clean.cpu().numpy(),
            "status": np.full(count, WRONG, dtype=f"U{len(UNSUPPORTED)}"),
            "reason": np.full(count, "", dtype=f"U{REASON}"),
            "radius": np.zeros(count),
            "margin": np.full(count, np.nan),
        }
        points = x.clone()
        if right.any():
            said = self._search(x[right], y[right], rows[right.cpu()])
            points[right] = said.points
            for name in ("status", "reason", "radius", "margin"):
                columns[name][right.cpu().numpy()] = getattr(said, name)
        falsified = np.flatnonzero(columns["status"] == FALSIFIED)
        return Certified(
            **columns,
            certified=np.where(columns["status"] == VERIFIED, columns["label"], -1),
            seconds=np.full(count, (time.perf_counter() - began) / count),
            imaged=columns["row"][falsified],
            images=points[torch.from_numpy(falsified)].float().cpu().numpy(),
        )

    def _search(self, x: Tensor, y: Tensor, rows: Tensor) -> "_Answer":
        """What is proved within eps; where asked for, with the largest radius, by bisection.

        Brackets are whole multiples of the same fraction of eps, so that inputs are asked about together. Nothing is
        taken to be monotone: a radius is the largest at which the input was verified.
        """
        said = self._ask(x, y, rows, self.threat.eps)
        if not searches(self.certifier, self.radius):
            return said
        top = 2**HALVINGS
        low = np.where(said.status == VERIFIED, top, 0)
        high = np.full(len(x), top)
        tried = ~np.char.startswith(said.reason, ERROR) & (said.status != UNSUPPORTED)
        while (open := tried & (high - low > np.maximum(1, NARROW * high))).any():
            middle = (low + high) // 2
            for level in np.unique(middle[open]):
                here = np.flatnonzero(open & (middle == level))
                at = torch.from_numpy(here)
                proved = self._ask(x[at], y[at], rows[at], self.threat.eps * level / top).status == VERIFIED
                low[here[proved]] = high[here[~proved]] = level
        return replace(said, radius=self.threat.eps * low / top)

    def _ask(self, x: Tensor, y: Tensor, rows: Tensor, eps: float) -> "_Answer":
        """The certifier's answer about labels ``y`` within ``eps``, without what it may not state.

        That it does not cover the model, or falls over, is a result, not ours to raise.
        """
        threat, nothing = replace(self.threat, eps=eps), _Answer.nothing(x)
        if self.model.detects:
            return nothing.end(slice(None), UNSUPPORTED, "it has a detector, of which nothing is proved")
        noise = Noise(self.seed, rows)
        try:
            given = self.certifier(self.model, x, y, threat, noise)
        except ValueError as error:
            return nothing.end(slice(None), UNSUPPORTED, one_line(error, named=False))
        except Exception as error:
            return nothing.end(slice(None), UNKNOWN, f"{ERROR}{one_line(error)}")
        try:
            said = _Answer.read(given, x)
        except Exception as error:
            return nothing.end(slice(None), UNKNOWN, f"{ERROR}no certificate for {len(x)} inputs: {one_line(error)}")

        label, own = given.label.cpu().numpy(), y.cpu().numpy()
        verified = said.status == VERIFIED
        said = said.end((label >= 0) & (label != own), UNKNOWN, f"{ERROR}the certificate is for another label")
        said = said.end(verified & (label < 0), UNKNOWN, f"{ERROR}the certificate is for no label")
        said = said.end(verified & (said.margin <= 0), UNKNOWN, f"{ERROR}the certificate's own margin is not above 0")
        if getattr(self.certifier, "exact_radius", False):
            short = (said.status == VERIFIED) & ~(said.radius >= eps)
            said = replace(said, status=np.where(short, UNKNOWN, said.status))
        else:
            said = replace(said, radius=np.where(said.status == VERIFIED, eps, 0.0))
        return self._retry(said, x, y, threat, noise)

    def _retry(self, said: "_Answer", x: Tensor, y: Tensor, threat: ThreatModel, noise: Noise) -> "_Answer":
        """A counterexample counts only if the model, asked again strictly inside the ball, agrees."""
        falsified = said.status == FALSIFIED
        if not falsified.any():
            return said
        claimed = by_row(torch.from_numpy(falsified).to(x.device), x)
        strict = threat.project_strictly(torch.where(claimed, said.points.nan_to_num(), x), x)
        logits = ask_finally(self.model, strict, len(x), noise)
        fooled = ((logits.argmax(1) != y) & logits.isfinite().all(1)).cpu().numpy()
        said = replace(said, points=strict)
        return said.end(falsified & ~fooled, UNKNOWN, f"{ERROR}the model, asked again, denies the counterexample")


@dataclass(frozen=True)
class _Answer:
    """What was said of each input, and the points that are to be counterexamples."""

    status: NDArray[np.str_]
    reason: NDArray[np.str_]
    radius: NDArray[np.float64]
    margin: NDArray[np.float64]
    points: Tensor

    @staticmethod
    def nothing(x: Tensor) -> "_Answer":
        count = len(x)
        return _Answer(
            status=np.full(count, UNKNOWN, dtype=f"U{len(UNSUPPORTED)}"),
            reason=np.full(count, "", dtype=f"U{REASON}"),
            radius=np.zeros(count),
            margin=np.full(count, np.nan),
            points=x,
        )

    @staticmethod
    def read(given: Certificate, x: Tensor) -> "_Answer":
        """A certificate for inputs ``x``, column by column; whatever does not fit raises."""
        status = np.array(given.status)
        made = _Answer.nothing(x)
        points = x if given.counterexample is None else given.counterexample.detach().to(x).view_as(x)
        if strange := set(status.tolist()) - {VERIFIED, FALSIFIED, UNKNOWN, UNSUPPORTED}:
            raise ValueError(f"there is no status {strange.pop()!r}")
        shapes = {name: tuple(getattr(given, name).shape) for name in ("label", "radius", "margin")}
        reason = made.reason if given.reason is None else np.array(given.reason, dtype=made.reason.dtype)
        for name, shape in {**shapes, "status": status.shape, "reason": reason.shape}.items():
            if shape != (len(x),):
                raise ValueError(f"its {name} has shape {shape}")
        return replace(
            made,
            status=status.astype(made.status.dtype),
            reason=reason,
            radius=given.radius.detach().double().cpu().numpy(),
            margin=given.margin.detach().double().cpu().numpy(),
            points=points,
        )

    def end(self, where: NDArray[np.bool_] | slice, status: str, reason: str) -> "_Answer":
        """The same but for inputs of which nothing is proved after all, and why."""
        ended = {"status": status, "reason": reason[:REASON], "radius": 0.0, "margin": np.nan}
        columns = {name: getattr(self, name).copy() for name in ended}
        for name, value in ended.items():
            columns[name][where] = value
        return replace(self, **columns)
