"""Attacks crafted on one model and judged on another, worked out by hand, and where their sources come from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_lite import data, registry
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate
from robustbench_lite.matrix import Results, benchmark, load
from robustbench_lite.outcome import BROKEN, HELD, UNKNOWN
from robustbench_lite.registry import defense, identity, make, spec
from robustbench_lite.trained import Workshop, load_defense, weights_hash
from robustbench_lite.training import Lab, Progress
from tests.nets import Linear, Scripted, halfspace
from tests.outcomes import Notes

SOURCE = "standard:epochs=1@mlp"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROBUST_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ROBUST_BENCH_DATA", raising=False)
    return tmp_path / "cache"


def one_line(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# Crafted there, judged here


def line(slope: float, border: float) -> Linear:
    """Of inputs of two coordinates, says 1 where slope * x0 + (1 - slope) * x1 passes the border."""
    way = torch.tensor([slope, 1 - slope])
    return Linear(torch.stack([-way, way]), torch.tensor([border, -border]))


@pytest.mark.parametrize(
    ("source", "fooled"),
    [
        (line(1.0, 0.55), True),  # the same way: goes on past the source's border, as far as eps, and past the model's
        (line(0.0, 0.55), False),  # another way: where the source looks, the model does not
        (line(1.0, 0.95), True),  # not fooled itself, but it points the right way
    ],
    ids=["near", "elsewhere", "far"],
)
def test_the_source_shows_the_way_and_is_not_stopped_at(source: Linear, fooled: bool):
    x, y = torch.full((5, 2), 0.5), torch.zeros(5, dtype=torch.int64)
    attack = make("attack", "transfer:attack=(pgd:random_start=false)")
    outcome = evaluate(attack, line(1.0, 0.65), x, y, "linf:0.2", sources=lambda spec: Defended(source))
    assert set(outcome.status) == {BROKEN if fooled else HELD}
    assert not outcome.forwards.any()
    assert not outcome.backwards.any()


def test_what_an_attack_ends_with_gives_way_to_what_fooled_the_source():
    def strays(problem):
        problem.labels(problem.x + 0.15)
        return problem.x.clone()

    model, x, y = line(1.0, 0.6), torch.full((5, 2), 0.5), torch.zeros(5, dtype=torch.int64)
    attack = registry.find("attack", "transfer")(attack=Scripted(strays))
    assert set(evaluate(attack, model, x, y, "linf:0.2", sources=lambda spec: Defended(model)).status) == {BROKEN}
    assert set(evaluate(attack, model, x, y, "linf:0.12", sources=lambda spec: Defended(model)).status) == {HELD}


def test_an_attack_that_gives_up_on_the_source_leaves_the_input_unknown():
    def stops(problem):
        problem.give_up(torch.arange(len(problem)) < 2, "no start")
        return problem.x.clone()

    model, x, y = line(1.0, 0.6), torch.full((5, 2), 0.5), torch.zeros(5, dtype=torch.int64)
    attack = registry.find("attack", "transfer")(attack=Scripted(stops))
    outcome = evaluate(attack, model, x, y, "linf:0.01", sources=lambda spec: Defended(model))
    assert outcome.status.tolist() == [UNKNOWN] * 2 + [HELD] * 3
    assert outcome.reason.tolist() == ["no start"] * 2 + [""] * 3


def test_an_attack_that_minimises_transfers_at_its_own_distance():
    model, x, y = halfspace("l2", 0.4)
    attack = make("attack", "transfer:attack=deepfool")
    outcomes = [
        evaluate(attack, model, x, y, threat, sources=lambda spec: Defended(model)) for threat in ("l2:0.39", "l2:0.5")
    ]
    assert [set(outcome.status) for outcome in outcomes] == [{HELD}, {BROKEN}]
    assert (abs(outcomes[1].distance - 0.4) < 0.02).all()


def test_sources_that_are_missing_or_do_not_fit_are_one_line():
    model, x, y = line(1.0, 0.6), torch.full((5, 2), 0.5), torch.zeros(5, dtype=torch.int64)
    one_line(lambda: evaluate("transfer", model, x, y, "linf:0.1"), "nothing says which model 'standard' is", "sources")
    three = Defended(Linear(torch.zeros(3, 2), torch.zeros(3)))
    one_line(
        lambda: evaluate("transfer", model, x, y, "linf:0.1", sources=lambda spec: three),
        "source standard knows 3 classes, but the model that is attacked 2",
    )


# One attack, however it is written


def test_a_nested_attack_is_completed_with_its_defaults():
    plain, spelled, other = (
        make("attack", f"transfer{more}") for more in ("", ":attack=(pgd:steps=40)", ":attack=fgsm")
    )
    assert plain == spelled != other
    assert identity(plain) == identity(spelled)
    assert identity(plain)["settings"]["attack"] == {**identity(make("attack", "pgd")), "origin": "built-in"}
    assert [spec(one) for one in (plain, spelled, other)] == ["transfer", "transfer", "transfer:attack=fgsm"]
    text = "transfer:source=(madry:eps=0.1@mlp),attack=(pgd:steps=3,loss=margin)"
    assert spec(make("attack", text)) == text


def test_a_new_version_of_the_nested_attack_is_another_attack(monkeypatch: pytest.MonkeyPatch):
    before = identity(make("attack", "transfer"))
    monkeypatch.setattr(registry.find("attack", "pgd"), "version", 2, raising=False)
    assert identity(make("attack", "transfer")) != before


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("transfer:attack=pdg", "attack transfer: attack: no attack 'pdg'; did you mean pgd?"),
        ("transfer:attack=(pgd:steps=0)", "steps and restarts must be 1 or more"),
        ("transfer:attack=patch", "an attack on the source is wanted that needs nothing else, not patch"),
        ("transfer:attack=transfer", "an attack on the source is wanted that needs nothing else, not transfer"),
    ],
)
def test_a_nested_attack_that_cannot_be_is_one_line(text: str, complaint: str):
    one_line(lambda: make("attack", text), complaint)


def test_it_knows_the_norms_of_its_attack():
    assert make("attack", "transfer").norms == make("attack", "pgd").norms
    assert make("attack", "transfer:attack=cw").norms == {"l2", "l0"}


# Where sources come from


class Shop:
    """Workshops on digits that keep what they say."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.trained: list[str] = []

    def watch(self, name: str, progress: Progress) -> None:
        if name not in self.trained:
            self.trained.append(name)

    def __call__(self, model: str | nn.Module = "mlp") -> Workshop:
        return Workshop("digits", (1, 8, 8), 10, model=model, note=self.notes.append, progress=self.watch)


