"""ZOO beside C&W, image by image: what is lost by not seeing gradients, at several numbers of queries.

    python benchmarks/strength/zoo.py --weights FILE     # fills the architecture `cnn`; needs foolbox

C&W is foolbox's, 9 search steps of 1,000.
"""

import argparse
import time
from pathlib import Path

import foolbox
import torch
from torch import Tensor, nn

from robustbench_lite import evaluate, load_defense, models
from robustbench_lite.data import load
from robustbench_lite.evaluation import frozen
from robustbench_lite.outcome import WRONG
from robustbench_lite.registry import make
from robustbench_lite.trained import fill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--defense", default="standard")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--queries", type=int, nargs="*", default=[20_000, 200_000])
    parser.add_argument("--settings", default="", help="of zoo, for instance importance=true")
    options = parser.parse_args()
    images = load("mnist").take(slice(options.images))
    model = subject(options.defense, options.weights).requires_grad_(False)

    began = time.process_time()
    yardstick = carlini_wagner(model, images.x, images.y)
    print(f"{len(images)} MNIST images, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| attack | queries | success | mean L2 | median L2 | x C&W's mean | seconds (process) |")
    print("|---|---|---|---|---|---|---|")
    print(f"| C&W | - | {row(yardstick, yardstick)} | {time.process_time() - began:.0f} |", flush=True)
    for queries in options.queries:
        began = time.process_time()
        zoo = make("attack", ",".join(filter(None, [f"zoo:queries={queries}", options.settings])))
        outcome = evaluate(zoo, model, images.x, images.y, "l2:100")
        attacked = torch.from_numpy(outcome.status != WRONG)
        distance = torch.from_numpy(outcome.distance)[attacked].nan_to_num(torch.inf)
        seconds = time.process_time() - began
        print(f"| zoo | {outcome.forwards.max()} | {row(distance, yardstick)} | {seconds:.0f} |", flush=True)


def subject(defense: str, weights: Path | None) -> nn.Module:
    if weights is None:
        return load_defense(defense)
    model = models.build("cnn", (1, 28, 28), 10)
    fill(model, weights)
    return model.eval()


def carlini_wagner(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """How far the nearest adversarial lies that foolbox finds, of each image that is classified correctly."""
    peer = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=9, steps=1000)
    with frozen(model):
        right = model(x).argmax(1) == y
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        found, _, success = peer(wrapped, x[right], y[right], epsilons=None)
    distance = (found - x[right]).double().flatten(1).norm(dim=1)
    return torch.where(success, distance, torch.inf)


def row(distance: Tensor, yardstick: Tensor) -> str:
    """The means are over the images that both attacks succeed on."""
    success = distance.isfinite()
    both = success & yardstick.isfinite()
    ratio = distance[both].mean() / yardstick[both].mean()
    middle = f"{distance[both].mean():.3f} | {distance[both].median():.3f}"
    return f"{success.double().mean():.3f} | {middle} | {ratio:.3f}"


if __name__ == "__main__":
    main()
