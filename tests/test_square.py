"""Square: its schedule and its shapes worked out by hand, its proposals against what the paper says of them."""

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_lite.attacks.square import PLACES, bump, dipoles, extent, recolour, share, shift, stripes, tiles
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import BROKEN, HELD
from robustbench_lite.problem import Problem
from robustbench_lite.registry import make
from robustbench_lite.threat import Goal, ThreatModel, find_norm
from tests.nets import convolutional, halfspace, many_classes

SHAPES = [(1, 12, 12), (3, 10, 7), (2, 1, 1), (40,)]


def images(shape, count=30, low=0.0, high=1.0):
    random = torch.Generator().manual_seed(1)
    return low + (high - low) * torch.rand(count, *shape, generator=random)


def problem(x, norm, eps):
    goal, threat = Goal(torch.zeros(len(x), dtype=torch.long)), ThreatModel(find_norm(norm), eps)
    return Problem(Defended(nn.Flatten()), x, goal, threat, Noise(0, torch.arange(len(x))), classes=2, access="scores")


def drawn(x, at=0):
    """What a query draws for each row."""
    channels = x.shape[1] if x.dim() == 4 else 1
    return Noise(0, torch.arange(len(x))).at("test", at).uniform(x.new_empty(len(x), PLACES + channels))


@pytest.mark.parametrize(
    ("query", "queries", "want"),
    [
        *[(1, 10_000, 0.8), (10, 10_000, 0.8), (11, 10_000, 0.4), (50, 10_000, 0.4), (51, 10_000, 0.2)],
        *[(201, 10_000, 0.1), (501, 10_000, 0.05), (1001, 10_000, 0.025), (2001, 10_000, 0.0125)],
        *[(4001, 10_000, 0.00625), (6001, 10_000, 0.003125), (8001, 10_000, 0.0015625), (9999, 10_000, 0.0015625)],
        *[(5, 5000, 0.8), (6, 5000, 0.4), (25, 5000, 0.4), (26, 5000, 0.2), (4001, 5000, 0.0015625)],
        (99, 100, 0.0015625),
    ],
)
def test_the_schedule_by_hand(query, queries, want):
    assert share(query, queries, 0.8) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("part", "frame", "odd", "want"),
    [
        (0.8, (28, 28), False, (25, 25)),  # the root of 627.2 is 25.04
        (0.05, (28, 28), False, (6, 6)),  # of 39.2: 6.26
        (0.05, (28, 28), True, (7, 7)),
        (0.0001, (28, 28), False, (1, 1)),
        (0.0001, (28, 28), True, (3, 3)),
        (0.25, (1, 100), False, (1, 25)),  # a square of side 5 does not fit; a row of 25 is as large
        (0.25, (100, 2), False, (25, 2)),
        (0.8, (1, 1), True, (1, 1)),
        (1.0, (6, 7), False, (6, 6)),  # of 42: 6.48
    ],
)
def test_the_size_of_a_square_by_hand(part, frame, odd, want):
    assert extent(part, *frame, odd=odd) == want


def test_the_bump_by_hand():
    edge, ring, centre = 1 / 9, 1 / 9 + 1 / 4, 1 / 9 + 1 / 4 + 1
    rows = [[edge] * 5, [edge, ring, ring, ring, edge], [edge, ring, centre, ring, edge]]
    torch.testing.assert_close(bump(5, 5), torch.tensor([*rows, rows[1], rows[0]]).double())
    torch.testing.assert_close(bump(2, 1), torch.tensor([[1 / 4], [1 / 4 + 1]]).double())
    torch.testing.assert_close(bump(1, 2), bump(2, 1).T)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (3, 3), (7, 7), (6, 4)])