@pytest.fixture
def shop() -> Shop:
    return Shop()


def test_a_source_is_trained_once_whoever_asks_and_is_the_same(shop: Shop, tmp_path: Path, monkeypatch: Any):
    first = shop(nn.Linear(2, 2)).source(SOURCE, "transfer")
    assert shop.trained == ["standard:epochs=1@mlp"]
    assert len(shop.notes) == 1
    second = shop("cnn").source(SOURCE, "transfer").model
    direct = shop("mlp").subject("standard:epochs=1").model
    face = load_defense(SOURCE, "digits")
    assert len(shop.notes) == 1
    monkeypatch.setenv("ROBUST_BENCH_CACHE", str(tmp_path / "other"))
    anew = shop("mlp").subject("standard:epochs=1").model
    assert len(shop.notes) == 2
    assert len({weights_hash(model) for model in (first.model, second, direct, face, anew)}) == 1
    assert first.architecture == "mlp"
    assert not first.model.training
    assert not any(parameter.requires_grad for parameter in first.model.parameters())


def test_a_source_without_an_architecture_has_that_of_the_workshop(shop: Shop):
    assert shop("mlp").elsewhere("standard", "transfer")[0].architecture == "mlp"
    assert shop(nn.Linear(2, 2)).elsewhere("standard", "transfer")[0].architecture == "cnn"  # customary


@pytest.fixture
def asking():
    """A recipe that asks for what it is told, in a setting or unannounced."""

    @defense("asking")
    @dataclass(frozen=True)
    class Asking:
        sources: tuple[str, ...] = ("asking",)
        unannounced: str = ""

        trains: ClassVar[bool] = True

        def __call__(self, model: nn.Module, lab: Lab) -> Defended:
            for source in (*self.sources, *filter(None, [self.unannounced])):
                lab.sources(source)
            return Defended(model).eval()

    yield Asking
    del registry._tables["defense"]["asking"]


@pytest.mark.parametrize(
    ("chain", "complaint"),
    [
        ("asking", "it needs itself: asking@mlp > asking@mlp"),
        ("asking:sources=(asking@cnn)", "it needs itself: asking:sources=(asking@cnn)@mlp > asking@cnn > asking@cnn"),
        ("asking:sources=(standard,asking)", "it needs itself: asking:sources=(standard,asking)@mlp > asking@mlp"),
        ("asking:sources=standrad", "source standrad of asking:sources=(standrad)@mlp: no defense 'standrad'; did you"),
        ("asking:sources=(standard,standard@mpl)", "no model 'mpl'; did you mean mlp?"),
        ("asking:sources=(standard:epoch=1)", "defense standard has no setting 'epoch'"),
        ("asking:sources=none", "defense none needs a trained model"),
    ],
)
def test_a_source_that_cannot_be_is_one_line_before_anything_is_trained(
    shop: Shop, asking: type, chain: str, complaint: str
):
    one_line(lambda: shop().links(chain), complaint)
    one_line(lambda: shop().subject(chain), complaint)
    assert not shop.trained


def test_a_source_asked_for_unannounced_is_no_way_around(shop: Shop, asking: type):
    chain = "asking:sources=standard:epochs=1,unannounced=(asking:sources=standard:epochs=1,unannounced=standrad)"
    one_line(lambda: shop().subject(chain.replace("standrad", "asking")), "it needs itself")


