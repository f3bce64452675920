"""Attacks that compute in bf16, and are judged in float32."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from robustbench_lite import cli
from robustbench_lite.defended import Defended, ask
from robustbench_lite.evaluation import Bench, check, evaluate, frozen
from robustbench_lite.matrix import benchmark
from robustbench_lite.models import build
from robustbench_lite.noise import Noise
from robustbench_lite.probing import probe
from robustbench_lite.problem import Problem
from robustbench_lite.threat import Goal, ThreatModel
from tests.nets import convolutional, halfspace
from tests.outcomes import assert_same

SETTINGS = {
    "dataset": "digits",
    "threats": ["linf:0.1"],
    "n": 60,
    "model": build("mlp", (1, 8, 8), 10),
}


def test_answers_are_close_and_of_the_inputs_type():
    net, x, _ = convolutional(5)
    exact, coarse = (ask(Defended(net), x, 5, precision=precision) for precision in ("float32", "bf16"))
    assert coarse.dtype == x.dtype
    assert 0 < (coarse - exact).abs().max() < 0.05 * exact.abs().max()


def test_what_only_bf16_takes_for_a_hit_is_none():
    """Inputs a hair from the boundary: in bf16 many fall on its other side, though nothing was changed."""
    model, x, y = halfspace("l2", 1e-4, count=200)
    defended = Defended(model)
    wrong = ask(defended, x, 200, precision="bf16").argmax(1) != y
    assert wrong.sum() > 20
    noise = Noise(0, torch.arange(200))
    problem = Problem(
        defended, x, Goal(y), ThreatModel.parse("l2:0.1"), noise, classes=2, access="labels", precision="bf16"
    )
    assert (problem.labels(x) != y).sum() > 20
    assert problem.open.all()
    assert (evaluate("pgd:steps=5", model, x, y, "l2:0.00005", precision="bf16").status == "held").all()
    assert (evaluate("pgd:steps=5", model, x, y, "l2:0.01", precision="bf16").status == "broken").all()


def test_the_answer_does_not_depend_on_the_batch():
    x = torch.rand(13, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = build("cnn", (1, 8, 8), 10)
    y = model(x).argmax(1)
    whole = evaluate("pgd:steps=4", model, x, y, "linf:0.1", precision="bf16")
    parts = [
        evaluate("pgd:steps=4", model, x[rows], y[rows], "linf:0.1", precision="bf16", first_row=rows.start)
        for rows in (slice(0, 4), slice(4, 13))
    ]
    assert_same(whole, type(whole).join(parts), but=["seconds"])


def test_a_run_in_bf16_is_another_attack_of_the_same_row(tmp_path: Path):
    benchmark("pgd:steps=3", out=tmp_path, **SETTINGS)
    coarse = benchmark("pgd:steps=3", out=tmp_path, precision="bf16", **SETTINGS)
    assert [entry.attack for entry in coarse.entries] == ["pgd:steps=3 (bf16)"]
    with pytest.raises(ValueError, match="precision is float32 or bf16, not 'half'"):
        benchmark("pgd", out=tmp_path, precision="half", **SETTINGS)


class Autocasting(Defended):
    """Remembers whether it was asked in a lower precision."""

    seen = False

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        self.seen |= torch.is_autocast_enabled("cpu")
        return super().forward(x, noise)


def test_a_probe_is_the_same_whatever_the_attacks_compute_in():
    """It is stored under one key for both."""
    net, x, y = convolutional(20)
    threat, model = ThreatModel.parse("linf:0.1"), Autocasting(net)
    bench = Bench(model, threat, check(model, x, y, threat, "bf16"), precision="bf16")
    assert model.seen
    model.seen = False
    with frozen(model):
        probe(bench, x, y, torch.arange(20))
    assert not model.seen


def test_on_the_command_line(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    command = "robust-bench --attack fgsm --defense standard --n 20 --precision"
    monkeypatch.setattr("sys.argv", [*command.split(), "bf16", "--csv", "board.csv"])
    assert cli.main() == 0
    assert pd.read_csv("board.csv")["attacks"].tolist() == ["fgsm (bf16)"]
    monkeypatch.setattr("sys.argv", [*command.split(), "bf17"])
    assert cli.main() == 2
    assert "precision is float32 or bf16, not 'bf17'" in capsys.readouterr().err
