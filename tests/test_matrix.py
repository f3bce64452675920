"""The whole run on a small model: what is computed, what is read, and that neither shows in a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_lite import data, matrix, planning, registry
from robustbench_lite.evaluation import evaluate
from robustbench_lite.matrix import Results, benchmark, load
from robustbench_lite.problem import Access, Problem
from robustbench_lite.registry import make
from robustbench_lite.threat import ThreatModel
from robustbench_lite.trained import Workshop, save
from tests.outcomes import Notes, assert_same

TABLES = ("leaderboard", "matrix", "rows")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """An mlp after two epochs on digits."""
    model = Workshop("digits", (1, 8, 8), 10, model="mlp")
    return model.train(make("defense", "standard:epochs=2,rate=0.003")).model


@pytest.fixture(scope="module")
def weights(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mlp.safetensors"
    save(net, path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUST_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ROBUST_BENCH_DATA", raising=False)


class Runs:
    """Benchmarks of one model in one folder."""

    def __init__(self, weights: Path, out: Path) -> None:
        self.settings: dict[str, Any] = {
            "dataset": "digits",
            "model": "mlp",
            "weights": weights,
            "out": out,
            "n": 120,
            "device": "cpu",
        }
        self.out = out

    def __call__(self, attacks: Sequence[Any] = ("fgsm",), **settings: Any) -> Results:
        self.watcher = Notes()
        return benchmark(attacks, **(self.settings | {"watcher": self.watcher} | settings))


@pytest.fixture
def runs(weights: Path, tmp_path: Path) -> Runs:
    return Runs(weights, tmp_path / "runs")


def csv(results: Results, name: str, but: Sequence[str] = ()) -> str:
    return getattr(results, name)().drop(columns=list(but), errors="ignore").to_csv(index=False)


def assert_equal_tables(one: Results, other: Results, but: Sequence[str] = ("seconds",)) -> None:
    for name in TABLES:
        assert csv(one, name, but) == csv(other, name, but), name


@dataclass(frozen=True)
class Counting:
    """FGSM, and a record of how many inputs each call was given."""

    name: ClassVar[str] = "counting"
    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    calls: ClassVar[list[list[int]]] = []

    def __call__(self, problem: Problem) -> Tensor:
        self.calls.append(problem.noise.rows.tolist())
        gradient, _ = problem.gradient(problem.x)
        return problem.threat.step(problem.x, problem.x, gradient, problem.threat.eps)


@pytest.fixture
def calls() -> list[list[int]]:
    Counting.calls.clear()
    return Counting.calls


def chunks_called(calls: list[list[int]]) -> list[set[int]]:
    return [{row // 100 * 100 for row in rows} for rows in calls]


@dataclass(frozen=True)
class Unregistered:
    strength: float = 1.0

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf"})

    def __call__(self, problem: Problem) -> Tensor:
        gradient, _ = problem.gradient(problem.x)
        return problem.threat.step(problem.x, problem.x, gradient, self.strength * problem.threat.eps)


@dataclass(frozen=True)
class Nearest:
    """Walks along the gradient's sign until the label turns."""

    name: ClassVar[str] = "nearest"
    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    minimises: ClassVar[bool] = True
    calls: ClassVar[list[int]] = []

    def __call__(self, problem: Problem) -> Tensor:
        assert problem.threat.eps == float("inf")
        self.calls.append(len(problem))
        gradient, _ = problem.gradient(problem.x)
        way = problem.threat.norm.steepest(gradient)
        for length in torch.linspace(0.01, 0.5, 50):
            problem.labels((problem.x + length * way).clamp(0, 1))
        return problem.best


@dataclass(frozen=True)
class Crashing:
    name: ClassVar[str] = "crashing"
    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[str]] = frozenset({"linf"})

    def __call__(self, problem: Problem) -> Tensor:
        raise RuntimeError("it fell\nover")


# The same table, however it was computed


