import itertools
import math

import cvxpy as cp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from robustbench_lite.noise import Noise
from robustbench_lite.norms import NORMS, Norm, by_row, l0, l1, l2, linf, patch, pixels

ALL = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
BALLS = [(linf, 8 / 255), (linf, 0.3), (l2, 0.7), (l1, 2.0), (l0, 3.0), (l0, 3.9), (patch, 0.2), (patch, 0.45)]
EVERY_BALL = pytest.mark.parametrize(("norm", "eps"), BALLS, ids=lambda value: getattr(value, "name", value))
SHAPES = [(3, 6, 5), (1, 4, 9), (13,)]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
HYPOTHESIS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def batches(draw: st.DrawFn) -> Tensor:
    """Eighths at any scale: sums of squares are exact, and ties and zeros are common."""
    shape = (draw(st.integers(1, 4)), *draw(st.sampled_from([(3, 4, 5), (1, 3, 3), (7,)])))
    entries = draw(st.lists(st.integers(-8, 8), min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(entries, dtype=torch.float64).view(shape) / 8 * 2.0 ** draw(st.integers(-6, 10))


def nearest(points: Tensor, eps: float, order: int, bounds: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The nearest points of norm at most ``eps`` within bounds, by a solver."""
    here = cp.Variable(points.shape)
    constraints = [cp.norm(here, order, axis=1) <= eps]
    if bounds is not None:
        constraints += [here >= bounds[0].numpy(), here <= bounds[1].numpy()]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(here - points.numpy())), constraints)
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return torch.from_numpy(here.value)


def apart(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).flatten(1).norm(dim=1)


def squares(height: int, width: int, side: int) -> list[Tensor]:
    """Every square of the plane, as masks; it may reach over the edge of a plane that is narrower."""
    masks = []
    for top, left in itertools.product(range(max(height - side, 0) + 1), range(max(width - side, 0) + 1)):
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[top : top + side, left : left + side] = True
        masks.append(mask)
    return masks


# size and limit


@pytest.mark.parametrize(
    ("norm", "delta", "size"),
    [
        (linf, [[0.5, -2.0, 1.0]], 2.0),
        (l2, [[3.0, 0.0, -4.0]], 5.0),
        (l1, [[3.0, 0.0, -4.0]], 7.0),
        (l0, [[3.0, 0.0, -4.0]], 2),
        (l0, [[9e-7, 1.1e-6, -9e-7]], 1),
        (patch, [[3.0, 0.0, -4.0, 0.0]], 3),
        (patch, [[0.0, 0.0, -4.0, 0.0]], 1),
    ],
)
def test_the_size_of_a_vector(norm: Norm, delta: list[list[float]], size: float):
    assert norm.size(torch.tensor(delta)).tolist() == [size]


@ALL
def test_nothing_has_size_0(norm: Norm):
    assert norm.size(torch.zeros(2, 3, 4, 4)).tolist() == [0, 0]


def test_l0_counts_pixels_and_not_channels():
    delta = torch.zeros(2, 3, 4, 4)
    delta[0, :, 1, 2] = 0.5
    delta[1, 0, 0, 0] = delta[1, 2, 3, 3] = -0.5
    assert l0.size(delta).tolist() == [1, 2]


def test_the_size_of_a_patch_is_the_side_of_the_square_that_holds_all_that_moved():
    delta = torch.zeros(4, 2, 5, 6)
    delta[0, 1, 2, 3] = -1
    delta[1, 0, 1, 1], delta[1, 1, 2, 4] = 1, 1  # two rows, four columns, in different channels
    delta[2, 0, 0, 0] = delta[2, 0, 4, 0] = 1
    delta[3] = 1
    assert patch.size(delta).tolist() == [1, 4, 5, 6]


@EVERY_BALL
def test_sizes_are_of_each_row_alone(norm: Norm, eps: float):
    delta = normal(5, 3, 6, 5)
    delta[2] = 0
    assert torch.equal(norm.size(delta), torch.cat([norm.size(row) for row in delta.split(1)]))


def test_the_largest_size_that_eps_allows():
    image, wide, vector = torch.zeros(1, 3, 28, 28), torch.zeros(1, 1, 4, 16), torch.zeros(1, 9)
    assert [norm.limit(0.3, image) for norm in (linf, l2, l1)] == [0.3, 0.3, 0.3]
    assert [l0.limit(eps, image) for eps in (0, 0.9, 10, 10.7)] == [0, 0, 10, 10]
    assert l0.limit(math.inf, vector) >= 9
    assert [patch.limit(eps, image) for eps in (0, 0.1, 1)] == [0, 8, 28]
    assert patch.limit(math.inf, image) >= 28
    for side, of in ((3, torch.zeros(1, 1, 3, 31)), (7, torch.zeros(1, 3, 7, 11)), (4, torch.zeros(1, 1, 7, 10))):
        assert patch.limit(side * side / of[0, 0].numel(), of) == side
    assert patch.limit(0.25, wide) == 4


# projection


@given(batches(), st.sampled_from(BALLS))
@HYPOTHESIS
def test_a_projection_lies_in_the_ball_and_is_its_own(delta: Tensor, ball: tuple[Norm, float]):
    norm, eps = ball
    before = delta.clone()
    once = norm.project(delta, eps)
    assert torch.equal(delta, before)
    assert (norm.size(once) <= norm.limit(eps, delta) * (1 + 1e-12)).all()
    torch.testing.assert_close(norm.project(once, eps), once, rtol=1e-12, atol=1e-14)


@EVERY_SHAPE
@EVERY_BALL
def test_what_lies_inside_is_left_alone(norm: Norm, eps: float, shape: tuple[int, ...]):
    inside = norm.sample(Noise(0, torch.arange(20)), torch.empty(20, *shape), eps) * (1 - 1e-6)
    assert torch.equal(norm.project(inside, eps), inside)


@pytest.mark.parametrize(("norm", "order"), [(l1, 1), (l2, 2)], ids=["l1", "l2"])
@pytest.mark.parametrize("eps", [0.05, 1.0])
def test_the_projection_is_the_nearest_point(norm: Norm, order: int, eps: float):
    delta = normal(12, 6)
    delta[0, 3:], delta[1] = 0, 0.5
    delta[2], delta[3] = 1e-3 * delta[2], 30 * delta[3]
    torch.testing.assert_close(norm.project(delta, eps), nearest(delta, eps, order), rtol=0, atol=1e-5)


def test_the_nearest_point_of_a_cube_and_of_a_diamond():
    delta = torch.tensor([[0.5, -0.05, -0.3]])
    torch.testing.assert_close(linf.project(delta, 0.1), torch.tensor([[0.1, -0.05, -0.1]]))
    torch.testing.assert_close(l1.project(delta, 0.4), torch.tensor([[0.3, 0.0, -0.1]]))


@pytest.mark.parametrize("eps", [0, 1, 2.5, 5, 6, 9])
def test_l0_keeps_the_nearest_choice_of_pixels(eps: float):
    delta = normal(20, 3, 2, 3)
    delta[0, :, 0] = 0
    choices = itertools.combinations(range(6), int(min(eps, 6)))
    masks = [torch.zeros(6).index_fill(0, torch.tensor(choice, dtype=torch.int64), 1).view(2, 3) for choice in choices]
    best = torch.stack([apart(delta, delta * mask) for mask in masks]).amin(0)
    kept = l0.project(delta, eps)
    torch.testing.assert_close(apart(delta, kept), best)
    assert ((kept == delta) | (kept == 0)).all()


@pytest.mark.parametrize("shape", [(2, 4, 5), (3, 5, 3), (6,)], ids=str)
@pytest.mark.parametrize("eps", [0.01, 0.1, 0.3, 0.5, 1.0])
def test_patch_keeps_the_nearest_square(shape: tuple[int, ...], eps: float):
    delta = normal(20, *shape)
    height, width = shape[1:] if len(shape) == 3 else (1, *shape)
    side = int(math.sqrt(eps * height * width))
    kept = patch.project(delta, eps)
    masks = [mask.view(shape[-2:] if len(shape) == 3 else shape) for mask in squares(height, width, side)]
    best = torch.stack([apart(delta, delta * mask) for mask in masks]).amin(0)
    torch.testing.assert_close(apart(delta, kept), best)
    assert ((kept == delta) | (kept == 0)).all()
    assert (patch.size(kept) <= side).all()


@EVERY_SHAPE
@EVERY_BALL
def test_a_batch_of_one_is_projected_as_in_a_batch_of_seven(norm: Norm, eps: float, shape: tuple[int, ...]):
    x, clean = 2 * normal(7, *shape, dtype=torch.float32), uniform(7, *shape, dtype=torch.float32)
    one = [norm.project(row, eps) for row in x.split(1)]
    assert torch.equal(norm.project(x, eps), torch.cat(one))
    one = [norm.confine(*pair, eps, 0, 1) for pair in zip(x.split(1), clean.split(1))]
    assert torch.equal(norm.confine(x, clean, eps, 0, 1), torch.cat(one))


# ball and pixel range at once


def awkward(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Points far out and near by, around images of which a third lies on the pixel bounds and some all but there."""
    clean = (3 * uniform(24, *shape, dtype=dtype) - 1).clamp(0, 1)
    clean.view(-1)[::7], clean.view(-1)[3::11] = 1e-6, 1 - 1e-6
    reach = by_row(torch.logspace(-3, 2, 24, dtype=dtype), clean)
    x = clean + reach * normal(24, *shape, seed=1, dtype=dtype)
    x.view(-1)[::5] = clean.view(-1)[::5]
    return x, clean


@EVERY_SHAPE
@EVERY_BALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_confined_points_lie_in_the_ball_and_in_the_pixel_range(
    norm: Norm, eps: float, shape: tuple[int, ...], dtype: torch.dtype
):
    x, clean = awkward(shape, dtype)
    before = x.clone(), clean.clone()
    near = norm.confine(x, clean, eps, 0, 1)
    assert torch.equal(x, before[0])
    assert torch.equal(clean, before[1])
    slack = 2e-6 if dtype == torch.float32 else 1e-12
    assert near.min() >= 0
    assert near.max() <= 1
    assert (norm.size(near - clean) <= norm.limit(eps, x) + slack).all()
    torch.testing.assert_close(norm.confine(near, clean, eps, 0, 1), near, rtol=0, atol=slack)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_confining_to_nothing_and_to_everything(norm: Norm, dtype: torch.dtype):
    x, clean = awkward((3, 6, 6), dtype)
    assert torch.equal(norm.confine(x, clean, 0, 0, 1), clean)
    for eps in (1e6, math.inf):
        torch.testing.assert_close(norm.confine(x, clean, eps, 0, 1), x.clamp(0, 1), rtol=0, atol=1e-7)


@EVERY_BALL
def test_confining_to_another_pixel_range(norm: Norm, eps: float):
    x, clean = (256 * points - 128 for points in awkward((3, 6, 5)))
    near = norm.confine(x, clean, eps, -128, 128)
    assert near.abs().max() <= 128 + 1e-12
    assert (norm.size(near - clean) <= norm.limit(eps, x) + 1e-12).all()
    assert (norm.size(near - clean) > 0).all()


@pytest.mark.parametrize("eps", [1e-4, 0.3, 2.0])
def test_confined_to_a_cube_is_nearest(eps: float):
    x, clean = awkward((8,))
    hand = torch.minimum(torch.maximum(x, (clean - eps).clamp_min(0)), (clean + eps).clamp_max(1))
    torch.testing.assert_close(linf.confine(x, clean, eps, 0, 1), hand, rtol=0, atol=1e-15)


@pytest.mark.parametrize("eps", [1e-2, 0.4, 1.5, 4.0])
def test_confined_to_a_diamond_is_nearest(eps: float):
    x, clean = awkward((8,))
    solved = clean + nearest(x - clean, eps, 1, (-clean, 1 - clean))
    confined = l1.confine(x, clean, eps, 0, 1)
    torch.testing.assert_close(confined, solved, rtol=0, atol=1e-4)
    # the solver stops short of the optimum; ours must not lie further away
    assert (apart(x, confined) <= apart(x, solved) + 1e-6).all()


def test_the_l1_projection_by_hand():
    """Both long coordinates leave the range: 0.2 of room and 0.1, the rest of 0.5 goes to the third."""
    clean, x = torch.tensor([[0.8, 0.1, 0.5, 0.5]]), torch.tensor([[9.0, -9.0, 0.9, 0.6]])
    torch.testing.assert_close(l1.confine(x, clean, 0.5, 0, 1), torch.tensor([[1.0, 0.0, 0.7, 0.5]]))


@ALL
@pytest.mark.parametrize("far", [1e8, 1e20, math.inf])
def test_points_at_any_distance_are_confined(norm: Norm, far: float):
    clean = torch.full((2, 3, 4, 4), 0.5)
    x = clean + 0.4
    x[:, 0, 0, 0] = far
    eps = 2 if norm is l0 else 0.3
    near = norm.confine(x, clean, eps, 0, 1)
    assert ((near >= 0) & (near <= 1)).all()
    assert (norm.size(near - clean) <= norm.limit(eps, x) + 1e-6).all()
    assert (near[:, 0, 0, 0] > 0.5).all()


@pytest.mark.parametrize("shape", [(784,), (3, 32, 32)], ids=str)
@pytest.mark.parametrize("eps", [0.5, 12.0])
def test_float32_is_confined_as_precisely_as_it_can_be(shape: tuple[int, ...], eps: float):
    x, clean = awkward(shape, torch.float32)
    exact = l1.confine(x.double(), clean.double(), eps, 0, 1)
    confined = l1.confine(x, clean, eps, 0, 1)
    torch.testing.assert_close(confined.double(), exact, rtol=0, atol=1e-6)
    assert (l1.size((confined - clean).double()) <= eps + 1e-5).all()


# steepest ascent


def gradients(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    grad = normal(16, *shape, dtype=dtype)
    grad.view(-1)[::3] = 0
    return grad


@EVERY_SHAPE
@ALL
def test_a_step_has_size_one_and_never_descends(norm: Norm, shape: tuple[int, ...]):
    grad = gradients(*shape)
    step = norm.steepest(grad)
    torch.testing.assert_close(norm.size(step), torch.ones(16, dtype=torch.float64))
    assert (step * grad >= 0).all()
    assert (step.abs() <= 1).all()


@EVERY_SHAPE
@pytest.mark.parametrize(("norm", "dual"), [(linf, 1), (l2, 2), (l1, math.inf)], ids=["linf", "l2", "l1"])
def test_the_rise_of_a_step_is_the_dual_norm(norm: Norm, dual: float, shape: tuple[int, ...]):
    grad = gradients(*shape)
    rise = (norm.steepest(grad) * grad).flatten(1).sum(1)
    torch.testing.assert_close(rise, torch.linalg.vector_norm(grad.flatten(1), dual, dim=1))


@pytest.mark.parametrize("norm", [l0, patch], ids=["l0", "patch"])
def test_one_pixel_rises_most(norm: Norm):
    grad = gradients(3, 3, 4)
    corners = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=3)), dtype=torch.float64)
    rises = torch.einsum("bchw,kc->bkhw", grad, corners).flatten(1).amax(1)
    torch.testing.assert_close((norm.steepest(grad) * grad).flatten(1).sum(1), rises)


@pytest.mark.parametrize("size", [1, 20, 100])
def test_an_l1_step_changes_the_steepest_coordinate(size: int):
    grad = normal(16, size)
    best = torch.zeros_like(grad).scatter(1, grad.abs().argmax(1, keepdim=True), 1) * grad.sign()
    assert torch.equal(l1.steepest(grad), best)


def test_an_l1_step_is_shared_by_the_steepest_hundredth():
    grad = normal(16, 3, 32, 32)
    step, flat = l1.steepest(grad).flatten(1), grad.flatten(1)
    chosen = flat.abs() >= flat.abs().sort(1, descending=True).values[:, 30:31]
    torch.testing.assert_close(step, torch.where(chosen, flat.sign() / 31, 0))


def test_an_l1_step_wastes_nothing_on_flat_coordinates():
    grad = torch.zeros(2, 1000)
    grad[0, 5], grad[1, :3] = -2, torch.tensor([1.0, -1.0, 1e-9])
    step = l1.steepest(grad)
    torch.testing.assert_close(step[:, :6], torch.tensor([[0, 0, 0, 0, 0, -1.0], [1 / 3, -1 / 3, 1 / 3, 0, 0, 0]]))
    assert l1.size(step).tolist() == pytest.approx([1, 1])


@EVERY_SHAPE
@ALL
def test_no_gradient_gives_no_step(norm: Norm, shape: tuple[int, ...]):
    grad = gradients(*shape)
    grad[3] = 0
    step = norm.steepest(grad)
    assert not step[3].any()
    assert (norm.size(step) > 0).sum() == 15


@ALL
@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e30])
def test_the_scale_of_a_gradient_does_not_matter(norm: Norm, scale: float):
    grad = gradients(3, 4, 4, dtype=torch.float32)
    torch.testing.assert_close(norm.steepest(grad * scale), norm.steepest(grad), rtol=1e-4, atol=1e-6)


