"""Attacks that know of a wrapper and attacks that are blind to it; detectors in the tables."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.defended import Defended
from robustbench_lite.entries import violations
from robustbench_lite.evaluation import evaluate
from robustbench_lite.leaderboard import leaderboard
from robustbench_lite.matrix import benchmark, load
from robustbench_lite.outcome import BROKEN, HELD, REJECTED, Outcome
from robustbench_lite.runner import Watcher
from tests.nets import Guarded, Linear, Scripted, guarded
from tests.outcomes import made
from tests.test_leaderboard import entry, proof


class Mirrored(Defended):
    """Answers of the model within to 1 - x."""

    def forward(self, x: Tensor, noise: object = None) -> Tensor:
        return super().forward(1 - x)


def test_a_blind_attack_is_run_on_the_model_within_and_judged_on_the_whole():
    """Class 1 lies above 0.5; who does not know that inputs are mirrored goes the wrong way."""
    model = Linear(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.5, -0.5]))
    x, y = torch.full((10, 1), 0.4), torch.ones(10, dtype=torch.long)
    asked: list[Tensor] = []

    def attack(problem):
        asked.append(problem.logits(problem.x))
        return problem.x + 0.2 * problem.gradient(problem.x)[0].sign()

    adaptive = evaluate(Scripted(attack), Mirrored(Defended(model)), x, y, "linf:0.25")
    blind = evaluate(Scripted(attack), Mirrored(Defended(model)), x, y, "linf:0.25", adaptive=False)
    assert set(adaptive.status) == {BROKEN}
    assert set(blind.status) == {HELD}
    assert not blind.reason.any()
    torch.testing.assert_close(asked[1], model(x))  # misclassified there: nothing left to do, as it seems


def test_a_blind_attack_is_detected_at_its_distance():
    model, x, y = guarded()
    blind = evaluate(
        "pgd:steps=10,random_start=false",
        Guarded(Defended(model.model), model.way, 0.45),
        x,
        y,
        "l2:0.4",
        adaptive=False,
    )
    assert set(blind.status) == {HELD}
    assert set(blind.adversarial) == {REJECTED}
    nearest = evaluate("deepfool", Guarded(Defended(model.model), model.way, 0.45), x, y, "l2:0.4", adaptive=False)
    assert set(nearest.adversarial) == {REJECTED}
    np.testing.assert_allclose(nearest.distance, 0.2, rtol=0.03)
    assert set(nearest.within(0.1).adversarial) == {-1}
    assert np.isnan(nearest.within(0.1).distance).all()


def test_without_a_wrapper_there_is_nothing_to_be_blind_to():
    model, x, y = guarded()
    with pytest.raises(ValueError, match="no wrapper"):
        evaluate("fgsm", model.model, x, y, "l2:0.4", adaptive=False)


# The tables


def rejecting(letters: str, rejected: list[int], clean: list[int] = []) -> Outcome:  # noqa: B006
    outcome = made(letters)
    outcome.adversarial[rejected] = REJECTED
    outcome.clean[clean] = REJECTED
    return outcome


def test_detection_by_hand():
    """Rows 0 and 1 are rejected when clean; 2 is broken by one attack and rejected under the other, 3 broken by both,
    4 and 5 rejected, 6 and 7 held."""
    one = rejecting("wwbbhhhh", [4, 5], clean=[0, 1])
    other = rejecting("wwhbhhhh", [2, 4], clean=[0, 1])
    (row,) = leaderboard([entry(one, "a", threshold=1.25), entry(other, "b", threshold=1.25)]).to_dict("records")
    assert row["detection_rate"] == 2 / 4
    assert row["false_positives"] == 2 / 8
    assert row["threshold"] == 1.25
    assert row["robust_accuracy"] == 4 / 8
    (plain,) = leaderboard([entry("hhbw")]).to_dict("records")
    assert np.isnan([plain[name] for name in ("detection_rate", "false_positives", "threshold")]).all()


def test_blind_rows_are_shown_but_not_ranked():
    board = leaderboard([entry("hhhh", adaptive=False), entry("hbbb"), entry("hhbb", defense="standard")])
    assert board["adaptive"].tolist() == [True, True, False]
    assert board["rank"].tolist()[:2] == [1, 2]
    assert board["rank"].isna().tolist() == [False, False, True]
    assert board["robust_accuracy"].tolist() == [0.5, 0.25, 1.0]


def test_a_blind_attack_violates_no_certificate():
    broken = made("bh", distance=[0.05, np.nan])
    assert violations([entry(broken, eps=0.1)], [proof("vv", eps=0.1)])
    assert not violations([entry(broken, eps=0.1, adaptive=False)], [proof("vv", eps=0.1)])


# Whole runs


class Count(Watcher):
    total = done = 0

    def planned(self, inputs: int) -> None:
        self.total = inputs

    def advanced(self, *about: object) -> None:
        self.done += about[-1]  # type: ignore[operator]


SMOOTH = "smoothed:sigma=0.1,draws=2"
SETTINGS = {
    "dataset": "digits",
    "threats": ["linf:0.1"],
    "n": 60,
    "model": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
}


def test_both_gives_two_rows_that_are_stored_apart(tmp_path: Path):
    count = Count()
    results = benchmark("fgsm", SMOOTH, adaptive="both", out=tmp_path, watcher=count, **SETTINGS)
    assert (count.total, count.done) == (120, 120)
    assert results.leaderboard()["adaptive"].tolist() == [True, False]
    assert results.matrix()["adaptive"].tolist() == [True, False]
    assert results.rows()["adaptive"].tolist() == [True] * 60 + [False] * 60
    again = load(tmp_path)
    assert again.rows().equals(results.rows())
    alone = benchmark("fgsm", SMOOTH, adaptive="off", out=tmp_path, **SETTINGS)
    assert alone.rows().equals(results.rows()[60:].reset_index(drop=True))


@pytest.mark.parametrize(("adaptive", "defenses"), [("off", [SMOOTH, "none"]), ("both", ["none"]), ("yes", [SMOOTH])])
def test_what_cannot_be_blind_is_refused(tmp_path: Path, adaptive: str, defenses: list[str]):
    with pytest.raises(
        ValueError, match=r"none has no wrapper that an attack could be blind to|on, off, both, not 'yes'"
    ):
        benchmark("fgsm", defenses, adaptive=adaptive, out=tmp_path, **SETTINGS)
