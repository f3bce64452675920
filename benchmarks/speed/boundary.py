"""Queries a second of the boundary attack, against the model's raw throughput and against foolbox's, in one run.

Raw is the model alone on batches of 400. Every round times all contenders one after the other; the table gives medians
and, for each, the median of its ratios to the raw throughput of the same round.

    python benchmarks/speed/boundary.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import foolbox
import torch
from torch import Tensor, nn

from robustbench_lite import ThreatModel, evaluate, load_defense
from robustbench_lite.data import load
from robustbench_lite.norms import l2
from robustbench_lite.registry import make


class Counting(nn.Module):
    """Counts the images that it is asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.count = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += len(x)
        answer: Tensor = self.model(x)
        return answer


def prepare(model: Counting, x: Tensor, y: Tensor, queries: int) -> dict[str, Callable[[], object]]:
    attack, threat = make("attack", f"boundary:queries={queries}"), ThreatModel(l2, 100.0)
    peer = foolbox.attacks.BoundaryAttack(steps=(queries - 50) * 10 // 11)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    raw = x.repeat(-(-400 // len(x)), 1, 1, 1)[:400]
    return {
        "raw": lambda: [model(raw) for _ in range(-(-len(x) * queries // 400))],
        "robustbench-lite": lambda: evaluate(attack, model, x, y, threat),
        "foolbox": lambda: peer.run(wrapped, x, foolbox.criteria.Misclassification(y)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[20, 100, 400])
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = Counting(load_defense("standard")).eval().requires_grad_(False)
    print(f"{options.queries} queries an image, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| images | contender | queries/s | x raw |")
    print("|---|---|---|---|")
    for count in options.images:
        images = load("mnist").take(slice(count))
        rates: dict[str, list[float]] = {}
        for _ in range(options.rounds + 1):  # the first warms up
            for name, run in prepare(model, images.x, images.y, options.queries).items():
                began, model.count = time.perf_counter(), 0
                run()
                rates.setdefault(name, []).append(model.count / (time.perf_counter() - began))
        for name, rate in rates.items():
            ratio = statistics.median(mine / raw for mine, raw in zip(rate[1:], rates["raw"][1:]))
            print(f"| {count} | {name} | {statistics.median(rate[1:]):,.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
