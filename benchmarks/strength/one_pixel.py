"""One-pixel on correctly classified images, beside exhaustive search and torchattacks' OnePixel.

The exhaustive search tries every corner of the colour cube at every position: one pixel only. Su et al. (2019) report
that one pixel fools 60 to 75 % of the images of Kaggle CIFAR-10. A net for CIFAR-10 comes from

    robust-bench train --defense standard --dataset cifar10 --model cnn-large --data-dir DIR --out cifar.safetensors
    python benchmarks/strength/one_pixel.py --weights cifar.safetensors --data-dir DIR --alone

``--alone`` leaves torchattacks out, which at the paper's settings takes an hour; compare with it at smaller ones.
"""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustbench_lite import evaluate, load_defense
from robustbench_lite.data import Images, load
from robustbench_lite.models import build
from robustbench_lite.registry import make
from robustbench_lite.trained import fill


class Case(NamedTuple):
    name: str
    model: nn.Module
    x: Tensor
    y: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=100, help="how many correctly classified images")
    parser.add_argument("--population", type=int, default=400)
    parser.add_argument("--generations", type=int, default=100)
    parser.add_argument("--weights", type=Path, help="a CIFAR-10 net, beside the shipped MNIST net")
    parser.add_argument("--model", default="cnn-large", help="the architecture of --weights")
    parser.add_argument("--data-dir", type=Path, help="where CIFAR-10 is")
    parser.add_argument("--base", default="random", help="what children start from: random, as in the paper, or best")
    parser.add_argument("--alone", action="store_true", help="leave torchattacks out")
    options = parser.parse_args()
    size = f"population={options.population},generations={options.generations},base={options.base}"
    attack = make("attack", f"one-pixel:{size}")
    print(f"one-pixel:{size}, {options.images} correctly classified images, torch {torch.__version__}\n")
    print("| net | pixels | one-pixel | exhaustive corners | found by these alone | torchattacks | queries an image |")
    print("|---|---|---|---|---|---|---|")
    for case in cases(options.images, options.weights, options.model, options.data_dir):
        for pixels in (1, 3, 5):
            outcome = evaluate(attack, case.model, case.x, case.y, f"l0:{pixels}")
            broken = torch.from_numpy(outcome.status == "broken")
            corners = exhaustive(case) if pixels == 1 else None
            peer = None if options.alone else torchattacks(case, pixels, options.population, options.generations)
            missed = "" if corners is None else int((corners & ~broken).sum())
            figures = f"{share(broken)} | {share(corners)} | {missed} | {share(peer)} | {outcome.forwards.mean():.0f}"
            print(f"| {case.name} | {pixels} | {figures} |", flush=True)


def cases(images: int, weights: Path | None, architecture: str, data_dir: Path | None) -> Iterator[Case]:
    yield right("MNIST, shipped `standard`", load_defense("standard"), load("mnist"), images)
    if weights is not None:
        cifar = load("cifar10", data_dir=data_dir)
        model = build(architecture, cifar.shape, cifar.classes)
        fill(model, weights)
        yield right(f"CIFAR-10, {architecture}", model.eval(), cifar, images)


def right(name: str, model: nn.Module, images: Images, count: int) -> Case:
    """The first ``count`` images that the model classifies correctly."""
    with torch.no_grad():
        correct = model(images.x[: 4 * count]).argmax(1) == images.y[: 4 * count]
    rows = correct.nonzero()[:count, 0]
    return Case(name, model, images.x[rows], images.y[rows])


@torch.no_grad()
def exhaustive(case: Case) -> Tensor:
    """Which images some position and some corner of the colour cube break."""
    channels, *grid = case.x.shape[1:]
    positions = torch.eye(grid[0] * grid[1], dtype=torch.bool).view(-1, 1, *grid)
    broken = torch.zeros(len(case.x), dtype=torch.bool)
    for row, (x, y) in enumerate(zip(case.x, case.y)):
        for corner in product((0.0, 1.0), repeat=channels):
            painted = torch.where(positions, torch.tensor(corner).view(-1, 1, 1), x)
            labels = torch.cat([case.model(piece).argmax(1) for piece in painted.split(256)])
            broken[row] |= (labels != y).any()
    return broken


def torchattacks(case: Case, pixels: int, population: int, generations: int) -> Tensor | None:
    """Which images torchattacks' OnePixel breaks; None where it is not installed."""
    try:
        from torchattacks import OnePixel
    except ImportError:
        return None
    found = OnePixel(case.model, pixels=pixels, steps=generations, popsize=population)(case.x, case.y)
    with torch.no_grad():
        return case.model(found).argmax(1) != case.y


def share(broken: Tensor | None) -> str:
    return "not run" if broken is None else f"{100 * broken.float().mean():.1f} %"


if __name__ == "__main__":
    main()