def test_the_table_is_right(runs: Runs, net: nn.Module):
    """Against evaluate, and against the model asked directly."""
    results = runs(["pgd:steps=5", "fgsm"], n=150)
    digits = data.load("digits").take(slice(150))
    outcomes = {
        name: evaluate(make("attack", name), net, digits.x, digits.y, "linf:0.1") for name in ("fgsm", "pgd:steps=5")
    }
    for entry in results.entries:
        assert_same(entry.outcome, outcomes[entry.attack], but=["seconds", "imaged", "images"])
    (row,) = results.leaderboard().to_dict("records")
    with torch.no_grad():
        right = (net(digits.x).argmax(1) == digits.y).numpy()
    held = right & ~np.any([outcome.fooled for outcome in outcomes.values()], axis=0)
    assert 0.05 < held.mean() < right.mean()
    assert row["clean_accuracy"] == pytest.approx(right.mean())
    assert row["robust_accuracy"] == pytest.approx(held.mean())
    assert (row["defense"], row["model"], row["norm"], row["eps"]) == ("none", "mlp", "linf", 0.1)
    assert row["parameters"] == 64 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10
    assert runs.watcher.inputs == runs.watcher.expected == 300


def test_the_batch_changes_nothing(runs: Runs, tmp_path: Path):
    first, *others = (runs(["pgd:steps=4"], n=320, batch=size, out=tmp_path / str(size)) for size in (16, 100, 300))
    assert 0 < first.leaderboard()["robust_accuracy"][0] < 1
    for other in others:
        assert_equal_tables(first, other)
        assert_same(first.entries[0].outcome, other.entries[0].outcome, but=["seconds"])


def test_the_order_in_which_things_are_asked_for_changes_nothing(tmp_path: Path, runs: Runs):
    one = runs(["fgsm", Counting()], threats=["linf:0.1", "l2:1"])
    other = runs([Counting(), "fgsm"], threats=["l2:1", "linf:0.1"], out=tmp_path / "other")
    assert len(one.leaderboard()) == 2
    assert_equal_tables(one, other)


def test_the_order_of_defenses_changes_nothing(tmp_path: Path, runs: Runs):
    chains = ["standard:epochs=1", "madry:epochs=1,steps=1,warmup=0"]
    trained = {"model": "mlp", "weights": None, "n": 20}
    one = runs(defenses=chains, **trained)
    other = runs(defenses=chains[::-1], out=tmp_path / "other", **trained)
    assert set(one.leaderboard()["defense"]) == {"standard:epochs=1", "madry:epochs=1,eps=0.1,warmup=0,steps=1"}
    assert_equal_tables(one, other)


def test_what_is_asked_for_twice_counts_once(runs: Runs, calls: list[list[int]]):
    once = runs(["fgsm"])
    assert_equal_tables(runs(["fgsm", make("attack", "fgsm"), "fgsm"]), once)
    trained = {"weights": None, "n": 20, "dataset": "digits"}
    names = ["madry:epochs=1,steps=1", "madry:steps=1,epochs=1,eps=0.1", "madry:epochs=1,steps=1 "]
    assert_equal_tables(runs(defenses=names, **trained), runs(defenses=names[:1], **trained))


@pytest.mark.parametrize("target", [None, 3, "next", "random", "least-likely"])
def test_what_is_loaded_is_what_was_found(runs: Runs, target: Any):
    found = runs(["fgsm", "pgd:steps=3", Nearest()], threats=["l2:0.5", "linf:0.1"], target=target)
    loaded = load(runs.out)
    assert_equal_tables(found, loaded, but=())
    if target is not None:
        assert all(f"to {target}" in attack for attack in found.rows()["attack"].unique())


def test_loading_an_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="there are no results in"):
        load(tmp_path)


# What is stored is not computed again


def test_a_second_call_computes_nothing_and_writes_the_same_bytes(runs: Runs, calls: list[list[int]], tmp_path: Path):
    first = runs([Counting(), "fgsm"])
    assert calls
    first.to_csv(tmp_path / "first.csv")
    calls.clear()
    second = runs([Counting(), "fgsm"])
    second.to_csv(tmp_path / "second.csv")
    assert not calls
    assert runs.watcher.inputs == runs.watcher.expected == 240
    assert (tmp_path / "first.csv").read_bytes() == (tmp_path / "second.csv").read_bytes()
    assert_equal_tables(first, second, but=())


