"""Target success of a patch on held-out MNIST images against its area, beside the paper's controls.

The controls are pasted at the same places: a patch of noise, and a real image of the target class, shrunk to the size
of the patch. Success counts the images that are classified right when clean and are not of the target class.

    python benchmarks/strength/patch.py --data-dir DATA
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from robustbench_lite import evaluate, fit_attack, load_defense
from robustbench_lite.data import load
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import BROKEN, HELD
from robustbench_lite.plugins import Attack
from robustbench_lite.registry import make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--attack", default="patch")
    parser.add_argument("--target", type=int, default=8)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--areas", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--defenses", nargs="+", default=["standard", "madry"])
    options = parser.parse_args()
    training, test = load("mnist", "train", options.data_dir), load("mnist").take(slice(options.images))
    real = training.x[training.y == options.target][:1]
    print(f"{options.attack} towards {options.target}, {len(test)} test images, success in %\n")
    print("| defense | area, % | patch | noise | real image |")
    print("|---|---|---|---|---|")
    for defense in options.defenses:
        model = load_defense(defense)
        for area in options.areas:
            threat = f"patch:{area:g}"

            def success(attack: Attack) -> float:
                outcome = evaluate(attack, model, test.x, test.y, threat, target=options.target)  # noqa: B023
                broken = (outcome.status == BROKEN).sum()
                return float(broken / (broken + (outcome.status == HELD).sum()))

            fitted = fit_attack(options.attack, model, training.x, training.y, threat, target=options.target)
            size = fitted.learned.shape  # type: ignore[attr-defined]
            noise = Noise(0, torch.zeros(1, dtype=torch.int64)).uniform(torch.empty(1, *size))
            shrunk = F.interpolate(real, size=size[1:], mode="bilinear", antialias=True)
            pasted = [replace(make("attack", options.attack), learned=control[0]) for control in (noise, shrunk)]
            figures = " | ".join(f"{100 * success(attack):.1f}" for attack in (fitted, *pasted))
            print(f"| {defense} | {100 * area:g} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