# random points

DRAWS, ROWS = 4000, torch.arange(4000)
NOISE = Noise(0, ROWS)


def assert_likely(result: object) -> None:
    assert result.pvalue > 1e-3, result


@EVERY_SHAPE
@EVERY_BALL
def test_samples_lie_in_the_ball_and_depend_on_the_key_alone(norm: Norm, eps: float, shape: tuple[int, ...]):
    rows = torch.tensor([5, 3, 900, 0, 2, 77, 41])
    sample = norm.sample(Noise(1, rows), torch.zeros(7, *shape), eps)
    assert sample.dtype == torch.float32
    assert (norm.size(sample) <= norm.limit(eps, sample) * (1 + 1e-6)).all()
    assert (pixels(sample) <= 1).all()
    again = [norm.sample(Noise(1, row), torch.ones(1, *shape), eps) for row in rows.split(1)]
    assert torch.equal(sample, torch.cat(again))
    other = norm.sample(Noise(1, rows).at("other"), torch.zeros(7, *shape), eps)
    assert (other != sample).flatten(1).any(1).all()


@pytest.mark.parametrize("norm", [linf, l2, l1], ids=["linf", "l2", "l1"])
@pytest.mark.parametrize("size", [1, 3, 20])
def test_the_volume_within_a_sample_is_uniform(norm: Norm, size: int):
    sample = norm.sample(NOISE, torch.empty(DRAWS, size), 0.3)
    assert_likely(stats.kstest((norm.size(sample) / 0.3) ** size, "uniform"))


