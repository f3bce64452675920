import copy
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite import training
from robustbench_lite.ascent import ascend, customary_length, input_gradient
from robustbench_lite.data import Images, load
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate
from robustbench_lite.history import Epoch, History
from robustbench_lite.models import build
from robustbench_lite.noise import Noise
from robustbench_lite.norms import l2, linf
from robustbench_lite.registry import make
from robustbench_lite.threat import Goal, ThreatModel
from robustbench_lite.training import Lab, Loss, Measured, Progress, Recipe, shifted


class Killed(KeyboardInterrupt):
    pass


def separable() -> Images:
    """200 images of noise; the left half of the second class is brighter than its right half, the first's darker."""
    y = torch.arange(200) % 2
    x = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 2
    x[y == 0, :, :, 4:] += 0.5
    x[y == 1, :, :, :4] += 0.5
    return Images("halves", "train", x, y, 2, "")


def no_sources(spec: str) -> Defended:
    raise AssertionError(spec)


@pytest.fixture
def lab() -> Lab:
    return Lab(separable, Noise(0, torch.arange(200)), no_sources)


def net(seed: int = 0) -> nn.Module:
    return build("mlp", (1, 8, 8), 2, seed)


@dataclass(frozen=True)
class Told(Recipe):
    """Minimises what it is told, by default the cross-entropy."""

    epochs: int = 3
    batch: int = 48
    rate: float = 0.005
    told: Loss | None = field(default=None, compare=False)

    def objective(self, model: nn.Module, lab: Lab) -> Loss:
        return self.told or cross_entropy(model)


def cross_entropy(model: nn.Module) -> Loss:
    def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return F.cross_entropy(logits, y), logits

    return loss


def trained(lab: Lab, seed: int = 0, **settings: Any) -> nn.Module:
    model = net(seed)
    Told(**settings)(model, lab)
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.equal(one, other), name


def weight(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# the loop


def test_the_loss_falls_and_the_classes_are_told_apart(lab: Lab):
    seen: list[Progress] = []
    model = trained(replace(lab, report=seen.append))
    assert [(progress.epoch, progress.step) for progress in seen] == [(e, s) for e in range(3) for s in range(1, 6)]
    assert {(progress.epochs, progress.steps) for progress in seen} == {(3, 5)}
    first, *_, last = [progress for progress in seen if progress.step == 5]
    assert last.loss < first.loss / 2
    assert last.accuracy == 1
    assert (model(lab.data.x).argmax(1) == lab.data.y).all()
    assert not model.training


def test_progress_counts_every_input_once(lab: Lab):
    """A loss of 1 for each of the first class: means over the epoch so far, whatever the size of the last batch."""
    model, seen = net(), []

    def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
        logits = torch.eye(2)[torch.zeros_like(y)]
        return (y == 0).double().mean() + 0 * model(x).sum(), logits

    Told(1, told=loss)(model, replace(lab, report=seen.append))
    assert seen[-1].loss == pytest.approx(0.5)
    assert seen[-1].accuracy == 0.5


def test_every_epoch_shows_every_input_once_in_another_order(lab: Lab):
    model, orders = net(), {0: [], 1: []}

    def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
        assert torch.equal(x, lab.data.x[noise.rows])
        assert torch.equal(y, lab.data.y[noise.rows])
        orders[int(epoch)] += noise.rows.tolist()
        return cross_entropy(model)(x, y, noise, epoch)

    Told(2, 64, told=loss)(model, lab)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(200))
    assert orders[0] != orders[1]
    assert orders[0] != list(range(200))


def test_the_noise_of_a_batch_is_keyed_by_epoch_and_input(lab: Lab):
    model, drawn = net(), {}

    def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
        for row, number in zip(noise.rows.tolist(), noise.uniform(x.new_empty(len(x), 1))[:, 0].tolist()):
            drawn[int(epoch), row] = number
        return cross_entropy(model)(x, y, noise, epoch)

    Told(2, 64, told=loss)(model, lab)
    small = dict(drawn)
    Told(2, 200, told=loss)(model, lab)
    assert drawn == small
    assert len(set(drawn.values())) == 400


