"""The leaderboard as others want it: Markdown, LaTeX with booktabs, and RobustBench's JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustbench_lite import model_info

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS: dict[str, Callable[[Any], str]] = {
    "protocol": lambda row: row.get("protocol", ""),
    "block": lambda row: row.get("block", ""),
    "rank": lambda row: number(row["rank"], "d"),
    "source": lambda row: row.get("source", ""),
    "data set": lambda row: row["dataset"],
    "defense": lambda row: row["defense"] if row["adaptive"] else f"{row['defense']} (blind attacks)",
    "model": lambda row: row["model"],
    "threat": lambda row: f"{row['norm']} {model_info.eps_text(row['eps'])}",
    "seed": lambda row: number(row["seed"], "d"),
    "n": lambda row: number(row["examples"], "d"),
    "clean, %": lambda row: percent(row["clean_accuracy"]),
    "certified, %": lambda row: _interval(row, "certified"),
    "robust, %": lambda row: _interval(row, "robust"),
    "p above": lambda row: number(row["p_above"], ".2g"),
    "worst attack": lambda row: row["worst_attack"],
    "unknown": lambda row: number(row["unknown"], "d"),
    "flags": lambda row: row["flags"],
}
_RIGHT = {"rank", "seed", "n", "clean, %", "certified, %", "robust, %", "p above", "unknown"}
_BEST = "robust, %"  # in bold at rank 1

_LATEX = {character: f"\\{character}" for character in "{}$&#%_"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    '"': r"\textquotedbl{}",
}


def markdown(board: pd.DataFrame) -> str:
    """A table of GitHub's Markdown; names are shown as they are."""

    def escaped(text: str) -> str:
        return re.sub(r"([\\`*_\[\]<>|~&$#!])", r"\\\1", text)

    heads = _heads(board)
    lines = [[f"**{cell}**" if best else cell for cell, best in line] for _, line in _lines(board, heads, escaped)]
    rule = ["---:" if head in _RIGHT else "---" for head in heads]
    return "".join(f"| {' | '.join(line)} |\n" for line in [heads, rule, *lines])


def latex(board: pd.DataFrame) -> str:
    """A ``tabular`` with the rules of booktabs; names are shown as they are."""

    def escaped(text: str) -> str:
        plain = "".join(_LATEX.get(character, character) for character in text)
        plain = re.sub("-(?=-)", "-{}", plain)  # two would be a dash
        return re.sub(r"^(?=[\[*])", "{}", plain)  # these would belong to the end of the line above

    heads, made, last = _heads(board), [], None
    for block, line in _lines(board, heads, escaped):
        made += [r"\midrule"] * (block != last)
        made.append(" & ".join(rf"\textbf{{{cell}}}" if best else cell for cell, best in line) + r" \\")
        last = block
    return "\n".join(
        [
            r"% in the preamble: \usepackage{booktabs} \usepackage[T1]{fontenc} \usepackage{textcomp}",
            rf"\begin{{tabular}}{{{''.join('r' if head in _RIGHT else 'l' for head in heads)}}}",
            r"\toprule",
            " & ".join(map(escaped, heads)) + r" \\",
            *made,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


FORMATS: dict[str, Callable[[pd.DataFrame], str]] = {".md": markdown, ".tex": latex, ".json": model_info.text}


def check(file: Path) -> None:
    """Sees that a file's name says what to write."""
    if file.suffix.lower() not in FORMATS:
        raise ValueError(f"--table writes {', '.join(FORMATS)}; {file.name} ends in none of them")


def text(board: pd.DataFrame, file: Path) -> str:
    """The leaderboard in the format that the file's name asks for."""
    return FORMATS[file.suffix.lower()](board)


def _heads(board: pd.DataFrame) -> list[str]:
    """The columns that say something."""
    told = [head for head, cell in _COLUMNS.items() if any(cell(row) for _, row in board.iterrows())]
    return [head for head in told if head != "seed" or board["seed"].nunique() > 1]


def _lines(
    board: pd.DataFrame, heads: list[str], escaped: Callable[[str], str]
) -> Iterator[tuple[tuple[Any, ...], list[tuple[str, bool]]]]:
    """For each row the block in which it is ranked, and its cells: what they show, and whether it is the best."""
    keys = [name for name in ("protocol", "block", *model_info.BLOCK) if name in board]
    for _, row in board.iterrows():
        cells = [_one_line(_COLUMNS[head](row)) for head in heads]
        best = bool(row["adaptive"]) and row["rank"] == 1
        yield tuple(row[keys]), [(escaped(cell), best and head == _BEST) for head, cell in zip(heads, cells)]


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def percent(fraction: float) -> str:
    """Empty where there is none."""
    return number(100 * fraction, ".1f")


def _interval(row: Any, kind: str) -> str:
    """An accuracy in percent, with its interval where there is one."""
    low, high = (percent(row[f"{kind}_{end}"]) for end in ("low", "high"))
    return percent(row[f"{kind}_accuracy"]) + f" [{low}, {high}]" * bool(low)


def number(value: Any, form: str) -> str:
    """Empty where there is none."""
    import pandas as pd

    return "" if pd.isna(value) else format(value, form)
