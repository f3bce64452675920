"""The figures of a page as files for a paper: one for each data set and threat model, with the page's own tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustbench_lite import curves, exports, figures
from robustbench_lite.curves import COLOURS, DASHES, DISTANCES, MARKERS, STYLE, UNDATED, plain
from robustbench_lite.model_info import eps_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from robustbench_lite.matrix import Results

BLOCK = ["dataset", "norm", "eps", "seed"]


def draw(results: Results, folder: Path, kind: str) -> Iterator[Path]:
    """Writes what figures there are as SVG, PDF or PNG, and says which.

    Raises:
        ValueError: where they cannot be written.
    """
    from matplotlib import rc_context

    entries, board = results.entries, results.leaderboard()
    drawn: dict[str, tuple[pd.DataFrame, Callable[[pd.DataFrame], Figure]]] = {
        "matrix": (figures.cells(entries, results.proofs), _matrix),
        "bounds": (figures.bounds(board), _bounds),
        "distances": (figures.distances(entries), _distances),
        "queries": (figures.queries(entries), _queries),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (frame, figure) in drawn.items():
            for key, rows in frame.groupby(BLOCK, sort=False) if len(frame) else ():
                path = folder / _file(name, key, kind)
                with rc_context(STYLE):
                    figure(rows).savefig(path, format=kind, metadata=UNDATED.get(kind))
                yield path
        for dataset, rows in results.trainings().groupby("dataset", sort=False):
            path = folder / _file("training", (dataset, "", 0), kind)
            with rc_context(STYLE):
                _training(rows).savefig(path, format=kind, metadata=UNDATED.get(kind))
            yield path
        for key, rows in figures.security(entries).groupby(["dataset", "norm", "seed"], sort=False):
            path = folder / _file("curves", key, kind)
            curves.plot(rows, path, kind)
            yield path
    except OSError as error:
        raise ValueError(f"cannot write figures into {folder}: {error.strerror or error}") from error


def _file(name: str, block: Any, kind: str) -> str:
    """Such as ``matrix-mnist-linf-8_255.svg``, of a block with or without a norm and an eps."""
    dataset, norm, *eps, seed = block
    parts = [name, dataset, norm, *map(eps_text, eps), *[f"seed{seed}"] * bool(seed)]
    return "-".join(re.sub(r"[^\w.]+", "_", part)[:60] for part in parts if part) + f".{kind}"


def _matrix(rows: pd.DataFrame) -> Figure:
    lines, attacks = _names(rows), list(dict.fromkeys(rows["attack"]))
    figure, (axes,) = _figure(1, 1.6 + 0.62 * len(attacks), 1.2 + 0.36 * len(lines))
    places = {line: y for y, line in enumerate(lines)}
    for row in rows.to_dict("records"):
        x, y, share = attacks.index(row["attack"]), places[row["line"]], row["robust_accuracy"]
        axes.barh(y, 0.98, 0.96, x - 0.49, color=_blue(share))
        axes.text(x, y, exports.percent(share), ha="center", va="center", color="w" if share > 0.55 else "k", size=8)
    axes.set(xlim=(-0.5, len(attacks) - 0.5), ylim=(len(lines) - 0.5, -0.5))
    axes.set_xticks(range(len(attacks)), [_short(attack) for attack in attacks], rotation=35, ha="right")
    axes.set_yticks(range(len(lines)), list(lines.values()))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("robust accuracy, %", size=9)
    return figure


def _blue(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["Blues"](share)


def _bounds(rows: pd.DataFrame) -> Figure:
    figure, (axes,) = _figure(1, 4.5, 1.1 + 0.34 * len(rows))
    for y, row in enumerate(rows.to_dict("records")):
        robust, certified, clean = (100 * row[f"{kind}_accuracy"] for kind in ("robust", "certified", "clean"))
        look: dict[str, Any] = {"height": 0.6, "edgecolor": "#5b93c9", "linewidth": 0.5}
        axes.barh(y, robust, color="#d5e5f4", hatch="////", label="robust, not certified", **look)
        if certified == certified:
            axes.barh(y, certified, color="#08519c", height=0.6, label="certified")
        axes.plot([clean, clean], [y - 0.42, y + 0.42], "k:", linewidth=1.2, label="clean")
        ends = 100 * row["robust_low"], 100 * row["robust_high"]
        axes.plot(ends, [y, y], "k-|", linewidth=0.8, markersize=4)
    axes.set_yticks(range(len(rows)), [_defense(row) for row in rows.to_dict("records")])
    axes.set(xlim=(0, 100.5), ylim=(len(rows) - 0.5, -0.5), xlabel="accuracy, %")
    told = dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(told.values(), told, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _distances(rows: pd.DataFrame) -> Figure:
    def panel(axes: Axes, line: pd.DataFrame, k: int) -> None:
        edges = [*line["above"], line["up_to"].iloc[-1]]
        axes.stairs(100 * line["share"], edges, label=_short(line["attack"].iloc[0]), **_look(k))

    return _panels(rows, panel, xlabel=DISTANCES[rows["norm"].iloc[0]], ylabel="inputs, %")


def _queries(rows: pd.DataFrame) -> Figure:
    def panel(axes: Axes, line: pd.DataFrame, k: int) -> None:
        look = {"drawstyle": "steps-post", "marker": MARKERS[k % len(MARKERS)], "markersize": 3.5}
        label = _short(line["attack"].iloc[0])
        axes.semilogx(line["forwards"], 100 * line["success"], label=label, **look, **_look(k))

    return _panels(rows, panel, xlabel="forward passes for an input", ylabel="success, %", ylim=(-2, 102))


def _training(rows: pd.DataFrame) -> Figure:
    """Two panels a model: accuracies on the left, the loss on the right."""
    models = [model for _, model in rows.groupby("line", sort=False)]
    figure, all_axes = _figure(2 * len(models), 3.2, 2.4, most=2)
    for model, left, right in zip(models, all_axes[::2], all_axes[1::2]):
        for k, kind in enumerate(("clean", "robust")):
            accuracy = model[f"{kind}_accuracy"]
            if accuracy.notna().any():
                left.plot(model["epoch"], 100 * accuracy, label=kind, marker=MARKERS[k], markersize=3.5, **_look(k))
        right.plot(model["epoch"], model["loss"], marker=MARKERS[0], markersize=3.5, **_look(0))
        left.set(ylabel="accuracy, %", ylim=(-2, 102))
        left.legend(frameon=False)
        right.set(ylabel="training loss", ylim=(min(0, model["loss"].min()), None))
        for axes in (left, right):
            axes.set(title=_short(model["defense"].iloc[0]), xlabel="epoch")
            axes.locator_params(axis="x", integer=True)
            axes.grid(alpha=0.3, linewidth=0.5)
    return figure


def _look(k: int) -> dict[str, Any]:
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k % len(DASHES)], "linewidth": 1.2}


def _panels(rows: pd.DataFrame, panel: Callable[[Axes, pd.DataFrame, int], None], **labels: Any) -> Figure:
    """A panel a defense, with one legend: an attack looks the same in all."""
    lines = _names(rows)
    attacks = {attack: k for k, attack in enumerate(dict.fromkeys(rows["attack"]))}
    figure, all_axes = _figure(len(lines), 2.6, 2.2 + 0.1 * len(attacks))
    for axes, (line, name) in zip(all_axes, lines.items()):
        for attack, own in rows[rows["line"] == line].groupby("attack", sort=False):
            panel(axes, own, attacks[attack])
        axes.set(title=name, **labels)
        axes.grid(alpha=0.3, linewidth=0.5)
    told = {label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(told.values(), told, loc="outside lower center", ncols=min(3, len(told)), frameon=False)
    return figure


def _figure(panels: int, width: float, height: float, most: int = 3) -> tuple[Figure, list[Axes]]:
    """Panels of this size in inches, at most so many beside each other."""
    from matplotlib.figure import Figure

    columns = min(most, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows), dpi=300, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[panels:]:
        spare.set_visible(False)
    return figure, axes[:panels]


def _names(rows: pd.DataFrame) -> dict[int, str]:
    """What each leaderboard row is called."""
    return {row["line"]: _defense(row) for row in rows.drop_duplicates("line").to_dict("records")}


def _defense(row: dict[Any, Any]) -> str:
    return _short(row["defense"] if row["adaptive"] else f"{row['defense']} (blind)")


def _short(name: str) -> str:
    return plain(name if len(name) <= 40 else f"{name[:39]}…")
