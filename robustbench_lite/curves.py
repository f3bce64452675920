"""Security curves: robust accuracy as a function of eps, from the rows of attacks at several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robustbench_lite import __version__
from robustbench_lite.chance import wilson
from robustbench_lite.entries import Entry
from robustbench_lite.outcome import SKIPPED, UNKNOWN
from robustbench_lite.threat import parse_number

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

ALL = "all"  # stands where an attack does, for all of them together
CURVES = (
    "dataset",
    "defense",
    "model",
    "parameters",
    "norm",
    "adaptive",
    "seed",
    "attack",
    "eps",
    "examples",
    "robust_accuracy",
    "robust_low",
    "robust_high",
    "unknown",
    "version",
)
MOST = 200  # points of a grid
FORMATS = ("svg", "pdf", "png")
SIZES = {
    "linf": "ℓ∞ perturbation (pixel range 0 to 1)",
    "l2": "ℓ₂ perturbation (pixel range 0 to 1)",
    "l1": "ℓ₁ perturbation (pixel range 0 to 1)",
    "l0": "ℓ₀ perturbation (pixels)",
    "patch": "patch (share of the image area)",
}
DISTANCES = {
    "linf": "ℓ∞ distance",
    "l2": "ℓ₂ distance",
    "l1": "ℓ₁ distance",
    "l0": "ℓ₀ distance (pixels)",
    "patch": "side of the patch (pixels)",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, 2008
MARKERS, DASHES = "osD^vPX<>", ("-", "--", "-.", ":")  # 9 and 4: 36 curves are told apart without colour
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "",
    "pdf.fonttype": 42,
    "font.size": 9,
    "legend.fontsize": 8,
}
UNDATED: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def grid(text: str) -> list[float]:
    """``"0:0.4:0.1"`` (start, stop, step; stop is included where a step falls on it) or ``"0,0.1,8/255"`` as numbers,
    ascending. Each is what it reads as when written out, 0.3 and not 0.1 + 0.2: the eps of the same cell.

    Raises:
        ValueError: for anything else, a grid without an eps above 0, or one of more than ``MOST`` points.
    """
    parts = text.split(":")
    if len(parts) not in (1, 3):
        raise ValueError(f"eps wants START:STOP:STEP, as 0:0.4:0.02, or a list, as 0,0.1,0.2; not {text!r}")
    if len(parts) == 1:
        points = sorted({parse_number(part) for part in text.split(",")})
    else:
        start, stop, step = map(_exact, parts)
        if step <= 0 or stop < start:
            raise ValueError(f"eps {text} is empty: from START up to STOP, by a STEP above 0")
        count = (stop - start) // step + 1
        if count > MOST:
            raise ValueError(f"eps {text} has {count} points, of at most {MOST}; take a larger step")
        points = [float(start + k * step) for k in range(count)]
    if len(points) > MOST:
        raise ValueError(f"eps has {len(points)} points, of at most {MOST}")
    if points[0] < 0:
        raise ValueError(f"eps must be 0 or more, not {points[0]:g}")
    if not points[-1] > 0:
        raise ValueError(f"eps {text} has nothing above 0, and at 0 there is nothing to attack")
    return points


def _exact(text: str) -> Fraction:
    parse_number(text)
    top, _, bottom = text.partition("/")
    try:
        return Fraction(top) / Fraction(bottom or 1)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a finite number; write 0.3 or 8/255") from None


@dataclass(frozen=True)
class _Fall:
    """From which eps on each input is known to break, and from which on nobody can vouch for it; inf: never."""

    broken: NDArray[np.float64]
    doubtful: NDArray[np.float64]
    attacked: NDArray[np.bool_]  # not so where the label is the target

    @staticmethod
    def of(entry: Entry) -> _Fall:
        outcome = entry.outcome
        size = np.fmin(outcome.distance, entry.eps)  # in eps's unit; a patch's distance is a side
        return _Fall(
            np.where(outcome.fooled, size, np.inf),
            np.where(outcome.status == UNKNOWN, entry.eps, np.inf),
            outcome.status != SKIPPED,
        )

    def __or__(self, other: _Fall) -> _Fall:
        return _Fall(
            np.minimum(self.broken, other.broken),
            np.minimum(self.doubtful, other.doubtful),
            self.attacked | other.attacked,
        )


def curves(entries: Iterable[Entry]) -> pd.DataFrame:
    """A row a defense, attack and eps, the union over attacks as attack ``all``; the columns are those of ``CURVES``.

    An input counts as robust at an eps where the attack was run and no adversarial of that size or less is known: not
    from this eps, nor from another, since what breaks an input at 0.1 is admissible at 0.2 too. So a curve never
    rises, and lies on or below the leaderboard's figures for the same attacks, each of which knows its own eps alone.
    In the same way an input of unknown status is not robust from there on. At eps 0, which is always there, it is the
    clean accuracy. Every point is over the inputs that the defense's cells share; intervals are 95 % Wilson's;
    ``unknown`` counts inputs.
    """
    import pandas as pd

    groups: dict[object, list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.place, entry.seed, entry.adaptive), []).append(entry)
    table = [row for group in groups.values() for row in _rows(group)]
    return pd.DataFrame(table, columns=list(CURVES))


def _rows(group: Sequence[Entry]) -> Iterator[dict[str, object]]:
    """The curves of one defense under one norm."""
    common = reduce(np.intersect1d, [entry.outcome.row for entry in group])
    if not len(common):
        return
    first, right = group[0], group[0].outcome.select(common).right
    falls: dict[str, _Fall] = {}
    levels: dict[str, set[float]] = {}
    for entry in group:
        fall = _Fall.of(replace(entry, outcome=entry.outcome.select(common)))
        for name in (entry.attack, ALL):
            falls[name] = falls[name] | fall if name in falls else fall
            levels.setdefault(name, {0.0}).add(entry.eps)
    for name in sorted(falls, key=lambda name: (name == ALL, name)):
        fall = falls[name]
        for eps in sorted(levels[name]):
            held = right & (fall.attacked & (np.minimum(fall.broken, fall.doubtful) > eps) | (eps == 0))
            low, high = wilson(int(held.sum()), len(held))
            yield {
                **{column: getattr(first, column) for column in CURVES[:7]},
                "attack": name,
                "eps": eps,
                "examples": len(held),
                "robust_accuracy": float(held.mean()),
                "robust_low": low,
                "robust_high": high,
                "unknown": int((right & (fall.doubtful <= eps) & (fall.broken > eps) & (eps > 0)).sum()),
                "version": __version__,
            }


def named(frame: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Attack, defense and rows of each curve; without the union where there is but one attack."""
    found = []
    for _, here in frame.groupby(list(CURVES[:7]), sort=False, dropna=False):
        curves = list(here.groupby("attack", sort=False))
        for attack, rows in curves[:1] if len(curves) == 2 else curves:
            blind = "" if rows["adaptive"].iloc[0] else " (blind)"
            found.append((str(attack), f"{rows['defense'].iloc[0]}{blind}", rows))
    return found


