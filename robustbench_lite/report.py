"""Results as one self-contained page, which opens from disk and asks no other file and no network for anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from robustbench_lite import __version__, audit, exports, figures, gallery, provenance
from robustbench_lite.charts import Chart, Point
from robustbench_lite.curves import ALL, CURVES, DISTANCES, SIZES
from robustbench_lite.entries import Setting
from robustbench_lite.model_info import eps_text

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from robustbench_lite.matrix import Results

BLUES = ("f7fbff", "deebf7", "c6dbef", "9ecae1", "6baed6", "4292c6", "2171b5", "08519c", "08306b")  # ColorBrewer
TINY = 1e-9  # a loss that is never above is not drawn

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Results that are ranked among themselves: a block of a suite, or all there are."""

    results: Results
    board: pd.DataFrame
    name: str = ""

    @cached_property
    def rows(self) -> list[Row]:
        """Of the leaderboard, with None where there is nothing."""
        return records(self.board)

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """What lies behind each figure."""
        entries, proofs = self.results.entries, self.results.proofs
        return {
            "leaderboard": self.board,
            "matrix": figures.cells(entries, proofs),
            "bounds": figures.bounds(self.board),
            "curves": figures.security(entries),
            "distances": figures.distances(entries),
            "queries": figures.queries(entries),
            "training": self.results.trainings(),
            "certificates": self.results.certificates(),
            "audit": self.results.audit(),
        }

    def about(self, row: Row) -> Row:
        """What a figure of a leaderboard row says of it, and is found by; over all eps if it names none."""
        names = [name for name in figures.ABOUT if name in row]
        own = [str(line["flags"]) for line in self.rows if all(line[name] == row[name] for name in names)]
        return {
            "part": self.name,
            "dataset": row["dataset"],
            "defense": row["defense"] if row["adaptive"] in (True, None) else f"{row['defense']} (blind attacks)",
            "model": row["model"],
            "threat": threat_of(row) if "eps" in row else "",
            "flags": "; ".join(dict.fromkeys(flag for names in own for flag in names.split("; ") if flag)),
        }

    def of(self, one: Setting) -> Row:
        """The same of an entry or a proof."""
        return self.about({name: getattr(one, name) for name in figures.ABOUT})


@dataclass(frozen=True)
class Table:
    """What lies behind a figure: to read, and to download as CSV."""

    name: str
    frame: pd.DataFrame

    @property
    def href(self) -> str:
        """The CSV, in the link itself."""
        return gallery.uri("text/csv;charset=utf-8", self.frame.to_csv(index=False, lineterminator="\n").encode())

    @property
    def rows(self) -> Iterator[list[str]]:
        """As texts."""
        for row in _filled(self.frame).itertuples(index=False):
            yield [_plain(value) for value in row]


@dataclass(frozen=True)
class Panel:
    """A chart, or histograms, of one defense under one threat model."""

    about: Row
    chart: Chart | None = None
    bars: list[tuple[str, str, int]] = field(default_factory=list)  # label, path, inputs
    axis: tuple[str, str] = ("", "")  # of the bars: what runs across, and up to where


def html(parts: Sequence[Part], data_dir: Path | None = None) -> str:
    """The page; the same results give the same page. Clean images come from ``data_dir``, as for a run."""
    from jinja2 import Environment, StrictUndefined

    page = files("robustbench_lite").joinpath("page")
    text = {kind: page.joinpath(f"report.{kind}").read_text("utf-8") for kind in ("html", "css", "js")}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["percent"] = _percent
    shown = list(_gallery(parts, data_dir))
    boards = [row for part in parts for row in _board(part)]
    proofs = [row for part in parts for row in _proofs(part)]
    abouts = [row["about"] for row in boards] + [about for about, _ in proofs]
    return environment.from_string(text["html"]).render(
        version=__version__,
        css=text["css"],
        js=text["js"],
        board=boards,
        heads=_told(boards),
        choices={name: list(dict.fromkeys(about[name] for about in abouts)) for name in ("dataset", "threat")},
        flags=sorted({flag for row in boards for flag in row["flags"]}),
        heats=[heat for part in parts for heat in _heats(part)],
        proofs=proofs,
        curves=[panel for part in parts for panel in _curves(part)],
        distances=[panel for part in parts for panel in _distances(part)],
        queries=[panel for part in parts for panel in _queries(part)],
        trainings=[panel for part in parts for panel in _trainings(part)],
        gallery=shown,
        lacking=list(dict.fromkeys(one.lacking for _, attacks in shown for one in attacks if one.lacking)),
        patches=[
            (part.of(entry), entry.attack, image)
            for part in parts
            for entry, image in gallery.patches(part.results.entries)
        ],
        findings=[
            (part.of(finding.row), finding, audit.FLAGS[finding.flag])
            for part in parts
            for finding in part.results.findings
        ],
        violations=list(dict.fromkeys(line for part in parts for line in part.results.violations())),
        unprobed=list(dict.fromkeys(line for part in parts for line in part.results.unprobed)),
        origins=[(part.of(origin.first), origin) for part in parts for origin in provenance.origins(part.results)],
        tables={name: Table(name, frame) for name, frame in _tables(parts).items()},
        blues=["#" + colour for colour in BLUES],
    )