def test_the_cache_tells_recipes_by_what_their_sources_are(shop: Shop, asking: type, monkeypatch: Any):
    recipes = [make("defense", f"asking:sources={text}") for text in ("standard", "standard@mlp", "standard@cnn")]
    keys = [shop()._cached(recipe, 0, "x") for recipe in recipes]
    assert keys[0] == keys[1] != keys[2]
    monkeypatch.setattr(registry.find("defense", "standard"), "version", 2, raising=False)
    assert shop()._cached(recipes[0], 0, "x") != keys[0]


# In a matrix


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Results, Notes]]:
    def run(attacks: Any, defenses: Any = None, **settings: Any) -> tuple[Results, Notes]:
        watcher = Notes()
        usual = {"model": "mlp", "n": 100, "device": "cpu", "out": tmp_path / "runs", "threats": ["linf:0.1"]}
        usual["probe"] = False
        return benchmark(attacks, defenses, "digits", **(usual | settings), watcher=watcher), watcher

    return run


def test_transfer_stands_beside_white_box_and_is_weaker(run: Any, tmp_path: Path):
    standard, madry = "standard:epochs=4", "madry:epochs=6,eps=0.1,warmup=1"
    same, other = f"transfer:source=({standard})", f"transfer:source=({standard}@cnn)"
    results, watcher = run(["pgd:steps=10", same, other], [standard, madry], n=None)
    table = results.matrix().set_index("defense")
    assert list(table.columns[4:]) == ["pgd:steps=10", same, other]
    assert table.loc[madry, "pgd:steps=10"] + 0.05 < table.loc[madry, [same, other]].min()
    broken = {entry.attack: entry.outcome.status == BROKEN for entry in results.entries if entry.defense == madry}
    assert (broken[same] | broken[other]).sum() > 20  # but it is an attack
    assert (broken[same] & ~broken["pgd:steps=10"]).sum() <= 5
    assert table.loc[standard, "pgd:steps=10"] < table.loc[standard, other] < 0.8
    assert np.isnan(table.loc[standard, same])
    assert f"attack {same} is left out on {standard}, which is its source" in watcher.notes
    assert watcher.inputs == watcher.expected
    assert load(tmp_path / "runs").matrix().equals(results.matrix())


def test_the_source_s_weights_are_part_of_the_key(run: Any, tmp_path: Path, monkeypatch: Any):
    attack = f"transfer:source=({SOURCE})"
    cells = tmp_path / "runs" / "cells"
    own = {"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()}
    run(attack, **own)
    run(f"transfer:source=({SOURCE}),attack=(pgd:steps=40)", **own)
    assert len(list(cells.iterdir())) == 1
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    other = Workshop("digits", (1, 8, 8), 10, model="mlp").train(make("defense", "standard:epochs=1"), seed=1)
    from robustbench_lite.trained import save

    save(other.model, file)
    run(attack, **own)
    assert len(list(cells.iterdir())) == 2


def test_where_it_is_crafted_on_the_only_defense_there_is_nothing_to_run(run: Any, tmp_path: Path):
    one_line(lambda: run("transfer", "standard"), "there is no attack to run")
    one_line(lambda: run("transfer:source=standrad", "madry"), "source standrad of transfer: no defense 'standrad'")
    assert not (tmp_path / "cache").exists()


def test_all_does_without_a_source_that_is_not_to_be_had(tmp_path: Path, monkeypatch: Any):
    digits = data.load("digits")
    np.savez(tmp_path / "x.npz", x=digits.x[:20].numpy(), y=digits.y[:20].numpy())
    monkeypatch.setattr(registry, "builtin", {"attack": ["fgsm", "transfer"], "defense": []}.__getitem__)
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    usual = {"dataset": f"npz:{tmp_path / 'x.npz'}", "threats": ["linf:0.1"], "n": None, "device": "cpu", "model": own}
    watcher = Notes()
    results = benchmark("all", out=tmp_path / "runs", watcher=watcher, **usual)
    assert results.leaderboard()["attacks"].tolist() == ["fgsm"]
    assert any("attack transfer is left out" in note and "no array x_train" in note for note in watcher.notes)
    one_line(lambda: benchmark(["all", "transfer"], out=tmp_path / "runs", **usual), "no array x_train")


def test_a_defense_may_name_its_architecture(place: Path):
    """Two architectures in one table; the name of the one that is meant anyway adds nothing."""
    quick = "standard:epochs=1"
    defenses = [f"{quick}@mlp", quick, f"{quick}@cnn", f"{quick}+smoothed:draws=1@mlp"]
    results = benchmark("fgsm", defenses, "digits", n=10, probe=False)
    rows = results.leaderboard()[["defense", "model"]].value_counts().to_dict()
    assert rows == {(quick, "mlp"): 1, (quick, "cnn"): 1, (f"{quick}+smoothed:draws=1", "mlp"): 1}
    for wrong, why in (("standard@mpl", "no model 'mpl'; did you mean mlp"), ("standard@", "an empty item")):
        with pytest.raises(ValueError, match=why):
            benchmark("fgsm", wrong, "digits", n=10)
    with pytest.raises(ValueError, match="names an architecture, but the model is given"):
        benchmark("fgsm", "smoothed@mlp", "digits", n=10, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
