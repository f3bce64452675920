"""Attacks that ask a model of another layout, and are judged by the model as it is."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from robustbench_lite import cli, evaluation
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import Bench, check, evaluate
from robustbench_lite.layout import channels_last
from robustbench_lite.matrix import benchmark
from robustbench_lite.models import build
from robustbench_lite.noise import Noise
from robustbench_lite.threat import Goal, ThreatModel
from tests.nets import convolutional

SETTINGS = {"dataset": "digits", "threats": ["linf:0.1"], "n": 60}


def residual() -> nn.Module:
    """A residual network whose batch norms have seen something."""
    torch.manual_seed(0)
    net = build("preact-resnet18", (3, 16, 16), 10).train()
    with torch.no_grad():
        net(torch.rand(16, 3, 16, 16))
    return net.eval()


class Branching(nn.Module):
    """Looks at values, which torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(10))
        self.net(torch.rand(2, 1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > -1 else self.net(-x)


class Viewing(nn.Module):
    """Counts on an order in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x).view(len(x), -1))


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_batch_norms_behind_convolutions_are_folded():
    net, x = residual(), torch.rand(8, 3, 16, 16)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    laid = channels_last(Defended(net), x)
    assert norms(laid) < norms(net)
    assert any(
        weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        for weight in laid.parameters()
        if weight.dim() == 4
    )
    with torch.no_grad():
        torch.testing.assert_close(laid.answer(x), net(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_cannot_be_followed_is_not_folded():
    model = Defended(Branching().eval())
    assert norms(channels_last(model, torch.rand(4, 1, 8, 8))) == 1


def test_a_network_that_counts_on_an_order_is_refused():
    with pytest.raises(ValueError, match="layout channels-last: the model does not run so: RuntimeError: view size"):
        channels_last(Defended(Viewing().eval()), torch.rand(4, 3, 8, 8))


class Lying(nn.Module):
    """Answers otherwise once its weights lie otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.convolution(x).flatten(1))
        return answer if self.convolution.weight.is_contiguous() else answer.flip(1)


def test_a_network_that_answers_otherwise_is_refused():
    with pytest.raises(ValueError, match="layout channels-last: the model answers otherwise so"):
        channels_last(Defended(Lying().eval()), torch.rand(4, 3, 8, 8))


class Turned(Defended):
    """Says the opposite."""

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        return -super().forward(x, noise)


def test_the_model_as_it_is_judges():
    """The one that is asked calls every input broken; the one that judges, none."""
    net, x, y = convolutional(20)
    threat = ThreatModel.parse("linf:1e-6")
    model = Defended(net)
    bench = Bench(model, threat, check(model, x, y, threat), asked=Turned(net))
    problem = bench.problem(x, Goal(y), threat, Noise(0, torch.arange(20)), "labels", minimises=False)
    assert (problem.labels(x) != y).all()
    assert problem.open.all()


@pytest.mark.parametrize("attack", ["pgd:steps=5", "deepfool", "boundary:queries=200"])
def test_as_many_inputs_break(attack: str):
    net, x, y = convolutional(40)
    threat = "l2:0.4"
    plain = evaluate(attack, net, x, y, threat)
    laid = evaluate(attack, net, x, y, threat, layout="channels-last")
    assert abs(int((plain.status == "broken").sum()) - int((laid.status == "broken").sum())) <= 1
    assert set(laid.status) <= {"broken", "held", "wrong"}


def test_a_run_of_another_layout_is_another_attack_of_the_same_row(tmp_path: Path):
    model = build("cnn", (1, 8, 8), 10)
    benchmark("pgd:steps=3", out=tmp_path, model=model, **SETTINGS)
    laid = benchmark("pgd:steps=3", out=tmp_path, model=model, layout="channels-last", **SETTINGS)
    assert [entry.attack for entry in laid.entries] == ["pgd:steps=3 (channels-last)"]
    with pytest.raises(ValueError, match="layout is as-built or channels-last, not 'nhwc'"):
        benchmark("pgd", out=tmp_path, model=model, layout="nhwc", **SETTINGS)


def test_the_copy_is_made_once_a_model_and_not_for_proofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(evaluation, "channels_last", lambda model, x: made.append(model) or channels_last(model, x))
    settings = {**SETTINGS, "model": build("cnn", (1, 8, 8), 10), "layout": "channels-last"}
    benchmark([], certifiers=["ibp"], out=tmp_path, **settings)
    assert not made
    benchmark(["pgd:steps=1", "fgsm"], out=tmp_path, **settings)
    assert len(made) == 1


def test_on_the_command_line(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    command = "robust-bench --attack fgsm --defense standard --n 20 --layout"
    monkeypatch.setattr("sys.argv", [*command.split(), "channels-last", "--csv", "board.csv"])
    assert cli.main() == 0
    assert pd.read_csv("board.csv")["attacks"].tolist() == ["fgsm (channels-last)"]
    monkeypatch.setattr("sys.argv", [*command.split(), "nhwc"])
    assert cli.main() == 2
    assert "layout is as-built or channels-last, not 'nhwc'" in capsys.readouterr().err