def test_the_same_seed_gives_the_same_weights(lab: Lab):
    model = trained(lab)
    torch.manual_seed(9)
    torch.rand(3)
    assert_same(trained(lab), model)
    other = trained(replace(lab, noise=Noise(1, torch.arange(200))))
    assert not torch.equal(weight(other), weight(model))


class Recorded(torch.optim.Adam):
    rates: list[float] = []

    def step(self, closure: Any = None) -> Any:
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


def test_the_rate_falls_along_half_a_cosine(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Recorded, "rates", [])
    monkeypatch.setattr(torch.optim, "Adam", Recorded)
    trained(lab, epochs=4, batch=50, rate=0.01)
    assert Recorded.rates == pytest.approx([0.005 * (1 + math.cos(math.pi * step / 16)) for step in range(16)])
    assert Recorded.rates[0] == 0.01
    assert Recorded.rates[8] == pytest.approx(0.005)
    assert Recorded.rates[-1] < 0.0001


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_training(lab: Lab, poison: float):
    model, calls = net(), []

    def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
        calls.append(weight(model))
        value, logits = cross_entropy(model)(x, y, noise, epoch)
        return value * (poison if len(calls) == 8 else 1), logits

    with pytest.raises(ValueError, match=f"the loss is {poison} at epoch 2, step 3; lower rate"):
        Told(told=loss)(model, lab)
    assert torch.equal(weight(model), calls[-1])


# kills


