"""Feature squeezing: the squeezers beside scipy's and scikit-image's, the detector, and attacks that know of it."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter
from torch import Tensor, nn

from robustbench_lite import data
from robustbench_lite.certifying import certify_inputs
from robustbench_lite.defended import Defended
from robustbench_lite.defenses import feature_squeezing as module
from robustbench_lite.defenses.feature_squeezing import bit_depth, median, non_local_means, threshold
from robustbench_lite.evaluation import evaluate
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import BROKEN, REJECTED
from robustbench_lite.registry import make
from robustbench_lite.trained import weights_hash
from robustbench_lite.training import Lab

DIGITS = data.load("digits")
TRAIN = data.load("digits", "train")


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def lab(seed: int = 0) -> Lab:
    return Lab(lambda: TRAIN, Noise(seed, torch.zeros(1, dtype=torch.int64)), lambda spec: Defended(nn.Identity()))


@pytest.fixture(scope="module")
def model() -> Defended:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))
    return make("defense", "standard:epochs=4,rate=3e-3,shift=0")(net, lab())


# The squeezers


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 5, 9)], ids=str)
def test_the_median_is_scipys(shape: tuple[int, ...], size: int):
    x = images(*shape)
    expected = median_filter(x.numpy(), size=(1, 1, size, size), mode="reflect")
    np.testing.assert_array_equal(median(x, size), expected)


def test_a_window_wider_than_the_image_is_mirrored_again():
    x = images(2, 1, 3, 2)
    np.testing.assert_array_equal(median(x, 9), median_filter(x.numpy(), size=(1, 1, 9, 9), mode="reflect"))


def test_bits_by_hand():
    x = torch.tensor([[0.0, 0.2, 0.49, 0.51, 0.9, 1.0]])
    assert bit_depth(x, 1).tolist() == [[0, 0, 0, 1, 1, 1]]
    torch.testing.assert_close(bit_depth(x, 2) * 3, torch.tensor([[0.0, 1, 1, 2, 3, 3]]))
    grey = torch.arange(256.0).unsqueeze(0) / 255
    torch.testing.assert_close(bit_depth(grey, 8), grey)


def approximate(y: Tensor) -> Tensor:
    """The exponential of scikit-image, which is a few percent off: the upper half of a double's bits, by a line."""
    upper = (1048576 / math.log(2) * y + 1072632447).clamp_min(0).long()
    return (upper << 32).view(torch.float64)


@pytest.mark.parametrize("strength", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 12, 10), (3, 9, 11), (1, 8, 8)], ids=str)
def test_non_local_means_are_those_of_scikit_image(shape: tuple[int, ...], strength: float, monkeypatch):
    denoise = pytest.importorskip("skimage.restoration").denoise_nl_means
    x = images(3, *shape).double()
    settings = {"patch_size": 3, "patch_distance": 5, "h": strength, "fast_mode": False, "channel_axis": -1}
    last = x.permute(0, 2, 3, 1)
    expected = torch.stack([torch.from_numpy(denoise(one.numpy(), **settings)) for one in last])
    expected = expected.view_as(last).permute(0, 3, 1, 2)
    torch.testing.assert_close(non_local_means(x, strength), expected, atol=5e-3, rtol=0)
    assert (non_local_means(x, strength) - x).abs().max() > 0.01
    kernel = torch.exp
    monkeypatch.setattr(module.torch, "exp", lambda y: approximate(y) if y.dim() == 4 else kernel(y))
    torch.testing.assert_close(non_local_means(x, strength), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "spec", ["bits=1,median=none", "bits=3,median=none", "bits=none", "bits=none,median=none,strength=1"]
)
def test_attacks_see_a_gradient_where_there_is_one_to_see(spec: str, model: Defended):
    """Of pixels whose change can change the answer; a bit depth has no gradient of its own."""
    squeezed = make("defense", f"feature-squeezing:{spec}")(model, lab())
    x = DIGITS.x[:8].clone().requires_grad_()
    (within,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x)
    (gradient,) = torch.autograd.grad(squeezed.differentiable(x).logsumexp(1).sum(), x)
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.3 * (within != 0).float().mean()
    assert ((gradient - within).abs().flatten(1).amax(1) > 1e-6).all()


