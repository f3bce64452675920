"""Parseval networks beside a standard one, on MNIST, as in the paper's table (Cisse et al., 2017): accuracy in %
under FGSM against the signal-to-noise ratio of what it makes of the images, and under PGD-100 at linf 0.1.

    python benchmarks/strength/parseval.py
"""

import argparse

import torch

from robustbench_lite import evaluate, load_defense
from robustbench_lite.data import load
from robustbench_lite.norms import l2

DEFENSES = ["standard", "parseval"]
LEVELS = [50, 45, 40, 33, 25, 20, 15, 10]  # decibels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    test, models = load("mnist").take(slice(options.images)), [load_defense(defense) for defense in DEFENSES]
    print(f"{len(test)} test images\n\n| attack | {' | '.join(DEFENSES)} |\n|---|---|---|")
    clean = [f"{100 * (model(test.x).argmax(1) == test.y).float().mean():.1f}" for model in models]
    print(f"| none | {' | '.join(clean)} |")
    # A sign step of length eps has l2 norm eps * sqrt(pixels), less where the pixel range cuts it off: what counts
    # is the ratio of a full step to the mean image, 20 log10(|x| / |step|).
    signal, pixels = float(l2.size(test.x).mean()), test.x[0].numel()
    for level in LEVELS:
        eps = signal / 10 ** (level / 20) / pixels**0.5
        print(f"| FGSM at {level} dB (linf {eps:.4f}) | {row('fgsm', models, test.x, test.y, eps)} |", flush=True)
    print(f"| PGD-100 at linf 0.1 | {row('pgd:steps=100', models, test.x, test.y, 0.1)} |")


def row(attack: str, models: list[torch.nn.Module], x: torch.Tensor, y: torch.Tensor, eps: float) -> str:
    held = [(evaluate(attack, model, x, y, f"linf:{eps}").status == "held").mean() for model in models]
    return " | ".join(f"{100 * share:.1f}" for share in held)


if __name__ == "__main__":
    main()
