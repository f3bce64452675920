"""How near the boundary attack comes, against foolbox's after as many queries an image: median L2 of 100 images.

    python benchmarks/strength/boundary.py --weights FILE

The file holds a state dict of the model ``cnn``; without it the shipped models alone are attacked.
"""

import argparse
from pathlib import Path

import foolbox
import torch
from torch import Tensor, nn

from robustbench_lite import ThreatModel, evaluate, load_defense
from robustbench_lite.data import Images, load
from robustbench_lite.models import build
from robustbench_lite.norms import l2
from robustbench_lite.registry import make


class Counting(nn.Module):
    """Counts the images that it is asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.count = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += len(x)
        answer: Tensor = self.model(x)
        return answer


def models(weights: Path | None) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {name: load_defense(name) for name in ("standard", "madry")}
    if weights:
        found[weights.stem] = build("cnn", (1, 28, 28), 10)
        found[weights.stem].load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return {name: model.eval().requires_grad_(False) for name, model in found.items()}


def correct(model: nn.Module, images: Images, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images that the model gets right."""
    few = images.take(slice(2 * count))
    right = (model(few.x).argmax(1) == few.y).nonzero()[:count, 0]
    return few.x[right], few.y[right]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--queries", type=int, nargs="+", default=[1_000, 5_000, 25_000])
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    print(f"boundary, {options.images} images, torch {torch.__version__}\n")
    print("| model | queries an image | robustbench-lite | foolbox's queries | foolbox |")
    print("|---|---|---|---|---|")
    for name, model in models(options.weights).items():
        x, y = correct(model, load("mnist"), options.images)
        for queries in options.queries:
            ours = evaluate(make("attack", f"boundary:queries={queries}"), model, x, y, ThreatModel(l2, 100.0))
            counting = Counting(model)
            torch.manual_seed(0)
            # Ten in eleven of its queries are steps, and a start costs it about fifty.
            theirs = foolbox.attacks.BoundaryAttack(steps=(queries - 50) * 10 // 11).run(
                foolbox.PyTorchModel(counting.eval(), bounds=(0, 1), device="cpu"),
                x,
                foolbox.criteria.Misclassification(y),
            )
            found = torch.from_numpy(ours.distance).nan_to_num(torch.inf).median()  # no start: infinitely far
            peer = f"{counting.count / len(x):.0f} | {l2.size(theirs - x).median():.3f}"
            print(f"| {name} | {ours.forwards.mean():.0f} | {found:.3f} | {peer} |", flush=True)


if __name__ == "__main__":
    main()
