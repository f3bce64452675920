"""Every Python block of the README runs as it stands."""

import re
import sys
from pathlib import Path

import pandas as pd
import pytest

from robustbench_lite import cli

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


pytestmark = pytest.mark.usefixtures("place")


def test_there_are_blocks():
    assert len(BLOCKS) == 5


@pytest.mark.parametrize("block", [block for block in BLOCKS if ".py\n" not in block[:20]])
def test_a_block_runs_and_prints_a_table(block, capsys):
    exec(block, {})
    assert len(capsys.readouterr().out.splitlines()) > 2


def test_the_custom_attack_is_short_and_runs_as_a_plugin(tmp_path, monkeypatch, capsys):
    (block,) = (block for block in BLOCKS if "# mine.py" in block)
    body = block[block.index("@attack") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 15
    (tmp_path / "mine.py").write_text(block)
    command = "robust-bench --plugin mine.py --attack mine,fgsm --defense standard --n 20 --csv board.csv"
    monkeypatch.setattr(sys, "argv", command.split())
    assert cli.main() == 0
    assert "fgsm; mine" in (tmp_path / "board.csv").read_text()


def test_the_custom_defense_runs_as_a_plugin_and_votes(tmp_path, monkeypatch):
    (block,) = (block for block in BLOCKS if "# jitter.py" in block)
    (tmp_path / "jitter.py").write_text(block)
    command = "robust-bench --plugin jitter.py --attack fgsm --defense standard+jitter --n 20 --csv board.csv"
    monkeypatch.setattr(sys, "argv", command.split())
    assert cli.main() == 0
    (row,) = pd.read_csv(tmp_path / "board.csv", keep_default_na=False).to_dict("records")
    assert (row["draws"], row["backwards"], row["flags"]) == (16, 16, "")
