"""Published figures on files that do not ship: ROBUST_BENCH_REFERENCE is the folder of Wong & Kolter's checkpoint,
ROBUST_BENCH_DATA that of the full MNIST. Run by ``make reference``."""

import os
from pathlib import Path

import pytest

from robustbench_lite import certify_inputs, models
from robustbench_lite.data import load
from robustbench_lite.matrix import benchmark
from robustbench_lite.threat import ThreatModel
from robustbench_lite.trained import fill

CHECKPOINT = Path(os.environ.get("ROBUST_BENCH_REFERENCE", ".")) / "wong_kolter_mnist_eps01.pth"
pytestmark = pytest.mark.reference


@pytest.fixture(scope="module", autouse=True)
def there():
    if not CHECKPOINT.exists():
        pytest.fail(f"{CHECKPOINT} is not there; set ROBUST_BENCH_REFERENCE to the folder that holds it")


@pytest.fixture(scope="module")
def board(tmp_path_factory):
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


def test_the_dual_proves_what_the_paper_says_and_tighter_bounds_prove_more():
    """Robust error 5.82 % in Wong & Kolter (2018), table 1, whose ball is not cut to the pixel range."""
    images, threat = load("mnist"), ThreatModel.parse("linf:0.1")
    assert len(images) == 10_000
    model = models.build("cnn", images.shape, images.classes).eval()
    fill(model, CHECKPOINT)
    proved = {}
    for spec in ("wong-kolter:clip=false", "wong-kolter", "crown", "alpha-crown"):
        found = certify_inputs(spec, model, images.x, images.y, threat)
        proved[spec] = found.status == "verified"
        print(f"{spec}: robust error {1 - proved[spec].mean():.4f}")
    assert abs(1 - proved["wong-kolter:clip=false"].mean() - 0.0582) <= 0.0002
    assert (proved["wong-kolter"] | ~proved["wong-kolter:clip=false"]).all()
    assert proved["crown"].sum() >= proved["wong-kolter"].sum()
    assert (proved["alpha-crown"] | ~proved["crown"]).all()
