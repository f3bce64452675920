"""The patch stays in its square, learns what it should, and is kept with its cell."""

import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from robustbench_lite import cli, data, registry
from robustbench_lite.attacks.patch import Patch
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate, fit_attack, frozen
from robustbench_lite.matrix import Results, benchmark
from robustbench_lite.noise import Noise
from robustbench_lite.norms import patch as norm
from robustbench_lite.outcome import BROKEN, COLUMNS, HELD, SKIPPED, UNKNOWN, Outcome
from robustbench_lite.problem import Problem
from robustbench_lite.registry import make
from robustbench_lite.store import Store
from robustbench_lite.threat import Goal, ThreatModel
from robustbench_lite.trained import Workshop, save
from tests.nets import Linear, convolutional
from tests.outcomes import Notes, assert_same

QUICK = "patch:steps=20,batch=16,images=48"


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(math.prod(shape)), dtype=dtype)


def noise(count: int) -> Noise:
    return Noise(0, torch.arange(count))


# Where it may be


@pytest.mark.parametrize("shape", ["square", "circle"])
@pytest.mark.parametrize("image", [(1, 9, 12), (3, 10, 7), (2, 1, 8), (30,), (1, 1, 1)], ids=str)
def test_it_never_touches_a_pixel_outside_its_square(shape, image):
    for eps in (0.1, 0.3, 1.0):
        threat = ThreatModel(norm, eps)
        clean = random(200, *image, dtype=torch.float64) * 0.5
        problem = Problem(Defended(nn.Identity()), clean, Goal(torch.zeros(200).long()), threat, noise(200), classes=2)
        size = [min(int(norm.limit(eps, clean)), n) for n in ((1, *image)[-2:])]
        channels = image[0] if len(image) == 3 else 1
        patch = 0.6 + 0.4 * random(channels, *size, dtype=torch.float64)  # no pixel of it is one of an image's
        pasted = Patch(shape=shape, turn=180, smallest=0.75).paste(patch, problem.x, problem.noise)
        assert threat.allows(pasted, clean, slack=0).all()
        torch.testing.assert_close(threat.project(pasted, clean), pasted, rtol=0, atol=1e-15)
        if patch.numel():
            assert (pasted != clean).flatten(1).any(1).all()


def test_where_it_lies_and_what_a_circle_and_a_quarter_turn_are():
    patch, clean = random(3, 5, 5), torch.zeros(400, 3, 9, 9)
    for shape, turn in (("square", 0.0), ("circle", 0.0)):
        pasted = Patch(shape=shape, turn=turn, smallest=1).paste(patch + 1, clean, noise(400))
        moved = (pasted > 0).any(1)
        corners = moved.any(2).int().argmax(1), moved.any(1).int().argmax(1)
        assert len(set(zip(*(corner.tolist() for corner in corners)))) == 25  # every place, and no other
        u, v = torch.meshgrid(torch.arange(5) - 2, torch.arange(5) - 2, indexing="ij")
        inside = torch.ones(5, 5).bool() if shape == "square" else u**2 + v**2 <= 2.5**2
        for row in range(20):
            top, left = (int(corner[row]) for corner in corners)
            expected = torch.zeros(3, 9, 9)
            expected[:, top : top + 5, left : left + 5] = (patch + 1) * inside
            torch.testing.assert_close(pasted[row], expected)
    quarter = Patch(turn=90, smallest=1)
    turned = quarter.paste(patch + 1, torch.zeros(1, 3, 5, 5), Fixed(torch.tensor([[0.0, 0.0, 0.0, 1.0]])))
    torch.testing.assert_close(turned[0], (patch + 1).rot90(-1, (1, 2)), atol=1e-4, rtol=0)
    half = Patch(smallest=0.5, turn=0).paste(patch + 1, torch.zeros(1, 3, 5, 5), Fixed(torch.zeros(1, 4)))
    assert (half > 0).sum() == 3 * 9  # of 2.5 pixels a side
    torch.testing.assert_close(half[0, :, 2, 2], patch[:, 2, 2] + 1)


class Fixed(Noise):
    """Draws that are given."""

    def __init__(self, draws: Tensor) -> None:
        super().__init__(0, torch.arange(len(draws)))
        self.draws = draws

    def uniform(self, like: Tensor) -> Tensor:
        return self.draws


