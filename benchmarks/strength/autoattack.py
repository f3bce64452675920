"""AutoAttack against its reference implementation and against our other attacks, image by image.

.venv-speed/bin/python benchmarks/strength/autoattack.py --defense madry --eps 0.3
.venv-speed/bin/python benchmarks/strength/autoattack.py --weights FILE --eps 0.1     # fills the architecture `cnn`
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from robustbench_lite import ThreatModel, evaluate, load_defense, models
from robustbench_lite.data import load
from robustbench_lite.registry import make
from robustbench_lite.trained import fill

OTHERS = ["pgd:steps=100,restarts=5", "apgd:loss=dlr", "fab", "square"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--defense", default="madry")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--eps", type=float, default=0.3)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--attacks", nargs="*", default=OTHERS, help="ours to compare with, beside autoattack")
    options = parser.parse_args()
    images = load("mnist").take(slice(options.images))
    model = subject(options.defense, options.weights).requires_grad_(False)
    x, y, threat = images.x, images.y, ThreatModel.parse(f"linf:{options.eps}")

    print(f"{options.weights.name if options.weights else options.defense}, {threat}, {len(y)} MNIST images, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| attack | robust accuracy | seconds (process) | survivors of autoattack that it breaks |")
    print("|---|---|---|---|")
    first: Tensor | None = None
    for name in ["autoattack", *options.attacks, "pyautoattack"]:
        run = reference if name == "pyautoattack" else ours(name)
        began = time.process_time()
        held = run(model, x, y, threat)
        seconds = time.process_time() - began
        first = held if first is None else first
        missed = (first & ~held).nonzero()[:, 0].tolist()
        print(f"| {name} | {held.float().mean():.4f} | {seconds:.0f} | {missed or 'none'} |", flush=True)
    print(f"\nbroken by autoattack alone, not by its reference: {(held & ~first).nonzero()[:, 0].tolist() or 'none'}")


def subject(defense: str, weights: Path | None) -> nn.Module:
    if weights is None:
        return load_defense(defense)
    model = models.build("cnn", (1, 28, 28), 10)
    fill(model, weights)
    return model.eval()


def ours(spec: str) -> Callable[[nn.Module, Tensor, Tensor, ThreatModel], Tensor]:
    return lambda *case: torch.from_numpy(evaluate(make("attack", spec), *case).status == "held")


def reference(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    attacked = AutoAttack(model, norm="Linf", eps=threat.eps, seed=0, version="standard")
    found, _ = attacked.run_standard_evaluation(x, y, batch_size=250)
    with torch.no_grad():
        return model(found).argmax(1) == y


if __name__ == "__main__":
    main()
