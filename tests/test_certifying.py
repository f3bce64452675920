"""What a certifier may state, and what becomes of it when it states more; radii, resumed runs, attacks that object."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbench_lite.certificate import Certificate
from robustbench_lite.certifying import certify_inputs
from robustbench_lite.matrix import Results, benchmark, load
from robustbench_lite.norms import NORMS as NORM
from robustbench_lite.outcome import REJECTED, Certified
from robustbench_lite.threat import ThreatModel
from tests.nets import DUAL, Linear, guarded, halfspace, many_classes, nearest
from tests.outcomes import Notes

NORMS = frozenset(DUAL)
EPS = 0.007  # about half the inputs of a run lie within


def linear_margin(model: Any, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """Exact, but for the pixel range: the smallest over the other classes of gap minus eps times the dual norm."""
    net, logits = model.model, model(x)
    ways = net.weight - net.weight[y].unsqueeze(1)
    gap = logits.gather(1, y.unsqueeze(1)) - logits - threat.eps * DUAL[threat.norm.name](ways)
    return gap.scatter(1, y.unsqueeze(1), torch.inf).amin(1).detach()


def exactly(model: Any, x: Tensor, y: Tensor, threat: ThreatModel) -> Certificate:
    return Certificate.of_margins(linear_margin(model, x, y, threat), y, threat.eps)


@dataclass(frozen=True)
class Scripted:
    """A certifier that does what it is told; ``asked`` keeps how many inputs and at which eps."""

    call: Callable[..., Any] = exactly
    exact_radius: bool = False

    name: ClassVar[str] = "scripted"
    norms: ClassVar[frozenset[str]] = NORMS
    asked: ClassVar[list[tuple[int, float]]] = []

    def __call__(self, model: Any, x: Tensor, y: Tensor, threat: ThreatModel, noise: Any) -> Certificate:
        self.asked.append((len(x), threat.eps))
        assert len(noise.rows) == len(x)
        return self.call(model, x, y, threat)


@pytest.fixture(autouse=True)
def asked() -> list[tuple[int, float]]:
    Scripted.asked.clear()
    return Scripted.asked


def statuses(found: Certified) -> list[str]:
    return found.status.tolist()


# What is proved


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_a_linear_model_is_verified_up_to_its_distance(norm):
    model, x, y = halfspace(norm, 0.1)
    inside = certify_inputs(Scripted(), model, x, y, f"{norm}:0.0999")
    assert statuses(inside) == ["verified"] * 20
    assert inside.certified.tolist() == y.tolist()
    assert (inside.radius == 0.0999).all()
    assert (inside.margin > 0).all()
    beyond = certify_inputs(Scripted(), model, x, y, f"{norm}:0.1001")
    assert statuses(beyond) == ["unknown"] * 20
    assert set(beyond.certified) == {-1}
    assert (beyond.radius == 0).all()
    assert (beyond.margin < 0).all()


def test_what_the_model_gets_wrong_is_not_asked_about(asked):
    model, x, y = halfspace("linf", 0.1, count=6)
    labels = torch.where(torch.tensor([True, False, False, True, False, False]), 1 - y, y)
    found = certify_inputs(Scripted(), model, x, labels, "linf:0.05", first_row=100)
    assert statuses(found) == ["wrong", "verified", "verified", "wrong", "verified", "verified"]
    assert asked == [(4, 0.05)]
    assert found.row.tolist() == list(range(100, 106))
    assert found.clean.tolist() == y.tolist()
    assert found.certified.tolist() == [-1, *y[1:3].tolist(), -1, *y[4:].tolist()]
    nothing = certify_inputs(Scripted(), model, x, 1 - y, "linf:0.05")
    assert statuses(nothing) == ["wrong"] * 6


# What it may not state


def lie(**columns: Callable[[Certificate, Tensor], Any]) -> Callable[..., Certificate]:
    """A certificate that would hold, with some columns made anew."""

    def call(model: Any, x: Tensor, y: Tensor, threat: ThreatModel) -> Certificate:
        honest = exactly(model, x, y, threat)
        return replace(honest, **{name: column(honest, y) for name, column in columns.items()})

    return call


def fail(error: Exception) -> Callable[..., Certificate]:
    def call(*_: object) -> Certificate:
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "status", "reason"),
    [
        (
            fail(ValueError("layer 3 (Softmax)\ncannot be bounded")),
            "unsupported",
            "layer 3 (Softmax) cannot be bounded",
        ),
        (fail(RuntimeError("out of memory")), "unknown", "error: RuntimeError: out of memory"),
        (lie(label=lambda _, y: 1 - y), "unknown", "error: the certificate is for another label"),
        (lie(label=lambda _, y: y - y - 1), "unknown", "the certificate is for no label"),
        (lie(margin=lambda one, _: -one.margin), "unknown", "the certificate's own margin is not above 0"),
        (lie(status=lambda one, _: one.status[1:]), "unknown", "error: no certificate for 4 inputs"),
        (lie(status=lambda one, _: ["proven"] * 4), "unknown", "there is no status 'proven'"),
        (lie(radius=lambda one, _: one.radius.sum()), "unknown", "its radius has shape ()"),
        (lambda *_: None, "unknown", "error: no certificate for 4 inputs: AttributeError"),
    ],
)
def test_a_certifiers_error_is_never_a_proof(call, status, reason):
    model, x, y = halfspace("linf", 0.1, count=4)
    found = certify_inputs(Scripted(call), model, x, y, "linf:0.05", radius=True)
    assert statuses(found) == [status] * 4
    assert all(reason in one for one in found.reason)
    assert set(found.certified) == {-1}
    assert (found.radius == 0).all()
    assert np.isnan(found.margin).all()


def test_an_error_costs_its_batch_only():
    model, x, y = halfspace("linf", 0.1, count=6)

    def call(model: Any, x: Tensor, y: Tensor, threat: ThreatModel) -> Certificate:
        return exactly(model, x, y, threat) if len(x) == 4 else fail(RuntimeError())()

    found = certify_inputs(Scripted(call), model, x, y, "linf:0.05", batch=4)
    assert statuses(found) == ["verified"] * 4 + ["unknown"] * 2


def falsify(point: Callable[[Tensor], Tensor]) -> Callable[..., Certificate]:
    def call(model: Any, x: Tensor, y: Tensor, threat: ThreatModel) -> Certificate:
        return replace(exactly(model, x, y, threat), status=["falsified"] * len(x), counterexample=point(x))

    return call


def test_a_counterexample_counts_where_the_model_agrees_strictly_inside_the_ball():
    net = halfspace("l2", 0.1, count=4)
    call = falsify(lambda x: net.across(x, 0.15))
    found = certify_inputs(Scripted(call), net.model, net.x, net.y, "l2:0.101")
    assert statuses(found) == ["falsified"] * 4
    assert found.imaged.tolist() == [0, 1, 2, 3]
    images = torch.from_numpy(found.images)
    assert (net.model(images).argmax(1) != net.y).all()
    assert ((images.double() - net.x).flatten(1).norm(dim=1) <= 0.101).all()
    for beyond in (call, falsify(lambda x: x * torch.nan), falsify(lambda x: x)):
        found = certify_inputs(Scripted(beyond), net.model, net.x, net.y, "l2:0.099")
        assert statuses(found) == ["unknown"] * 4
        assert set(found.reason) == {"error: the model, asked again, denies the counterexample"}
        assert not len(found.images)


# Radii


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_the_radius_is_the_distance_to_the_boundary(norm):
    model, x, y = many_classes(5, 40)
    model, x = model.double(), x.double()
    distance = nearest(model, x, norm).numpy()
    top = float(np.median(distance))
    found = certify_inputs(Scripted(), model, x, y, ThreatModel(NORM[norm], top), radius=True)
    far = distance > top
    assert (found.radius[far] == top).all()
    assert statuses(found) == np.where(far, "verified", "unknown").tolist()
    assert (found.radius <= distance).all()
    assert (distance[~far] - found.radius[~far] <= np.maximum(2**-12 * top, 1.002e-3 * distance[~far])).all()


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_a_radius_does_not_depend_on_the_batch(batch):
    model, x, y = many_classes(3, 40)
    whole = certify_inputs(Scripted(), model, x, y, "linf:0.9", radius=True)
    found = certify_inputs(Scripted(), model, x, y, "linf:0.9", radius=True, batch=batch)
    np.testing.assert_array_equal(found.radius, whole.radius)


def test_inputs_at_the_same_eps_are_asked_about_together_and_leave_when_narrow(asked):
    model, x, y = halfspace("linf", 0.1)
    certify_inputs(Scripted(), model, x, y, "linf:0.1125", radius=True)
    assert all(count == 20 for count, _ in asked)
    assert [eps for _, eps in asked[:3]] == [0.1125, 0.05625, 0.084375]
    assert len(asked) == 1 + 11  # 0.1125 / 2 ** 11 is the first bracket below a thousandth of 0.1
    asked.clear()
    certify_inputs(Scripted(), model, x, y, "linf:0.05", radius=True)
    assert asked == [(20, 0.05)]


def test_a_radius_is_one_that_was_verified_though_proofs_come_and_go():
    model, x, y = halfspace("linf", 0.1, count=3)
    kept: list[float] = []

    def call(model: Any, x: Tensor, y: Tensor, threat: ThreatModel) -> Certificate:
        if int(threat.eps * 1e6) % 2:
            return Certificate(y * 0 - 1, x.new_zeros(len(x)), x.new_full((len(x),), torch.nan), ["unknown"] * len(x))
        kept.append(threat.eps)
        return exactly(model, x, y, threat)

    found = certify_inputs(Scripted(call), model, x, y, "linf:0.100001", radius=True)
    assert set(found.radius) == {max(kept)}


def test_a_certifier_with_its_own_radius_is_asked_once(asked):
    """Nearer than eps it is no certificate for eps, but the radius stands."""
    model, x, y = many_classes(4, 10)
    distance = nearest(model, x, "l2")
    eps = float(distance.sort().values[4:6].mean())

    def call(model: Any, x: Tensor, y: Tensor, threat: ThreatModel) -> Certificate:
        return Certificate(y, nearest(model.model, x, "l2"), x.new_full((10,), torch.nan), ["verified"] * 10)

    found = certify_inputs(Scripted(call, exact_radius=True), model, x, y, f"l2:{eps}", radius=True)
    assert asked == [(10, eps)]
    np.testing.assert_array_equal(found.radius, distance.double())
    assert statuses(found) == np.where(distance > eps, "verified", "unknown").tolist()
    assert set(found.reason) == {""}


# In a run


@dataclass(frozen=True)
class Exact:
    """The linear certificate; ``lie`` adds to every margin."""

    lie: float = 0.0

    name: ClassVar[str] = "exact"
    norms: ClassVar[frozenset[str]] = NORMS
    calls: ClassVar[list[int]] = []
    trouble: ClassVar[dict[int, BaseException]] = {}  # from which row on

    def __call__(self, model: Any, x: Tensor, y: Tensor, threat: ThreatModel, noise: Any) -> Certificate:
        for start, error in self.trouble.items():
            if noise.rows.max() >= start:
                raise error
        self.calls.append(len(x))
        return Certificate.of_margins(linear_margin(model, x, y, threat) + self.lie, y, threat.eps)


@pytest.fixture
def runs(tmp_path: Path):
    """Runs on 150 inputs of a linear model, seven of them with a wrong label."""
    Exact.calls.clear()
    Exact.trouble.clear()
    model, x, y = many_classes(3, 150)
    model.eval()
    y[:7] = (y[:7] + 1) % 3
    np.savez(tmp_path / "x.npz", x=x.view(-1, 1, 5, 6), y=y)
    settings: dict[str, Any] = {"dataset": f"npz:{tmp_path}/x.npz", "model": model, "n": None, "device": "cpu"}

    def run(out: str = "runs", **more: Any) -> Results:
        usual = {"attacks": [], "certifiers": [Exact()], "threats": [f"linf:{EPS}"], "out": tmp_path / out}
        return benchmark(**(settings | usual | more))

    return run


def but_seconds(results: Results) -> str:
    return results.certified_rows().drop(columns="seconds").to_csv()


@pytest.mark.parametrize("radius", [False, True])
def test_a_run_that_is_stopped_goes_on_and_says_the_same(runs, tmp_path, radius):
    peace = runs("peace", radius=radius)
    assert 20 < (peace.proofs[0].certified.status == "verified").sum() < 120
    Exact.calls.clear()
    Exact.trouble[100] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        runs(radius=radius)
    assert Exact.calls[0] == 93
    Exact.trouble.clear()
    Exact.calls.clear()
    finished = runs(radius=radius)
    assert Exact.calls[0] == 50
    assert but_seconds(finished) == but_seconds(peace)
    calls = len(Exact.calls)
    assert but_seconds(runs(radius=radius)) == but_seconds(load(tmp_path / "runs")) == but_seconds(peace)
    assert len(Exact.calls) == calls
    runs(radius=not radius)
    assert len(Exact.calls) > calls


def test_the_leaderboard_has_what_any_certifier_verified(runs, tmp_path):
    results = runs(attacks=["pgd:steps=5", "fgsm"], certifiers=[Exact(), Exact(lie=-0.1)])
    row = results.leaderboard().iloc[0]
    weak, strong = sorted(results.certificates()["certified_accuracy"])
    assert 0 < weak < strong == row["certified_accuracy"]
    assert row["certifiers"] == "exact; exact:lie=-0.1"
    assert row["certified_low"] < strong < row["certified_high"]
    assert strong <= row["robust_accuracy"] <= row["clean_accuracy"] == 143 / 150
    assert results.violations() == []
    stored = load(tmp_path / "runs")
    assert stored.leaderboard().equals(results.leaderboard())
    assert stored.certificates().equals(results.certificates())


def test_certificates_for_fewer_inputs_or_another_eps_do_not_fill_the_row(runs, tmp_path):
    runs(attacks=["fgsm"], certifiers=[])
    runs(n=60)
    runs(threats=[f"linf:{EPS / 2}"])
    row = load(tmp_path / "runs").leaderboard().iloc[0]
    assert np.isnan(row["certified_accuracy"])
    assert row["certifiers"] == ""
    runs()
    assert load(tmp_path / "runs").leaderboard()["certified_accuracy"][0] > 0


def test_a_lying_certifier_is_caught_by_every_attack_that_wins_inside(runs, tmp_path):
    runs(attacks=["pgd:steps=5"], certifiers=[], threats=[f"linf:{EPS / 2}"], n=120)
    results = runs(attacks=["fgsm"], certifiers=[Exact(lie=1e6)])
    found = load(tmp_path / "runs")
    for entry in found.entries:
        broken = entry.outcome.row[entry.outcome.status == "broken"].tolist()
        assert len(broken) > 3
        lines = [line for line in found.violations() if f"but {entry.attack} " in line]
        assert [int(line.split()[1]) for line in lines] == broken
        assert all("exact:lie=1000000.0 certifies linf:0.007 (seed 0)" in line for line in lines)
    assert 0 < len(results.violations()) < len(found.violations())


def test_an_attack_beyond_the_certified_eps_does_not_object(runs, tmp_path):
    runs(attacks=["fgsm"], certifiers=[], threats=[f"linf:{3 * EPS}"])
    runs(attacks=["fgsm"], certifiers=[], dataset=_other(tmp_path))
    runs(certifiers=[Exact()], radius=True)
    found = load(tmp_path / "runs")
    assert {(entry.eps, (entry.outcome.status == "broken").any()) for entry in found.entries} == {
        (3 * EPS, True),
        (EPS, True),
    }
    assert found.violations() == []


def _other(folder: Path) -> str:
    with np.load(folder / "x.npz") as file:
        np.savez(folder / "other.npz", x=file["x"][::-1], y=file["y"][::-1])
    return f"npz:{folder}/other.npz"


def test_a_model_that_is_not_covered_is_noted_once(runs):
    Exact.trouble[0] = ValueError("layer 0 (Linear) is too linear")
    watcher = Notes()
    results = runs(attacks=["fgsm"], watcher=watcher)
    assert watcher.notes == ["certifier exact does not cover none: layer 0 (Linear) is too linear"]
    assert results.certificates()["unsupported"].tolist() == [143]
    assert results.leaderboard()["certified_accuracy"].isna().all()
    again = Notes()
    runs(attacks=["fgsm"], watcher=again)
    assert again.notes == watcher.notes


def test_a_certifier_runs_under_the_threat_models_of_the_attacks(runs):
    results = runs(attacks=["fgsm"], threats=["linf:0.02", "l2:0.5"])
    assert [(proof.norm, proof.eps) for proof in results.proofs] == [("linf", 0.02), ("l2", 0.5)]
    with pytest.raises(ValueError, match="none of the certifiers runs under l0:2"):
        runs(threats=["l0:2"])
    with pytest.raises(ValueError, match="there is no attack to run"):
        runs(certifiers=[])
    with pytest.raises(ValueError, match="is no certifier: it has no norms"):
        runs(certifiers=[Linear(torch.zeros(1, 1), torch.zeros(1))])


def test_a_model_with_a_detector_is_not_covered():
    model, x, y = guarded(4)
    found = certify_inputs("lipschitz", model, torch.cat([x, x - 0.2]), torch.cat([y, y]), "l2:0.01")
    assert found.status.tolist() == ["unsupported"] * 8
    assert {*found.reason.tolist()} == {"it has a detector, of which nothing is proved"}
    wrong = certify_inputs("lipschitz", model, x + torch.tensor([0.1, 0, 0]), y, "l2:0.01")
    assert wrong.status.tolist() == ["wrong"] * 4
    assert wrong.clean.tolist() == [REJECTED] * 4
