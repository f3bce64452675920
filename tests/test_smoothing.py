"""The wrapper ``smoothed`` and the certifier ``smoothing``."""

import math
from statistics import NormalDist

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from robustbench_lite import smoothed
from robustbench_lite.certificate import Certificate
from robustbench_lite.certify.smoothing import lower_confidence_bound
from robustbench_lite.data import Images
from robustbench_lite.defended import Defended, ask_finally
from robustbench_lite.evaluation import evaluate
from robustbench_lite.noise import Noise
from robustbench_lite.registry import make
from robustbench_lite.smoothed import Smoothed
from robustbench_lite.threat import ThreatModel
from robustbench_lite.training import Lab

from .nets import Linear, convolutional, halfspace, many_classes

NORMAL = NormalDist()


def noise(count: int, seed: int = 0) -> Noise:
    return Noise(seed, torch.arange(count))


def certificate(model: nn.Module, x: Tensor, y: Tensor, spec: str, eps: float = 0.0, keyed: Noise | None = None):
    threat = ThreatModel.parse(f"l2:{eps}")
    return make("certifier", spec)(model, x, y, threat, keyed or noise(len(x)))


class Scripted(Smoothed):
    """Answers with the counts that it is told, first those of the selection, then those of the estimate."""

    def __init__(self, *counts: list[list[int]], sigma: float) -> None:
        super().__init__(nn.Identity(), sigma)
        self.counts = [torch.tensor(each) for each in counts]

    def votes(self, x: Tensor, noise: Noise, draws: int) -> Tensor:
        return self.counts.pop(0)


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([0.0, 1.0, 0.0]).expand(len(x), 3) + 0 * x.flatten(1)[:, :1]


# The certifier


@pytest.mark.parametrize(("counts", "n", "alpha"), [(5, 10, 0.05), (10, 10, 0.05), (990, 1000, 0.001), (1, 7, 0.3)])
def test_the_bound_is_clopper_and_pearsons(counts: int, n: int, alpha: float):
    theirs = binomtest(counts, n, alternative="greater").proportion_ci(1 - alpha, "exact").low
    assert lower_confidence_bound(torch.tensor([counts]), n, alpha).item() == pytest.approx(theirs, rel=1e-9)


def test_the_bound_in_cases_worked_out_by_hand():
    bound = lower_confidence_bound(torch.tensor([0, 1, 5, 10]), 10, 0.05)
    by_hand = [0, 1 - 0.95**0.1, 0.2224, 0.05**0.1]  # p^10 = 0.05, 1 - (1 - p)^10 = 0.05; in between from tables
    torch.testing.assert_close(bound, torch.tensor(by_hand, dtype=torch.float64), atol=1e-4, rtol=0)