@pytest.mark.parametrize("shape", ["square", "circle"])
def test_the_gradient_of_a_pasted_patch_is_that_of_finite_differences(shape):
    clean, weight = random(6, 2, 8, 9, dtype=torch.float64), random(6, 2, 8, 9, dtype=torch.float64)
    patch = random(2, 4, 4, dtype=torch.float64).requires_grad_()

    def loss(patch: Tensor) -> Tensor:
        return (Patch(shape=shape).paste(patch, clean, noise(6)) * weight).square().sum()

    assert torch.autograd.gradcheck(loss, patch, eps=1e-6, atol=1e-6)


def test_learning_ascends_the_expectation_over_inputs_and_places():
    """The first step of Adam is the rate along the sign of the mean gradient: worked out with finite differences."""
    net, x, y = convolutional(12)
    net, x = net.double(), x.double()
    threat, attack = ThreatModel(norm, 0.15), Patch(steps=1, batch=12, images=12)
    with frozen(net):
        problem = Problem(Defended(net), x, Goal(y), threat, noise(12), classes=4, minimises=True)
        learned = attack.fit(problem).learned

        def loss(patch: Tensor) -> float:
            (order,) = problem.noise[:1].at("order", 0).permutation(x.new_empty(1, 12))
            pasted = attack.paste(patch, x[order], problem.noise[order].at("step", 0))
            return float(nn.functional.cross_entropy(net(pasted), y[order]))

        grey, rise = torch.full((1, 3, 3), 0.5).double(), torch.zeros(9).double()
        for k in range(9):
            step = torch.zeros(9).double().index_fill(0, torch.tensor(k), 1e-5).view(1, 3, 3)
            rise[k] = (loss(grey + step) - loss(grey - step)) / 2e-5
    assert (rise.abs() > 1e-4).all()
    torch.testing.assert_close(learned - grey, attack.rate * rise.sign().view(1, 3, 3), rtol=1e-3, atol=0)


# What it keeps of the contract of the attacks


def ready(net: nn.Module, x: Tensor, y: Tensor, threat: str, **settings: Any) -> Any:
    return fit_attack(QUICK, net, x, y, threat, **settings)


def test_same_rows_whatever_the_batch_and_the_order():
    net, x, y = convolutional(220)
    attack = ready(net, x[:60], y[:60], "patch:0.25")
    whole = evaluate(attack, net, x, y, "patch:0.25", batch=300)
    assert set(whole.status) == {BROKEN, HELD}
    assert set(whole.forwards) == {1}
    assert not whole.backwards.any()
    assert_same(evaluate(attack, net, x, y, "patch:0.25", batch=16), whole, but=["seconds"])
    parts = [evaluate(attack, net, x[s : s + 100], y[s : s + 100], "patch:0.25", first_row=s) for s in (200, 0, 100)]
    assert_same(Outcome.join(parts), whole, but=["seconds"])
    few = evaluate(attack, net, x[37:64], y[37:64], "patch:0.25", first_row=37)
    for column in set(COLUMNS) - {"seconds"}:
        np.testing.assert_array_equal(getattr(few, column), getattr(whole.part(37, 64), column))


def test_same_seed_same_patch():
    net, x, y = convolutional(80)
    first, again, other = (ready(net, x, y, "patch:0.25", seed=seed).learned for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, torch.full_like(first, 0.5))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    ("shape", "window"),
    [((1, 1, 1), (1, 1, 1)), ((1, 6, 7), (1, 6, 6)), ((3, 5, 4), (3, 4, 4)), ((7,), (1, 1, 2))],
    ids=str,
)
def test_every_shape_and_few_classes(shape, window, classes):
    weight = torch.randn(classes, math.prod(shape), generator=torch.Generator().manual_seed(0)).double()
    model, x = Linear(weight, -weight.sum(1) / 2).double(), random(40, *shape, dtype=torch.float64)
    y = model(x).argmax(1)
    fitted = fit_attack("patch:steps=20,batch=16,turn=0,smallest=1", model, x, y, "patch:1", target=1)
    assert fitted.learned.shape == window
    assert fitted.learned.dtype == torch.float64
    if shape == (1, 1, 1) and classes == 2:  # all of the image: the best colour is known
        assert fitted.learned.item() == float(weight[1] > weight[0])
    outcome = evaluate(fitted, model, x, y, "patch:1", target=1)
    np.testing.assert_array_equal(outcome.status == SKIPPED, y == 1)
    assert set(outcome.adversarial[outcome.status == BROKEN]) <= {1}
    assert UNKNOWN not in outcome.status


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_gradients_and_an_eps_of_zero_end_as_held(dtype):
    model = Linear(torch.zeros(3, 12), torch.tensor([1.0, 0.0, -1.0])).to(dtype)
    x, y = random(10, 3, 2, 2, dtype=dtype), torch.zeros(10, dtype=torch.long)
    assert set(evaluate(ready(model, x, y, "patch:1"), model, x, y, "patch:1").status) == {HELD}
    net, x, y = convolutional(20)
    assert set(evaluate(ready(net, x, y, "patch:0"), net, x, y, "patch:0").status) == {HELD}


