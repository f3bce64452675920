"""Whatever is typed gets an answer or one line, and whatever a suite's file says."""

import shlex
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from robustbench_lite import cli, data

MODEL = """
import torch
from torch import nn


def load():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


def predict(images):
    return load()(torch.from_numpy(images).float()).argmax(1).numpy()


def broken():
    raise KeyError("weights")


number = 3
"""
WORDS = st.text("".join(set(string.printable) - set("/~")), max_size=10)
NUMBERS = st.sampled_from(
    ["0", "-1", "1", "2.5", "nan", "inf", "-inf", "1e400", "9" * 30, "0x1", "1_0", "٣", "8/255", "1/0"]
)
JUNK = WORDS | NUMBERS
FILES = st.sampled_from(["", ".", "t.csv", "t.json", "t.md", "t.tex", "t.svg", "t.html", "t.npz", "no/t.csv", "taken"])
SPECS = st.sampled_from(
    [
        *(
            "fgsm",
            "r-fgsm,fgsm",
            "pgd:steps=2",
            "pgd:steps=0",
            "pgd:steps=nan",
            "pgd:step=2",
            "pdg",
            "pgd:steps",
            "pgd(",
            ",",
        ),
        *(
            "square:queries=3",
            "mi-fgsm:steps=1,decay=-1",
            "transfer:source=none",
            "transfer:source=(",
            "foolbox/none",
            "fgsm:",
        ),
        *("cw:steps=2,search_steps=1", "deepfool:steps=2", "fab:steps=2", "one-pixel:generations=1", "patch:steps=1"),
    ]
)
PROVERS = st.sampled_from(
    ["ibp", "crown", "best", "wong-kolter", "crown,ibp", "lipschitz", "smoothing:n=9", "milp", "ipb", "lp:x=1"]
)
OWN: dict[str, st.SearchStrategy[str]] = {
    "--attack": SPECS,
    "--certify": PROVERS,
    "--method": PROVERS,
    "--defense": st.sampled_from(
        ["none", "smoothed:sigma=0.1,draws=2", "smoothed", "none+smoothed", "+", "smothed", "smoothed:sigma=-1"]
    ),
    "--dataset": st.sampled_from(["digits", "npz:own.npz", "npz:", "npz:model.py", "folder:.", "folder:no", "digit"]),
    "--threat": st.sampled_from(
        ["linf:0.1", "l2:0.5,linf:8/255", "l0:3", "l1:2", "patch:0.1", "linf", "linf:", "linf:-1", "l3:1", "l0:0"]
    ),
    "--norm": st.sampled_from(["linf", "l2", "l1", "l0", "patch", "l3"]),
    "--eps": st.sampled_from(
        ["0.1", "8/255", "0:0.2:0.1", "0,0.1", "0:1:0", "1:0:0.1", "0:1:1e-9", "0:1", "::", "0.1,0.1"]
    ),
    "--n": st.sampled_from(["3", "20", "0", "-5", "700", "1e1"]),
    "--target": st.sampled_from(["next", "random", "least-likely", "3", "10", "-1"]),
    "--adaptive": st.sampled_from(["on", "off", "both", "none"]),
    "--eot": st.sampled_from(["1", "2", "0", "-1", "x"]),
    "--plugin": st.sampled_from(["model.py", "no.py", "own.npz", "."]),
    "--model": st.sampled_from(
        ["model.py:load", "model.py:broken", "model.py:number", "model.py:no", "model.py", "no.py:load", "onnx:own.npz"]
    ),
    "--weights": st.sampled_from(["own.npz", "no.safetensors", ".", "model.py"]),
    "--mean": st.sampled_from(["0.5", "0.5,0.5,0.5", ",", "x"]),
    "--std": st.sampled_from(["0.5", "0", "-1", "0.5,0.5,0.5"]),
    "--bounds": st.sampled_from(["0:1", "0:255", "-1:1", "1:0", "0", ":", "nan:1"]),
    "--access": st.sampled_from(
        ["labels", "scores", "labels:queries=5", "labels:rate=0", "scores:rate=nan", "gradients"]
    ),
    "--device": st.sampled_from(["cpu", "auto", "cuda:7", "tpu"]),
    "--precision": st.sampled_from(["float32", "bf16", "fp16"]),
    "--layout": st.sampled_from(["as-built", "channels-last", "last"]),
    "--workers": st.sampled_from(["0", "-1", "x", "1.5"]),
    "--timeout": st.sampled_from(["0", "-1", "nan", "x"]),
    "--threads": st.sampled_from(["1", "0", "-1", "x"]),
    "--fail-below": st.sampled_from(["0.5", "0", "1", "2", "-1"]),
    "--format": st.sampled_from(["pdf", "svg", "gif"]),
    "--with-robustbench": st.sampled_from(["no", "own.npz"]),
    "suite": st.sampled_from(["own.toml", "smoke.toml", "no", "mnst", "model.py", "."]),
    "folder": st.sampled_from(["runs", "no", ".", "model.py"]),
    "before": st.sampled_from(["runs", "no", "."]),
    "after": st.sampled_from(["runs", "no", "."]),
    "kind": st.sampled_from(["attack", "defense", "certifier", "norm"]),
    "name": st.sampled_from(["pgd", "pdg", "own", "ibp", "standard", "foolbox", "class", "../own", "Own"]),
}
SMALL = {"--eot", "--workers", "--timeout", "--threads"}  # whose numbers may cost what they say
UNTRIED = {"--ray", "--isolate", "--version"}  # start processes that take seconds; ends before all else
SUITE = """
name = "own"
version = 1
description = "A linear model."
dataset = "digits"
defense = ["standard"]

[block.linf]
threat = ["linf:0.1"]
attack = ["fgsm"]
n = 10
"""
BASE = {
    "--dataset": "digits",
    "--model": "model.py:load",
    "--n": "10",
    "--device": "cpu",
    "--attack": "fgsm",
    "--method": "ibp",
    "--eps": "0.1",
}
ROOT = typer.main.get_command(cli.app)
COMMANDS: dict[str, Any] = {"": ROOT, **ROOT.commands}
LONG = {"train"}  # trains for whatever is asked


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """A command with options of its own, most of which are sound, and some that are not its own."""
    name = draw(st.sampled_from(["", "", "certify", "curve", "run"]) | st.sampled_from(sorted(set(COMMANDS) - LONG)))
    options = {param.opts[0]: param for param in COMMANDS[name].params if param.opts[0] not in UNTRIED}
    asked = {option: value for option, value in BASE.items() if option in options and (name, option) != ("", "--eps")}
    places = [draw(value(option)) for option in options if not option.startswith("-")]
    flags = []
    for option in draw(st.lists(st.sampled_from(sorted(options)), max_size=4, unique=True)) if options else []:
        if getattr(options[option], "is_flag", False):
            flags.append(option)
        elif option.startswith("-"):
            asked[option] = draw(value(option))
    given = [text for option, value in asked.items() for text in (option, value)]
    stray = draw(JUNK) if draw(st.integers(0, 9)) == 9 else None
    return [text for text in (name or None, *places, *given, *flags, stray) if text is not None]


