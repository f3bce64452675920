"""How near Carlini & Wagner's l2 attack comes, beside foolbox's; and cw-linf's robust accuracy beside PGD-100's.

Only correctly classified images are attacked. Both l2 attacks search for c as often, from the same c, with as
many steps of the same length.

    python benchmarks/strength/cw.py --weights wong_kolter_mnist_eps01.pth
"""

import argparse
from pathlib import Path

import foolbox
import numpy as np
import torch
from torch import Tensor, nn

from robustbench_lite import evaluate, load_defense
from robustbench_lite.data import Images, load
from robustbench_lite.models import build
from robustbench_lite.norms import l2
from robustbench_lite.trained import fill


def compare(name: str, model: nn.Module, images: Images, options: argparse.Namespace) -> None:
    """Prints a row for our l2 attack and one for foolbox's."""
    model.requires_grad_(False)
    with torch.no_grad():
        right = model(images.x).argmax(1) == images.y
    x, y = images.x[right], images.y[right]
    settings = f"search_steps={options.search_steps},steps={options.steps},rate={options.rate},initial_c={options.c}"
    ours = torch.from_numpy(evaluate(f"cw:{settings}", model, x, y, "l2:1000").distance)
    peer = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=options.search_steps, steps=options.steps, stepsize=options.rate, initial_const=options.c
    )
    found, _, success = peer(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=None)
    show(name, "robustbench-lite", ours[ours.isfinite()], len(x))
    show(name, "foolbox", l2.size(found - x)[success], len(x))


def show(model: str, attack: str, distance: Tensor, count: int) -> None:
    print(f"| {model} | {attack} | {len(distance) / count:.3f} | {distance.median():.3f} | {distance.mean():.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--search-steps", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--c", type=float, default=1.0)
    parser.add_argument("--linf-images", type=int, default=1000)
    parser.add_argument("--weights", type=Path, help="of the cnn, attacked beside the shipped models")
    options = parser.parse_args()
    test = load("mnist")
    models = {name: load_defense(name) for name in ("standard", "madry")}
    if options.weights:
        models[options.weights.name] = build("cnn", (1, 28, 28), 10).eval()
        fill(models[options.weights.name], options.weights)

    print(f"C&W l2, {options.search_steps} x {options.steps} steps, first {options.images} images\n")
    print("| model | attack | success | median l2 | mean l2 |")
    print("|---|---|---|---|---|")
    for name, model in models.items():
        compare(name, model, test.take(slice(options.images)), options)

    images = test.take(slice(options.linf_images))
    print(f"\nmadry at linf 0.3, first {len(images)} images\n\n| attack | robust accuracy |\n|---|---|")
    for attack in ("cw-linf", "pgd:steps=100"):
        held = evaluate(attack, models["madry"], images.x, images.y, "linf:0.3").status == "held"
        print(f"| {attack} | {np.mean(held):.4f} |")


if __name__ == "__main__":
    main()
