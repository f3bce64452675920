"""Leaderboards as Markdown, LaTeX and RobustBench's JSON, from rows made up by hand; names are hostile."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from robustbench_lite import exports, model_info
from robustbench_lite.leaderboard import LEADERBOARD, leaderboard
from robustbench_lite.matrix import Results, write_table
from tests.test_leaderboard import entry, proof

HOSTILE = [
    r"a|b\|c & d_e%f#g$h{i}~j^k<script>alert('1')</script>",
    r"\input{/etc/passwd} \\[2em] --- **bold** `code` [link](x) ![image](y) &lt; \| \ ",
    "[first] *second*\n\\end{tabular}\r\t| third\x1b[0m",
]
KEYS = (
    "link name authors additional_data number_forward_passes dataset venue architecture norm eps clean_acc reported "
    "autoattack_acc footnote unreliable"
)


def board(**others) -> pd.DataFrame:
    names = zip(HOSTILE, ("hhhb", "hhbb", "wbbb"))
    return leaderboard([entry(letters, attack="a|b", defense=name, **others) for name, letters in names])


def shown(name: str) -> str:
    """A name as a table should show it: on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in name).split())


def parsed(text: str) -> list[list[str]]:
    """The cells of a Markdown table, as an independent parser shows them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    assert {token.type for token in tokens} <= {
        f"{part}_{side}" for part in ("table", "thead", "tbody", "tr", "th", "td") for side in ("open", "close")
    } | {"inline"}
    lines: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            lines.append([])
        elif token.type == "inline":
            children = token.children or []
            assert {child.type for child in children} <= {"text", "text_special", "strong_open", "strong_close"}
            bold = any(child.type == "strong_open" for child in children)
            lines[-1].append("".join(child.content for child in children) + "!" * bold)
    return lines


def typeset(text: str) -> list[list[str]]:
    """The cells of a tabular as TeX would show them, read by what each command stands for."""
    words = {
        "textbackslash": "\\",
        "textasciitilde": "~",
        "textasciicircum": "^",
        "textless": "<",
        "textgreater": ">",
        "textbar": "|",
        "textasciigrave": "`",
        "textquotesingle": "'",
        "textquotedbl": '"',
    }
    body = text.split("\\toprule\n")[1].split("\\bottomrule")[0].replace("\\midrule\n", "")
    lines: list[list[str]] = []
    for line in body.splitlines():
        assert line.endswith(r" \\")
        cells, rest = [""], line.removesuffix(r" \\")
        while rest:
            if found := re.match(r"\\([a-z]+)\{\}", rest):
                cells[-1] += words[found[1]]
            elif found := re.match(r"\\textbf\{([^{}\\]*)\}", rest):
                cells[-1] += found[1] + "!"
            elif found := re.match(r"\\([{}$&#%_])", rest):
                cells[-1] += found[1]
            elif found := re.match(r"\{\}", rest):
                pass
            elif found := re.match(" & ?", rest):
                cells.append("")
            else:
                found = re.match(r"[^\\{}$&#%_~^<>|`'\"]", rest)
                assert found, rest
                cells[-1] += found[0]
            rest = rest[found.end() :]
        lines.append(cells)
    return lines


@pytest.mark.parametrize(("write", "read"), [(exports.markdown, parsed), (exports.latex, typeset)])
def test_names_are_shown_as_they_are_and_the_best_in_bold(write, read):
    """3 of 4, 2 of 4 and 0 of 4 are robust; the Wilson intervals are those of the leaderboard."""
    heads, *lines = read(write(board(eps=8 / 255)))
    assert heads == [
        *("rank", "data set", "defense", "model", "threat", "n"),
        *("clean, %", "robust, %", "p above", "worst attack", "unknown"),
    ]
    assert [line[2] for line in lines] == [shown(name) for name in HOSTILE]
    assert [line[0] for line in lines] == ["1", "2", "3"]
    assert {line[4] for line in lines} == {"linf 8/255"}
    assert {line[9] for line in lines} == {"a|b"}
    assert [line[7] for line in lines] == ["75.0 [30.1, 95.4]!", "50.0 [15.0, 85.0]", "0.0 [0.0, 49.0]"]
    assert [line[8] for line in lines] == ["", "1", "0.5"]


def test_latex_keeps_dashes_apart_and_lines_from_taking_options():
    text = exports.latex(board(dataset="[npz]--x"))
    assert "--" not in text.split("\\toprule")[1]
    assert not re.search(r"(\\\\|rule)\s*[\[*]", text)
    blind = exports.latex(leaderboard([entry("hb", dataset="*npz", adaptive=False)]))  # no rank: the name comes first
    assert "\\midrule\n{}*npz & madry (blind attacks) & " in blind


def test_blocks_are_set_apart_and_columns_that_say_nothing_left_out():
    entries = [entry("hb", defense=name, eps=eps) for eps in (0.1, 0.2) for name in ("a", "b")]
    text = exports.latex(leaderboard(entries, [proof("vuw"), proof("vu", defense="a")], {entries[0].line: "eps"}))
    assert text.count("\\midrule") == 2
    assert text.count("\\textbf{50.0 ") == 4  # ties share the rank
    heads, *lines = typeset(text)
    assert heads[-1] == "flags"
    assert [line[-1] for line in lines] == ["eps", "", "", ""]
    assert "certified, %" in heads
    assert "certified, %" not in typeset(exports.latex(leaderboard(entries)))[0]
    seeds = leaderboard([entry("hb", seed=seed) for seed in (0, 7)])
    assert [line[5] for line in parsed(exports.markdown(seeds))] == ["seed", "0", "7"]


def test_the_blocks_of_a_suite_are_ranked_by_themselves():
    boards = [board().assign(protocol="mine 1", block=name) for name in ("linf", "queries")]
    together = pd.concat(boards, ignore_index=True)[["protocol", "block", *LEADERBOARD]]
    heads, *lines = typeset(exports.latex(together))
    assert heads[:3] == ["protocol", "block", "rank"]
    assert [line[1:3] for line in lines[2:4]] == [["linf", "3"], ["queries", "1"]]
    assert exports.latex(together).count("\\midrule") == 2


# RobustBench's entries


def theirs(folder: Path, name: str, where: str = "digits/Linf", **others: object) -> None:
    made = {"name": "A title", "dataset": "digits", "architecture": "WRN", "eps": "8/255", "clean_acc": "95.19"}
    made |= {"reported": "80.0", "autoattack_acc": "70.08", "additional_data": False, "link": "", "venue": "N/A"}
    file = folder / where / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made | others))


def read(folder: Path) -> tuple[list[dict], list[str]]:
    notes: list[str] = []
    return model_info.read(folder, notes.append), notes


def test_what_others_report_is_ranked_beside_what_was_evaluated(tmp_path):
    """Ours are 3/4, 2/4 and 0/4; theirs 0.7008, the lower of two (0.5), and one of no interest each."""
    theirs(tmp_path, "Else2020")
    theirs(tmp_path, "Known2021", autoattack_acc=60, external="50.0", unreliable=True, eps="0.03137254901960784")
    theirs(tmp_path, "Other2022", "digits/L2")
    theirs(tmp_path, "Other2022", "mnist/Linf", dataset="mnist")
    theirs(tmp_path, "Other2022", eps="4/255")
    theirs(tmp_path, "Corrupt", "digits/corruptions", eps=None, autoattack_acc=None, corruptions_acc="3")
    ours = board(eps=8 / 255)
    reported, notes = read(tmp_path)
    assert notes == []
    both = model_info.joined(ours, reported)
    assert tuple(both.columns) == ("rank", "source", *LEADERBOARD[1:])
    names = [HOSTILE[0], "Else2020", HOSTILE[1], "Known2021", HOSTILE[2]]
    assert both["defense"].tolist() == names
    assert both["rank"].tolist() == [1, 2, 3, 3, 5]
    assert both["source"].tolist() == ["evaluated", "reported", "evaluated", "reported", "evaluated"]
    assert both["robust_accuracy"].tolist() == [0.75, 0.7008, 0.5, 0.5, 0.0]
    assert both["worst_attack"].tolist() == ["a|b", "autoattack", "a|b", "external", "a|b"]
    assert both["flags"].tolist() == ["", "", "", "unreliable", ""]
    there = both[both["source"] == "reported"]
    unsaid = ["examples", "robust_low", "robust_high", "parameters", "unknown", "seed", "p_above", "seconds"]
    assert there[unsaid].isna().all().all()
    assert both["p_above"].isna().all()  # another's row stands between any two of ours
    assert both["examples"].dropna().tolist() == [4, 4, 4]
    (first,) = (row for row in reported if row["defense"] == "Else2020")
    one = model_info.joined(ours, [first | {"robust_accuracy": 0.9}])
    np.testing.assert_array_equal(one["p_above"], [np.nan, *ours["p_above"]])
    cells = parsed(exports.markdown(both))
    assert cells[2][:4] == ["2", "reported", "digits", "Else2020"]
    assert cells[2][cells[0].index("robust, %")] == "70.1"
    assert model_info.joined(ours, []).drop(columns="source").to_csv() == ours.to_csv()


def test_entries_are_written_with_their_keys_and_read_again(tmp_path):
    entries = [
        entry("hhhw", "autoattack", defense=HOSTILE[0], eps=8 / 255),
        entry("hhbw", "pgd", defense=HOSTILE[0], eps=8 / 255),
        entry("hbbh", "autoattack:steps=10", defense="b", eps=8 / 255),
        entry("hhhh", "pgd", defense="b", eps=8 / 255, adaptive=False),
    ]
    ours = leaderboard(entries, flags={entries[2].line: "effort"})
    (tmp_path / "shared").mkdir()
    write_table(ours, tmp_path / "shared" / "ours.json")
    first, second = json.loads((tmp_path / "shared" / "ours.json").read_text())
    assert " ".join(first) == KEYS
    assert set(KEYS.split()) | {"external"} == set(second)
    said = ("name", "architecture", "norm", "eps", "clean_acc", "reported", "autoattack_acc", "unreliable")
    assert [first[key] for key in said] == [HOSTILE[0], "mlp", "Linf", "8/255", "75.00", "50.00", "50.00", False]
    assert second["autoattack_acc"] is None  # not the standard cascade
    assert (second["external"], second["unreliable"]) == ("50.00", True)
    assert second["footnote"].startswith("On 4 test images, against autoattack:steps=10; 95 % interval 15.00 to 85.00;")
    reported, notes = read(tmp_path)
    assert notes == []
    both = model_info.joined(ours[ours["adaptive"].astype(bool)], reported)
    for name in ("dataset", "defense", "model", "norm", "eps", "clean_accuracy", "robust_accuracy"):
        kept = [both.loc[both["source"] == source, name].tolist() for source in ("evaluated", "reported")]
        assert kept[0] == kept[1], name
    assert len(json.loads(model_info.text(both))) == 2  # what others report is theirs to publish


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        ("3", "an entry must be an object"),
        ('{"name": ""}', "it lacks dataset, architecture, eps, clean_acc"),
        ({"autoattack_acc": None}, "it has neither autoattack_acc nor external"),
        ({"autoattack_acc": "101"}, "an accuracy must be 0 to 100 %, not 101"),
        ({"clean_acc": "NaN"}, "wants a number"),
        ({"clean_acc": True}, "wants a number"),
        ({"eps": [8, 255]}, "wants a number"),
        (b"\xff", "'utf-8' codec"),
    ],
    ids=str,
)
def test_an_entry_that_cannot_be_used_is_named_in_one_line(tmp_path, content, why):
    theirs(tmp_path, "Good2020")
    if isinstance(content, dict):
        theirs(tmp_path, "Bad2020", **content)
    else:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "digits" / "Linf" / "Bad2020.json").write_bytes(data)
    rows, (note,) = read(tmp_path)
    assert [row["defense"] for row in rows] == ["Good2020"]
    assert "Bad2020.json cannot be used and is left out" in note
    assert why in note
    assert "\n" not in note


def test_a_folder_without_entries_and_a_name_without_format_are_errors(tmp_path):
    with pytest.raises(ValueError, match="there are no entries of RobustBench"):
        read(tmp_path / "none")
    with pytest.raises(ValueError, match=r"--table writes .md, .tex, .json; board.xlsx ends in none of them"):
        exports.check(tmp_path / "board.xlsx")


@pytest.mark.parametrize(("eps", "text"), [(8 / 255, "8/255"), (0.2, "0.2"), (1.0, "1"), (0.1234567, "0.1234567")])
def test_eps_is_written_as_people_write_it(eps, text):
    assert model_info.eps_text(eps) == text


def test_names_that_no_encoding_holds_are_written_all_the_same(tmp_path):
    for suffix, name in ((".md", "net .py:load"), (".TEX", "net .py:load"), (".json", r"net\udcff.py:load")):
        write_table(leaderboard([entry("hb", model="net\udcff.py:load")]), tmp_path / f"board{suffix}")
        assert name in (tmp_path / f"board{suffix}").read_text()


def test_a_board_without_rows_is_a_table_without_rows():
    empty = Results((), (proof("vu"),)).leaderboard()
    assert json.loads(model_info.text(empty)) == []
    assert all(write(empty) for write in (exports.markdown, exports.latex))
    assert len(model_info.joined(empty, [])) == 0
