"""ZOO against the model's raw throughput and against ART's ZooAttack: seconds a query, in one run.

Raw is the bare forward of 400 images at a time. Every round times all contenders one after the other; the table gives
medians and, for each, the median of its ratios to raw in the same round. ART attacks one image.

    .venv-speed/bin/python benchmarks/speed/zoo.py       # ART: package adversarial-robustness-toolbox
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from robustbench_lite import evaluate, load_defense, models
from robustbench_lite.data import load
from robustbench_lite.registry import make


def raw(model: nn.Module, x: Tensor, queries: int) -> int:
    with torch.no_grad():
        for _ in range(max(1, queries // 400)):
            model(x)
    return max(1, queries // 400) * len(x)


def ours(model: nn.Module, x: Tensor, y: Tensor, queries: int) -> int:
    return int(evaluate(make("attack", f"zoo:queries={queries}"), model, x, y, "l2:1").forwards.sum())


def art(model: nn.Module, x: Tensor, y: Tensor) -> int | None:
    """How many queries ART made; None where it is not installed."""
    try:
        from art.attacks.evasion import ZooAttack
        from art.estimators.classification import PyTorchClassifier
    except ImportError:
        return None
    counted = Counted(model)
    classifier = PyTorchClassifier(
        counted, nn.CrossEntropyLoss(), x.shape[1:], nb_classes=10, clip_values=(0, 1), device_type="cpu"
    )
    attack = ZooAttack(
        classifier, max_iter=20, binary_search_steps=1, nb_parallel=128, use_resize=False, use_importance=False,
        verbose=False,
    )  # fmt: skip
    attack.generate(x[:1].numpy(), y[:1].numpy())
    return counted.queries


class Counted(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.queries = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.queries += len(x)
        answer: Tensor = self.model(x)
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    images = load("mnist").take(slice(max(400, options.images)))
    x, y = images.x[: options.images], images.y[: options.images]
    print(f"{options.images} images, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| model | contender | microseconds a query | x raw |")
    print("|---|---|---|---|")
    small = models.build("cnn", (1, 28, 28), 10).eval()
    for name, model in {"untrained cnn": small, "standard": load_defense("standard")}.items():
        model.requires_grad_(False)
        contenders: dict[str, Callable[[], int | None]] = {
            "raw, batch 400": partial(raw, model, images.x[:400], options.images * options.queries),
            "robustbench-lite": partial(ours, model, x, y, options.queries),
            "ART": partial(art, model, x, y),
        }
        seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _ in range(options.rounds + 1):  # the first warms up
            for contender, run in contenders.items():
                began = time.perf_counter()
                queries = run()
                if queries:
                    seconds[contender].append((time.perf_counter() - began) / queries)
        for contender, times in seconds.items():
            if not times:
                print(f"| {name} | {contender} | not installed | |")
                continue
            ratios = [mine / bare for mine, bare in zip(times[1:], seconds["raw, batch 400"][1:])]
            figures = f"{1e6 * statistics.median(times[1:]):.1f} | {statistics.median(ratios):.2f}"
            print(f"| {name} | {contender} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