def test_whole_chunks_are_reused_when_more_is_asked_for(runs: Runs, calls: list[list[int]]):
    runs([Counting()], n=250, batch=300)
    assert chunks_called(calls) == [{0, 100, 200}]
    calls.clear()
    more = runs([Counting()], n=300)
    assert chunks_called(calls) == [{200}]
    assert more.leaderboard()["examples"].tolist() == [300]
    assert more.rows()["row"].tolist() == list(range(300))
    assert load(runs.out).rows()["row"].tolist() == list(range(300))
    calls.clear()
    less = runs([Counting()], n=250)
    assert not calls
    assert less.rows()["row"].tolist() == list(range(250))


def test_fresh_computes_again(runs: Runs, calls: list[list[int]]):
    first = runs([Counting()])
    calls.clear()
    second = runs([Counting()], fresh=True)
    assert calls
    assert_equal_tables(first, second)
    assert csv(first, "rows") != csv(second, "rows")  # the seconds are new
    assert_equal_tables(load(runs.out), second, but=())


@pytest.mark.parametrize("damage", [b"", b"half", None], ids=["empty", "garbage", "truncated"])
def test_a_corrupt_chunk_is_computed_again_and_said(runs: Runs, calls: list[list[int]], damage: bytes | None):
    first = runs([Counting()], n=220, probe=False)
    calls.clear()
    victim = sorted(runs.out.rglob("*.npz"))[1]
    victim.write_bytes(victim.read_bytes()[:-50] if damage is None else damage)
    second = runs([Counting()], n=220)
    assert chunks_called(calls) == [{100}]
    assert [str(victim) in note for note in runs.watcher.notes] == [True]
    assert_equal_tables(first, second)
    calls.clear()
    runs([Counting()], n=220)
    assert not calls
    assert not runs.watcher.notes


def test_what_changes_the_answer_is_computed_anew(runs: Runs, calls: list[list[int]]):
    for settings in (
        {},
        {"seed": 1},
        {"threats": ["linf:0.2"]},
        {"threats": ["l2:0.2"]},
        {"target": 1},
        {"threats": [ThreatModel(matrix.NORMS["linf"], 0.1, 0.0, 1.5)]},
    ):
        calls.clear()
        runs([Counting()], **settings)
        assert calls, settings
        calls.clear()
        runs([Counting()], **settings)
        assert not calls, settings


def test_other_weights_are_another_model_and_never_mixed(runs: Runs, tmp_path: Path, net: nn.Module, calls: Any):
    other = tmp_path / "other.safetensors"
    save(Workshop("digits", (1, 8, 8), 10, model="mlp").train(make("defense", "standard:epochs=1")).model, other)
    mine = runs([Counting()]).leaderboard()
    calls.clear()
    theirs = runs([Counting()], weights=other).leaderboard()
    assert calls
    accuracies = [table["robust_accuracy"][0] for table in (mine, theirs)]
    assert accuracies[0] != accuracies[1]
    both = load(runs.out).leaderboard()
    assert sorted(both["robust_accuracy"]) == sorted(accuracies)


def test_seeds_differ(runs: Runs):
    one, other = (runs(["pgd:steps=1"], seed=seed) for seed in (0, 1))
    assert csv(one, "rows", ["seed", "seconds"]) != csv(other, "rows", ["seed", "seconds"])
    assert load(runs.out).leaderboard()["seed"].tolist() == [0, 1]


# Attacks


def test_an_attack_may_be_an_object(runs: Runs):
    assert_equal_tables(runs([make("attack", "pgd:steps=2")]), runs(["pgd:steps=2"]), but=())


def test_an_object_of_an_unregistered_class_goes_by_its_own_name(runs: Runs):
    results = runs([Unregistered(), Unregistered(0.1), "fgsm"])
    table = results.matrix()
    assert table.columns[5:].tolist() == ["Unregistered", "Unregistered:strength=0.1", "fgsm"]
    assert table["Unregistered"][0] == table["fgsm"][0] < table["Unregistered:strength=0.1"][0]
    assert_equal_tables(results, load(runs.out), but=())


@dataclass(frozen=True)
class Unhashable:
    table: list[int]

    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[str]] = frozenset({"linf"})

    def __call__(self, problem: Problem) -> Tensor:
        return problem.x


def test_a_list_among_the_settings_is_part_of_the_key(runs: Runs):
    assert len(runs([Unhashable([1]), Unhashable([2])]).entries) == 2


class Plain:
    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[str]] = frozenset({"linf"})

    def __call__(self, problem: Problem) -> Tensor:
        return problem.x


