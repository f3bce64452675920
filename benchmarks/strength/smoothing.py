"""The certified accuracy of smoothed models by radius (Cohen, Rosenfeld & Kolter, 2019, figure 6), on MNIST, in %.

What is computed is kept in a results folder, so that it goes on where it was stopped.

    python benchmarks/strength/smoothing.py --workers 2
"""

import argparse

import numpy as np

from robustbench_lite import benchmark

DEFENSES = {0.25: "gaussian+smoothed", 0.5: "gaussian:sigma=0.5+smoothed:sigma=0.5"}
RADII = np.linspace(0, 1.5, 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--method", default="smoothing:n=10000")
    parser.add_argument("--out", default="runs")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    found = benchmark(
        [],
        [*DEFENSES.values()],
        threats=["l2:1"],
        n=options.images,
        certifiers=[options.method],
        out=options.out,
        workers=options.workers,
        device="cpu",
    )
    print(f"{options.method}, {options.images} test images\n\n| radius, l2 | {' | '.join(f'{r:g}' for r in RADII)} |")
    print(f"|---|{'---|' * len(RADII)}")
    for sigma, defense in DEFENSES.items():
        (proof,) = (proof for proof in found.proofs if proof.defense == defense)
        right, radius = proof.certified.clean == proof.certified.label, proof.certified.radius
        figures = [100 * (right & (radius > 0) & (radius >= one)).mean() for one in RADII]
        print(f"| sigma {sigma:g} | {' | '.join(f'{figure:.1f}' for figure in figures)} |")


if __name__ == "__main__":
    main()
