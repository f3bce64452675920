"""Carlini & Wagner's l2 attack against the bare loop and against foolbox, in one run.

The bare loop is as many forwards and input-only backwards of the margin, and nothing else. Every round times all
contenders one after the other; the table gives medians and, for each, the median of its ratios to the bare loop of the
same round.

    python benchmarks/speed/cw.py --weights wong_kolter_mnist_eps01.pth
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import foolbox
import numpy as np
import torch
from torch import Tensor, nn

from robustbench_lite import evaluate, load_defense
from robustbench_lite.data import load
from robustbench_lite.models import build
from robustbench_lite.registry import make
from robustbench_lite.threat import Goal
from robustbench_lite.trained import fill


def bare(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> float:
    for _ in range(steps):
        point = x.detach().requires_grad_()
        torch.autograd.grad(Goal(y).margin(model(point)).sum(), point)
    return float("nan")


def prepare(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """What is timed; each returns a median distance. All start from the same c and move at the same rate."""
    settings = f"search_steps={options.search_steps},steps={options.steps},initial_c={options.c},rate={options.rate}"
    ours = make("attack", f"cw:{settings}")
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    peer = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=options.search_steps, steps=options.steps, stepsize=options.rate, initial_const=options.c
    )

    def theirs() -> float:
        found = peer(wrapped, x, y, epsilons=None)[0]
        return float((found - x).flatten(1).norm(dim=1).median())

    return {
        "bare loop": lambda: bare(model, x, y, options.search_steps * options.steps),
        "robustbench-lite": lambda: float(np.nanmedian(evaluate(ours, model, x, y, "l2:100").distance)),
        "foolbox": theirs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--search-steps", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--c", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--defense", default="madry")
    parser.add_argument("--weights", type=Path, help="attack these weights of the cnn in the defense's place")
    options = parser.parse_args()
    if options.weights:
        model = build("cnn", (1, 28, 28), 10).eval()
        fill(model, options.weights)
    else:
        model = load_defense(options.defense)
    model.requires_grad_(False)
    images = load("mnist").take(slice(2 * options.images))
    right = (model(images.x).argmax(1) == images.y).nonzero()[: options.images, 0]  # nobody attacks the others
    contenders = prepare(model, images.x[right], images.y[right], options)
    print(f"C&W l2, {options.search_steps} x {options.steps} steps, {len(right)} images", end=", ")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| contender | seconds | x bare loop | median l2 |")
    print("|---|---|---|---|")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    distance = {}
    for _ in range(options.rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            distance[name] = run()
            seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        ratios = [mine / bare for mine, bare in zip(times, seconds["bare loop"])]
        print(f"| {name} | {statistics.median(times):.2f} | {statistics.median(ratios):.2f} | {distance[name]:.3f} |")


if __name__ == "__main__":
    main()
