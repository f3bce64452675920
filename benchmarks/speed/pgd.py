"""PGD against the bare loop, foolbox and torchattacks, in one run: what the bookkeeping costs, and what it saves.

The bare loop is k forwards and k input-only backwards with a step and a projection after each, and nothing else. Every
round times all contenders one after the other; the table gives medians and, for each, the median of its ratios to the
bare loop of the same round.

    make speed
"""

import argparse
import statistics
import time
from collections.abc import Callable

import foolbox
import torch
import torchattacks
from torch import Tensor, nn

from robustbench_lite import ThreatModel, evaluate, load_defense
from robustbench_lite.ascent import customary_length
from robustbench_lite.data import load
from robustbench_lite.registry import make

# what each case shows, the shipped defense, eps
CASES = [("nothing can be dropped", "madry", 0.02), ("strong model", "madry", 0.3), ("breaks easily", "standard", 0.3)]


def bare(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    length = customary_length(eps, steps)
    point = (x + (2 * torch.rand_like(x) - 1) * eps).clamp(0, 1)
    for _ in range(steps):
        point.requires_grad_()
        loss = nn.functional.cross_entropy(model(point), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, point)
        point = point.detach() + length * grad.sign()
        point = (x + (point - x).clamp(-eps, eps)).clamp(0, 1)
    return point


def prepare(defense: str, eps: float, steps: int, x: Tensor, y: Tensor) -> dict[str, Callable[[], float]]:
    """What is timed; each returns a robust accuracy. Peers get a model as their users hand it over."""
    model = load_defense(defense).requires_grad_(False)
    wrapped = foolbox.PyTorchModel(load_defense(defense), bounds=(0, 1), device="cpu")
    peer = foolbox.attacks.LinfPGD(abs_stepsize=customary_length(eps, steps), steps=steps)
    other = torchattacks.PGD(load_defense(defense), eps=eps, alpha=customary_length(eps, steps), steps=steps)
    pgd, threat = make("attack", f"pgd:steps={steps}"), ThreatModel.parse(f"linf:{eps}")
    return {
        "bare loop": lambda: accuracy(model, bare(model, x, y, eps, steps), y),
        "robustbench-lite": lambda: float((evaluate(pgd, model, x, y, threat).status == "held").mean()),
        "foolbox": lambda: 1 - float(peer(wrapped, x, y, epsilons=eps)[2].float().mean()),
        "torchattacks": lambda: accuracy(model, other(x, y), y),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    images = load("mnist").take(slice(options.images))
    print(f"PGD-{options.steps}, {len(images)} images, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| case | contender | seconds | x bare loop | robust accuracy |")
    print("|---|---|---|---|---|")
    for case, defense, eps in CASES:
        contenders = prepare(defense, eps, options.steps, images.x, images.y)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        robust = {}
        for _ in range(options.rounds + 1):  # the first warms up
            for name, run in contenders.items():
                began = time.perf_counter()
                robust[name] = run()
                seconds[name].append(time.perf_counter() - began)
        for name, times in seconds.items():
            ratios = [mine / bare for mine, bare in zip(times[1:], seconds["bare loop"][1:])]
            figures = f"{statistics.median(times[1:]):.2f} | {statistics.median(ratios):.2f} | {robust[name]:.4f}"
            print(f"| {case}: {defense}, eps {eps:g} | {name} | {figures} |", flush=True)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    main()
