"""What the harness costs: beside the model under PGD, to read a matrix that is stored, to show it; and what a
second worker brings.

python benchmarks/speed/harness.py
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from robustbench_lite.defended import Defended
from robustbench_lite.matrix import benchmark, load
from robustbench_lite.store import Store

PGD = "pgd:steps=40"
ROUNDS = 5


@contextmanager
def timed_calls(spent: list[float]) -> Iterator[None]:
    """Adds up the seconds of every forward and backward pass of a defended model."""
    forward, grad = Defended.answer, torch.autograd.grad

    def wrapped(call):
        def timed(*args, **settings):
            began = time.perf_counter()
            try:
                return call(*args, **settings)
            finally:
                spent.append(time.perf_counter() - began)

        return timed

    Defended.answer, torch.autograd.grad = wrapped(forward), wrapped(grad)
    try:
        yield
    finally:
        Defended.answer, torch.autograd.grad = forward, grad


def overhead(n: int) -> str:
    """All that is not a forward or a backward pass: noise, steps, projections, judging, storing, tables; but for what
    Python imports once. The median of some runs."""
    timed(10)
    runs = sorted((1 - model / whole, whole, model) for whole, model in (timed(n) for _ in range(ROUNDS)))
    share, whole, model = runs[ROUNDS // 2]
    return f"{PGD} on {n} MNIST images: {whole:.2f} s, of which the model {model:.2f} s: {share:.1%} beside it"


def timed(n: int) -> tuple[float, float]:
    """Seconds of a run, and those of its model."""
    spent: list[float] = []
    with tempfile.TemporaryDirectory() as out, timed_calls(spent):
        began = time.perf_counter()
        benchmark([PGD], ["madry"], n=n, out=out, device="cpu", probe=False).leaderboard()
        return time.perf_counter() - began, sum(spent)


def cached(side: int, n: int) -> str:
    """A matrix whose cells are copies of one: as many attacks as defenses, all stored."""
    with tempfile.TemporaryDirectory() as out:
        benchmark(["fgsm"], ["madry"], n=n, out=out, device="cpu", probe=False)
        store = Store(Path(out), print)
        ((cell, chunks),) = store.cells()
        for attack in range(side):
            for model in range(side):
                copy = replace(
                    cell,
                    identity=cell.identity | {"model": {"number": model}, "attack": {"number": attack}},
                    about=cell.about | {"defense": f"defense-{model}", "attack": f"attack-{attack}"},
                )
                for chunk in chunks:
                    store.save(copy, chunk)
        for file in (Path(out) / "cells" / cell.key).iterdir():
            file.unlink()
        began = time.perf_counter()
        results = load(out)
        read = time.perf_counter() - began
        assert len(results.leaderboard()) == side
        results.matrix()
        whole = time.perf_counter() - began
        page = Path(out) / "page.html"
        began = time.perf_counter()
        load(out).to_html(page)
        shown, size = time.perf_counter() - began, page.stat().st_size / 1e6
    told = f"read in {read:.2f} s, with tables {whole:.2f} s; as a page in {shown:.2f} s, {size:.1f} MB"
    return f"a stored {side}x{side} matrix of {n} images: {told}"


def scaling(n: int) -> str:
    """Seconds between the first chunk and the last, so that the start of processes is left out, and with it."""
    walls = []
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as out:
            began = time.time()
            benchmark([PGD], ["madry"], n=n, out=out, device="cpu", batch=100, workers=workers, probe=False)
            whole = time.time() - began
            written = np.sort([path.stat().st_mtime for path in Path(out).rglob("*.npz")])
            rate = (len(written) - workers) / (written[-1] - written[workers - 1])
            walls.append((whole, rate))
    (one, slow), (two, fast) = walls
    walls = f"one {one:.1f} s, two {two:.1f} s"
    rates = f"chunks a second {slow:.2f} and {fast:.2f}: {fast / slow:.2f}x"
    return f"{PGD} on {n} images, workers of one thread: {walls}; {rates}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=1000)
    n = parser.parse_args().n
    torch.set_num_threads(1)
    print(overhead(n))
    print(cached(10, n))
    print(scaling(2 * n))
