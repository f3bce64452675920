"""One-pixel against the model's raw forward at batch 400 and against torchattacks' OnePixel, in one run.

Every round times all contenders one after the other; the table gives medians and, for each, the median of its ratios
to the raw forward of the same round. Queries are the rows that reach the model, which both attacks leave at a hit.

    python benchmarks/speed/one_pixel.py
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from robustbench_lite import evaluate, load_defense
from robustbench_lite.data import load
from robustbench_lite.registry import make


class Counting(nn.Module):
    """A model that counts the rows it is asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.rows = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        logits: Tensor = self.model(x)
        return logits


def prepare(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """What is timed; each returns the share of the images that it breaks."""
    attack = make("attack", f"one-pixel:population={options.population},generations={options.generations}")
    crowd = x.repeat(400 // len(x) + 1, 1, 1, 1)[:400]

    @torch.no_grad()
    def raw() -> float:
        for _ in range(options.forwards):
            model(crowd)
        return 0.0

    def ours() -> float:
        return float((evaluate(attack, model, x, y, f"l0:{options.pixels}").status == "broken").mean())

    def theirs() -> float:
        from torchattacks import OnePixel

        peer = OnePixel(model, options.pixels, options.generations, options.population, inf_batch=400)
        with torch.no_grad():
            return float((model(peer(x, y)).argmax(1) != y).float().mean())

    contenders = {"raw forward, batch 400": raw, "robustbench-lite": ours}
    return contenders | ({"torchattacks": theirs} if find_spec("torchattacks") else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--defense", default="standard")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--pixels", type=int, default=3)
    parser.add_argument("--population", type=int, default=400)
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--forwards", type=int, default=100, help="of 400 images in a raw round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = Counting(load_defense(options.defense)).eval()
    images = load("mnist").take(slice(2 * options.images))
    with torch.no_grad():
        right = (model(images.x).argmax(1) == images.y).nonzero()[: options.images, 0]
    contenders = prepare(model, images.x[right], images.y[right], options)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    broken = {}
    for _ in range(options.rounds):
        for name, run in contenders.items():
            model.rows, began = 0, time.perf_counter()
            broken[name] = run()
            seconds[name].append(time.perf_counter() - began)
            rates[name].append(model.rows / seconds[name][-1])
    print(f"{options}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| contender | queries/s | x raw | seconds | success |")
    print("|---|---|---|---|---|")
    for name in contenders:
        ratio = statistics.median(mine / raw for mine, raw in zip(rates[name], next(iter(rates.values()))))
        figures = f"{statistics.median(rates[name]):.0f} | {ratio:.2f} | {statistics.median(seconds[name]):.2f}"
        print(f"| {name} | {figures} | {broken[name]:.3f} |")
    if "torchattacks" not in contenders:
        print("\ntorchattacks is not installed")


if __name__ == "__main__":
    main()
