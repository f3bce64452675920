"""The certifiers beside auto_LiRPA and the authors' dual network: seconds, memory and margins on a checkpoint.

Every certifier runs in a process of its own, so that the memory that it adds shows. auto_LiRPA does not install beside
current torch, so its figures, measured on Wong & Kolter's checkpoint on 2 cores with another torch, stand in the table
as they were found; the authors' package convex_adversarial is measured in the same run where it is installed. Machines
differ, so seconds are given as forward passes over the same images too, timed in turn with each certifier.

    python benchmarks/speed/certify.py --weights wong_kolter_mnist_eps01.pth
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from robustbench_lite import ThreatModel
from robustbench_lite.bounds import Ball, differences, optimised, trace
from robustbench_lite.data import load
from robustbench_lite.defended import Defended
from robustbench_lite.models import build
from robustbench_lite.noise import Noise
from robustbench_lite.registry import make
from robustbench_lite.trained import fill

AUTHORS = "convex_adversarial"
THEIR_FORWARD = 200 / 220_000  # seconds: images, by what the bare network answered a second where these were measured
EVERY = "alpha-crown, all inputs"  # as auto_LiRPA was run: no input is spared because CROWN has verified it
FITS = 100  # images that a forward pass is fastest with
PUBLISHED = {  # contender: seconds on 200 images, eps 0.1, and the mean margin
    "ibp": ("auto_LiRPA", 0.01, -85.24),
    "crown-ibp": ("auto_LiRPA", 0.07, -20.29),
    "crown": ("auto_LiRPA", 2.4, 5.79),
    "wong-kolter": ("the authors' package", 3.4, 5.66),
    EVERY: ("auto_LiRPA, 20 iterations", 109, 6.03),
}
CONTENDERS = [*PUBLISHED, "alpha-crown", "best"]


def prepare(name: str, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Callable[[], Tensor]:
    """What is timed; it returns each input's margin."""
    threat = ThreatModel.parse(f"linf:{eps}")
    if name == AUTHORS:
        from convex_adversarial import RobustBounds

        theirs = RobustBounds(model, eps, bounded_input=True)
        pieces = list(zip(x.split(10), y.split(10)))
        others = torch.ones(len(y), 10, dtype=torch.bool).scatter(1, y.unsqueeze(1), False)
        return lambda: -torch.cat([theirs(*piece) for piece in pieces])[others].view(len(y), 9).amax(1)
    if name == EVERY:
        return lambda: optimised(trace(model, x.shape[1:]), Ball(x, threat), differences(y, 10)).amin(1)
    certifier, noise = make("certifier", name), Noise(0, torch.arange(len(x)))
    return lambda: certifier(Defended(model).eval(), x, y, threat, noise).margin


@torch.no_grad()
def measure(name: str, options: argparse.Namespace) -> None:
    """Prints seconds, megabytes added, share verified and mean margin."""
    model = build("cnn", (1, 28, 28), 10).eval()
    fill(model, options.weights)
    model.requires_grad_(False)
    images = load("mnist").take(slice(options.images))
    run = prepare(name, model, images.x, images.y, options.eps)
    prepare("ibp", model, images.x[:1], images.y[:1], options.eps)()  # what torch loads on first use is nobody's
    before, seconds, forwards = peak(), [], []
    for _ in range(options.rounds):
        began = time.perf_counter()
        margin = run()
        ended = time.perf_counter()
        for part in images.x.split(FITS):
            model(part)
        seconds.append(ended - began)
        forwards.append(time.perf_counter() - ended)
    took, share = statistics.median(seconds), (margin > 1e-4).float().mean()
    cost = f"{took:.3f} | {took / statistics.median(forwards):.0f}"
    print(f"{cost} | {peak() - before:.0f} | {share:.1%} | {margin.mean():.2f}")


def peak() -> float:
    """The most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True, help="weights of the cnn, for MNIST")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[*CONTENDERS, *([AUTHORS] if find_spec(AUTHORS) else [])])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.child, options)
        return
    print(f"Certifiers, {options.images} images, linf eps {options.eps:g}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| certifier | seconds | x forward | MB added | verified | mean margin ", end="")
    print("| to beat: seconds | x forward | mean margin |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.only:
        command = [sys.executable, *sys.argv, "--child", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        theirs = " | | "
        if name in PUBLISHED:
            who, seconds, margin = PUBLISHED[name]
            theirs = f"{seconds} ({who}) | {seconds / THEIR_FORWARD:.0f} | {margin}"
        print(f"| {name} | {done.stdout.strip()} | {theirs} |", flush=True)


if __name__ == "__main__":
    main()