def test_l2_samples_point_anywhere():
    """On a sphere in three dimensions every coordinate is uniform (Archimedes)."""
    sample = l2.sample(NOISE, torch.empty(DRAWS, 3), 2.0)
    for way in (sample / sample.norm(dim=1, keepdim=True)).T:
        assert_likely(stats.kstest(way, stats.uniform(-1, 2).cdf))


def test_l1_samples_point_anywhere():
    """A coordinate's share of a point that is uniform on a simplex follows Beta(1, d - 1)."""
    sample = l1.sample(NOISE, torch.empty(DRAWS, 4), 2.0)
    for share, sign in zip((sample.abs() / sample.abs().sum(1, keepdim=True)).T, (sample > 0).T):
        assert_likely(stats.kstest(share[sign], stats.beta(1, 3).cdf))
        assert_likely(stats.kstest(share[~sign], stats.beta(1, 3).cdf))
        assert_likely(stats.binomtest(int(sign.sum()), DRAWS))


def test_linf_samples_are_uniform_in_every_coordinate():
    for coordinate in linf.sample(NOISE, torch.empty(DRAWS, 3), 0.3).T:
        assert_likely(stats.kstest(coordinate, stats.uniform(-0.3, 0.6).cdf))


def test_l0_samples_change_every_pixel_alike():
    sample = l0.sample(NOISE, torch.empty(DRAWS, 2, 3, 4), 5.0)
    moved = pixels(sample) > 0
    assert (moved.flatten(1).sum(1) == 5).all()
    # 12 indicators that add up to 5 in each draw: scaled by (n - 1) / n / variance, their sum is chi-squared
    counts, rate = moved.flatten(1).sum(0).double(), 5 / 12
    statistic = ((counts - DRAWS * rate).square().sum() / (DRAWS * rate * (1 - rate)) * 11 / 12).item()
    assert stats.chi2(11).sf(statistic) > 1e-3
    assert_likely(stats.kstest(sample[sample != 0], stats.uniform(-1, 2).cdf))


def test_patch_samples_lie_in_every_square_alike():
    moved = pixels(patch.sample(NOISE, torch.empty(DRAWS, 2, 4, 6), 9 / 24)) > 0
    counts = [int((moved == square).flatten(1).all(1).sum()) for square in squares(4, 6, 3)]
    assert sum(counts) == DRAWS
    assert_likely(stats.chisquare(counts))
