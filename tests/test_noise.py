import itertools
import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from robustbench_lite import noise as module
from robustbench_lite.noise import Noise

ROWS = torch.arange(4000)
NOISE = Noise(0, ROWS)
DRAWS: dict[str, Callable[[Noise, Tensor], Tensor]] = {
    "uniform": Noise.uniform,
    "normal": Noise.normal,
    "signs": Noise.signs,
    "integers": lambda noise, like: noise.integers(1000, like),
    "permutation": Noise.permutation,
}
EVERY_DRAW = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
EVERY_TYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def assert_likely(result: object) -> None:
    assert result.pvalue > 1e-3, result


def batch(rows: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((rows, *shape), torch.nan, dtype=dtype)


# keys


def test_the_generator_is_splitmix64():
    """The first numbers of Vigna's splitmix64.c from 1234567, which adds the odd constant before it scrambles."""
    counter = 1234567 + torch.arange(1, 6) * module._GAMMA
    known = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [number % 2**64 for number in module._scramble(counter).tolist()] == known


@EVERY_TYPE
@EVERY_DRAW
def test_the_same_key_gives_the_same_numbers(draw: Callable[[Noise, Tensor], Tensor], dtype: torch.dtype):
    noise, like = Noise(7, torch.arange(5)).at("restart", 2), batch(5, 3, 4, dtype=dtype)
    first = draw(noise, like)
    torch.manual_seed(1)
    noise.at("else").normal(like)
    assert first.shape == like.shape
    assert torch.equal(draw(noise, like), first)
    assert torch.equal(draw(Noise(7, torch.arange(5)).at("restart").at(2), like), first)


@EVERY_TYPE
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 5)], ids=str)
@EVERY_DRAW
def test_a_row_has_its_numbers_in_any_batch(
    draw: Callable[[Noise, Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
):
    noise = Noise(3, torch.arange(257)).at("x")
    whole = draw(noise, batch(257, *shape, dtype=dtype))
    for size in (1, 7):
        parts = [
            draw(noise.over(rows), batch(len(rows), *shape, dtype=dtype)) for rows in torch.arange(257).split(size)
        ]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.arange(257).roll(100).flip(0)
    assert torch.equal(draw(noise[order], batch(257, *shape, dtype=dtype)), whole[order])
    mask = order % 3 == 0
    assert torch.equal(draw(noise[mask], batch(int(mask.sum()), *shape, dtype=dtype)), whole[mask])
    assert torch.equal(draw(noise[40:50], batch(10, *shape, dtype=dtype)), whole[40:50])


def test_every_path_is_another_stream():
    noise, like = Noise(0, torch.arange(3)), batch(3, 8)
    paths = [(), ("a",), ("b",), ("a", 1), ("a1",), ("a", "1"), (1, "a"), ("a", 1, 0), ("a", 10), (1,), (-1,), ("",)]
    streams = [noise.at(*path).uniform(like) for path in paths]
    streams += [Noise(1, noise.rows).uniform(like), Noise(-1, noise.rows).uniform(like), noise[[1, 2, 0]].uniform(like)]
    for one, other in itertools.combinations(streams, 2):
        assert not (one == other).any()


def test_rows_seeds_and_paths_are_uncorrelated():
    rows = torch.arange(50)
    numbers = torch.cat(
        [Noise(seed, rows).at(*path).normal(batch(50, 500)) for seed in (0, 1) for path in [(), ("a",), ("a", 1)]]
    )
    correlations = torch.corrcoef(numbers).triu(1)[*torch.triu_indices(300, 300, 1)] * math.sqrt(500)
    assert correlations.abs().max() < 5.5  # of 44,850 that are all but standard normal
    assert_likely(stats.kstest(correlations[::10], "norm"))


def test_neighbouring_numbers_are_uncorrelated():
    numbers = NOISE.uniform(batch(4000, 40)) - 0.5
    for lag in (1, 2, 20):  # the two halves of a word are 20 apart
        correlation = 12 * (numbers[:, lag:] * numbers[:, :-lag]).mean() * math.sqrt(4000 * (40 - lag))
        assert correlation.abs() < 4


def test_noise_for_another_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="noise for 4 rows was asked for a batch of 5"):
        Noise(0, torch.arange(4)).uniform(batch(5, 2))


# distributions


@EVERY_TYPE
def test_uniform_numbers_are(dtype: torch.dtype):
    numbers = NOISE.uniform(batch(4000, 10, dtype=dtype))
    assert numbers.dtype == dtype
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for column in (numbers.flatten(), *numbers.T):
        assert_likely(stats.kstest(column, "uniform"))


@EVERY_TYPE
def test_the_last_bits_are_random_too(dtype: torch.dtype):
    numbers = NOISE.uniform(batch(4000, 10, dtype=dtype)).double()
    last = (numbers * 2 ** (24 if dtype == torch.float32 else 53)).long() & 15
    for column in last.T:
        assert_likely(stats.chisquare(column.bincount(minlength=16)))


@EVERY_TYPE
def test_normal_numbers_are(dtype: torch.dtype):
    numbers = NOISE.normal(batch(4000, 9, dtype=dtype))
    assert numbers.dtype == dtype
    assert numbers.isfinite().all()
    for column in (numbers.flatten(), *numbers.T):
        assert_likely(stats.kstest(column, "norm"))
        assert abs(stats.kurtosis(column)) < 0.4
    # the two of a pair: independent, so that the radius is as well
    assert_likely(stats.kstest(numbers[:, 0] ** 2 + numbers[:, 5] ** 2, stats.chi2(2).cdf))
    assert_likely(stats.pearsonr(numbers[:, 0], numbers[:, 5]))


@EVERY_TYPE
def test_signs_are_balanced(dtype: torch.dtype):
    signs = NOISE.signs(batch(4000, 10, dtype=dtype))
    assert signs.dtype == dtype
    assert signs.unique().tolist() == [-1, 1]
    for column in signs.T:
        assert_likely(stats.binomtest(int((column > 0).sum()), 4000))


@pytest.mark.parametrize("high", [1, 2, 7, 100])
def test_integers_are_uniform_and_in_range(high: int):
    numbers = NOISE.integers(high, batch(4000, 3))
    assert numbers.dtype == torch.int64
    counts = numbers.flatten().bincount()
    assert len(counts) == high
    if high > 1:
        assert_likely(stats.chisquare(counts))


def test_large_integers_reach_all_over_their_range():
    numbers = NOISE.integers(2**40, batch(4000, 3)).flatten()
    assert_likely(stats.kstest(numbers.double() / 2**40, "uniform"))
    assert_likely(stats.chisquare((numbers & 15).bincount(minlength=16)))


def test_a_permutation_holds_every_number_once():
    orders = NOISE.permutation(batch(4000, 3, 5)).flatten(1)
    assert torch.equal(orders.sort(1).values, torch.arange(15).expand(4000, -1))


def test_permutations_are_uniform():
    orders = NOISE.permutation(batch(4000, 4))
    counts = (orders @ torch.tensor([64, 16, 4, 1])).unique(return_counts=True)[1]
    assert len(counts) == math.factorial(4)
    assert_likely(stats.chisquare(counts))
