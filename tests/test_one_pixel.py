"""One-pixel: its differential evolution against scipy's, its pixels against every pixel there is."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks import one_pixel
from robustbench_lite.attacks.one_pixel import OnePixel, evolve, mates, paint
from robustbench_lite.evaluation import evaluate
from robustbench_lite.noise import Noise
from robustbench_lite.norms import l0
from robustbench_lite.outcome import BROKEN, HELD
from robustbench_lite.registry import make
from robustbench_lite.threat import ThreatModel
from tests.nets import convolutional, halfspace, many_classes, nearest


def sphere(z):
    return ((z - 0.3) ** 2).sum(-1)


def rosenbrock(z):
    z = 4 * z - 2
    return (100 * (z[..., 1:] - z[..., :-1] ** 2) ** 2 + (1 - z[..., :-1]) ** 2).sum(-1)


def rastrigin(z):
    z = 6 * z - 2
    return (z**2 + 10 * (1 - (np if isinstance(z, np.ndarray) else torch).cos(2 * np.pi * z))).sum(-1)


@pytest.mark.parametrize("valley", [sphere, rosenbrock, rastrigin])
@pytest.mark.parametrize("from_best", [False, True])
def test_finds_the_minima_that_scipys_evolution_finds(valley, from_best: bool):
    optimize, stats = pytest.importorskip("scipy.optimize"), pytest.importorskip("scipy.stats")
    seeds, members, generations, size = 30, 24, 25, 3
    noise = Noise(0, torch.arange(seeds))
    start = noise.at("start").uniform(torch.empty(seeds, members, size, dtype=torch.float64))
    genes, fitness = start, -valley(start)
    for generation in range(generations):
        genes, fitness = evolve(genes, fitness, lambda z: -valley(z), noise.at(generation), 0.5, from_best)
    ours = -fitness.amax(1).numpy()
    theirs = [
        optimize.differential_evolution(
            lambda z: valley(z.T),
            [(0, 1)] * size,
            strategy="best1bin" if from_best else "rand1bin",
            mutation=0.5,
            recombination=1.0,
            maxiter=generations,
            init=population.numpy(),
            tol=0,
            atol=-1,
            polish=False,
            updating="deferred",
            vectorized=True,
            rng=seed,
        ).fun
        for seed, population in enumerate(start)
    ]
    assert (-fitness <= valley(start) + 1e-12).all()
    assert np.median(ours) < 0.3 * np.median(valley(start).amin(1).numpy())
    assert stats.ks_2samp(ours, theirs).pvalue > 0.01


def test_a_child_has_three_parents_that_are_neither_it_nor_each_other():
    members = torch.arange(6).expand(500, 6)
    chosen = torch.stack([*mates(torch.empty(500, 6), Noise(0, torch.arange(500))), members], 2)
    assert (chosen.sort(2).values.diff(dim=2) > 0).all()
    ahead = (chosen[..., :3] - members.unsqueeze(2)) % 6 - 1
    _, counts = (ahead @ torch.tensor([25, 5, 1])).unique(return_counts=True)
    assert len(counts) == 5 * 4 * 3
    assert counts.min() > 20  # 50 are expected
    assert counts.max() < 85


def test_paints_the_pixels_that_the_genes_name():
    x = torch.zeros(1, 2, 3, 4)
    genes = torch.tensor(
        [[[[0.0, 0.0, 0.25, 0.5], [0.99, 0.3, 1.0, 0.0]], [[0.4, 1.0, 0.1, 0.2], [0.4, 1.0, 0.5, 1.0]]]]
    )
    painted = paint(x, genes, ThreatModel(l0, 2, lower=-1.0, upper=1.0))
    by_hand = torch.zeros(1, 2, 2, 3, 4)
    by_hand[0, 0, :, 0, 0] = torch.tensor([-0.5, 0.0])
    by_hand[0, 0, :, 2, 1] = torch.tensor([1.0, -1.0])
    by_hand[0, 1, :, 1, 3] = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(painted, by_hand)


def corners_break(net: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    """Which inputs some position and some corner of the colour cube break."""
    channels, count = x.shape[1], x[0, 0].numel()
    colours = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * channels).view(-1, channels)
    hit = torch.zeros(len(x), dtype=torch.bool)
    for colour in colours:
        tried = x.flatten(2).unsqueeze(1).repeat(1, count, 1, 1)
        tried.diagonal(dim1=1, dim2=3).copy_(colour.view(1, channels, 1).expand(len(x), -1, count))
        with torch.no_grad():
            labels = net(tried.view(-1, *x.shape[1:])).argmax(1)
        hit |= (labels.view(len(x), count) != y.unsqueeze(1)).any(1)
    return hit.numpy()


def test_misses_none_that_an_exhaustive_search_finds():
    net, x, y = convolutional(100)
    exhaustive = corners_break(net, x, y)
    outcome = evaluate(OnePixel(population=100, generations=20), net, x, y, "l0:1")
    assert 10 < exhaustive.sum() < 90
    assert (exhaustive & (outcome.status != BROKEN)).sum() <= 1
    assert (outcome.distance[outcome.status == BROKEN] == 1).all()


def test_finds_the_best_corners_of_a_linear_model():
    model, x, y = many_classes(3, count=40, size=400)
    exact = nearest(model, x, "l0").numpy()
    outcome = evaluate(OnePixel(population=200, generations=40), model, x, y, "l0:2")
    assert set(exact) > {1, 2}
    assert (outcome.status[exact > 2] == HELD).all()
    assert (outcome.status[exact <= 2] == BROKEN).mean() >= 0.9


def test_the_piece_of_memory_changes_nothing(monkeypatch):
    net, x, y = convolutional(60)
    runs = []
    for size in (2**24, 1):
        monkeypatch.setattr(one_pixel, "AT_ONCE", size)
        runs.append(evaluate(OnePixel(population=30, generations=6), net, x, y, "l0:2"))
    assert {BROKEN, HELD} == set(runs[0].status)
    np.testing.assert_array_equal(runs[0].forwards, runs[1].forwards)
    np.testing.assert_array_equal(runs[0].distance, runs[1].distance)


def test_costs_a_population_a_generation_until_the_label_changes():
    model, x, y = halfspace("l0", 1.25)
    held = evaluate(OnePixel(population=10, generations=7), model, x, y, "l0:1")
    assert set(held.status) == {HELD}
    assert set(held.forwards) == {80}
    easy = evaluate(OnePixel(population=40, generations=7), *halfspace("l0", 0.01), "l0:1")
    assert set(easy.status) == {BROKEN}
    assert set(easy.forwards) == {40}


@pytest.mark.parametrize("text", ["population=3", "generations=-1", "scale=0"])
def test_refuses_settings_that_make_no_sense(text):
    with pytest.raises(ValueError, match="one-pixel"):
        make("attack", f"one-pixel:{text}")
