"""What the command line shows: progress while it runs, then tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from robustbench_lite.chance import wilson
from robustbench_lite.comparison import LEVEL, changed
from robustbench_lite.curves import named
from robustbench_lite.exports import number, percent
from robustbench_lite.runner import Watcher
from robustbench_lite.threat import ThreatModel
from robustbench_lite.training import Progress as Training

if TYPE_CHECKING:
    import pandas as pd

    from robustbench_lite.forecast import Ahead

ROBUST, CERTIFIED = "robust [95 %]", "certified [95 %]"
WHOLE = {ROBUST, CERTIFIED, "threat", "data set", "attack", "defense"}  # columns whose cells are not broken over lines
FLAGGED = " !"  # marks a figure that an audit doubts
WIDE = 120  # characters, from which on a line has room for the leaderboard's costs


class Display(Watcher):
    """Progress bars on stderr for as long as its context lasts; notes stay on the screen."""

    def __init__(self, console: Console, quiet: bool, verbose: bool) -> None:
        self.console, self.quiet, self.verbose = console, quiet, verbose
        columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
        times = [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[state]}")]
        self.bars = Progress(
            *columns, *times, console=console, disable=quiet or not console.is_terminal, transient=True
        )
        self.cells: TaskID | None = None
        self.trainings: dict[str, TaskID] = {}
        self.finished = 0

    def __enter__(self) -> Display:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def note(self, text: str) -> None:
        if not self.quiet:
            self.bars.console.print(Text(f"note: {text}", style="yellow"), soft_wrap=True)

    def training(self, defense: str, progress: Training) -> None:
        if defense not in self.trainings:
            total = progress.epochs * progress.steps
            self.trainings[defense] = self.bars.add_task(f"training {defense}", total=total, state="")
        state = (
            f"epoch {progress.epoch + 1}/{progress.epochs}  loss {progress.loss:.3f}  accuracy {progress.accuracy:.1%}"
        )
        if progress.measured:
            state += f"  clean {progress.measured.clean:.1%}"
            if progress.measured.robust is not None:
                state += f"  robust {progress.measured.robust:.1%}"
        done = progress.epoch * progress.steps + progress.step
        self.bars.update(self.trainings[defense], completed=done, state=state)
        if self.verbose and progress.step == progress.steps:
            self.bars.console.print(Text(f"training {defense}: {state}"), soft_wrap=True)

    def planned(self, inputs: int) -> None:
        self.cells = self.bars.add_task("working", total=inputs, state="")

    def advanced(self, defense: str, plugin: str, threat: ThreatModel, inputs: int) -> None:
        assert self.cells is not None
        self.finished += inputs
        self.bars.update(self.cells, description=f"{plugin} on {defense}, {threat}", advance=inputs)
        if self.verbose and inputs:
            self.bars.console.print(Text(f"{plugin} on {defense}, {threat}: {inputs} inputs"), soft_wrap=True)


def interval(fraction: float, examples: int) -> str:
    """A percentage with its 95 % Wilson interval."""
    low, high = wilson(round(fraction * examples), examples)
    return f"{percent(fraction)} [{percent(low)}, {percent(high)}]"


def show_results(console: Console, matrix: pd.DataFrame, board: pd.DataFrame) -> None:
    """A matrix for each threat model, then the leaderboard; on a narrow screen without what it cost."""
    keys = ["dataset", "norm", "eps"]
    attacks = [column for column in matrix.columns if column not in (*keys, "defense", "adaptive")]
    for (dataset, norm, eps), block in matrix.groupby(keys, sort=False):
        ran = [attack for attack in attacks if block[attack].notna().any()]
        here = board[(board["dataset"] == dataset) & (board["norm"] == norm) & (board["eps"] == eps)]
        examples = here.groupby("defense")["examples"].min().to_dict()
        lines = [
            [_defense(row), *(_cell(row[attack], examples[row["defense"]]) for attack in ran)]
            for _, row in block.iterrows()
        ]
        title = f"Robust accuracy, % [95 % interval]: {dataset}, {norm} eps {eps:g}"
        console.print(table(title, ["defense", *ran], lines))
    wide, proved = console.width >= WIDE, bool(board["certified_accuracy"].notna().any())
    columns: dict[str, Callable[[Any], str]] = {
        "rank": lambda row: str(row["rank"]) if row["adaptive"] else "",
        "source": lambda row: row.get("source", ""),
        "defense": _defense,
        "threat": lambda row: f"{row['norm']} {row['eps']:g}",
        "n": lambda row: number(row["examples"], "d"),
        "clean": lambda row: percent(row["clean_accuracy"]),
        CERTIFIED if wide else "proved": lambda row: _cell(
            row["certified_accuracy"], row["examples"] if wide else None
        ),
        ROBUST: lambda row: _cell(row["robust_accuracy"], row["examples"]) + FLAGGED * bool(row["flags"]),
        "one draw": lambda row: _draw(row),
        "p above": lambda row: number(row["p_above"], ".2g"),
        "worst attack": lambda row: row["worst_attack"],
        "detected": lambda row: _cell(row["detection_rate"], None),
        "false pos.": lambda row: _cell(row["false_positives"], None),
        "threshold": lambda row: number(row["threshold"], ".4f"),
        "unknown": lambda row: number(row["unknown"], "d"),
        "forwards": lambda row: number(row["forwards"], ".1f"),
        "backwards": lambda row: number(row["backwards"], ".1f"),
        "seconds": lambda row: number(row["seconds"], ".1f"),
    }
    hidden = set() if proved else {CERTIFIED, "proved"}
    hidden |= set() if "source" in board else {"source"}
    hidden |= set() if wide and board["draws"].notna().any() else {"one draw"}
    if not wide or not board["p_above"].notna().any():
        hidden |= {"p above"}
    if not wide or not board["threshold"].notna().any():
        hidden |= {"detected", "false pos.", "threshold"}
    hidden |= set() if wide else {"forwards", "backwards", "seconds"}
    heads = [head for head in columns if head not in hidden]
    lines = [[columns[head](row) for head in heads] for _, row in board.iterrows()]
    title = "Leaderboard: what survives every attack, %"
    spare = ("rank", "worst attack")  # the order says the one, and the matrix above how each attack did
    console.print(table(title, heads, lines, spare, console.width))
    for _, row in board[board["flags"] != ""].iterrows():
        where = f"{_defense(row)}, {row['norm']} {row['eps']:g}"
        console.print(f"{FLAGGED.strip()} {where}: {row['flags']}", style="yellow", soft_wrap=True)


def show_curves(console: Console, frame: pd.DataFrame) -> None:
    """A row an eps and a column a curve, in as many tables as the screen asks for."""
    for _, panel in frame.groupby(["dataset", "norm", "seed"], sort=False):
        curves = named(panel)
        first, fit = panel.iloc[0], max(1, (console.width - 8) // 22)
        title = f"Robust accuracy, % [95 % interval]: {first['dataset']}, {first['norm']}"
        for start in range(0, len(curves), fit):
            here = curves[start : start + fit]
            cells = {
                (k, row["eps"]): interval(row["robust_accuracy"], row["examples"])
                for k, (_, _, rows) in enumerate(here)
                for _, row in rows.iterrows()
            }
            lines = [
                [f"{eps:g}", *(cells.get((k, eps), "") for k in range(len(here)))]
                for eps in sorted({eps for _, eps in cells})
            ]
            heads = ["eps", *(f"{defense}\n{attack}" for attack, defense, _ in here)]
            console.print(table(title, heads, lines))


def show_certificates(console: Console, certificates: pd.DataFrame) -> None:
    """A line a defense and certifier; on a narrow screen without interval, counts and seconds."""
    wide = console.width >= WIDE
    lines = [
        [
            row["defense"],
            row["certifier"],
            f"{row['norm']} {row['eps']:g}",
            str(row["examples"]),
            percent(row["clean_accuracy"]),
            _cell(row["certified_accuracy"], row["examples"] if wide else None),
            number(row["mean_margin"], ".2f"),
            f"{row['mean_radius']:.4f}",
            *(str(row[status]) for status in ("verified", "falsified", "unknown", "unsupported")),
            f"{row['seconds']:.1f}",
        ]
        for _, row in certificates.iterrows()
    ]
    heads = ["defense", "method", "threat", "n", "clean", CERTIFIED if wide else "certified", "margin", "radius"]
    if wide:
        heads += ["verified", "falsified", "unknown", "unsupported", "seconds"]
    title = "Certificates: what is proved, %; means of margin and radius"
    console.print(table(title, heads, [line[: len(heads)] for line in lines], ("margin",), console.width))


def show_comparison(console: Console, comparison: pd.DataFrame) -> None:
    """What differs, a line an accuracy, and how many do not."""
    differs = changed(comparison)
    lines = [
        [
            row["dataset"],
            _defense(row) + (" (another model)" * (number(row["same_model"], "") == "False")),
            f"{row['norm']} {row['eps']:g}",
            f"{row['accuracy']}, {row['plugin']}" if row["plugin"] else row["accuracy"],
            str(row["examples"]),
            _cell(row["before"], None) or "-",
            _cell(row["after"], None) or "-",
            number(row["lost"], "d") and f"-{row['lost']} +{row['gained']}",
            number(row["p_value"], ".2g") + " *" * bool(row["p_value"] < LEVEL),
        ]
        for _, row in comparison[differs].iterrows()
    ]
    if lines:
        heads = ["data set", "defense", "threat", "accuracy", "n", "before", "after", "inputs", "p"]
        console.print(table("What changed, %; * more than noise (McNemar's exact test at 5 %)", heads, lines))
    console.print(f"{len(lines)} of {len(comparison)} accuracies differ", soft_wrap=True)


def show_forecast(console: Console, blocks: Mapping[str, Sequence[Ahead]], memory: int | None) -> None:
    """A line a cell, block by block, how long all may take, and what a process takes of memory (bytes)."""
    heads = ["defense", "attack or certifier", "threat", "missing", "about"]
    for name, cells in blocks.items():
        lines = [
            [one.defense, one.plugin, str(one.threat), f"{one.missing} of {one.inputs}", _about(one)] for one in cells
        ]
        console.print(table(f"Block {name}" if name else "What is to be run", heads, lines))
    cells = [one for block in blocks.values() for one in block]
    missing = [one for one in cells if one.missing]
    known = [one.seconds for one in missing if one.seconds is not None]
    left = f", and {len(missing) - len(known)} of which nothing can be said" if len(known) < len(missing) else ""
    console.print(f"{len(missing)} of {len(cells)} cells are to be run: about {_duration(sum(known))}{left}")
    if memory is not None:
        console.print(f"Memory: {memory / 2**20:.0f} MB to find this out, and about as much for each worker.")
    if missing:
        console.print(
            "This is rough: the queries of what is stored, or else of inputs that hold, times what a query of each "
            "defense takes here; what is broken takes less.",
            soft_wrap=True,
        )


def _about(ahead: Ahead) -> str:
    return ahead.why if ahead.seconds is None else _duration(ahead.seconds) if ahead.missing else ""


def _duration(seconds: float) -> str:
    """Two figures of it: 40 s, 12 min, 3.5 h."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} s"