def format_of(path: str | Path) -> str:
    """The format that a file's name asks for.

    Raises:
        ValueError: for one that is not written.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise ValueError(f"a plot is written as {', '.join(FORMATS)}; {Path(path).name} is none of these")
    return suffix


def plot(frame: pd.DataFrame, path: Path, kind: str) -> None:
    """Draws a table of curves: a panel a data set and norm, a line a curve with its 95 % band.

    Raises:
        ValueError: where there are none.
    """
    if frame.empty:
        raise ValueError("there are no curves to draw")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = list(frame.groupby(["dataset", "norm", "seed"], sort=False))
    lines = max(len(named(panel)) for _, panel in panels)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.5 * len(panels), 3.1 + 0.17 * lines), dpi=300, layout="constrained")
        for axes, ((dataset, norm, _), panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            for k, (attack, defense, rows) in enumerate(named(panel)):
                low, high = 100 * rows["robust_low"], 100 * rows["robust_high"]
                look: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)]}
                axes.fill_between(rows["eps"], low, high, alpha=0.15, linewidth=0, **look)
                look |= {"marker": MARKERS[k % len(MARKERS)], "linestyle": DASHES[k % len(DASHES)]}
                label = plain(f"{'all attacks' if attack == ALL else attack} on {defense}")
                axes.plot(
                    rows["eps"], 100 * rows["robust_accuracy"], markersize=3.5, linewidth=1.2, label=label, **look
                )
            axes.set(title=plain(str(dataset)), xlabel=SIZES[str(norm)], ylabel="robust accuracy (%)", ylim=(-2, 102))
            axes.set_xlim(left=0)
            axes.grid(alpha=0.3, linewidth=0.5)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False, handlelength=3.5)
        figure.savefig(path, format=kind, metadata=UNDATED.get(kind))


def plain(text: str) -> str:
    """As a text in which nothing is read as a formula."""
    return text.replace("$", r"\$")