def _tables(parts: Sequence[Part]) -> dict[str, pd.DataFrame]:
    """Every figure's data; those of several parts below each other."""
    import pandas as pd

    frames: dict[str, list[pd.DataFrame]] = {}
    for part in parts:
        for name, frame in part.tables.items():
            told = frame.drop(columns="line", errors="ignore")
            if part.name and len(told):
                told.insert(0, "block", part.name)
            frames.setdefault(name, []).append(told)
    return {name: pd.concat(found, ignore_index=True) for name, found in frames.items()}


# The leaderboard, the matrix and the bars


def _board(part: Part) -> Iterator[Row]:
    for row in part.rows:
        shown: Row = {
            "block": (part.name, part.name),
            "rank": (row["rank"], exports.number(row["rank"], "d")),
            "source": (row.get("source"), row.get("source") or ""),
            "defense": (row["defense"], part.about(row)["defense"]),
            "model": (row["model"], row["model"]),
            "data set": (row["dataset"], row["dataset"]),
            "threat": (f"{row['norm']} {row['eps']:024.12f}", threat_of(row)),
            "seed": (row["seed"], exports.number(row["seed"], "d")),
            "inputs": (row["examples"], exports.number(row["examples"], "d")),
            "clean, %": (row["clean_accuracy"], _percent(row["clean_accuracy"])),
            "certified, %": (row["certified_accuracy"], _percent(row["certified_accuracy"])),
            "robust, %": (row["robust_accuracy"], _percent(row["robust_accuracy"])),
            "flags": (row["flags"], row["flags"]),
            "worst attack": (row["worst_attack"], row["worst_attack"] or ""),
            "unknown": (row["unknown"], exports.number(row["unknown"], "d")),
        }
        yield {
            **row,
            "about": part.about(row),
            "cells": {head: ("" if value is None else value, text) for head, (value, text) in shown.items()},
            "spans": {f"{kind}, %": _span(row[f"{kind}_low"], row[f"{kind}_high"]) for kind in ("certified", "robust")},
            "flags": [flag for flag in str(row["flags"]).split("; ") if flag],
        }


def _told(board: list[Row]) -> list[str]:
    """The columns that say something; a seed does where there are several."""
    heads = list(board[0]["cells"]) if board else []
    told = [head for head in heads if any(row["cells"][head][1] for row in board)]
    return [head for head in told if head != "seed" or len({row["cells"]["seed"] for row in board}) > 1]


def _heats(part: Part) -> Iterator[Row]:
    """A heat map a data set, threat model and seed."""
    frame = part.tables["matrix"]
    if frame.empty:
        return
    for (dataset, norm, eps, seed), block in frame.groupby(["dataset", "norm", "eps", "seed"], sort=False):
        attacks = list(dict.fromkeys(block["attack"]))
        lines = []
        for _, line in block.groupby("line", sort=False):
            found = {row["attack"]: row for row in records(line)}
            cells = [_heat(found[attack]) if attack in found else None for attack in attacks]
            lines.append({"about": part.about(records(line.head(1))[0]), "cells": cells})
        threat = threat_of({"norm": norm, "eps": eps})
        where = ", ".join([*[part.name] * bool(part.name), str(dataset), threat, *[f"seed {seed}"] * bool(seed)])
        yield {"where": where, "attacks": attacks, "lines": lines}


def _heat(row: Row) -> Row:
    colour = shade(row["robust_accuracy"])
    return {
        "text": exports.percent(row["robust_accuracy"]),
        "span": _span(row["robust_low"], row["robust_high"]),
        "unknown": row["unknown"],
        "paper": "#" + colour,
        "ink": "#000" if luminance(colour) > 0.179 else "#fff",  # where black and white are equally far off
    }


def shade(fraction: float) -> str:
    """A colour of ``BLUES``, or between two: the darker, the more."""
    at = min(max(fraction, 0), 1) * (len(BLUES) - 1)
    low = min(int(at), len(BLUES) - 2)
    mixed = ((1 - at + low) * _rgb(BLUES[low]) + (at - low) * _rgb(BLUES[low + 1])).round().astype(int)
    return "".join(f"{level:02x}" for level in mixed.tolist())


def luminance(colour: str) -> float:
    """Relative luminance, by which contrast is measured (WCAG 2)."""
    level = _rgb(colour) / 255
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _rgb(colour: str) -> NDArray[np.float64]:
    return np.array([int(colour[at : at + 2], 16) for at in (0, 2, 4)], float)


