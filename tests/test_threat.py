import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustbench_lite.noise import Noise
from robustbench_lite.norms import NORMS
from robustbench_lite.threat import Goal, ThreatModel, parse_number

HYPOTHESIS = settings(max_examples=60, deadline=None, derandomize=True, database=None)
THREATS = [
    ThreatModel(NORMS[name], eps)
    for name, epsilons in {
        "linf": (8 / 255, 0.3, 1e-4, 0.25),
        "l2": (0.3, 8 / 255, 1e-4, 2.0),
        "l1": (0.3, 8 / 255, 1e-4, 10.0),
        "l0": (3, 1),
        "patch": (0.1, 0.3),
    }.items()
    for eps in epsilons
]
EVERY_THREAT = pytest.mark.parametrize("threat", THREATS, ids=str)


def images(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Float32 in [0, 1]: multiples of 1/255, black and white among them, and numbers of any length."""
    draw = torch.Generator().manual_seed(seed)
    bytes_ = torch.randint(-80, 336, (count, *shape), generator=draw).clamp(0, 255) / 255
    return torch.where(torch.rand(bytes_.shape, generator=draw) < 0.5, bytes_, torch.rand(bytes_.shape, generator=draw))


def moved(clean: Tensor, reach: float, seed: int = 1) -> Tensor:
    return clean + reach * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


# threats


@pytest.mark.parametrize(
    ("text", "name", "eps"),
    [
        ("linf:8/255", "linf", 8 / 255),
        ("linf:0.3", "linf", 0.3),
        ("linf:0", "linf", 0),
        ("linf:1", "linf", 1),
        ("l2:2", "l2", 2),
        (" l1:12 ", "l1", 12),
        ("l1:1e1", "l1", 10),
        ("l0:10", "l0", 10),
        ("patch:0.1", "patch", 0.1),
    ],
)
def test_a_threat_is_read(text: str, name: str, eps: float):
    assert ThreatModel.parse(text) == ThreatModel(NORMS[name], eps)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("linfty:0.3", "no norm 'linfty'; did you mean linf? There are: linf, l2, l1, l0, patch"),
        ("0.3", "no norm '0.3'"),
        ("", "no norm ''"),
        ("linf", "'linf' has no eps; write linf:0.3"),
        ("linf:", "'' is not a number; write 0.3 or 8/255"),
        ("linf:x", "'x' is not a number"),
        ("linf:8/0", "'8/0' is not a number"),
        ("linf:8/255/2", "'8/255/2' is not a number"),
        ("linf:-0.1", "linf: eps must be 0 or more, not -0.1"),
        ("l2:-8/255", "l2: eps must be 0 or more"),
        ("l2:nan", "l2: eps must be 0 or more, not nan"),
        ("l2:inf", "'l2:inf' allows everything; eps must be finite"),
        ("linf:8", "linf: eps 8 is above 1, but pixels run from 0 to 1; did you mean 8/255?"),
        ("patch:5", "patch: eps 5 is above 1, but it is a share of the image's area"),
    ],
)
def test_what_is_no_threat_is_refused_in_one_line(text: str, complaint: str):
    with pytest.raises(ValueError) as caught:
        ThreatModel.parse(text)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("lower", "upper"), [(1, 0), (0.5, 0.5), (math.nan, 1)])
def test_a_pixel_range_has_two_ends(lower: float, upper: float):
    with pytest.raises(ValueError, match="lower < upper"):
        ThreatModel(NORMS["linf"], 0.1, lower, upper)


def test_a_fraction_is_a_number():
    assert parse_number("8/255") == 8 / 255
    assert parse_number("0.3") == 0.3


def exact_size(name: str, x: Tensor, clean: Tensor) -> float | Fraction:
    """The size of one perturbation without any rounding; squared for l2."""
    delta = [Fraction(a) - Fraction(b) for a, b in zip(x.flatten().tolist(), clean.flatten().tolist())]
    return {"linf": max, "l1": sum, "l2": lambda sizes: sum(size * size for size in sizes)}[name](
        [abs(change) for change in delta]
    )


@EVERY_THREAT
@pytest.mark.parametrize("reach", [0.1, 0.5, 4.0])
def test_not_a_bit_lies_outside_after_a_strict_projection(threat: ThreatModel, reach: float):
    clean = images(64, (3, 6, 6))
    x = threat.project_strictly(moved(clean, reach), clean)
    assert x.dtype == torch.float32
    assert x.min() >= 0
    assert x.max() <= 1
    assert (threat.norm.size(x.double() - clean.double()) <= threat.norm.limit(threat.eps, clean)).all()
    assert threat.allows(x, clean, slack=0).all() or threat.norm.name in ("linf", "l2", "l1")  # sizes in float32 round
    torch.testing.assert_close(x, threat.project(moved(clean, reach), clean), rtol=0, atol=1e-6)


@given(
    st.sampled_from([threat for threat in THREATS if threat.norm.name in ("linf", "l2", "l1")]),
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.sampled_from([1e-4, 0.3, 30.0]),
)
@HYPOTHESIS
def test_nor_in_exact_arithmetic(threat: ThreatModel, seed: int, size: int, reach: float):
    clean = images(16, (size,), seed)
    x = threat.project_strictly(moved(clean, reach, seed + 1), clean)
    limit = Fraction(threat.eps) ** (2 if threat.norm.name == "l2" else 1)
    for row, origin in zip(x, clean):
        assert exact_size(threat.norm.name, row, origin) <= limit


@EVERY_THREAT
def test_a_strict_projection_leaves_what_is_inside_alone(threat: ThreatModel):
    clean = images(16, (3, 6, 6))
    assert torch.equal(threat.project_strictly(clean, clean), clean)
    x = threat.project_strictly(moved(clean, 1), clean)
    torch.testing.assert_close(threat.project_strictly(x, clean), x, rtol=0, atol=1e-7)


@EVERY_THREAT
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (20,)], ids=str)
def test_what_is_projected_is_allowed(threat: ThreatModel, shape: tuple[int, ...]):
    clean = images(8, shape)
    for reach in (0.01, 1.0, 50.0):
        assert threat.allows(threat.project(moved(clean, reach), clean), clean).all()


@EVERY_THREAT
def test_samples_are_allowed_and_depend_on_the_key(threat: ThreatModel):
    clean = images(20, (3, 6, 6))
    noise = Noise(0, torch.arange(20))
    sample = threat.sample(noise, clean)
    assert threat.allows(sample, clean).all()
    assert (sample != clean).flatten(1).any(1).all()
    assert torch.equal(threat.sample(noise[5:7], clean[5:7]), sample[5:7])
    assert not torch.equal(threat.sample(noise.at("again"), clean), sample)


def test_slack_forgives_rounding_and_no_more():
    clean = torch.full((4, 3), 0.5)
    x = clean + torch.tensor([[0.3], [0.3 + 5e-6], [0.3 + 5e-5], [-0.3 - 5e-5]])
    assert ThreatModel(NORMS["linf"], 0.3).allows(x, clean).tolist() == [True, True, False, False]
    assert ThreatModel(NORMS["linf"], 0.3).allows(x, clean, slack=1e-3).all()
    assert ThreatModel(NORMS["linf"], 0.3 + 1e-7).allows(x, clean, slack=0).tolist() == [True, False, False, False]


def test_slack_is_relative_to_large_sizes():
    clean = torch.zeros(2, 100)
    x = clean + torch.tensor([[0.5 + 2e-6], [0.5 + 1e-5]])
    assert ThreatModel(NORMS["l1"], 50).allows(x, clean).tolist() == [True, False]


def test_nothing_outside_the_pixel_range_is_allowed():
    clean = torch.tensor([[0.95, 0.5], [0.05, 0.5], [0.05, 0.5]])
    x = torch.tensor([[1.01, 0.5], [-0.01, 0.5], [-5e-6, 0.5]])
    threat = ThreatModel(NORMS["linf"], 0.3)
    assert threat.allows(x, clean).tolist() == [False, False, True]
    assert threat.inside(x).tolist() == [False, False, False]
    assert ThreatModel(NORMS["linf"], 0.3, -1, 2).allows(x, clean).all()


@EVERY_THREAT
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_never_allowed(threat: ThreatModel, poison: float):
    clean = images(3, (3, 6, 6))
    x = clean.clone()
    x[1, 2, 3, 4] = poison
    assert threat.allows(x, clean, slack=1e9 if math.isnan(poison) else 1e-5).tolist() == [True, False, True]
    assert threat.inside(x).tolist() == [True, False, True]


@EVERY_THREAT
def test_a_step_stays_inside_and_climbs(threat: ThreatModel):
    clean = images(16, (3, 6, 6))
    grad = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    x = clean
    for _ in range(3):
        x = threat.step(x, clean, grad, threat.eps / 2)
        assert threat.allows(x, clean).all()
    assert ((x - clean) * grad).flatten(1).sum(1).min() > 0


def test_a_step_is_as_long_as_it_was_asked_to_be():
    clean, grad = torch.full((1, 4), 0.5), torch.tensor([[3.0, -1.0, 0.0, 0.5]])
    for name, step in {
        "linf": [0.1, -0.1, 0.0, 0.1],
        "l2": [0.3 / 10.25**0.5, -0.1 / 10.25**0.5, 0.0, 0.05 / 10.25**0.5],
        "l1": [0.1, 0.0, 0.0, 0.0],
        "l0": [0.1, 0.0, 0.0, 0.0],
    }.items():
        x = ThreatModel(NORMS[name], 1).step(clean, clean, grad, 0.1)
        torch.testing.assert_close(x - clean, torch.tensor([step]))


def test_a_step_spends_nothing_on_coordinates_at_a_pixel_bound():
    clean = torch.tensor([[1.0, 0.0, 0.5, 0.0]])
    grad = torch.tensor([[9.0, -8.0, 0.1, 0.2]])
    x = ThreatModel(NORMS["l1"], 0.2).step(clean, clean, grad, 0.2)
    torch.testing.assert_close(x, torch.tensor([[1.0, 0.0, 0.5, 0.2]]))
    x = ThreatModel(NORMS["l2"], 0.2).step(clean, clean, grad, 0.2)
    torch.testing.assert_close((x - clean).norm(), torch.tensor(0.2))
    back = ThreatModel(NORMS["l1"], 0.2).step(clean, clean, -grad, 0.2)
    torch.testing.assert_close(back, torch.tensor([[0.8, 0.0, 0.5, 0.0]]))
    beyond = clean + torch.tensor([[1e-7, -1e-7, 0, 0]])  # as rounding may leave it
    assert torch.equal(ThreatModel(NORMS["l2"], 1).step(beyond, clean, grad, 0.2)[:, :2], clean[:, :2])


@pytest.mark.parametrize("name", NORMS)
def test_without_eps_nothing_moves(name: str):
    threat, clean = ThreatModel(NORMS[name], 0), images(4, (3, 6, 6))
    noise = Noise(0, torch.arange(4))
    assert torch.equal(threat.step(clean, clean, torch.ones_like(clean), 0.1), clean)
    assert torch.equal(threat.sample(noise, clean), clean)


# goals

LOGITS = torch.tensor([[1.0, 3.0, 2.0], [-5.0, -3.0, -4.0], [0.5, 0.0, 0.25]])


@pytest.mark.parametrize(
    ("labels", "targeted", "met", "margin"),
    [
        ([1, 1, 0], False, [False, False, False], [-1.0, -1.0, -0.25]),
        ([0, 2, 2], False, [True, True, True], [2.0, 1.0, 0.25]),
        ([1, 1, 0], True, [True, True, True], [1.0, 1.0, 0.25]),
        ([0, 2, 2], True, [False, False, False], [-2.0, -1.0, -0.25]),
    ],
)
def test_goals_and_margins_by_hand(labels: list[int], targeted: bool, met: list[bool], margin: list[float]):
    goal = Goal(torch.tensor(labels), targeted)
    assert goal.met(LOGITS).tolist() == met
    assert goal.margin(LOGITS).tolist() == margin


def test_cross_entropies_by_hand():
    odds = torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.25, 0.25]]).log() + 3
    labels = torch.tensor([1, 2])
    expected = torch.tensor([0.7, 0.25]).log()
    torch.testing.assert_close(Goal(labels).cross_entropy(odds), -expected)
    torch.testing.assert_close(Goal(labels, targeted=True).cross_entropy(odds), expected)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_goal_is_never_met_by_nan_or_infinity(targeted: bool, poison: float, place: int):
    logits = LOGITS.clone()
    logits[1, place] = poison
    for label in range(3):
        assert not Goal(torch.full((3,), label), targeted).met(logits)[1]


@pytest.mark.parametrize("targeted", [False, True])
def test_candidates_are_judged_as_if_each_came_alone(targeted: bool):
    logits = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    goal = Goal(torch.tensor([0, 1, 2, 1]), targeted)
    for judge in (goal.met, goal.margin, goal.cross_entropy):
        assert judge(logits).shape == (4, 5)
        assert torch.equal(judge(logits), torch.stack([judge(column) for column in logits.unbind(1)], 1))
    assert goal.met(logits).any()
    assert not goal.met(logits).all()


@pytest.mark.parametrize("targeted", [False, True])
@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=6), st.data())
@HYPOTHESIS
def test_a_goal_is_met_where_its_margin_is_positive(targeted: bool, logits: list[float], data: st.DataObject):
    label = data.draw(st.integers(0, len(logits) - 1))
    goal, rows = Goal(torch.tensor([label]), targeted), torch.tensor([logits])
    own, other = logits[label], max(logits[:label] + logits[label + 1 :])
    assert goal.margin(rows).item() == pytest.approx((own - other) * (1 if targeted else -1), abs=1e-5)
    if own != other:
        assert goal.met(rows).item() == ((own > other) == targeted)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", [Goal.cross_entropy, Goal.margin], ids=["cross_entropy", "margin"])
def test_losses_grow_towards_the_goal(loss: object, targeted: bool):
    """By finite differences: the label's logit leads one way, its strongest rival's the other."""
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(50) % 4
    goal, rows = Goal(labels, targeted), torch.arange(50)
    rival = logits.scatter(1, labels.unsqueeze(1), -torch.inf).argmax(1)
    for place, sign in ((labels, 1 if targeted else -1), (rival, -1 if targeted else 1)):
        more = logits.clone()
        more[rows, place] += 1e-3
        assert (sign * (loss(goal, more) - loss(goal, logits)) > 0).all()


@pytest.mark.parametrize("targeted", [False, True])
def test_a_label_reaches_a_goal_unless_it_is_that_of_a_closed_input(targeted: bool):
    goal = Goal(torch.tensor([0, 2]), targeted)
    assert goal.reached(torch.tensor([0, 1])).tolist() == [targeted, not targeted]
    labels = torch.tensor([[0, 1, -1], [0, 2, -1]])
    assert (goal.reached(labels) == (torch.tensor([[1, 0, 0], [0, 1, 0]]) == targeted) & (labels >= 0)).all()


def test_a_part_of_a_goal_is_the_goal_of_a_part():
    goal = Goal(torch.tensor([1, 0, 2]), targeted=True)
    part = goal[torch.tensor([True, False, True])]
    assert part.labels.tolist() == [1, 2]
    assert part.targeted


# What a detector's "rejected" is to the adversary: the last column


def test_a_rejection_counts_as_the_label():
    answers = torch.tensor([[3.0, 1.0, 2.0, 4.0], [1.0, 3.0, 2.0, 2.5], [1.0, 3.0, 2.0, 3.5]])
    seen = Goal(torch.tensor([0, 0, 0])).seen(answers, 3)
    assert seen.tolist() == [[4.0, 1.0, 2.0], [2.5, 3.0, 2.0], [3.5, 3.0, 2.0]]
    assert Goal(torch.tensor([0, 0, 0])).met(seen).tolist() == [False, True, False]


def test_to_a_target_it_counts_as_the_best_other_class():
    answers = torch.tensor([[3.0, 1.0, 2.0, 4.0], [1.0, 3.0, 2.0, 2.5], [1.0, 3.0, 2.0, 3.5]])
    goal = Goal(torch.tensor([1, 1, 1]), targeted=True)
    seen = goal.seen(answers, 3)
    assert seen.tolist() == [[4.0, 1.0, 2.0], [1.0, 3.0, 2.5], [1.0, 3.0, 3.5]]
    assert goal.met(seen).tolist() == [False, True, False]


@pytest.mark.parametrize("targeted", [False, True])
def test_the_margin_is_the_adaptive_loss(targeted):
    """min(margin, -score) where the classifier alone is fooled, and of that sign everywhere."""
    random = torch.Generator().manual_seed(0)
    logits, score = torch.randn(500, 4, generator=random), torch.randn(500, generator=random)
    goal = Goal(torch.randint(4, (500,), generator=random), targeted)
    seen = goal.seen(torch.cat([logits, (logits.amax(1) + score).unsqueeze(1)], 1), 4)
    adaptive, fooled = torch.minimum(goal.margin(logits), -score), goal.met(logits)
    torch.testing.assert_close(goal.margin(seen)[fooled], adaptive[fooled])
    assert torch.equal(goal.margin(seen) > 0, adaptive > 0)
    assert torch.equal(goal.met(seen), fooled & (score < 0))
    assert 0 < goal.met(seen).sum() < fooled.sum()


def test_without_a_detector_nothing_changes():
    logits = torch.randn(3, 4)
    assert Goal(torch.tensor([0, 1, 2])).seen(logits, 4) is logits
