"""Queries a second of the attacks that see no gradients, against the model alone and against peers, in one run.

A query is an image that reaches the model. Raw is the model on 400 images at a time. Every round times all contenders
one after the other; the table gives medians over the rounds, of the ratio to raw in the same round, and the share of
the images that were broken.

    .venv-speed/bin/python benchmarks/speed/queries.py --weights FILE      # of the architecture `cnn`
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import foolbox
import torch
from torch import Tensor, nn

from robustbench_lite import evaluate, load_defense, models
from robustbench_lite.data import load
from robustbench_lite.trained import fill

RAW = "raw forward, batch 400"
# ours, with settings that make every input cost about as many queries, and the threat model
OURS = {
    "boundary:queries=1000": "l2:0.5",
    "zoo:queries=1000": "l2:0.5",
    "one-pixel:population=100,generations=10": "l0:1",
    "square:queries=1000": "linf:0.05",
}


class Counting(nn.Module):
    """Counts the images that it is asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.count = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += len(x)
        logits: Tensor = self.model(x)
        return logits


@torch.no_grad()
def raw(model: nn.Module, x: Tensor) -> float:
    crowd = x.repeat(400 // len(x) + 1, 1, 1, 1)[:400]
    for _ in range(100):
        model(crowd)
    return 0.0


def ours(spec: str, threat: str) -> Callable[[nn.Module, Tensor, Tensor], float]:
    return lambda model, x, y: float((evaluate(spec, model, x, y, threat).status == "broken").mean())


def foolbox_boundary(model: nn.Module, x: Tensor, y: Tensor) -> float:
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.BoundaryAttack(steps=850)
    return float(attack(wrapped, x, y, epsilons=0.5)[2].float().mean())


def art_zoo(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """One image alone: it goes through a batch image by image."""
    from art.attacks.evasion import ZooAttack
    from art.estimators.classification import PyTorchClassifier

    asked = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), x.shape[1:], nb_classes=10, clip_values=(0, 1), device_type="cpu"
    )
    attack = ZooAttack(asked, max_iter=20, binary_search_steps=1, use_resize=False, use_importance=False, verbose=False)
    found = torch.from_numpy(attack.generate(x[:1].numpy(), y[:1].numpy()))
    return broken(model, found, y[:1])


def torchattacks_one_pixel(model: nn.Module, x: Tensor, y: Tensor) -> float:
    from torchattacks import OnePixel

    return broken(model, OnePixel(model, pixels=1, steps=10, popsize=100, inf_batch=400)(x, y), y)


@torch.no_grad()
def broken(model: nn.Module, found: Tensor, y: Tensor) -> float:
    return float((model(found).argmax(1) != y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, help="of the architecture `cnn`; else the shipped standard")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = Counting(subject(options.weights)).eval().requires_grad_(False)
    images = load("mnist").take(slice(2 * options.images))
    with torch.no_grad():
        right = (model(images.x).argmax(1) == images.y).nonzero()[: options.images, 0]
    x, y = images.x[right], images.y[right]
    contenders = {RAW: lambda model, x, y: raw(model, x)}
    contenders |= {spec: ours(spec, threat) for spec, threat in OURS.items()}
    contenders |= {
        "foolbox BoundaryAttack": foolbox_boundary,
        "ART ZooAttack": art_zoo,
        "torchattacks OnePixel": torchattacks_one_pixel,
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    success = {}
    for _ in range(options.rounds + 1):  # the first warms up
        for name, run in contenders.items():
            model.count, began = 0, time.perf_counter()
            success[name] = run(model, x, y)
            seconds[name].append(time.perf_counter() - began)
            rates[name].append(model.count / seconds[name][-1])
    print(f"{len(x)} images, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| contender | queries/s | x raw | seconds | broken |")
    print("|---|---|---|---|---|")
    for name in contenders:
        ratio = statistics.median(mine / bare for mine, bare in zip(rates[name][1:], rates[RAW][1:]))
        took = f"{statistics.median(rates[name][1:]):,.0f} | {ratio:.2f} | {statistics.median(seconds[name][1:]):.2f}"
        print(f"| {name} | {took} | {success[name]:.2f} |")


def subject(weights: Path | None) -> nn.Module:
    if weights is None:
        return load_defense("standard")
    model = models.build("cnn", (1, 28, 28), 10)
    fill(model, weights)
    return model


if __name__ == "__main__":
    main()