def value(option: str) -> st.SearchStrategy[str]:
    own = OWN.get(option, FILES)
    return own if option in SMALL else own | own | own | JUNK


@pytest.fixture
def desk(place: Path) -> Path:
    """A folder with a model, data, a suite and results."""
    images = data.load("digits").take(slice(40))
    np.savez(place / "own.npz", x=images.x.numpy(), y=images.y.numpy())
    (place / "model.py").write_text(MODEL)
    (place / "own.toml").write_text(SUITE)
    (place / "taken").write_text("by someone else")
    (place / "smoke.toml").write_text(SUITE.replace('"own"', '"smoke"'))
    return place


def answered(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An exit code that the README names; where the line is wrong, one line says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["robust-bench", *line])
        code = cli.main()
    err = capsys.readouterr().err
    assert code in (0, 1, 2, 3)
    if code == cli.USAGE:
        last = err.splitlines()[-1]
        assert last.startswith("robust-bench: error: ")
        assert len(last) > len("robust-bench: error: ")
    assert "Traceback" not in err


def trying(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


@given(lines())
@example(shlex.split("--dataset digits --model model.py:load --n 10 --attack fgsm --threads 0 --dry-run"))
@trying(150)
def test_whatever_is_typed_gets_an_answer_or_one_line(desk, capsys, line):
    answered(line, capsys)


@pytest.mark.soak
@given(lines())
@trying(10_000)
def test_whatever_is_typed_ten_thousand_times_gets_an_answer_or_one_line(desk, capsys, line):
    answered(line, capsys)
