"""The models here are tiny: one thread a test, and as many tests at once as there are cores (``pytest -n auto``)."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from robustbench_lite import cli, registry

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests run
torch.set_num_threads(1)
collect_ignore = ["packages"]  # whose tests are run as their own


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return self.err.splitlines()


@contextmanager
def forgetting() -> Iterator[None]:
    """No plugin of a file, and no module of the working folder, stays."""
    for kind in registry.KINDS:
        registry.plugins(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_tables", {kind: dict(table) for kind, table in registry._tables.items()})
        for name in ("_families", "_files", "_dists"):
            patch.setattr(registry, name, dict(getattr(registry, name)))
        yield
    for name, module in list(sys.modules.items()):
        here = str(getattr(module, "__file__", None) or "").startswith(f"{Path.cwd()}{os.sep}")
        if here or name.startswith(("_robust_bench_model_", "_robustbench_lite_file_")):
            del sys.modules[name]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; nothing outside it is written, and no plugin of a file stays."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("ROBUST_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ROBUST_BENCH_DATA", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    with forgetting():
        yield tmp_path


@pytest.fixture
def bench(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Ran]:
    """Runs a command line in this process."""

    def run(line: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["robust-bench", *shlex.split(line)])
        code = cli.main()
        return Ran(code, *capsys.readouterr())

    return run
