"""Published results derive from stored rows, which are published with them."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pandas as pd
import pytest
import torch
from torch import nn

from robustbench_lite import suites
from robustbench_lite.matrix import benchmark, load, write_csv

ROOT = Path(__file__).parents[1]
KEPT = sorted((ROOT / "benchmarks/results").glob("*.zip"))


def derives(archive: Path, folder: Path) -> None:
    """The tables beside an archive are those of the rows in it."""
    with ZipFile(archive) as file:
        file.extractall(folder)
    found = load(folder, pytest.fail)
    for name, table in {"": found.leaderboard(), "-matrix": found.matrix()}.items():
        write_csv(table, folder / "made.csv")
        assert (folder / "made.csv").read_bytes() == archive.with_name(f"{archive.stem}{name}.csv").read_bytes()


def test_a_results_folder_is_kept_with_what_its_tables_derive_from_and_a_run_goes_on_from(tmp_path: Path):
    torch.manual_seed(0)
    net, runs = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), tmp_path / "runs"
    attacks, threats = ["fgsm", "fab:steps=5", "patch:steps=5,images=20"], ["linf:0.2", "patch:0.1"]
    results = benchmark(attacks, None, "digits", threats, model=net, n=300, certifiers=["ibp"], out=runs)
    script = ROOT / "benchmarks/matrix.py"
    for stem in ("first", "again"):
        subprocess.run([sys.executable, script, runs, tmp_path / stem], check=True, cwd=ROOT)
    assert (tmp_path / "first.zip").read_bytes() == (tmp_path / "again.zip").read_bytes()
    with ZipFile(tmp_path / "first.zip") as file:
        kept = sum(one.file_size for one in file.infolist())
    assert kept < sum(path.stat().st_size for path in runs.rglob("*.*")), "with images"
    derives(tmp_path / "first.zip", tmp_path / "unpacked")
    results.to_csv(tmp_path / "board.csv")
    assert (tmp_path / "first.csv").read_bytes() == (tmp_path / "board.csv").read_bytes()
    (tmp_path / "unpacked" / "made.csv").unlink()
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "unpacked").rglob("*.npz")}
    again = benchmark(attacks, None, "digits", threats, model=net, n=300, certifiers=["ibp"], out=tmp_path / "unpacked")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "unpacked").rglob("*.npz")} == stored
    assert again.leaderboard().equals(results.leaderboard())
    page = (tmp_path / "first-tables.md").read_text()
    assert "# digits, linf 0.2: robust accuracy in %" in page
    assert "| `fab:steps=5` |" in page


@pytest.mark.parametrize("archive", KEPT, ids=lambda path: path.stem)
def test_what_is_published_derives_from_the_rows_beside_it(archive: Path, tmp_path: Path):
    derives(archive, tmp_path)


SLICE = 50


@pytest.mark.soak
@pytest.mark.parametrize("archive", KEPT, ids=lambda path: path.stem)
def test_a_slice_of_what_is_published_is_computed_again_and_agrees(archive: Path, tmp_path: Path):
    """All cells of the suite's first block; another machine rounds otherwise, so that an input may be otherwise."""
    with ZipFile(archive) as file:
        file.extractall(tmp_path / "published")
    suite = suites.load(archive.stem).shrunk(SLICE)
    published = load(tmp_path / "published", pytest.fail)
    again = benchmark(**suite.asked(suite.block[0]), out=tmp_path / "again", probe=False)
    assert agreement(published.rows(), again.rows(), "attack") >= len(suite.defense) * (len(suite.block[0].attack) - 1)
    assert agreement(published.certified_rows(), again.certified_rows(), "certifier") == len(suite.defense)


def agreement(published: pd.DataFrame, again: pd.DataFrame, plugin: str) -> int:
    """The number of cells that were computed again, each of which agrees."""
    which = ["defense", "norm", "eps", plugin, *["adaptive"] * ("adaptive" in again)]
    both = again.merge(published, on=[*which, "row"], suffixes=("_again", ""), validate="one_to_one")
    assert len(both) == len(again)
    differ = (both["status"] != both["status_again"]).groupby([both[name] for name in which]).sum()
    assert differ.max() <= 1, differ[differ > 1]
    return len(differ)