def test_squeezers_are_applied_one_after_the_other(model: Defended):
    x = DIGITS.x[:20]
    squeezed = make("defense", "feature-squeezing:bits=2,median=3")(model, lab())
    torch.testing.assert_close(squeezed(x), model(median(bit_depth(x, 2), 3)))


# The detector


@pytest.mark.parametrize("fpr", [0.05, 0.2])
def test_the_threshold_rejects_the_share_that_is_asked_for(fpr: float, model: Defended):
    detector = make("defense", f"feature-squeezing:detect=true,bits=2,median=3,fpr={fpr}")(model, lab())
    rejected = (detector.rejection(TRAIN.x) > 0).float().mean().item()
    assert fpr - 2 / len(TRAIN) < rejected <= fpr
    assert torch.equal(detector(DIGITS.x[:20]), model(DIGITS.x[:20]))


def test_thresholds_by_hand():
    distances = torch.tensor([5.0, 1, 4, 2, 3, 9, 8, 7, 6, 10])
    assert [threshold(distances, fpr).item() for fpr in (0.1, 0.15, 0.5, 0.95)] == [9, 9, 5, 1]


def test_the_distance_is_that_of_the_squeezer_that_changes_most(model: Defended):
    detector = make("defense", "feature-squeezing:detect=true,bits=1,median=2")(model, lab())
    x, score = DIGITS.x[:200], {}
    for name, squeezed in {"bits": bit_depth(x, 1), "median": median(x, 2)}.items():
        score[name] = (model(x).softmax(1) - model(squeezed).softmax(1)).abs().sum(1)
    torch.testing.assert_close(detector.rejection(x) + detector.threshold, torch.maximum(*score.values()))
    assert (score["bits"] > score["median"]).any()
    assert (score["bits"] < score["median"]).any()


def test_the_threshold_is_part_of_what_the_defense_is(model: Defended):
    one, other, again = (
        make("defense", f"feature-squeezing:detect=true,fpr={fpr}")(model, lab()) for fpr in (0.05, 0.2, 0.05)
    )
    assert one.threshold == again.threshold > other.threshold
    assert weights_hash(one) == weights_hash(again) != weights_hash(other)


# Attacked


@pytest.mark.parametrize(
    ("spec", "more"),
    [("bits=1,median=none", 0.1), ("detect=true,bits=3,median=none", 0.02)],
    ids=["squeezed", "detector"],
)
def test_who_knows_of_it_breaks_more(spec: str, more: float, model: Defended):
    squeezed = make("defense", f"feature-squeezing:{spec}")(model, lab())
    x, y = DIGITS.x[:100], DIGITS.y[:100]
    blind, adaptive = (evaluate("pgd:steps=20", squeezed, x, y, "linf:0.2", adaptive=knows) for knows in (False, True))
    assert (adaptive.status == BROKEN).mean() > (blind.status == BROKEN).mean() + more
    assert ((blind.adversarial == REJECTED).mean() > 0.3) == squeezed.detects


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("bits=none,median=none", "there is nothing to squeeze by"),
        ("bits=0", "bits must be 1 to 8"),
        ("median=1", "median must be 2 or more"),
        ("strength=0", "strength must be above 0"),
        ("fpr=1", "fpr must be between"),
    ],
)
def test_settings_that_make_no_sense(settings: str, why: str):
    with pytest.raises(ValueError, match=f"defense feature-squeezing: {why}"):
        make("defense", f"feature-squeezing:{settings}")


@pytest.mark.parametrize("certifier", ["ibp", "lipschitz"])
@pytest.mark.parametrize("spec", ["bits=1,median=none", "bits=none,median=2", "detect=true"])
def test_no_certifier_covers_it(certifier: str, spec: str, model: Defended):
    squeezed = make("defense", f"feature-squeezing:{spec}")(model, lab())
    found = certify_inputs(certifier, squeezed, DIGITS.x[:10], DIGITS.y[:10], "l2:0.001")
    assert set(found.status) <= {"unsupported", "wrong"}
