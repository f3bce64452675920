"""The door to the model: what is sent, what it costs, and what is remembered."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate, frozen
from robustbench_lite.noise import Noise
from robustbench_lite.norms import NORMS, linf
from robustbench_lite.outcome import BROKEN
from robustbench_lite.problem import AccessError, Budget, Problem
from robustbench_lite.registry import make
from robustbench_lite.threat import Goal, ThreatModel
from tests.nets import Linear

COUNT = 5
CLEAN = torch.full((COUNT, 4), 0.5)
BORDER = 0.1  # class 1 begins where the first coordinate reaches 0.5 + BORDER


class Recorder(Linear):
    """Says 1 where the first coordinate passes the border, and keeps all that it was asked about."""

    def __init__(self) -> None:
        super().__init__(torch.tensor([[-1.0, 0, 0, 0], [1.0, 0, 0, 0]]), torch.tensor([0.5 + BORDER, -0.5 - BORDER]))
        self.asked: list[torch.Tensor] = []

    def forward(self, x):
        self.asked.append(x.detach().clone())
        return super().forward(x)


@pytest.fixture
def model():
    recorder = Recorder()
    with frozen(recorder):
        yield recorder


def problem(model, eps=0.2, goal=None, norm="linf", **settings):
    defended = model if isinstance(model, Defended) else Defended(model).eval()
    goal = goal or Goal(torch.zeros(COUNT, dtype=torch.long))
    threat = ThreatModel(NORMS[norm], eps)
    return Problem(defended, CLEAN.clone(), goal, threat, Noise(0, torch.arange(COUNT)), classes=2, **settings)


def moved(*by):
    """The clean inputs, each with its first coordinate moved by as much."""
    x = CLEAN.clone()
    x[:, 0] += torch.tensor(by)
    return x


MISS = moved(0, 0.01, 0.02, 0.03, 0.04)


def test_answers_of_every_shape(model):
    asked = problem(model)
    torch.testing.assert_close(asked.logits(MISS), model(MISS))
    assert asked.labels(MISS).tolist() == [0] * 5
    many = torch.stack([MISS, MISS + 0.001, MISS - 0.001], 1)
    torch.testing.assert_close(asked.logits(many), model(many.flatten(0, 1)).view(5, 3, 2))
    assert asked.labels(many).shape == (5, 3)
    assert asked.forwards.tolist() == [8] * 5
    assert not asked.backwards.any()


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (5,), (5, 2, 3), (3, 2, 4), (5, 1, 1, 4)], ids=str)
def test_a_wrong_shape_is_named(model, shape):
    with pytest.raises((ValueError, IndexError)):
        problem(model).labels(torch.zeros(shape))


def test_solved_inputs_are_closed(model):
    asked = problem(model)
    asked.labels(moved(0.15, 0, 0.25, 0, -0.15))
    assert asked.open.tolist() == [False, True, True, True, True]  # the third hit lies beyond eps
    model.asked.clear()
    probe = MISS + torch.arange(5).view(5, 1) / 1000
    assert asked.labels(probe).tolist() == [-1, 0, 0, 0, 0]
    assert asked.logits(probe).isnan().any(1).tolist() == [True, False, False, False, False]
    assert not (torch.cat(model.asked) == probe[0]).all(1).any()
    assert (torch.cat(model.asked) == probe[1]).all(1).any()
    assert asked.forwards.tolist() == [1, 3, 3, 3, 3]


def test_an_attack_that_minimises_goes_on(model):
    asked = problem(model, eps=float("inf"), minimises=True)
    asked.labels(moved(*[0.15] * 5))
    assert asked.open.all()
    asked.labels(moved(0.12, 0.2, 0.05, 0.14, 0.16))
    torch.testing.assert_close(asked.distance, torch.tensor([0.12, 0.15, 0.15, 0.14, 0.15]))


def test_a_spent_input_is_closed(model):
    asked = problem(model, budget=Budget(3))
    for _ in range(2):
        asked.labels(MISS)
    assert asked.open.all()
    asked[torch.tensor([True, False, True, False, False])].labels(MISS[[0, 2]])
    assert asked.open.tolist() == [False, True, False, True, True]
    model.asked.clear()
    assert asked.labels(MISS).tolist() == [-1, 0, -1, 0, 0]
    assert asked.logits(MISS).isnan().all()
    assert asked.forwards.tolist() == [3] * 5
    assert len(model.asked) == 1


def test_an_input_that_is_given_up_is_closed(model):
    asked = problem(model, eps=float("inf"), minimises=True)
    part = asked[torch.tensor([1, 3])]
    part.give_up(torch.tensor([False, True]), "no luck")
    assert part.reasons == ["", "no luck"]
    assert asked.reasons == ["", "", "", "no luck", ""]
    assert asked.open.tolist() == [True, True, True, False, True]
    assert asked.labels(MISS).tolist() == [0, 0, 0, -1, 0]
    assert asked.forwards.tolist() == [1, 1, 1, 0, 1]


def test_candidates_are_sent_until_the_budget_is_spent(model):
    asked = problem(model, budget=Budget(4))
    asked[torch.tensor([0])].labels(MISS[:1].unsqueeze(1).repeat(1, 3, 1))
    x = moved(*[0.0] * 5).unsqueeze(1).repeat(1, 6, 1)
    x[:, :, 0] += torch.arange(6) / 1000
    x[1, 4, 0] = 0.7  # a hit, but after the budget is spent
    x[2, 3, 0] = 0.7  # the last that is sent
    labels = asked.labels(x)
    assert labels.tolist() == [[0] + [-1] * 5, [0] * 4 + [-1] * 2, [0] * 3 + [1] + [-1] * 2, *[[0] * 4 + [-1] * 2] * 2]
    assert asked.forwards.tolist() == [4] * 5
    assert asked.distance.isfinite().tolist() == [False, False, True, False, False]
    assert not asked.open.any()


def test_a_view_shares_the_ledger(model):
    asked = problem(model)
    mask = torch.tensor([False, True, False, True, True])
    part = asked[mask]
    assert len(part) == 3
    assert part.noise.rows.tolist() == [1, 3, 4]
    nested = part[torch.tensor([2, 0])]  # inputs 4 and 1
    nested.labels(moved(0.12, 0.15, 0, 0, 0)[:2])
    torch.testing.assert_close(asked.distance, torch.tensor([torch.inf, 0.15, torch.inf, torch.inf, 0.12]))
    assert asked.forwards.tolist() == [0, 1, 0, 0, 1]
    assert part.open.tolist() == [False, True, False]
    torch.testing.assert_close(part.best[2], moved(0.12, 0, 0, 0, 0)[0])
    torch.testing.assert_close(asked.best[0], CLEAN[0])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("seed", range(3))
def test_the_ledger_keeps_the_nearest_hit(model, norm, seed):
    asked = problem(model, eps=1e-3 if norm != "l0" else 0, norm=norm)
    random = torch.Generator().manual_seed(seed)
    queries = [(CLEAN.unsqueeze(1) + 0.4 * torch.randn(5, k, 4, generator=random)).clamp(0, 1) for k in (20, 1, 7)]
    queries[1][:, :, 1:] = 0.5
    queries.append(queries[0][:, [3, 3, 4]])  # equal hits
    for query in queries:
        asked.labels(query)
    everything = torch.cat(queries, 1)
    distance = NORMS[norm].size((everything - CLEAN.unsqueeze(1)).flatten(0, 1)).view(5, -1)
    distance[everything[:, :, 0] <= 0.5 + BORDER] = torch.inf
    torch.testing.assert_close(asked.distance, distance.amin(1))
    found = asked.distance.isfinite()
    assert found.any()
    torch.testing.assert_close(NORMS[norm].size(asked.best - CLEAN)[found], distance.amin(1)[found])
    assert (model(asked.best).argmax(1) == 1).equal(found)


def test_targeted_hits_are_the_target_alone():
    model = Linear(torch.tensor([[0.0, 0, 0, 0], [9.0, 0, 0, 0], [-9.0, 0, 0, 0]]), torch.tensor([0, -5.0, 4.0]))
    goal = Goal(torch.tensor([1, 2, 1, 2, 1]), targeted=True)
    asked = Problem(
        Defended(model), CLEAN, goal, ThreatModel(linf, 0.2), Noise(0, torch.arange(5)), classes=3, access="labels"
    )
    assert asked.labels(moved(0.15, 0.15, -0.15, -0.15, 0)).tolist() == [1, 1, 2, 2, 0]
    assert asked.distance.isfinite().tolist() == [True, False, False, True, False]


def test_hits_outside_the_pixel_range_are_not_kept(model):
    asked = problem(model, eps=1.0)
    x = moved(*[0.3] * 5)
    x[0, 3], x[1, 3], x[2, 3], x[3, 3] = 1.1, -0.1, torch.nan, 1 + 1e-4
    asked.labels(x)
    assert asked.distance.isfinite().tolist() == [False, False, False, False, True]


def test_what_was_found_is_a_copy(model):
    asked = problem(model)
    x = moved(*[0.15] * 5)
    asked.labels(x)
    x.zero_()
    asked.best.zero_(), asked.distance.zero_(), asked.forwards.zero_()
    torch.testing.assert_close(asked.best, moved(*[0.15] * 5))
    assert asked.forwards.tolist() == [1] * 5


def test_an_attacks_copies_are_its_own(model):
    labels = torch.zeros(5, dtype=torch.long)
    asked = problem(model, goal=Goal(labels))
    asked.x.fill_(0.9)
    asked.goal.labels.fill_(1)
    asked.threat = ThreatModel(linf, 1.0)
    assert not labels.any()
    asked.labels(moved(0.15, 0.15, 0.3, 0.3, 0))
    torch.testing.assert_close(asked.distance, torch.tensor([0.15, 0.15, 0.3, 0.3, torch.inf]))
    assert asked.open.tolist() == [False, False, True, True, True]

    def spoils(goal, logits):
        goal.labels.fill_(1)
        return logits.sum(1)

    asked.gradient(MISS, spoils)
    asked.labels(moved(*[0.12] * 5))
    assert not asked.open.any()


def test_gradient_costs_a_forward_and_a_backward(model):
    asked = problem(model)
    gradient, logits = asked.gradient(MISS)
    assert asked.forwards.tolist() == asked.backwards.tolist() == [1] * 5
    torch.testing.assert_close(logits, model(MISS))
    assert not logits.requires_grad
    odds = torch.softmax(logits, 1)[:, 1]
    torch.testing.assert_close(gradient[:, 0], 2 * odds)
    assert not gradient[:, 1:].any()
    margin, _ = asked.gradient(MISS, Goal.margin)
    torch.testing.assert_close(margin[:, 0], torch.full((5,), 2.0))
    with torch.no_grad():
        asked.gradient(MISS)
    assert asked.backwards.tolist() == [3] * 5


def test_closed_inputs_have_a_gradient_of_zero(model):
    asked = problem(model)
    asked.labels(moved(0.15, 0, 0, 0.15, 0))
    gradient, logits = asked.gradient(MISS)
    assert gradient.isfinite().all()
    assert gradient.any(1).tolist() == [False, True, True, False, True]
    assert logits.isnan().any(1).tolist() == [True, False, False, True, False]
    assert asked.backwards.tolist() == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("closes", ["solved", "spent"])
def test_a_gradient_is_zero_when_all_are_closed(model, closes):
    asked = problem(model, budget=Budget(1))
    asked.labels(moved(*[0.15 if closes == "solved" else 0] * 5))
    gradient, logits = asked.gradient(MISS)
    assert not gradient.any()
    assert logits.shape == (5, 2)
    assert logits.isnan().all()
    assert asked.forwards.tolist() == [1] * 5
    assert not asked.backwards.any()
    none = asked[asked.open]
    assert len(none) == 0
    assert none.labels(MISS[:0]).shape == (0,)
    assert none.gradient(MISS[:0])[0].shape == (0, 4)


def test_an_attacks_own_autograd_is_counted(model):
    asked = problem(model)
    x = MISS.unsqueeze(1).repeat(1, 3, 1).requires_grad_()
    logits = asked.logits(x)
    for times in (1, 2):
        (gradient,) = torch.autograd.grad(logits[..., 1].sum(), x, retain_graph=True)
        assert asked.backwards.tolist() == [3 * times] * 5
    torch.testing.assert_close(gradient[..., 0], torch.ones(5, 3))
    x = MISS.clone().requires_grad_()
    asked.logits(x).sum().backward()
    assert asked.backwards.tolist() == [7] * 5
    assert asked.forwards.tolist() == [4] * 5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_access_is_what_was_declared(model):
    with pytest.raises(AccessError, match="asked for gradients, but declares access to scores"):
        problem(model, access="scores").gradient(MISS)
    with pytest.raises(AccessError, match="asked for scores, but declares access to labels"):
        problem(model, access="labels").logits(MISS)
    scores = problem(model, access="scores").logits(MISS.clone().requires_grad_())
    assert not scores.requires_grad
    assert problem(model, access="labels").labels(MISS).tolist() == [0] * 5
    assert not problem(model).logits(MISS).requires_grad


class Stepped(Defended):
    """Rounds its input to tenths; its stand-in does not."""

    def forward(self, x, noise=None):
        return self.model((x * 10).round() / 10)

    def surrogate(self, x, noise=None):
        return self.model(x)


def test_a_surrogate_gives_its_gradient_and_the_value_of_the_defense(model):
    asked = problem(Stepped(model))
    x = moved(0.04, 0.06, 0.01, 0.14, -0.04)
    gradient, logits = asked.gradient(x, Goal.margin)
    torch.testing.assert_close(logits, model((x * 10).round() / 10), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient[:, 0], torch.full((5,), 2.0))
    assert torch.equal(logits, problem(Stepped(model)).logits(x))


def test_pieces_change_no_answer():
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2)).eval()
    x = torch.rand(5, 40, 4, generator=torch.Generator().manual_seed(0))
    answers = [problem(net, eps=0.0, access="scores", batch=batch).logits(x) for batch in (1, 16, 50, 4096)]
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@pytest.mark.parametrize("norm", NORMS)
def test_an_infinite_eps_binds_nothing(norm):
    threat = ThreatModel(NORMS[norm], float("inf"))
    random = torch.Generator().manual_seed(0)
    clean = torch.rand(6, 2, 5, 5, generator=random)
    x = torch.rand(clean.shape, generator=random)
    torch.testing.assert_close(threat.project(x, clean), x)
    torch.testing.assert_close(threat.project_strictly(x, clean), x)
    assert threat.allows(x, clean).all()
    assert threat.project(x + 1, clean).amax() <= 1 + 1e-6
    assert not threat.allows(x + 1, clean).any()


class Looks(TorchDispatchMode):
    """Counts what a device would be waited for."""

    LOOK = {torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense, torch.ops.aten.masked_select}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += by_mask or func.overloadpacket in self.LOOK
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "spec", ["pgd:steps=40", "pgd:steps=12,restarts=3", "mi-fgsm:steps=25", "apgd:steps=30", "cw-linf"]
)
def test_where_to_look_is_to_wait_the_same_is_found_and_charged(spec, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.rand(200, 4)
    here = evaluate(spec, net, x, net(x).argmax(1), "linf:0.1")
    assert 20 < (here.status == BROKEN).sum() < 180
    monkeypatch.setattr("robustbench_lite.problem.waits", lambda device: True)
    there = evaluate(spec, net, x, net(x).argmax(1), "linf:0.1")
    for name in set(here.columns()) - {"seconds"}:
        np.testing.assert_array_equal(getattr(here, name), getattr(there, name), name)


def test_no_step_waits_for_a_device(monkeypatch):
    monkeypatch.setattr("robustbench_lite.problem.waits", lambda device: True)
    torch.manual_seed(0)
    net = Defended(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).eval())
    x = torch.rand(200, 4)
    asked = Problem(
        net, x, Goal(net(x).argmax(1)), ThreatModel(linf, 0.1), Noise(0, torch.arange(200)), classes=3, batch=200
    )
    with frozen(net), Looks() as looks:
        make("attack", "pgd:steps=40")(asked)
    assert looks.count == 5  # of 41 queries
    assert 20 < asked.distance.isfinite().sum() < 180


def test_where_to_look_is_to_wait_parts_and_candidates_are_asked_about_too(model, monkeypatch):
    monkeypatch.setattr("robustbench_lite.problem.waits", lambda device: True)
    asked, some = problem(model), torch.tensor([False, True, False, True, True])
    many = torch.stack([MISS, MISS + 0.001, MISS - 0.001], 1)
    for _ in range(2):
        torch.testing.assert_close(asked.gradient(MISS)[1], model(MISS))
        torch.testing.assert_close(asked.logits(many), model(many.flatten(0, 1)).view(5, 3, 2))
        torch.testing.assert_close(asked[some].gradient(MISS[some])[1], model(MISS[some]))


class Metered(Defended):
    access = "labels"


@pytest.mark.parametrize(("metered", "budget", "queries"), [(Metered, Budget(), 5), (Defended, Budget(3), 3)])
def test_what_is_metered_is_not_asked_once_too_often(model, metered, budget, queries, monkeypatch):
    monkeypatch.setattr("robustbench_lite.problem.waits", lambda device: True)
    asked = problem(metered(model).eval(), budget=budget, access="labels")
    for _ in range(5):
        asked.labels(moved(0.15, 0, 0, 0, 0))
    assert [bool((x[:, 0] > 0.6).any()) for x in model.asked] == [True, *[False] * (queries - 1)]