@dataclass(frozen=True)
class Nowhere(Plain):
    norms: ClassVar[frozenset[str]] = frozenset({"l7"})


@pytest.mark.parametrize(
    ("attacks", "complaint"),
    [
        ([3], "3 is no attack: it has no access"),
        ([Plain()], "is no attack: an object of a frozen dataclass is wanted"),
        ([Counting], "is no attack: an object of a frozen dataclass is wanted"),
        ([Nowhere()], "attack Nowhere knows none of the norms linf, l2, l1, l0, patch"),
        ([Unhashable(torch.zeros(2))], "has a setting that cannot be part of a key"),  # type: ignore[arg-type]
        ([], "there is no attack to run"),
        (["pdg"], "no attack 'pdg'; did you mean pgd"),
        (["pgd:steps=0"], "steps and restarts must be 1 or more"),
    ],
    ids=["number", "class without settings", "class", "no norm", "tensor", "none", "typo", "setting"],
)
def test_what_is_no_attack_is_refused_in_one_line(runs: Runs, attacks: list[Any], complaint: str):
    with pytest.raises(ValueError) as error:
        runs(attacks)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)
    assert not runs.out.exists()


def test_attacks_that_do_not_know_the_norm_are_left_out_with_a_note(runs: Runs):
    results = runs(["fgsm", Counting()], threats=["l1:1", "l2:1"])
    assert results.leaderboard()["attacks"].tolist() == ["counting; fgsm", "fgsm"]
    assert runs.watcher.notes == ["attack counting is left out under l1:1: it knows linf, l2"]


def test_where_no_attack_is_left_it_is_refused(runs: Runs):
    with pytest.raises(ValueError, match=r"none of the attacks runs under l0:3, patch:0\.1"):
        runs(["fgsm", "pgd"], threats=["l0:3", "patch:0.1"])


def test_by_default_each_attack_runs_under_its_own_first_norm(runs: Runs):
    @dataclass(frozen=True)
    class Round(Counting):
        name: ClassVar[str] = "round"
        norms: ClassVar[frozenset[str]] = frozenset({"l1", "l2"})

    board = runs([Round(), "fgsm"]).leaderboard()
    assert board[["norm", "eps", "attacks"]].values.tolist() == [["linf", 0.1, "fgsm"], ["l2", 1.0, "round"]]
    assert not runs.watcher.notes


def test_a_norm_alone_stands_for_the_customary_eps(runs: Runs):
    assert runs(threats=["l2"]).leaderboard()["eps"].tolist() == [1.0]


def test_all_means_every_built_in_plugin(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "builtin", {"attack": ["fgsm", "pgd"], "defense": []}.__getitem__)
    assert runs(["all"], n=20, threats=["linf:0.1"]).matrix().columns[5:].tolist() == ["fgsm", "pgd"]
    assert runs(["all", "pgd"], n=20, threats=["linf:0.1"]).leaderboard()["attacks"].tolist() == ["fgsm; pgd"]


def test_all_defenses_are_the_recipes(monkeypatch: pytest.MonkeyPatch):
    found = planning._expand("defense", ["all"])
    assert {"standard", "madry"} <= set(found)
    assert all(registry.find("defense", name).trains for name in found)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("threat", "complaint"),
    [
        ("linf:1.1", "above 1"),
        ("l2:8.5", "eps is above the range; two images of digits differ by at most 8"),
        ("l1:64.5", "eps is above the range; two images of digits differ by at most 64"),
        ("l0:65", "eps is above the range; two images of digits differ by at most 64"),
        ("linf:-0.1", "eps must be 0 or more"),
        ("l2:inf", "eps must be finite"),
        (ThreatModel(matrix.NORMS["l2"], float("inf")), "eps is above the range"),
        ("l2:nan", "eps must be 0 or more"),
        ("l3:1", "no norm 'l3'"),
        ("linf:big", "not a number"),
        ("l1", "no customary eps for digits under l1; give an eps"),
        (ThreatModel(matrix.NORMS["linf"], 1.5), "eps is above the range; two images of digits differ by at most 1"),
    ],
    ids=str,
)
def test_an_impossible_threat_is_one_line(runs: Runs, threat: str, complaint: str):
    with pytest.raises(ValueError) as error:
        runs(threats=[threat])
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_the_widest_eps_of_all_is_allowed(runs: Runs):
    assert len(runs(threats=["linf:1", "l2:8", "l1:64"], n=10).leaderboard()) == 3