def killed(lab: Lab, checkpoint: Path, epoch: int, step: int) -> None:
    def report(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (epoch, step):
            raise Killed

    with pytest.raises(Killed):
        trained(replace(lab, checkpoint=checkpoint, report=report))


@pytest.mark.parametrize(("epoch", "step"), [(0, 3), (1, 1), (1, 5), (2, 4)])
def test_a_training_that_was_killed_goes_on_to_the_same_weights(lab: Lab, tmp_path: Path, epoch: int, step: int):
    checkpoint, seen = tmp_path / "checkpoint", []
    killed(lab, checkpoint, epoch, step)
    resumed = trained(replace(lab, checkpoint=checkpoint, report=seen.append), seed=1 if epoch else 0)
    assert (seen[0].epoch, seen[0].step) == (epoch, 1)
    assert_same(resumed, trained(lab))
    assert not resumed.training


def test_a_training_that_was_killed_twice_goes_on_to_the_same_weights(lab: Lab, tmp_path: Path):
    killed(lab, tmp_path / "checkpoint", 1, 2)
    killed(lab, tmp_path / "checkpoint", 2, 2)
    assert_same(trained(replace(lab, checkpoint=tmp_path / "checkpoint")), trained(lab))


def test_a_kill_while_saving_leaves_the_last_checkpoint(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved, count = torch.save, iter(range(9))

    def half(state: object, path: Path) -> None:
        if next(count) == 1:
            path.write_bytes(b"half a checkpoint")
            raise Killed
        saved(state, path)

    monkeypatch.setattr(torch, "save", half)
    started = replace(lab, checkpoint=tmp_path / "checkpoint")
    with pytest.raises(Killed):
        trained(started)
    assert_same(trained(started, seed=1), trained(lab))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_finished_training_is_not_begun_again(lab: Lab, tmp_path: Path):
    model = trained(replace(lab, checkpoint=tmp_path / "checkpoint"))
    killed_at_once = replace(lab, checkpoint=tmp_path / "checkpoint", report=lambda _: pytest.fail("trained again"))
    assert_same(trained(killed_at_once, seed=1), model)


# the history


def history(lab: Lab, seed: int = 0) -> History:
    return Told()(net(seed), lab).history


def test_the_history_is_what_was_reported_at_the_end_of_each_epoch(lab: Lab):
    seen: list[Progress] = []
    told = history(replace(lab, images=lambda: replace(separable(), name="digits"), report=seen.append))
    ends = [progress for progress in seen if progress.step == progress.steps]
    assert [epoch.epoch for epoch in told] == [1, 2, 3]
    assert [epoch[1:3] for epoch in told] == [(end.loss, end.accuracy) for end in ends]
    assert [(epoch.robust_accuracy, epoch.clean_accuracy) for epoch in told] == [end.measured for end in ends]
    assert {type(epoch.robust_accuracy) for epoch in told} == {float}
    assert {epoch.robust_accuracy for epoch in history(lab)} == {None}  # for nothing says at which eps


@pytest.mark.parametrize(("epoch", "step"), [(0, 3), (1, 1), (2, 5)])
def test_the_history_of_a_training_that_was_killed_is_that_of_an_unbroken_one(lab, tmp_path, epoch, step):
    killed(lab, tmp_path / "checkpoint", epoch, step)
    resumed = history(replace(lab, checkpoint=tmp_path / "checkpoint"), seed=1 if epoch else 0)
    assert resumed == history(lab)
    assert {type(one) for one in resumed} == {Epoch}


def test_a_checkpoint_from_before_there_were_histories_goes_on_with_one_from_there(lab: Lab, tmp_path: Path):
    checkpoint = tmp_path / "checkpoint"
    killed(lab, checkpoint, 1, 2)
    kept = torch.load(checkpoint, weights_only=True)
    del kept["history"]
    torch.save(kept, checkpoint)
    model = net(1)
    assert Told()(model, replace(lab, checkpoint=checkpoint)).history == history(lab)[1:]
    assert_same(model, trained(lab))


# early stopping


def stopping(lab: Lab, monkeypatch: pytest.MonkeyPatch, robust: list[float], patience: int = 2) -> list[nn.Module]:
    """The model that is kept, then what it was after each epoch, when epochs are as robust as told."""
    after: list[nn.Module] = []

    def measure(recipe: Recipe, model: nn.Module, lab: Lab, rows: Tensor) -> Measured:
        after.append(copy.deepcopy(model))
        return Measured(robust[len(after) - 1], 0.5)

    monkeypatch.setattr(training, "_measure", measure)
    return [trained(lab, epochs=len(robust), patience=patience), *after]


def test_training_stops_without_better_robust_accuracy_and_keeps_the_best_epoch(lab, monkeypatch):
    kept, *after = stopping(lab, monkeypatch, [0.1, 0.3, 0.2, 0.3, 0.9])
    assert len(after) == 4
    assert_same(kept, after[1])
    assert not kept.training
    kept, *after = stopping(lab, monkeypatch, [0.1, 0.3, 0.2, 0.4, 0.2])
    assert_same(kept, after[3])
    assert len(after) == 5


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_kill_forgets_neither_the_best_epoch_nor_how_long_ago_it_was(lab, monkeypatch, tmp_path, epoch):
    told = [0.1, 0.3, 0.2, 0.2, 0.9]
    whole, *_ = stopping(lab, monkeypatch, told)

    def report(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (epoch, 2):
            raise Killed

    started = replace(lab, checkpoint=tmp_path / "checkpoint")
    with pytest.raises(Killed):
        stopping(replace(started, report=report), monkeypatch, told)
    kept, *after = stopping(started, monkeypatch, told[epoch:] + [0.9] * epoch)
    assert len(after) == 4 - epoch
    assert_same(kept, whole)


def test_images_that_are_held_out_are_not_trained_on(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    used, watched, measure = set(), set(), training._measure

    def measured(recipe: Recipe, model: nn.Module, lab: Lab, rows: Tensor) -> Measured:
        watched.update(rows.tolist())
        return measure(recipe, model, lab, rows)

    monkeypatch.setattr(training, "_measure", measured)
    model = net()

    def loss(x: Tensor, y: Tensor, noise: Noise, epoch: float) -> tuple[Tensor, Tensor]:
        used.update(noise.rows.tolist())
        return cross_entropy(model)(x, y, noise, epoch)

    Told(2, patience=1, told=loss)(model, lab)
    assert len(watched) == 20
    assert used == set(range(200)) - watched
    Told(1, told=loss)(model, lab)
    assert used == set(range(200))


def test_an_epoch_is_measured_as_an_evaluation_would():
    data = load("digits", "train").take(slice(300))
    seen: list[Progress] = []
    lab = Lab(lambda: data, Noise(0, torch.arange(300)), no_sources, report=seen.append)
    model = make("defense", "standard:epochs=2,rate=0.005,shift=0")(build("cnn", data.shape, 10), lab)
    assert {progress.measured for progress in seen[:2]} == {None}  # of three steps
    outcome = evaluate(make("attack", "pgd:steps=10"), model, data.x, data.y, "linf:0.1")
    assert seen[-1].measured is not None
    assert seen[-1].measured.clean == (outcome.status != "wrong").mean()
    assert seen[-1].measured.robust == pytest.approx((outcome.status == "held").mean(), abs=0.03)
    assert 0.1 < seen[-1].measured.robust < seen[-1].measured.clean


def test_patience_does_not_count_while_eps_rises():
    recipe = make("defense", "fast:eps=0.1,warmup=3,patience=1")
    assert recipe.easing == 3
    assert make("defense", "standard:patience=1").easing == 0


# settings and data


def test_schedules_hit_their_end_points():
    step, cyclic = Told(20, rate=0.1, schedule="step"), Told(20, rate=0.1, schedule="cyclic")
    assert [step.rate_at(epoch) for epoch in (0, 9.99, 10, 14.99, 15, 20)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )
    assert [cyclic.rate_at(epoch) for epoch in (0, 4, 8, 14, 20)] == pytest.approx([0, 0.05, 0.1, 0.05, 0])


def test_after_each_step_the_recipe_has_its_way_with_the_weights(lab: Lab):
    @dataclass(frozen=True)
    class Still(Told):
        def after_step(self, model: nn.Module, noise: Noise) -> None:
            drawn.append(noise.uniform(torch.empty(1, 1)).item())
            model.load_state_dict(net().state_dict())

    drawn: list[float] = []
    model = net()
    Still()(model, lab)
    assert_same(model, net())
    assert len(set(drawn)) == 15


@pytest.mark.parametrize("other", [{"rate": 0.004}, {"epochs": 4}, {"seed": 1}], ids=["rate", "epochs", "seed"])
def test_a_checkpoint_of_another_training_is_refused(lab: Lab, tmp_path: Path, other: dict[str, Any]):
    killed(lab, tmp_path / "checkpoint", 1, 1)
    noise = Noise(other.get("seed", 0), torch.arange(200))
    settings = {name: value for name, value in other.items() if name != "seed"}
    with pytest.raises(ValueError, match="checkpoint belongs to a training with other settings, data or seed"):
        trained(replace(lab, noise=noise, checkpoint=tmp_path / "checkpoint"), **settings)


def test_a_class_without_images_is_named(lab: Lab):
    data = replace(lab.data, classes=4)
    with pytest.raises(ValueError, match=r"^the training data of halves has no image of classes 2, 3$"):
        trained(replace(lab, images=lambda: data))
    few = data.take(slice(5))
    with pytest.raises(ValueError, match="patience needs 10 training images or more"):
        trained(replace(lab, images=lambda: few), patience=1)


@pytest.mark.parametrize("setting", ["epochs=0", "batch=0", "rate=0", "shift=-1", "patience=-1", "schedule=never"])
def test_settings_that_cannot_be_are_one_line(setting: str):
    with pytest.raises(ValueError, match=setting.partition("=")[0]):
        make("defense", f"standard:{setting}")


# the ascent


def test_the_gradient_of_an_input_leaves_the_parameters_alone():
    model, x, y = net().double(), separable().x[:3].double(), torch.tensor([0, 1, 1])
    gradient = input_gradient(model, Goal(y).cross_entropy)(x)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not x.requires_grad
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    rise = Goal(y).cross_entropy(model(x + 1e-5 * probe)) - Goal(y).cross_entropy(model(x - 1e-5 * probe))
    torch.testing.assert_close((gradient * probe).flatten(1).sum(1), rise.detach() / 2e-5)


def test_the_ascent_reaches_the_corner_that_a_linear_loss_points_to():
    clean, slope = torch.full((2, 4), 0.5), torch.tensor([[1.0, -1.0, 0.1, 0.0], [-2.0, 1.0, 1.0, 1.0]])
    threat, asked = ThreatModel(linf, 0.3), []

    def gradient(x: Tensor) -> Tensor:
        asked.append(x)
        return slope

    x = ascend(gradient, clean, clean, threat, 4, customary_length(0.3, 4))
    torch.testing.assert_close(x, clean + 0.3 * slope.sign())
    assert len(asked) == 4
    torch.testing.assert_close(asked[1], clean + 0.1875 * slope.sign())
    x = ascend(gradient, clean, clean, ThreatModel(l2, 0.3), 1, 0.2)
    torch.testing.assert_close(x, clean + 0.2 * slope / slope.norm(dim=1, keepdim=True))


# the recipes


class Watched(nn.Module):
    """How far what the model saw of a grey image in training had moved."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.moved = net(), []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.moved.append((x.detach() - 0.5).abs().max().item())
        logits: Tensor = self.model(x)
        return logits


def test_madry_s_eps_rises_from_nothing_and_stays(lab: Lab):
    grey = replace(lab, images=lambda: replace(lab.data, x=torch.full_like(lab.data.x, 0.5)))
    model = Watched()
    make("defense", "madry:eps=0.2,steps=2,warmup=2,epochs=4,batch=50")(model, grey)
    assert len(model.moved) == 4 * 4 * 3  # epochs, batches; two forwards for the gradient and one to train
    trained_on = model.moved[2::3]
    assert trained_on == pytest.approx([0.2 * min(1, step / 8) for step in range(16)], abs=1e-6)
    starts = model.moved[::3]
    assert all(0.9 * end <= start <= end + 1e-6 for start, end in zip(starts, trained_on))  # random, inside the ball


def test_madry_without_warmup_begins_at_eps(lab: Lab):
    grey = replace(lab, images=lambda: replace(lab.data, x=torch.full_like(lab.data.x, 0.5)))
    model = Watched()
    make("defense", "madry:eps=0.2,steps=2,warmup=0,epochs=1,batch=100")(model, grey)
    assert model.moved[2::3] == pytest.approx([0.2, 0.2], abs=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_madry_gives_the_same_weights_twice_and_after_a_kill(lab: Lab, tmp_path: Path, norm: str):
    recipe = make("defense", f"madry:norm={norm},eps=0.2,steps=2,warmup=1,epochs=2,batch=100")
    once = recipe(net(), lab)
    assert isinstance(once, Defended)
    assert not once.training
    assert_same(recipe(net(), lab), once)

    def report(progress: Progress) -> None:
        if progress.epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        recipe(net(), replace(lab, checkpoint=tmp_path / "checkpoint", report=report))
    assert_same(recipe(net(1), replace(lab, checkpoint=tmp_path / "checkpoint")), once)


@pytest.mark.parametrize("eps", ["0", "-0.1"])
def test_madry_wants_an_eps_above_0(eps: str):
    with pytest.raises(ValueError, match="eps must be above 0"):
        make("defense", f"madry:eps={eps}")


def test_adversarial_training_pays_on_digits():
    data, test = load("digits", "train"), load("digits", "test").take(slice(200))
    lab = Lab(lambda: data, Noise(0, torch.arange(len(data))), no_sources)
    held, clean = {}, {}
    for recipe in ("standard:epochs=8,rate=0.005,shift=0", "madry:eps=0.1,steps=4,epochs=8,warmup=2,rate=0.005"):
        model = make("defense", recipe)(build("cnn", data.shape, data.classes), lab)
        outcome = evaluate(make("attack", "pgd:steps=10"), model, test.x, test.y, "linf:0.1")
        name = recipe.partition(":")[0]
        held[name], clean[name] = (outcome.status == "held").mean(), (outcome.status != "wrong").mean()
    assert min(clean.values()) > 0.9
    assert held["madry"] > held["standard"] + 0.1


def test_images_are_shifted_by_up_to_so_many_pixels_and_alike_in_any_batch():
    x = torch.rand(200, 2, 6, 5) + 1
    noise = Noise(0, torch.arange(200))
    moved = shifted(x, noise, 1)
    padded = F.pad(x, (1, 1, 1, 1))
    windows = {(i, j): padded[:, :, i : i + 6, j : j + 5] for i in range(3) for j in range(3)}
    hits = torch.stack([(moved == window).flatten(1).all(1) for window in windows.values()])
    assert (hits.sum(0) == 1).all()
    assert hits.any(1).all()
    assert torch.equal(shifted(x[50:60], noise[slice(50, 60)], 1), moved[50:60])