def test_an_example_worked_out_by_hand():
    """Of 10 votes, alpha 0.001: 10 bound the probability by 0.001^0.1 = 0.5012, and 9 by far less than a half."""
    select = [[3, 1, 0], [0, 2, 2], [1, 0, 3], [0, 0, 4]]  # a tie goes to the lower class
    estimate = [[10, 0, 0], [1, 9, 0], [0, 10, 0], [0, 0, 10]]  # the third changes its mind: no votes for class 2
    model, x, y = Scripted(select, estimate, sigma=0.5), torch.rand(4, 3), torch.tensor([0, 1, 1, 0])
    found = certificate(model, x, y, "smoothing:n0=4,n=10", eps=0.001)
    radius = 0.5 * NORMAL.inv_cdf(0.001**0.1)
    assert radius > 0.001
    assert found.label.tolist() == [0, -1, -1, 2]
    assert found.status == ["verified", "unknown", "unknown", "verified"]
    torch.testing.assert_close(found.radius, torch.tensor([radius, 0, 0, radius], dtype=torch.float64))
    beyond = certificate(Scripted(select, estimate, sigma=0.5), x, y, "smoothing:n0=4,n=10", eps=0.01)
    assert beyond.label.tolist() == [-1] * 4
    torch.testing.assert_close(beyond.radius, torch.tensor([radius, 0, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_radius_of_a_linear_model_is_its_distance(dtype: torch.dtype):
    """Noise puts a share Phi(distance / sigma) on the right side, so that only the interval is lost."""
    model, x, y = halfspace("l2", 0.3, count=6, shape=(1, 4, 4), dtype=dtype)
    found = certificate(Smoothed(model, sigma=0.25), x, y, "smoothing:n=20000", eps=0.25)
    expected = 0.25 * NORMAL.inv_cdf(binomtest(round(20000 * NORMAL.cdf(1.2)), 20000).proportion_ci(0.998, "exact").low)
    assert found.label.tolist() == y.tolist()
    assert (found.radius < 0.3).all()
    torch.testing.assert_close(found.radius, torch.full((6,), expected, dtype=torch.float64), atol=0.01, rtol=0)


def test_bounds_hold_as_often_as_they_say():
    """At alpha 0.2, at most a fifth of the radii are too large: 400 of them are, up to chance."""
    model, x, y = halfspace("l2", 0.1, count=1, shape=(2,))
    x, y = x.expand(400, 2), y.expand(400)
    found = certificate(Smoothed(model, sigma=0.25), x, y, "smoothing:n=500,alpha=0.2")
    wrong = int((found.radius > 0.1).sum())
    assert 50 < wrong < 80 + 3 * 8


def test_a_constant_classifier_holds_as_far_as_so_many_draws_can_say():
    found = certificate(
        Smoothed(Constant(), sigma=1.0), torch.rand(3, 1, 2, 2), torch.ones(3).long(), "smoothing:n=999"
    )
    expected = NORMAL.inv_cdf(0.001 ** (1 / 999))
    torch.testing.assert_close(found.radius, torch.full((3,), expected, dtype=torch.float64))
    assert found.label.tolist() == [1, 1, 1]


def test_a_row_has_its_own_draws_whatever_the_batch(monkeypatch: pytest.MonkeyPatch):
    net, x, _ = convolutional(5)
    model = Smoothed(net, sigma=0.5)
    whole = model.votes(x, noise(5), 300)
    assert whole.sum(1).tolist() == [300] * 5
    alone = model.votes(x[3:4], Noise(0, torch.tensor([3])), 300)
    assert torch.equal(whole[3:4], alone)
    monkeypatch.setattr(smoothed, "TOGETHER", 2 * smoothed.BLOCK * 64)
    assert torch.equal(whole, model.votes(x, noise(5), 300))
    assert not torch.equal(whole, model.votes(x, noise(5, seed=1), 300))
    same = model.votes(x[:1].expand(5, -1, -1, -1), noise(5), 300)
    assert len({tuple(row) for row in same.tolist()}) > 1


def test_the_votes_are_those_of_draws_made_one_by_one():
    net, x, _ = convolutional(3)
    draws = noise(3).at("draws", 0).normal(x.unsqueeze(1).expand(-1, 40, *x.shape[1:]))
    by_hand = torch.stack([net(x + 0.5 * draws[:, k]).argmax(1) for k in range(40)], 1)
    counted = torch.stack([(by_hand == label).sum(1) for label in range(4)], 1)
    assert torch.equal(Smoothed(net, sigma=0.5).votes(x, noise(3), 40), counted)


def test_selection_and_estimate_are_drawn_apart():
    """With the selection's own draws for the estimate a coin would be called loaded."""
    model = Smoothed(Linear(torch.eye(2), torch.zeros(2)), sigma=1.0)
    x = torch.full((300, 2), 0.5)
    found = certificate(model, x, torch.zeros(300).long(), "smoothing:n0=60,n=60,alpha=0.1", keyed=noise(300))
    assert sum(one == "verified" for one in found.status) < 0.1 * 300 + 3 * math.sqrt(0.09 * 300)


def test_only_a_smoothed_model_that_is_not_random_itself_is_covered():
    model, x, y = halfspace("l2", 0.3, count=2)
    with pytest.raises(ValueError, match="more of its own"):
        certificate(Smoothed(Smoothed(model)), x, y, "smoothing")
    with pytest.raises(ValueError, match=r"standard\+smoothed"):
        certificate(Defended(model), x, y, "smoothing")


@pytest.mark.parametrize("spec", ["smoothing:n0=0", "smoothing:n=0", "smoothing:alpha=0", "smoothing:alpha=1"])
def test_settings_of_the_certifier(spec: str):
    with pytest.raises(ValueError, match=r"certifier smoothing: (n0|alpha)"):
        make("certifier", spec)


def test_a_radius_verifies_up_to_itself():
    found = Certificate.of_radius(torch.tensor([2, 1, 0]), torch.tensor([0.5, 0.4, 0.0]), 0.5)
    assert (found.label.tolist(), found.status) == ([2, -1, -1], ["verified", "unknown", "unknown"])
    assert found.margin.isnan().all()


# The defense


def lab() -> Lab:
    def images() -> Images:
        raise AssertionError("nothing is trained")

    return Lab(images, Noise(0, torch.zeros(1, dtype=torch.int64)), lambda spec: Defended(nn.Identity()))


def test_the_defense_answers_under_noise_of_its_deviation_and_votes():
    net, x, _ = convolutional(6)
    model = make("defense", "smoothed:sigma=0.5,draws=7")(Defended(net), lab())
    assert (model.training, model.stochastic, model.draws) == (False, True, 7)
    key = noise(6)
    torch.testing.assert_close(model(x, key), net(x + 0.5 * key.at("smoothed").normal(x)))
    says = torch.stack([model(x, key.at("vote", draw)).argmax(1) for draw in range(7)])
    shares = torch.stack([(says == label).float().mean(0) for label in range(4)], 1)
    torch.testing.assert_close(ask_finally(model, x, 6, key.at("anywhere")), shares)


def test_many_draws_say_what_the_votes_say():
    model, x, _ = many_classes(3, 20)
    many = Smoothed(model, sigma=0.25, draws=600)
    shares = many.votes(x, noise(20), 5000) / 5000
    assert (ask_finally(many, x, 20, noise(20)) - shares).abs().max() < 0.1


def test_a_surrogate_inside_is_what_attacks_see():
    """Rounding has no gradient; the defense inside stands in for it."""

    class Rounded(Defended):
        def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
            return super().forward(x.round())

        def surrogate(self, x: Tensor, noise: Noise | None = None) -> Tensor:
            return super().forward(x)

    line, x, _ = many_classes(3, 4)
    model = Smoothed(Rounded(line), sigma=0.5)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, noise(4))[:, 0].sum(), x)
    assert (gradient != 0).any(1).all()


def test_pgd_breaks_a_smoothed_model_beyond_its_distance_and_not_before():
    """The smoothed halfspace is the halfspace; the vote moves it by about sigma / sqrt(draws)."""
    model, x, y = halfspace("l2", 0.3, count=12, shape=(1, 4, 4))
    smooth = Smoothed(model, sigma=0.1, draws=65)
    assert (evaluate("pgd:steps=5", smooth, x, y, "l2:0.25").status == "held").all()
    assert (evaluate("pgd:steps=5", smooth, x, y, "l2:0.35").status == "broken").all()


@pytest.mark.parametrize("spec", ["smoothed:sigma=0", "smoothed:draws=0"])
def test_settings_of_the_defense(spec: str):
    with pytest.raises(ValueError, match="defense smoothed: sigma must be above 0"):
        make("defense", spec)