def _defense(row: Any) -> str:
    return str(row["defense"] if row["adaptive"] else f"{row['defense']} (blind attacks)")


def _draw(row: Any) -> str:
    """Of a stochastic defense the robust accuracy of a single draw, and its deviation."""
    if row["draw_mean"] != row["draw_mean"]:
        return ""
    return f"{percent(row['draw_mean'])} ± {percent(row['draw_std'])}"


def _cell(fraction: float, examples: int | None) -> str:
    """Empty where there is none; with its interval where ``examples`` are given."""
    if fraction != fraction:
        return ""
    return percent(fraction) if examples is None or not number(examples, "d") else interval(fraction, examples)


def table(
    title: str, heads: Sequence[str], lines: Iterable[Sequence[Any]], spare: Sequence[str] = (), width: int = 0
) -> Group:
    """A table in which names from elsewhere are shown as they are, never read as markup; without the ``spare`` columns
    where words would have to be cut for it to be no wider than ``width``."""
    columns = [tuple(map(str, column)) for column in zip(heads, *lines)]
    if spare and _least(columns) > width:
        columns = [column for column in columns if column[0] not in spare]
    made = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for head, *_ in columns:
        made.add_column(Text(head), overflow="fold", no_wrap=head in WHOLE)
    for line in [*zip(*columns)][1:]:
        made.add_row(*map(Text, line))
    return Group(Text(title, style="italic"), made)


def _least(columns: Sequence[Sequence[str]]) -> int:
    """How wide a table of these columns, heads included, is if no word is cut."""
    cells = [column if column[0] in WHOLE else " ".join(column).split() for column in columns]
    return sum(max(map(len, words), default=0) + 2 for words in cells)
