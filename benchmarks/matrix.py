"""Keeps a finished results folder as it is published: its tables, and the stored rows that they derive from.

    robust-bench run mnist --data-dir DATA --workers 2 --out runs/
    python benchmarks/matrix.py runs/ benchmarks/results/mnist

Writes mnist.csv (the leaderboard), mnist-matrix.csv, mnist-tables.md (both, to be read) and mnist.zip: the results
folder without images, of which, unpacked, `robust-bench leaderboard` makes the same tables, and from which a run that
was not finished goes on.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import pandas as pd

from robustbench_lite.exports import markdown, percent
from robustbench_lite.matrix import Results, load, write_csv
from robustbench_lite.store import Store

BLOCK = ["dataset", "norm", "eps", "adaptive"]
ORIGIN = (1980, 1, 1, 0, 0, 0)  # of every file, so that the same rows make the same archive


def main() -> None:
    folder, stem = Path(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory() as bare:
        strip(folder, Path(bare))
        pack(Path(bare), Path(f"{stem}.zip"))
        results = load(bare, print)
    write_csv(results.leaderboard(), Path(f"{stem}.csv"))
    write_csv(results.matrix(), Path(f"{stem}-matrix.csv"))
    Path(f"{stem}-tables.md").write_text(tables(results), "utf-8")


def strip(folder: Path, bare: Path) -> None:
    """The same results, without images."""
    source, target = Store(folder, print), Store(bare, print)
    for cell, chunks in source.cells():
        if (learned := source.learned(cell)) is not None:
            target.learn(cell, learned)
        target.remember(cell, source.history(cell))
        for eps in source.asked(cell):
            target.ask(cell, eps)
        for chunk in chunks:
            target.save(cell, replace(chunk, imaged=chunk.imaged[:0], images=chunk.images[:0]))


def pack(folder: Path, archive: Path) -> None:
    with ZipFile(archive, "w", ZIP_DEFLATED) as file:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            about = ZipInfo(str(path.relative_to(folder)), ORIGIN)
            file.writestr(about, path.read_bytes(), ZIP_DEFLATED)


def tables(results: Results) -> str:
    """The leaderboard, and under each threat model what each attack leaves of each defense, in Markdown."""
    parts = ["# What survives every attack, and what is proved\n", markdown(results.leaderboard())]
    for (dataset, norm, eps, adaptive), block in results.matrix().groupby(BLOCK, sort=False):
        block = block.drop(columns=BLOCK).dropna(axis=1, how="all").set_index("defense").T
        blind = "" if adaptive else ", attacks blind to the last wrapper"
        parts += [f"\n# {dataset}, {norm} {eps:g}: robust accuracy in %{blind}\n", _markdown(block)]
    return "\n".join(parts)


def _markdown(accuracy: pd.DataFrame) -> str:
    lines = [["attack", *accuracy.columns], ["---", *["---:"] * accuracy.shape[1]]]
    lines += [[f"`{attack}`", *map(percent, row)] for attack, *row in accuracy.itertuples()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