@pytest.mark.parametrize("n", [0, -1, 600])
def test_n_beyond_what_there_is_is_refused(runs: Runs, n: int):
    with pytest.raises(ValueError, match=f"n must be 1 to 599 .*digits.*, not {n}"):
        runs(n=n)


def test_no_n_means_all(runs: Runs):
    assert runs(n=None).leaderboard()["examples"].tolist() == [599]


def test_a_device_that_is_not_there_is_refused(runs: Runs):
    with pytest.raises(ValueError, match=r"no device 'tpu' here; there are: .*cpu"):
        runs(device="tpu")


# Attacks that minimise


def test_one_run_of_a_minimising_attack_serves_every_eps(runs: Runs):
    Nearest.calls.clear()
    results = runs([Nearest(), "fgsm"], threats=["linf:0.05", "linf:0.1"], probe=False)
    assert Nearest.calls == [Nearest.calls[0]] * len(Nearest.calls)
    assert len(list(runs.out.glob("cells/*/cell.json"))) == 3
    before = len(Nearest.calls)
    wider = runs([Nearest()], threats=["linf:0.2"])
    assert len(Nearest.calls) == before
    found = [entry for entry in results.entries if entry.attack == "nearest"] + list(wider.entries)
    near, middle, far = (entry.outcome for entry in found)
    for outcome, eps in ((near, 0.05), (middle, 0.1), (far, 0.2)):
        assert (outcome.distance[outcome.status == "broken"] <= eps).all()
        assert outcome.status.tolist().count("broken") == (far.distance <= eps).sum()
    assert 0 < (near.status == "broken").sum() < (middle.status == "broken").sum() < (far.status == "broken").sum()


@pytest.mark.parametrize("threats", [["linf:0.05", "linf:0.1"], ["linf:0.1", "linf:0.05", "l2:0.5"]], ids=str)
def test_a_minimising_attack_alone_loads_at_every_eps_that_was_asked(runs: Runs, threats: list[str]):
    found = runs([Nearest()], threats=threats)
    assert len(found.leaderboard()) == len(threats)
    assert_equal_tables(found, load(runs.out), but=())
    again = runs([Nearest()], threats=["linf:0.2"])
    loaded = load(runs.out).leaderboard()
    assert sorted(loaded["eps"]) == sorted([*found.leaderboard()["eps"], *again.leaderboard()["eps"]])


def test_an_eps_that_was_asked_under_another_seed_or_model_does_not_count(runs: Runs, tmp_path: Path):
    runs([Nearest()], threats=["linf:0.1"])
    runs(["fgsm"], threats=["linf:0.05"], seed=1)
    assert load(runs.out).leaderboard()[["eps", "seed", "attacks"]].values.tolist() == [
        [0.05, 1, "fgsm"],
        [0.1, 0, "nearest"],
    ]


# What goes wrong


def test_a_crashing_attack_costs_its_own_cell(runs: Runs):
    results = runs([Crashing(), "fgsm"])
    clean, robust = (results.leaderboard()[f"{kind}_accuracy"][0] for kind in ("clean", "robust"))
    alone = runs(["fgsm"])
    table = results.rows()
    crashed = table[(table["attack"] == "crashing") & (table["status"] != "wrong")]
    assert set(crashed["status"]) == {"unknown"}
    assert set(crashed["reason"]) == {"error: RuntimeError: it fell over"}
    assert results.matrix()["crashing"][0] == robust == 0.0
    assert results.matrix()["fgsm"][0] == alone.matrix()["fgsm"][0] > 0
    held = int((alone.entries[0].outcome.status == "held").sum())
    assert results.leaderboard()["unknown"][0] == results.unknown == held  # the others were fooled by fgsm
    assert 0 < clean < 1
    assert_equal_tables(results, load(runs.out), but=())


@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        (nn.Flatten(), "labels out of range|classes"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 10)), "the model raises on inputs of shape"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1)), "probabilities"),
    ],
    ids=["classes", "raises", "probabilities"],
)
def test_a_model_that_does_not_fit_is_one_line(runs: Runs, module: nn.Module, complaint: str):
    with pytest.raises(ValueError, match=complaint) as error:
        runs(model=module, weights=None)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_computed(
    runs: Runs, tmp_path: Path, calls: list[list[int]]
):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write to the results folder"):
        runs([Counting()], out=tmp_path / "file" / "runs")
    assert not calls


