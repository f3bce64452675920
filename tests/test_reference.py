"""Published figures on files that do not ship: ROBUST_BENCH_REFERENCE is the folder of Wong & Kolter's checkpoint,
ROBUST_BENCH_DATA that of the full MNIST. Run by ``make reference``."""

import os
from pathlib import Path

import pytest

from robustbench_lite.matrix import benchmark

CHECKPOINT = Path(os.environ.get("ROBUST_BENCH_REFERENCE", ".")) / "wong_kolter_mnist_eps01.pth"
pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    if not CHECKPOINT.exists():
        pytest.fail(f"{CHECKPOINT} is not there; set ROBUST_BENCH_REFERENCE to the folder that holds it")
    attacks = ["fgsm", "pgd:steps=40,length=0.01,random_start=false"]
    return benchmark(
        attacks,
        dataset="mnist",
        threats=["linf:0.1"],
        n=None,
        model="cnn",
        weights=CHECKPOINT,
        out=tmp_path_factory.mktemp("runs"),
    )


def test_the_errors_of_wong_and_kolters_checkpoint_are_those_measured_inside_the_pixel_range(board):
    matrix = board.matrix().iloc[0]
    assert round(1 - board.leaderboard()["clean_accuracy"][0], 4) == 0.0180
    assert abs(1 - matrix["fgsm"] - 0.0390) <= 0.0002
    assert abs(1 - matrix["pgd:length=0.01,random_start=false"] - 0.0406) <= 0.0005
