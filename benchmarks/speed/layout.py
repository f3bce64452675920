"""What channels-last with folded batch norms gains: a forward, and with it an input-only backward, of a batch.

Every round times both layouts one after the other; the table gives the fastest of each.

    OMP_NUM_THREADS=1 python benchmarks/speed/layout.py
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from robustbench_lite import load_defense
from robustbench_lite.data import load
from robustbench_lite.defended import Defended, ask
from robustbench_lite.evaluation import frozen
from robustbench_lite.layout import channels_last
from robustbench_lite.models import build


def models() -> Iterator[tuple[str, Defended, Tensor]]:
    yield "cnn-large, 28x28", load_defense("madry"), load("mnist").x[:256]
    x = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    yield "preact-resnet18, 32x32", Defended(build("preact-resnet18", (3, 32, 32), 10)).eval(), x


def forward(model: Defended, x: Tensor) -> None:
    with torch.no_grad():
        ask(model, x, len(x))


def backward(model: Defended, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    torch.autograd.grad(ask(model, x, len(x), differentiable=True).sum(), x)


def seconds(run: Callable[[Defended, Tensor], None], model: Defended, x: Tensor) -> float:
    began = time.perf_counter()
    run(model, x)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| model | images | query | as built, ms | channels-last, ms | ratio |")
    print("|---|---|---|---|---|---|")
    for name, model, x in models():
        laid = channels_last(model, x[:32])
        with frozen(model), frozen(laid):
            for run in (forward, backward):
                pairs = [[seconds(run, which, x) for which in (model, laid)] for _ in range(options.rounds + 1)][1:]
                built, last = (1e3 * min(one) for one in zip(*pairs))
                figures = f"{built:.1f} | {last:.1f} | {built / last:.2f}"
                print(f"| {name} | {len(x)} | {run.__name__} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