def test_names_never_become_paths(runs: Runs, tmp_path: Path, net: nn.Module):
    @registry.attack("acme/y/x")
    @dataclass(frozen=True)
    class Slashed(Counting):
        text: str = ""

    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    digits = data.load("digits").take(slice(30))
    np.savez(tmp_path / "x.npz", x=digits.x.numpy(), y=digits.y.numpy())
    before = set(tmp_path.rglob("*"))
    name = f"npz:{inside}/../../x.npz"
    try:
        results = runs(["acme/y/x:text=../../../../y"], dataset=name, n=None, threats=["linf:0.1"])
    finally:
        del registry._tables["attack"]["acme/y/x"]
    assert results.leaderboard()["dataset"].tolist() == [name]
    assert results.leaderboard()["attacks"].tolist() == ["acme/y/x:text=../../../../y"]
    new = {path.relative_to(runs.out).parts for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert {len(parts) for parts in new} == {3}
    assert {parts[0] for parts in new} == {"cells"}
    assert all(len(parts[1]) == 64 for parts in new)


# Adversarial images


@pytest.mark.parametrize("keep_all", [True, False])
def test_saved_adversarials_fool_the_model_within_eps(runs: Runs, net: nn.Module, tmp_path: Path, keep_all: bool):
    attacks = ["fgsm", "pgd:steps=5", Nearest(), Crashing()]
    results = runs(attacks, n=230, threats=["linf:0.1", "l2:0.4", "linf:0.03"], keep_all=keep_all)
    results.save_adversarials(tmp_path / "adversarials.npz")
    digits = data.load("digits")
    with np.load(tmp_path / "adversarials.npz", allow_pickle=False) as file:
        kept = {name: file[name] for name in file.files}
    assert kept.keys() == {"x", "row", "defense", "adaptive", "attack", "norm", "eps"}
    assert len({len(column) for column in kept.values()}) == 1
    assert set(zip(kept["attack"], kept["norm"], kept["eps"])) == {
        (entry.attack, entry.norm, entry.eps) for entry in results.entries if (entry.outcome.status == "broken").any()
    }
    x, clean, rows = torch.from_numpy(kept["x"]), digits.x[kept["row"]], kept["row"]
    with torch.no_grad():
        assert (net(x).argmax(1) != digits.y[rows]).all()
        assert (net(clean).argmax(1) == digits.y[rows]).all()
    assert x.min() >= 0
    assert x.max() <= 1
    delta = (x.double() - clean.double()).flatten(1)
    size = torch.where(torch.from_numpy(kept["norm"] == "linf"), delta.abs().amax(1), delta.norm(dim=1)).numpy()
    assert (size <= kept["eps"] + 1e-12).all()
    if keep_all:
        assert len(x) == sum((entry.outcome.status == "broken").sum() for entry in results.entries)


def test_the_first_sixteen_adversarials_of_a_chunk_are_always_kept(runs: Runs):
    (entry,) = runs(n=230).entries
    outcome = entry.outcome
    broken = outcome.row[outcome.status == "broken"]
    expected = np.concatenate([broken[broken // 100 == chunk][:16] for chunk in range(3)])
    assert len(expected) > 32
    assert outcome.imaged.tolist() == expected.tolist()


def test_all_adversarials_are_computed_where_only_the_first_were_kept(runs: Runs, calls: list[list[int]]):
    few = runs([Counting()])
    calls.clear()
    all_of_them = runs([Counting()], keep_all=True)
    assert calls
    assert len(few.entries[0].outcome.imaged) < len(all_of_them.entries[0].outcome.imaged)
    assert_equal_tables(few, all_of_them)
    calls.clear()
    runs([Counting()], keep_all=True)
    runs([Counting()])
    assert not calls


def test_without_adversarials_the_file_is_empty(runs: Runs, tmp_path: Path):
    runs([Crashing()]).save_adversarials(tmp_path / "none.npz")
    with np.load(tmp_path / "none.npz") as file:
        assert file["x"].shape == (0, 1, 8, 8)
        assert len(file["row"]) == len(file["attack"]) == 0
