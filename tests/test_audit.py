"""What the audit flags, and where it keeps silent: rows made up by hand, and models with a known fault."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from robustbench_lite import audit, cli, data, probing
from robustbench_lite.audit import FLAGS, findings, flags
from robustbench_lite.chance import mcnemar
from robustbench_lite.defended import Defended, straight_through
from robustbench_lite.entries import Entry, Probe
from robustbench_lite.evaluation import Bench, check, frozen
from robustbench_lite.leaderboard import leaderboard
from robustbench_lite.matrix import benchmark, load
from robustbench_lite.outcome import Probed
from robustbench_lite.probing import probe
from robustbench_lite.threat import ThreatModel
from tests.nets import Linear, convolutional
from tests.outcomes import assert_same, made

SETTING: dict = {"dataset": "digits", "defense": "madry", "model": "mlp", "parameters": 10, "norm": "linf", "seed": 0}


def entry(attack: str, broken: range, backwards: int = 40, eps: float = 0.1, **others: object) -> Entry:
    """An attack that breaks those of 100 inputs."""
    letters = "".join("b" if row in broken else "h" for row in range(100))
    outcome = made(letters, backwards=np.full(100, backwards), forwards=np.full(100, 40), **others)
    return Entry(**SETTING, eps=eps, attack=attack, outcome=outcome)


def flagged(*entries: Entry, probes: tuple[Probe, ...] = ()) -> dict[str, tuple[float, float]]:
    return {finding.flag: finding.figures for finding in findings(entries, probes)}


@pytest.mark.parametrize(("alone", "both"), [(0, 0), (0, 5), (3, 3), (7, 12), (6, 12), (40, 61), (300, 900)])
def test_exact_tests_against_scipys(alone: int, both: int):
    one, other = np.arange(both) < alone, np.arange(both) >= alone
    for alternative in ("two-sided", "less", "greater"):
        theirs = binomtest(alone, both, 0.5, alternative).pvalue if both else 1.0
        assert mcnemar(one, other, alternative) == pytest.approx(theirs)
    if both:
        assert audit._by_chance(alone, both, 0.1) == pytest.approx(binomtest(alone, both, 0.1, "greater").pvalue)


def test_mcnemar_is_the_binomial_test_of_the_inputs_that_differ():
    """8 against 2 of 10: 1 + 10 + 45 of 1024 outcomes are as far out, on either side."""
    one, other = np.arange(100) < 58, (np.arange(100) < 50) | (np.arange(100) >= 98)
    assert mcnemar(one, other) == pytest.approx(2 * 56 / 1024)
    assert mcnemar(one, other, "greater") == pytest.approx(56 / 1024)
    assert mcnemar(other, one, "less") == pytest.approx(56 / 1024)
    assert mcnemar(one, one) == 1


# From stored rows

WEAKER: dict[str, Callable[[range], Entry]] = {
    "one-step": lambda broken: entry("weak", broken, backwards=1),
    "black-box": lambda broken: entry("weak", broken, backwards=0),
    "effort": lambda broken: entry("strong:steps=400", broken, backwards=400),
    "eps": lambda broken: entry("strong", broken, eps=0.05),
    "adaptive": lambda broken: replace(entry("strong", broken), adaptive=False),
}


@pytest.mark.parametrize("flag", WEAKER)
def test_a_weaker_attack_that_breaks_more_is_flagged_once_it_is_beyond_chance(flag: str):
    """Of 7 inputs that one attack alone breaks, all are on its side with probability 1 / 128, of 6 with 1 / 64."""
    strong = entry("strong", range(30))
    assert flagged(strong, WEAKER[flag](range(37))) == {flag: (7, 0)}
    assert flagged(strong, WEAKER[flag](range(36))) == {}
    assert flagged(strong, WEAKER[flag](range(20))) == {}


@pytest.mark.parametrize("flag", WEAKER)
def test_an_attack_that_leaves_much_of_what_a_weaker_one_breaks_is_flagged_though_their_totals_agree(flag: str):
    strong = entry("strong", range(30))
    assert flagged(strong, WEAKER[flag](range(20, 50))) == {flag: (20, 20)}
    assert flagged(strong, WEAKER[flag](range(5, 35))) == {}


def test_what_differs_in_thousands_of_inputs_by_little_is_silent():
    """15 of 1000 inputs: beyond chance, but not much."""
    weak, strong = (np.where(np.arange(1000) < count, "b", "h") for count in (115, 100))
    entries = [
        Entry(**SETTING, eps=0.1, attack=f"a{backwards}", outcome=made(letters, backwards=np.full(1000, backwards)))
        for letters, backwards in ((weak, 1), (strong, 40))
    ]
    assert flagged(*entries) == {}


def test_the_strong_attacks_of_a_row_answer_together():
    strong = entry("strong", range(30)), entry("other:loss=margin", range(30, 60))
    assert flagged(*strong, WEAKER["black-box"](range(20, 50))) == {}


def test_attacks_are_held_against_those_with_the_same_target_and_model_only():
    weak = WEAKER["one-step"](range(37))
    assert flagged(entry("strong to 3", range(30)), weak) == {}
    assert flagged(entry("strong to 3", range(30)), replace(weak, attack="weak to 3")) == {"one-step": (7, 0)}
    for other in ({"defense": "standard"}, {"adaptive": False}, {"seed": 1}, {"subject": "other weights"}):
        assert flagged(replace(entry("strong", range(30)), **other), weak) == {}
        assert flagged(replace(entry("strong", range(30)), **other), WEAKER["eps"](range(37))) == {}


def test_inputs_of_which_an_attack_does_not_know_how_they_ended_do_not_count():
    letters = "b" * 30 + "u" * 5 + "h" * 65
    strong = Entry(**SETTING, eps=0.1, attack="strong", outcome=made(letters, backwards=np.full(100, 40)))
    assert flagged(strong, WEAKER["one-step"](range(37))) == {}


def test_another_loss_is_no_more_effort_and_of_three_sizes_the_last_two_count():
    assert flagged(entry("pgd", range(30)), entry("pgd:loss=margin,steps=400", range(60), backwards=400)) == {}
    rising = [entry(f"pgd:steps={n}", range(k), backwards=n) for n, k in ((10, 20), (40, 50), (400, 52))]
    assert flagged(*rising) == {}
    assert flagged(*rising[:2]) == {"effort": (30, 0)}
    draws = [entry(f"pgd:steps={n} to 3 (eot {n})", range(k), backwards=n) for n, k in ((10, 20), (400, 50))]
    assert flagged(*draws) == {"effort": (30, 0)}


def test_attacks_that_one_side_has_alone_say_nothing_of_knowing_the_defense():
    blind = replace(entry("other", range(60)), adaptive=False)
    assert flagged(entry("strong", range(30)), blind) == {}


# Of a probe


class Own(Defended):
    """A net whose answer is changed by ``way``."""

    def __init__(self, model: nn.Module, way: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__(model)
        self.way = way

    def forward(self, x: Tensor, noise: object = None) -> Tensor:
        return self.way(self.model, x)


def coarse(x: Tensor) -> Tensor:
    return (x * 4).round() / 4


FAULTS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], set[str]]] = {
    "none": (lambda net, x: net(x), set()),
    "a surrogate": (lambda net, x: net(straight_through(coarse(x), x)), set()),
    "shattered": (lambda net, x: net(coarse(x)), {"unbounded", "zero-gradients"}),
    "a thousandfold": (lambda net, x: 1000 * net(x), {"unbounded", "saturated"}),
    "zero": (lambda net, x: straight_through(net(x), 0 * net(x)), {"unbounded", "zero-gradients"}),
    "cut off": (lambda net, x: net(x.detach()), {"unbounded", "zero-gradients"}),
    "nan": (lambda net, x: net(x) + 0 * (x - x).sqrt().flatten(1).sum(1, keepdim=True), {"unbounded", "nan-gradients"}),
    "random": (lambda net, x: net(x + 0.02 * torch.randn_like(x)), {"random"}),
    "probabilities": (lambda net, x: net(x).softmax(1), {"probabilities"}),
    "squashed": (lambda net, x: net(x).sigmoid(), {"probabilities"}),
}


def looked(model: Defended, x: Tensor, y: Tensor, threat: str = "linf:0.1", adaptive: bool = True) -> Probed:
    with frozen(model):
        return probe(Bench(model, ThreatModel.parse(threat), 4, adaptive=adaptive), x, y, torch.arange(len(x)))


def seen(probed: Probed, *entries: Entry) -> dict[str, tuple[float, float]]:
    entries = entries or (entry("pgd", range(100)),)
    return flagged(*entries, probes=(Probe(**SETTING, eps=0.1, probed=probed, classes=4),))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_probe_sees_the_fault_of_a_model(fault: str):
    net, x, y = convolutional(100)
    way, expected = FAULTS[fault]
    if fault in ("shattered", "a surrogate"):
        y = net(coarse(x)).argmax(1)
    assert seen(looked(Own(net, way), x, y)).keys() == expected


def test_the_figures_are_shares_of_the_inputs():
    """Half of them, by their label, have a gradient of zero."""
    net, x, y = convolutional(100)

    def half(net: nn.Module, x: Tensor) -> Tensor:
        logits = net(x)
        return torch.where(logits.argmax(1, keepdim=True) < 2, logits.detach(), logits)

    found = seen(looked(Own(net, half), x, y))
    share = float((y < 2).float().mean())
    assert found["zero-gradients"] == (pytest.approx(share), 0.05)
    assert found["unbounded"] == (pytest.approx(share), 0.25)


def test_a_random_model_is_told_by_other_logits_and_other_labels():
    net, x, y = convolutional(100)
    torch.manual_seed(0)
    moved, other = seen(looked(Own(net, lambda net, x: net(x + 0.3 * torch.randn_like(x))), x, y))["random"]
    assert moved == 1
    assert 0 < other < 1


def test_a_blind_attack_is_probed_on_the_model_that_it_sees():
    net, x, _ = convolutional(100)
    y = net(coarse(x)).argmax(1)
    whole = Own(Defended(net), lambda net, x: net(coarse(x)))
    assert "zero-gradients" in seen(looked(whole, x, y))
    assert "zero-gradients" not in seen(looked(whole, x, y, adaptive=False))


def test_attacks_that_do_no_better_than_noise_are_flagged():
    net, x, y = convolutional(100)
    probed = looked(Defended(net), x, y, "linf:0.3")
    shaken = int((probed.noise == "broken").sum())
    assert 10 < shaken < 90
    by_noise = made("".join("b" if status == "broken" else "h" for status in probed.noise))
    idle = replace(entry("idle", range(0)), outcome=by_noise)
    assert seen(probed, idle)["noise"] == (shaken, shaken)
    assert "noise" not in seen(probed, idle, entry("pgd", range(100)))
    assert "noise" not in seen(
        replace(probed, noise=np.full(100, "broken")), entry("pgd", range(100))
    )  # nothing is left
    calm = replace(probed, noise=np.full(100, "held"))
    assert "noise" not in seen(calm, entry("idle", range(0)))


@pytest.mark.parametrize("norm", ["l2:1", "l1:2", "l0:3", "patch:0.1"])
def test_every_norm_is_probed(norm: str):
    net, x, y = convolutional(20)
    assert set(looked(Defended(net), x, y, norm).noise) <= {"held", "broken"}


def test_probabilities_are_refused_before_they_are_attacked():
    net, x, y = convolutional(100)
    with pytest.raises(ValueError, match="probabilities"):
        check(Own(net, FAULTS["probabilities"][0]), x, y, ThreatModel.parse("linf:0.1"))


# In tables, on disk and at the command line


class Hot(nn.Module):
    """The nearest class mean of digits, with logits so large that the cross-entropy vanishes."""

    def __init__(self) -> None:
        super().__init__()
        images = data.load("digits", "train", None)
        means = torch.stack([images.x[images.y == k].flatten(1).mean(0) for k in range(10)])
        self.model = Linear(means, -means.square().sum(1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.model(x)


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    return {"dataset": "digits", "model": Hot(), "n": 120, "out": tmp_path / "runs", "threats": ["linf:0.1"]}


def test_a_run_probes_once_and_what_it_saw_is_read_again(settings: dict, monkeypatch: pytest.MonkeyPatch):
    first = benchmark(["fgsm", "pgd:steps=5"], **settings)
    assert first.leaderboard()["flags"].tolist() == ["unbounded; saturated"]
    monkeypatch.setattr(probing, "probe", None)  # what is stored is not asked for again
    for again in (benchmark(["fgsm", "pgd:steps=5"], **settings), load(settings["out"])):
        assert [str(finding) for finding in again.findings] == [str(finding) for finding in first.findings]
        assert_same(again.probes[0].probed, first.probes[0].probed)
        assert again.audit().equals(first.audit())
    assert not first.unprobed
    monkeypatch.undo()
    assert_same(benchmark(["fgsm"], **settings, fresh=True).probes[0].probed, first.probes[0].probed, but=["seconds"])


def test_a_row_that_was_not_probed_is_named(settings: dict):
    results = benchmark(["fgsm"], **settings, probe=False)
    assert results.leaderboard()["flags"].tolist() == [""]
    assert results.unprobed == ["none, linf 0.1"]


def test_the_command_explains_every_flag(
    settings: dict, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    benchmark(["fgsm", "pgd:steps=5"], **settings)
    table = settings["out"].parent / "audit.csv"
    monkeypatch.setattr("sys.argv", ["robust-bench", "audit", str(settings["out"]), "--csv", str(table)])
    assert cli.main() == 0
    unbounded, saturated, count = capsys.readouterr().out.splitlines()
    assert unbounded.startswith("unbounded: none (Hot), digits linf 0.1: ")
    assert "survive an attack without bounds, by chance 10.0%" in unbounded
    assert FLAGS["saturated"].advice in saturated
    assert count == "1 of 1 rows flagged"
    assert table.read_text().count("\n") == 3


def test_a_flagged_row_is_ranked_and_marked(settings: dict, capsys: pytest.CaptureFixture[str]):
    from rich.console import Console

    from robustbench_lite.display import show_results

    results = benchmark(["fgsm", "pgd:steps=5"], **settings)
    show_results(Console(width=100), results.matrix(), results.leaderboard())
    said = capsys.readouterr().out
    assert "] !" in said
    assert "! none, linf 0.1: unbounded; saturated" in said
    assert results.leaderboard()["rank"].tolist() == [1]


def test_flags_go_to_their_own_row():
    entries = [entry("strong", range(30)), WEAKER["one-step"](range(37)), WEAKER["eps"](range(20))]
    board = leaderboard(entries, flags=flags(findings(entries)))
    assert board.set_index("eps")["flags"].to_dict() == {0.05: "", 0.1: "one-step"}


@pytest.mark.parametrize("defense", ["standard", "madry", "crown-ibp"])
def test_shipped_models_at_their_customary_eps_are_not_flagged(defense: str, tmp_path: Path):
    attacks = ["fgsm", "pgd:steps=6", "apgd:steps=6", "square:queries=20"]
    results = benchmark(attacks, [defense], n=100, out=tmp_path)
    assert [str(finding) for finding in results.findings] == []
    assert len(results.probes) == 1
