"""Runs the comparisons of a folder and writes what they print, with their commands, to benchmarks/results.

    make speed            # benchmarks/speed,    in an environment of its own that has the peers
    make strength         # benchmarks/strength, hours

ROBUST_BENCH_REFERENCE is the folder of Wong & Kolter's checkpoint, ROBUST_BENCH_DATA that of the full data sets.
Comparisons that need a file which is not there are left out, and the table says so.
"""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import torch

from robustbench_lite import __version__

HERE = Path(__file__).parent
COMMANDS = {
    "speed": [
        "speed/pgd.py --rounds 3",
        "speed/cw.py --rounds 3 --weights {checkpoint}",
        "speed/queries.py --weights {checkpoint}",
        "speed/patch.py",
        "speed/certify.py --weights {checkpoint}",
        "speed/layout.py",
        "speed/harness.py",
        "strength/autoattack.py --weights {checkpoint} --eps 0.1 --images 200 --attacks",
    ],
    "strength": [
        "strength/autoattack.py --weights {checkpoint} --eps 0.1",
        "strength/autoattack.py --defense madry --eps 0.3",
        "strength/cw.py --weights {checkpoint}",
        "strength/boundary.py --weights {checkpoint}",
        "strength/zoo.py --weights {mnist_cnn}",
        "strength/one_pixel.py --weights {cifar_cnn} --data-dir {data} --alone",
        "strength/one_pixel.py --weights {cifar_cnn} --data-dir {data} --population 100 --generations 20",
        "strength/one_pixel.py --weights {cifar_cnn} --data-dir {data} --population 100 --generations 20 --base best",
        "strength/patch.py --data-dir {data}",
        "strength/ensemble.py --data-dir {data}",
        "strength/parseval.py",
        "strength/smoothing.py --workers 2",
    ],
}
FILES = {
    "checkpoint": ("ROBUST_BENCH_REFERENCE", "wong_kolter_mnist_eps01.pth"),
    "mnist_cnn": ("ROBUST_BENCH_REFERENCE", "mnist-cnn-standard.safetensors"),
    "cifar_cnn": ("ROBUST_BENCH_REFERENCE", "cifar10-cnn-large-standard.safetensors"),
    "data": ("ROBUST_BENCH_DATA", ""),
}


def main() -> None:
    (folder,) = sys.argv[1:] or ["speed"]
    result = HERE / "results" / f"{folder}.md"
    with result.open("w") as file:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        print(f"# {folder.capitalize()}, measured beside peers\n\nVersion {__version__}, {machine}.", file=file)
        for command in COMMANDS[folder]:
            report(command, file)
    print(f"wrote {result}")


def report(command: str, file: TextIO) -> None:
    """Runs a command with its files in place; what it prints goes to ``file`` as it is."""
    there = {name: Path(os.environ.get(variable, "")) / rest for name, (variable, rest) in FILES.items()}
    shown = command.format(**{name: path.name or name.upper() for name, path in there.items()})
    print(f"\n## `python benchmarks/{shown}`\n", file=file, flush=True)
    lacking = [name for name, path in there.items() if f"{{{name}}}" in command and not path.exists()]
    if lacking:
        print(f"Left out: {', '.join(FILES[name][1] or FILES[name][0] for name in lacking)} is not there.", file=file)
        return
    began = time.perf_counter()
    words = [word.format(**there) for word in command.split()]
    run = subprocess.run([sys.executable, HERE / words[0], *words[1:]], stdout=subprocess.PIPE, text=True, check=False)
    took = time.perf_counter() - began
    ending = f"It took {took:.0f} s." if run.returncode == 0 else f"It failed with exit code {run.returncode}."
    print(f"{run.stdout.strip()}\n\n{ending}", file=file, flush=True)


if __name__ == "__main__":
    main()