def _proofs(part: Part) -> Iterator[tuple[Row, Row]]:
    """What each certifier proves."""
    for row in records(part.tables["certificates"]):
        yield (
            part.about(row | {"adaptive": True}),
            row | {"span": _span(row["certified_low"], row["certified_high"])},
        )


# Charts


def _curves(part: Part) -> Iterator[Panel]:
    """Robust accuracy over eps: a panel a defense, whatever the eps."""
    frame = part.tables["curves"]
    for _, rows in frame.groupby(list(CURVES[:7]), sort=False, dropna=False):
        chart = Chart(SIZES[rows["norm"].iloc[0]], "robust accuracy, %", float(rows["eps"].max()))
        _draw(chart, rows, ["eps", "robust_accuracy", "robust_low", "robust_high"])
        yield Panel(part.about(records(rows.head(1).drop(columns="eps"))[0]), chart)


def _queries(part: Part) -> Iterator[Panel]:
    """Success over forwards: a panel a leaderboard row."""
    for rows in _lines(part.tables["queries"]):
        chart = Chart("forward passes for an input", "success, %", float(rows["forwards"].max()), log=True)
        _draw(chart, rows, ["forwards", "success"])
        yield Panel(part.about(records(rows.head(1))[0]), chart)


def _trainings(part: Part) -> Iterator[Panel]:
    """Accuracies over epochs, and the loss in a panel of its own, unless it goes below 0 or stays there."""
    for rows in _lines(part.tables["training"]):
        about = part.about(records(rows.head(1))[0] | {"adaptive": True})
        last, highest = float(rows["epoch"].max()), float(rows["loss"].max())
        accuracies = Chart("epoch", "accuracy, %", last, whole=True)
        for kind in ("clean", "robust"):
            if points := _points(rows, f"{kind}_accuracy"):
                accuracies.add(kind, points)
        yield Panel(about, accuracies)
        if highest > TINY and rows["loss"].min() >= 0:
            loss = Chart("epoch", "training loss", last, whole=True, height=highest)
            loss.add("training loss", _points(rows, "loss"))
            yield Panel(about, loss)


def _points(rows: pd.DataFrame, column: str) -> list[Point]:
    """Of the epochs in which there is a figure."""
    known = rows[rows[column].notna()]
    return [Point(*values) for values in known[["epoch", column]].to_numpy().tolist()]


def _draw(chart: Chart, rows: pd.DataFrame, columns: list[str]) -> None:
    """A curve an attack."""
    for attack, line in rows.groupby("attack", sort=False):
        points = [Point(*values) for values in line[columns].to_numpy().tolist()]
        chart.add("all attacks" if attack == ALL else str(attack), points)


def _distances(part: Part) -> Iterator[Panel]:
    """Histograms below each other, each as high as its highest bar: a panel a leaderboard row."""
    for rows in _lines(part.tables["distances"]):
        bars = []
        for attack, line in rows.groupby("attack", sort=False):
            steps = "".join(f"V{1 - share:.3f}h1" for share in (line["share"] / line["share"].max()).tolist())
            bars.append((str(attack), f"M0,1{steps}V1Z", int(line["inputs"].sum())))
        axis = (DISTANCES[rows["norm"].iloc[0]], f"{rows['up_to'].max():.4g}")
        yield Panel(part.about(records(rows.head(1))[0]), bars=bars, axis=axis)


def _lines(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """What belongs to each leaderboard row."""
    if len(frame):
        for _, rows in frame.groupby("line", sort=False):
            yield rows


def _gallery(parts: Sequence[Part], data_dir: Path | None) -> Iterator[tuple[Row, list[gallery.Shown]]]:
    """What is shown of each leaderboard row."""
    home = {id(entry): part for part in parts for entry in part.results.entries}
    shown = gallery.pictures([entry for part in parts for entry in part.results.entries], data_dir)
    for _, row in groupby(shown, key=lambda one: (home[id(one.entry)].name, one.entry.line)):
        first, *others = row
        yield home[id(first.entry)].of(first.entry), [first, *others]


# Texts


def records(frame: pd.DataFrame) -> list[Row]:
    """The rows of a table, with None where there is nothing."""
    return cast("list[Row]", _filled(frame).to_dict("records"))


def _filled(frame: pd.DataFrame) -> pd.DataFrame:
    """With None in place of every other way to say nothing."""
    return frame.astype(object).where(frame.notna(), None)


def threat_of(row: Row) -> str:
    return f"{row['norm']} {eps_text(row['eps'])}"


def _span(low: float | None, high: float | None) -> str:
    """An interval in percent, empty where there is none."""
    return "" if low is None or high is None else f"{exports.percent(low)} to {exports.percent(high)}"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else exports.percent(fraction)


def _plain(value: Any) -> str:
    """A figure of a table as text: at most six digits, and nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