def test_dipoles_have_length_one_and_two_signs(size):
    for shape, across in zip(dipoles(*size, torch.float32, torch.device("cpu")), (0, 1)):
        assert shape.shape == size
        assert float(shape.norm()) == pytest.approx(1)
        half = size[across] // 2
        assert (shape.narrow(across, 0, half) > 0).all()
        assert (shape.narrow(across, half, size[across] - half) < 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_start_is_stripes(shape):
    x = images(shape, low=0.2, high=0.8)
    change = stripes(problem(x, "linf", 0.1)) - x
    torch.testing.assert_close(change.abs(), torch.full_like(x, 0.1))
    if x.dim() == 4:
        torch.testing.assert_close(change, change[:, :, :1].expand_as(change), atol=1e-6, rtol=0)
    assert len(set(change.sign().flatten().tolist())) == 2
    images_at_the_end = stripes(problem(torch.ones(9, *shape), "linf", 0.1))
    assert ((images_at_the_end == 1) | (images_at_the_end == 0.9)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_l2_start_spends_all_of_eps_on_tiles(shape):
    x = images(shape, low=0.45, high=0.55)
    change = tiles(problem(x, "l2", 0.4)) - x
    torch.testing.assert_close(change.flatten(1).norm(dim=1), torch.full((len(x),), 0.4))
    if shape == (1, 12, 12):
        assert (change[:, :, [0, -1]] == 0).all()  # 5 tiles of side 2 leave a rim
        inner = change[:, 0, 1:11, 1:11].reshape(len(x), 5, 2, 5, 2)
        assert (inner[:, :, 0] > 0).eq(inner[:, :, 1] < 0).all()
        assert len({tuple(row.flatten().tolist()) for row in inner.sign()}) == len(x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("part", [0.5, 0.05])
def test_recolours_one_square(shape, part):
    x = images(shape)
    asked = problem(x, "linf", 0.1)
    best = stripes(asked)
    frame = shape[1:] if len(shape) == 3 else (1, shape[0])
    size = extent(part, *frame)
    seen = set()
    for query in range(20):
        tried = recolour(asked.threat, x, best, part, drawn(x, query))
        inside = ((tried == (x + 0.1).clamp(0, 1)) | (tried == (x - 0.1).clamp(0, 1))).all()
        assert inside
        moved = (tried != best).view(len(x), -1, *frame)
        assert moved.flatten(1).any(1).all()  # never in vain
        for row in moved.any(1):
            down, along = row.any(1).nonzero()[:, 0], row.any(0).nonzero()[:, 0]
            assert down.max() - down.min() < size[0]
            assert along.max() - along.min() < size[1]
            seen.add((int(down.min()), int(along.min())))
        best = tried
    room = (frame[0] - size[0] + 1) * (frame[1] - size[1] + 1)
    assert len(seen) >= min(room, 20)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("part", [0.5, 0.05])
def test_shifts_mass_between_two_squares(shape, part):
    x = images(shape, low=0.45, high=0.55)
    asked = problem(x, "l2", 0.3)
    best = tiles(asked)
    frame = shape[1:] if len(shape) == 3 else (1, shape[0])
    area = np.prod(extent(part, *frame, odd=True))
    for query in range(20):
        tried = shift(asked.threat, x, best, part, drawn(x, query))
        # a channel that is nowhere changed in the windows of a 1x1 image may lose its mass, which comes back later
        size = (tried - x).flatten(1).norm(dim=1)
        assert (size <= 0.3 + 1e-6).all()
        changed = ((tried - best).abs() > 1e-7).view(len(x), -1, *frame).any(1).flatten(1).sum(1)
        assert (changed <= 2 * area).all()
        assert (changed > 0).float().mean() > 0.4
        best = tried
    if frame != (1, 1):
        assert (size > 0.29).all()


def test_wins_at_once_and_a_half_the_exact_distance():
    for shape in [(1, 10, 10), (3, 5, 4), (7,)]:
        model, x, y = halfspace("linf", 0.05, shape=shape)
        outcome = evaluate(make("attack", "square:queries=200"), model, x, y, "linf:0.075")
        assert set(outcome.status) == {BROKEN}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_vector_is_an_image_of_one_row(norm):
    model, x, y = many_classes(4, count=30)
    eps = {"linf": 0.02, "l2": 0.2}[norm]
    vectors = evaluate(make("attack", "square:queries=150"), model, x, y, f"{norm}:{eps}")
    rows = evaluate(make("attack", "square:queries=150"), model, x.view(30, 1, 1, 30), y, f"{norm}:{eps}")
    assert set(vectors.status) == {BROKEN, HELD}
    np.testing.assert_array_equal(vectors.forwards, rows.forwards)


@pytest.mark.parametrize("queries", [1, 2, 101, 130])
def test_it_costs_what_it_may(queries):
    model, x, y = many_classes(4, count=20)
    outcome = evaluate(make("attack", f"square:queries={queries}"), model, x, y, "linf:0.0001")
    held = outcome.status == HELD
    assert held.sum() >= 15
    assert set(outcome.forwards[held]) == {queries}


def test_only_what_raises_the_margin_is_kept(monkeypatch):
    net, x, y = convolutional(30)
    asked, ask = [], Problem.logits

    def logits(problem, z):
        asked.append((z[0].clone(), problem.goal, ask(problem, z)))
        return asked[-1][2]

    monkeypatch.setattr(Problem, "logits", logits)
    assert set(evaluate(make("attack", "square:queries=60"), net, x[:16], y[:16], "linf:0.002").status) == {HELD}
    assert len(asked) == 60
    margins = [float(goal.margin(answer)[0]) for _, goal, answer in asked]
    best = 0
    for query in range(1, 60):
        moved = (asked[query][0] != asked[best][0]).any(0)
        down, along = moved.any(1).nonzero()[:, 0], moved.any(0).nonzero()[:, 0]
        size = extent(share(query, 60, 0.8), 8, 8)
        assert down.max() - down.min() < size[0]
        assert along.max() - along.min() < size[1]
        best = query if margins[query] > margins[best] else best
    assert best > 0


@pytest.mark.parametrize("text", ["queries=0", "p=0", "p=1.1", "p=nan"])
def test_refuses_settings_that_make_no_sense(text):
    with pytest.raises(ValueError, match="square"):
        make("attack", f"square:{text}")
