"""A step of the patch's training against its bare forward and backward, in one run.

The bare step is one forward and one input-only backward of the same batch. Every round times both one after the other;
the table gives medians and the median of the ratios.

    OMP_NUM_THREADS=1 python benchmarks/speed/patch.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from robustbench_lite import load_defense
from robustbench_lite.data import load
from robustbench_lite.evaluation import frozen
from robustbench_lite.noise import Noise
from robustbench_lite.problem import Problem
from robustbench_lite.registry import make
from robustbench_lite.threat import Goal, ThreatModel


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{options.steps} steps a round, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| batch | area | bare step, ms | patch step, ms | ratio |")
    print("|---|---|---|---|---|")
    model = load_defense("standard")
    for batch, area in ((64, 0.1), (128, 0.05), (128, 0.1), (128, 0.2)):
        images = load("mnist").take(slice(batch))
        attack = make("attack", f"patch:steps={options.steps},batch={batch},images={batch}")
        problem = Problem(
            model,
            images.x,
            Goal(torch.full_like(images.y, 3), targeted=True),
            ThreatModel.parse(f"patch:{area}"),
            Noise(0, torch.arange(batch)),
            classes=10,
            minimises=True,
        )

        def bare() -> None:
            for _ in range(options.steps):
                x = images.x.clone().requires_grad_()  # noqa: B023
                torch.autograd.grad(nn.functional.cross_entropy(model(x), images.y), x)  # noqa: B023

        with frozen(model):
            pairs = [(seconds(bare), seconds(lambda: attack.fit(problem))) for _ in range(options.rounds + 1)][1:]  # noqa: B023
        each = [1000 * statistics.median(times) / options.steps for times in zip(*pairs)]
        ratio = statistics.median(ours / theirs for theirs, ours in pairs)
        print(f"| {batch} | {area:g} | {each[0]:.2f} | {each[1]:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