def test_an_input_whose_answer_is_nan_spoils_no_patch():
    class Overflows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.flatten(1).mean(1, keepdim=True)
            return net(x) / ((mean < 0.61) | (mean > 0.685))  # NaN and infinite gradients

    net, x, y = convolutional(40, low=0.3, high=0.6)
    x = torch.where(torch.arange(40).view(-1, 1, 1, 1) % 4 == 0, 0.69 + 0.001 * x, x)  # under a grey patch 0.64
    y = Overflows()(x).argmax(1)
    fitted = ready(Overflows(), x, y, "patch:0.25")
    assert fitted.learned.isfinite().all()
    assert UNKNOWN in evaluate(fitted, Overflows(), x, y, "patch:0.25").status


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("steps=0", "steps, batch and images must be 1 or more"),
        ("rate=0", "rate must be above 0"),
        ("smallest=0", "smallest must be above 0"),
        ("smallest=1.1", "smallest must be above 0 and at most 1"),
        ("turn=-1", "turn must be 0 to 180"),
        ("learned=1", "has no setting 'learned'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        make("attack", f"patch:{text}")


def test_what_is_not_learned_yet_or_nothing_to_learn_is_one_line():
    net, x, y = convolutional(20)
    with pytest.raises(ValueError, match=r"attack patch learns first: give fit_attack\(attack, model, x_train"):
        evaluate("patch", net, x, y, "patch:0.1")
    with pytest.raises(ValueError, match="attack pgd learns nothing"):
        fit_attack("pgd", net, x, y, "linf:0.1")
    other = evaluate(ready(net, x, y, "patch:0.5"), net, x, y, "patch:0.1")
    assert set(other.status) == {UNKNOWN}
    assert "the patch learned has shape (1, 5, 5), not (1, 2, 2): fit it for this threat" in other.reason[0]
    with pytest.raises(ValueError, match="has learned already"):
        benchmark([ready(net, x, y, "patch:0.5")], dataset="digits", n=10)


# A benchmark of it, on digits


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mlp.safetensors"
    save(
        Workshop("digits", (1, 8, 8), 10, model="mlp").train(make("defense", "standard:epochs=3,rate=0.003")).model,
        path,
    )
    return path


def bench(weights: Path, out: Path, *threats: str, **settings: Any) -> Results:
    asked = {
        "dataset": "digits",
        "model": "mlp",
        "weights": weights,
        "n": 250,
        "device": "cpu",
        "batch": 100,
        "probe": False,
    }
    return benchmark(["patch:steps=40,images=400"], threats=threats or ["patch:0.25"], out=out, **asked | settings)


def table(results: Results) -> str:
    return results.rows().drop(columns="seconds").to_csv() + results.leaderboard().drop(columns="seconds").to_csv()


def test_success_rises_with_its_area_and_beats_a_patch_of_noise(weights: Path, tmp_path: Path):
    found = bench(weights, tmp_path, "patch:0.1", "patch:0.25", "patch:0.6")
    success = [float((entry.outcome.status == BROKEN).mean()) for entry in found.entries]
    assert [entry.learned.shape for entry in found.entries] == [(1, 2, 2), (1, 4, 4), (1, 6, 6)]
    assert success[0] < success[1] - 0.1 < success[2] - 0.2
    model, images = (
        Workshop("digits", (1, 8, 8), 10, model="mlp", weights=weights).subject("none").model,
        data.load("digits"),
    )
    noisy = replace(make("attack", "patch"), learned=random(1, 4, 4))
    control = evaluate(noisy, model, images.x[:250], images.y[:250], "patch:0.25")
    assert float((control.status == BROKEN).mean()) < success[1] - 0.1


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("what", "call"), [("fit", 1), ("gradient", 30), ("learn", 1), ("save", 1), ("save", 3)])
def test_a_run_that_was_killed_goes_on_with_the_very_same_patch(what, call, weights, tmp_path, monkeypatch):
    owner = {"fit": Patch, "gradient": Problem, "learn": Store, "save": Store}[what]
    real, calls = getattr(owner, what), []

    def killed(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == call and what != "learn":
            raise Killed
        done = real(*given)
        if len(calls) == call:  # just after it was kept
            raise Killed
        return done

    with monkeypatch.context() as patched:
        patched.setattr(owner, what, killed)
        with pytest.raises(Killed):
            bench(weights, tmp_path / "killed")
    kept = list((tmp_path / "killed").rglob("learned.safetensors"))
    assert len(kept) == (what in ("learn", "save"))
    if kept:  # to learn again would end elsewhere
        monkeypatch.setattr(Patch, "fit", lambda self, problem: pytest.fail("it learns again"))
    resumed = bench(weights, tmp_path / "killed")
    monkeypatch.undo()
    assert table(resumed) == table(peace(weights, tmp_path))


def peace(weights: Path, folder: Path) -> Results:
    return bench(weights, folder / "peace")


def test_what_was_learned_is_checked_and_its_chunks_stand_and_fall_with_it(weights, tmp_path, monkeypatch):
    first = bench(weights, tmp_path)
    [kept] = tmp_path.rglob("learned.safetensors")
    chunks = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert len(chunks) == 3
    again = bench(weights, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")} == chunks
    assert table(again) == table(first)
    np.testing.assert_array_equal(again.entries[0].learned, first.entries[0].learned)
    content = bytearray(kept.read_bytes())
    content[-3] ^= 1
    kept.write_bytes(content)
    other = random(1, 4, 4)
    monkeypatch.setattr(Patch, "fit", lambda self, problem: replace(self, learned=other))
    notes = Notes()
    anew = bench(weights, tmp_path, watcher=notes)
    assert any("learned.safetensors cannot be used" in note for note in notes.notes)
    np.testing.assert_array_equal(anew.entries[0].learned, other.numpy())
    assert all(path.stat().st_mtime_ns > when for path, when in chunks.items())
    assert table(anew) != table(first)


def test_other_training_data_is_another_cell_and_all_leaves_it_out(weights, tmp_path, monkeypatch):
    x, y = random(40, 1, 8, 8).numpy(), np.arange(40) % 10
    for name, shift in (("one", 0), ("two", 1)):
        np.savez(tmp_path / f"{name}.npz", x=x, y=y, x_train=x, y_train=(y + shift) % 10, classes=10)
        bench(weights, tmp_path / "runs", dataset=f"npz:{tmp_path / name}.npz", n=None)
    assert len(list(tmp_path.rglob("learned.safetensors"))) == 2
    monkeypatch.setattr(registry, "builtin", lambda kind: ["fgsm", "patch"] if kind == "attack" else [])
    notes = Notes()
    found = benchmark("all", dataset="mnist", defenses=["standard"], n=2, out=tmp_path / "all", watcher=notes)
    assert {entry.attack for entry in found.entries} == {"fgsm"}
    assert notes.notes == ["attack patch is left out: it learns from training data; give --threat patch"]


# --save-patch


def test_save_patch_writes_its_pixels_and_says_which(weights, tmp_path):
    found = bench(weights, tmp_path / "runs", "patch:0.25", "patch:0.1")
    said = found.save_patch(tmp_path / "it.png")
    first = found.entries[0]
    assert said == f"{first.attack} on {first.defense}, patch {first.eps:g} (the first of 2 patches)"
    with Image.open(tmp_path / "it.png") as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), np.rint(255 * first.learned[0]))
    colour = Results((replace(first, learned=random(3, 4, 5).numpy()),))
    assert "first of" not in colour.save_patch(tmp_path / "colour.png")
    with Image.open(tmp_path / "colour.png") as image:
        assert image.size == (5, 4)
        np.testing.assert_array_equal(np.asarray(image)[..., 2], np.rint(255 * random(3, 4, 5)[2].numpy()))
    for learned, complaint in ((np.zeros((2, 3, 3), np.float32), "no image"), (None, "none of the attacks")):
        with pytest.raises(ValueError, match=complaint):
            Results((replace(first, learned=learned),)).save_patch(tmp_path / "no.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["colour.png", "it.png", "runs"]


@pytest.mark.parametrize(
    ("attack", "path", "complaint"),
    [
        ("patch", "nowhere/it.png", "there is no folder nowhere"),
        ("patch", "folder.png", "folder.png is a folder"),
        ("patch", "it.jpg", "it.jpg does not end in .png"),
        ("patch", "''", ". is a folder"),
        ("patch", "learned.safetensors/it.png", "there is no folder"),
        ("pgd", "it.png", "--save-patch needs an attack that learns a patch"),
    ],
)
def test_places_where_no_patch_can_go_are_told_at_once(attack, path, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "learned.safetensors").touch()
    command = f"robust-bench --attack {attack} --threat patch:0.1 --dataset digits --save-patch {path}"
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    assert cli.main() == cli.USAGE
    said = capsys.readouterr().err.splitlines()
    assert complaint in said[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "learned.safetensors"]
