"""Ensemble adversarial training beside plain one-step training (Tramer et al., 2018), on MNIST: robust accuracy in %.

Transfer is from `standard` trained as an architecture that neither of them has met; it is trained and cached at need.

    python benchmarks/strength/ensemble.py --data-dir DATA
"""

import argparse
from functools import partial
from pathlib import Path

from robustbench_lite import evaluate, load_defense
from robustbench_lite.data import load

DEFENSES = ["fgsm-training:eps=0.3", "ensemble:eps=0.3"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--held-out", default="standard@lenet")
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args()
    test, sources = load("mnist").take(slice(options.images)), partial(load_defense, data_dir=options.data_dir)
    away = [f"transfer:source={options.held_out},attack={attack}" for attack in ("fgsm", "r-fgsm", "(pgd:steps=40)")]
    attacks = ["fgsm", "r-fgsm", *away, "pgd:steps=100"]
    print(f"linf 0.3, {len(test)} test images\n\n| attack | {' | '.join(DEFENSES)} |\n|---|---|---|")
    models = [sources(defense) for defense in DEFENSES]
    for attack in attacks:
        outcomes = [evaluate(attack, model, test.x, test.y, "linf:0.3", sources=sources) for model in models]
        figures = " | ".join(f"{100 * (outcome.status == 'held').mean():.1f}" for outcome in outcomes)
        print(f"| `{attack}` | {figures} |", flush=True)


if __name__ == "__main__":
    main()
