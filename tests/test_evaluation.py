"""The judge: no attack raises its score but by a point that the model, asked again, gets wrong."""

import copy
import weakref
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import Bench, evaluate
from robustbench_lite.outcome import BROKEN, COLUMNS, HELD, SKIPPED, UNKNOWN, WRONG, Outcome
from robustbench_lite.registry import make
from robustbench_lite.threat import ThreatModel, find_norm
from tests.nets import Linear, Scripted, halfspace

DISTANCE = 0.4
HALF = halfspace("l2", DISTANCE)
FAR = HALF.across(HALF.x, 1.2 * DISTANCE)  # the other side, 0.48 away
EPS = 0.3  # nothing honest reaches the other side
OUTSIDE = "the attack returned a point outside the threat model"
FORGOTTEN = "what the attack found did not hold when the model was asked again"
NON_FINITE = "the model answered the attack with NaN or infinite logits"


def assert_same(one: Outcome, other: Outcome) -> None:
    for field in fields(Outcome):
        if field.name != "seconds":
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


def fill(problem, value):
    problem.x.copy_(value)
    return problem.x


def spoil_goal(problem):
    problem.goal.labels.copy_(1 - problem.goal.labels)
    problem.labels(problem.x)
    return problem.x


def spoil_goal_in_a_loss(problem):
    def loss(goal, logits):
        goal.labels.copy_(1 - goal.labels)
        return goal.margin(logits)

    problem.gradient(problem.x, loss)
    return problem.x


def widen(problem):
    problem.threat = replace(problem.threat, eps=9.0)
    problem.labels(FAR)
    return FAR


def widen_quietly(problem):
    clean = problem.x
    widen(problem)
    return clean


def overwrite_what_it_found(problem):
    problem.best.copy_(FAR), problem.distance.zero_(), problem.forwards.zero_()
    return problem.x


def raises(problem):
    raise RuntimeError("out of\n  luck")


CHEATS = {
    "outside the ball": (lambda problem: FAR, UNKNOWN, OUTSIDE),
    "far outside": (lambda problem: problem.x + 1e30, UNKNOWN, OUTSIDE),
    "one value is NaN": (lambda problem: problem.x.index_fill(3, torch.tensor([4]), torch.nan), UNKNOWN, OUTSIDE),
    "infinite": (lambda problem: problem.x / 0, UNKNOWN, OUTSIDE),
    "one input too few": (
        lambda p: p.x[1:],
        UNKNOWN,
        "error: the attack returned (19, 1, 10, 10) for a batch",
    ),
    "another shape": (lambda problem: problem.x.flatten(1), UNKNOWN, "error: the attack returned (20, 100)"),
    "None": (lambda problem: None, UNKNOWN, "error: the attack returned NoneType"),
    "an array": (lambda problem: problem.x.numpy(), UNKNOWN, "error: the attack returned ndarray"),
    "raises": (raises, UNKNOWN, "error: RuntimeError: out of luck"),
    "moves the clean input": (lambda problem: fill(problem, FAR), UNKNOWN, OUTSIDE),
    "moves the clean input a little": (
        lambda problem: fill(problem, HALF.across(problem.x, 0.2)) + (FAR - HALF.x) / 2,
        UNKNOWN,
        OUTSIDE,
    ),
    "moves the clean input of a view": (lambda problem: fill(problem[problem.open], FAR), UNKNOWN, OUTSIDE),
    "turns the labels": (spoil_goal, HELD, ""),
    "turns the labels in a loss": (spoil_goal_in_a_loss, HELD, ""),
    "widens eps": (widen, UNKNOWN, OUTSIDE),
    "widens eps and returns the clean input": (widen_quietly, HELD, ""),
    "writes to the ledger's answers": (overwrite_what_it_found, HELD, ""),
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheating_gains_nothing(name):
    call, status, reason = CHEATS[name]
    x, y = HALF.x.clone(), HALF.y.clone()
    outcome = evaluate(Scripted(call), HALF.model, x, y, ThreatModel(find_norm("l2"), EPS))
    assert set(outcome.status) == {status}
    assert all(found.startswith(reason) and bool(found) == bool(reason) for found in outcome.reason)
    np.testing.assert_array_equal(outcome.adversarial, y if status == HELD else -1)
    assert np.isnan(outcome.distance).all()
    assert not len(outcome.images)
    assert x.equal(HALF.x)
    assert y.equal(HALF.y)


def test_points_beyond_the_pixel_range_are_not_counted():
    """The boundary lies at -0.1, within eps but where no picture can go."""
    model = Linear(torch.tensor([[10.0, 0], [-10.0, 0]]), torch.tensor([1.0, -1.0]))
    x, y = torch.full((20, 2), 0.1), torch.zeros(20, dtype=torch.long)
    beyond = x - torch.tensor([0.25, 0])
    assert (model(beyond).argmax(1) == 1).all()
    returned = evaluate(Scripted(lambda problem: beyond), model, x, y, "linf:0.3")
    assert set(returned.reason) == {OUTSIDE}

    def asks(problem):
        problem.labels(beyond)
        return problem.x

    assert set(evaluate(Scripted(asks), model, x, y, "linf:0.3").status) == {HELD}


@pytest.mark.parametrize(
    ("overshoot", "border", "status", "reason"),
    [(1e-3, 0.9, UNKNOWN, OUTSIDE), (1e-7, 0.9, BROKEN, ""), (1e-6, 1 + 1e-6, HELD, ""), (-1e-4, 0.9, BROKEN, "")],
)
def test_a_point_beyond_eps_is_judged_within(overshoot, border, status, reason):
    """Where the border lies is told in multiples of eps."""
    half = halfspace("l2", EPS * border, dtype=torch.float64)
    point = half.across(half.x, EPS + overshoot)
    outcome = evaluate(Scripted(lambda problem: point), half.model, half.x, half.y, f"l2:{EPS}")
    assert set(outcome.status) == {status}
    assert set(outcome.reason) == {reason}
    if status == BROKEN:
        assert (outcome.distance <= EPS * (1 + 1e-12)).all()
        assert (outcome.distance >= min(EPS, EPS + overshoot) - 1e-8).all()


def test_a_hit_counts_whatever_is_returned_or_raised():
    half = halfspace("l2", 0.1)
    hit = half.across(half.x, 0.2)

    def ask_then(answer):
        def call(problem):
            problem.labels(hit)
            return answer(problem)

        return evaluate(Scripted(call), half.model, half.x, half.y, f"l2:{EPS}")

    for answer in (lambda problem: problem.x, raises, lambda problem: None, lambda problem: problem.x + 9):
        outcome = ask_then(answer)
        assert set(outcome.status) == {BROKEN}
        assert set(outcome.reason) == {""}
        np.testing.assert_array_equal(outcome.adversarial, 1 - half.y)
        np.testing.assert_allclose(outcome.distance, 0.2, atol=1e-5)
        np.testing.assert_allclose(outcome.images, hit[:16].detach(), atol=1e-6)
    nearer = half.across(half.x, 0.15)
    np.testing.assert_allclose(ask_then(lambda problem: nearer).distance, 0.15, atol=1e-5)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda problem: problem.x, "no luck"),
        (lambda problem: problem.x + 9, "no luck"),
        (raises, "error: RuntimeError: out of luck"),
    ],
)
def test_an_input_that_was_given_up_is_unknown_unless_something_was_found(answer, reason):
    half = halfspace("l2", 0.1)
    hit = half.across(half.x, 0.2)

    def attack(problem):
        problem[torch.arange(5)].labels(hit[:5])
        problem.give_up(torch.arange(20) < 10, "no luck")
        return answer(problem)

    outcome = evaluate(Scripted(attack), half.model, half.x, half.y, f"l2:{EPS}")
    assert outcome.status.tolist()[:10] == [BROKEN] * 5 + [UNKNOWN] * 5
    assert outcome.reason.tolist()[:10] == [""] * 5 + [reason] * 5
    assert "no luck" not in outcome.reason[10:]


def test_an_error_costs_its_own_chunk_alone():
    half = halfspace("l2", 0.1, count=250)
    near = torch.arange(250) % 3 == 0
    goal = torch.where(near.view(-1, 1, 1, 1), half.across(half.x, 0.2), half.x)

    def sound(problem):
        return goal[problem.noise.rows]

    def fails(problem):
        if (problem.noise.rows == 150).any():
            raise RuntimeError("row 150")
        return sound(problem)

    runs = [evaluate(Scripted(call), half.model, half.x, half.y, "l2:0.3", batch=300) for call in (sound, fails)]
    assert {BROKEN, HELD} == set(runs[0].status)
    assert_same(runs[0].part(0, 100), runs[1].part(0, 100))
    assert_same(runs[0].part(200, 250), runs[1].part(200, 250))
    failed = runs[1].part(100, 200)
    assert set(failed.status) == {UNKNOWN}
    assert set(failed.reason) == {"error: RuntimeError: row 150"}


@pytest.mark.parametrize("room", [130, 40, 0])
def test_what_does_not_fit_in_memory_is_attacked_in_halves(room: int):
    half = halfspace("linf", 0.1, count=250)
    sizes, filled = [], []

    def call(problem):
        assert not any(one() is not None for one in filled), "the error keeps what filled the memory"
        sizes.append(len(problem))
        if len(problem) > room:
            much = torch.ones(9)
            filled.append(weakref.ref(much))
            raise torch.OutOfMemoryError("injected")
        start = problem.threat.sample(problem.noise, problem.x)
        return half.across(problem.x, 0.2 * (problem.noise.rows % 3 == 0).view(-1, 1, 1, 1)) + 0 * start

    def evaluated():
        return evaluate(Scripted(call), half.model, half.x, half.y, "linf:0.3", batch=300)

    split = evaluated()
    if room:
        assert sizes == {130: [250, 125, 125], 40: [250, 125, 63, 32, 31, 32, 30, 32, 32, 32, 29]}[room]
        room = 250
        assert_same(evaluated(), split)
        assert UNKNOWN not in split.status
    else:
        assert set(split.reason) == {"error: OutOfMemoryError: injected"}


def test_what_an_attack_remembers_is_judged_anew():
    weak, robust = halfspace("l2", 0.1), halfspace("l2", DISTANCE)
    memory = []

    def remembers(problem):
        memory.append(weak.across(weak.x, 0.2) if not memory else memory[0])
        return memory[0]

    attack = Scripted(remembers)
    assert set(evaluate(attack, weak.model, weak.x, weak.y, "l2:0.3").status) == {BROKEN}
    # other inputs: the remembered points lie elsewhere; the same inputs behind a constant model: they fool nobody
    assert set(evaluate(attack, robust.model, robust.x, robust.y, "l2:0.05").status) == {UNKNOWN}
    deaf = Linear(torch.zeros(2, 100), torch.tensor([1.0, -1.0]))
    outcome = evaluate(attack, deaf, weak.x, torch.zeros_like(weak.y), "l2:0.3")
    assert set(outcome.status) == {HELD}


@pytest.mark.parametrize(("access", "spec"), [("labels", "logits"), ("labels", "gradient"), ("scores", "gradient")])
def test_more_than_was_declared_is_refused(access, spec):
    attack = Scripted(lambda problem: getattr(problem, spec)(problem.x), access=access)
    outcome = evaluate(attack, HALF.model, HALF.x, HALF.y, "l2:0.3")
    wanted = "scores" if spec == "logits" else "gradients"
    assert set(outcome.status) == {UNKNOWN}
    assert set(outcome.reason) == {
        f"error: AccessError: the attack asked for {wanted}, but declares access to {access} only"
    }
    assert not outcome.forwards.any()


class Moody(Defended):
    """Says the other label while ``lying``."""

    lying = False

    def forward(self, x, noise=None):
        return self.model(x).flip(1) if self.lying else self.model(x)


@pytest.mark.parametrize("returned", ["hit", "clean"])
def test_a_hit_that_does_not_hold_is_unknown(returned):
    model = Moody(HALF.model)

    def attack(problem):
        model.lying = True
        point = HALF.across(problem.x, 0.1)[: len(problem)]
        problem[torch.arange(10)].labels(point[:10])
        model.lying = False
        return point if returned == "hit" else problem.x

    outcome = evaluate(Scripted(attack), model, HALF.x, HALF.y, "l2:0.3")
    assert outcome.status.tolist() == [UNKNOWN] * 10 + [HELD] * 10
    assert outcome.reason.tolist() == [FORGOTTEN] * 10 + [""] * 10


def test_a_refused_point_earns_nothing_when_the_clean_input_turns():
    model = Moody(HALF.model)

    def attack(problem):
        model.lying = True
        return FAR

    outcome = evaluate(Scripted(attack), model, HALF.x, HALF.y, "l2:0.3")
    assert set(outcome.status) == {UNKNOWN}
    assert set(outcome.reason) == {OUTSIDE}


def test_a_model_that_answers_at_random_is_asked_again():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.random = torch.Generator().manual_seed(0)

        def forward(self, x):
            if x.flatten(1).eq(0.5).all():
                return torch.tensor([[1.0, 0.0]]).expand(len(x), 2) - 3
            return torch.randn(len(x), 2, generator=self.random)

    def attack(problem):
        problem.labels((problem.x + 0.01).unsqueeze(1).repeat(1, 8, 1))
        return problem.x

    x = torch.full((64, 3), 0.5)
    outcome = evaluate(Scripted(attack), Random(), x, torch.zeros(64, dtype=torch.long), "linf:0.1")
    assert UNKNOWN in outcome.status
    assert set(outcome.reason[outcome.status == UNKNOWN]) == {FORGOTTEN}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("minimises", [False, True])
def test_no_model_is_robust_by_answering_nan(value, minimises):
    class Fragile(nn.Module):
        def forward(self, x):
            return HALF.model(x) + torch.where((x - 0.5).abs().flatten(1).amax(1) > 0.45, value, 0.0).unsqueeze(1)

    def attack(problem):
        x = problem.x.clone()
        x[:, :, 0, 0] = 1.0
        return x

    outcome = evaluate(Scripted(attack, minimises=minimises), Fragile(), HALF.x, HALF.y, "l2:2")
    assert set(outcome.status) == {UNKNOWN}
    assert set(outcome.reason) == {NON_FINITE}


# Attacks that minimise


def line_search(problem):
    """Bisection along the steepest way to the other class."""
    assert problem.threat.eps == float("inf")
    gradient, _ = problem.gradient(problem.x)
    way = problem.threat.norm.steepest(gradient)
    low, high = torch.zeros(len(problem)), torch.full((len(problem),), 0.9)
    for _ in range(20):
        middle = (low + high) / 2
        hit = problem.labels((problem.x + middle.view(-1, 1, 1, 1) * way).clamp(0, 1)) != problem.goal.labels
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    return (problem.x + high.view(-1, 1, 1, 1) * way).clamp(0, 1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0", "patch"])
def test_one_run_of_a_minimising_attack_gives_the_whole_curve(norm):
    pixels = norm in ("l0", "patch")  # there, one pixel is enough
    exact = 1 if pixels else {"linf": 0.05, "l2": DISTANCE, "l1": 0.2}[norm]
    half = halfspace("l1", 0.2) if pixels else halfspace(norm, exact)
    bench = Bench(Defended(half.model), ThreatModel(find_norm(norm), 1e-3), classes=2)
    (outcome,) = bench.run(Scripted(line_search, minimises=True), half.x, half.y, torch.arange(len(half.x)))
    assert set(outcome.status) == {BROKEN}
    np.testing.assert_allclose(outcome.distance, exact, rtol=1e-3)
    assert (outcome.distance >= exact * (1 - 1e-5)).all()
    for limit in (0, 0.5 * exact, 0.998 * exact):
        short = outcome.within(limit)
        assert set(short.status) == {HELD}
        assert set(short.adversarial) == {-1}
        assert np.isnan(short.distance).all()
        assert not short.fooled.any()
        assert not len(short.images)
    for limit in (1.002 * exact, 2 * exact, np.inf):
        assert_same(outcome.within(limit), outcome)


@pytest.mark.parametrize(("eps", "status"), [(0.04, HELD), (0.06, BROKEN)])
def test_a_minimising_attack_is_judged_at_the_eps_asked_for(eps, status):
    half = halfspace("linf", 0.05)
    outcome = evaluate(Scripted(line_search, minimises=True), half.model, half.x, half.y, f"linf:{eps}")
    assert set(outcome.status) == {status}


def test_a_minimising_attack_that_returns_rubbish_proves_nothing():
    for rubbish in (torch.nan, 2.0):
        attack = Scripted(lambda problem, rubbish=rubbish: problem.x * 0 + rubbish, minimises=True)
        outcome = evaluate(attack, HALF.model, HALF.x, HALF.y, "l2:0.3")
        assert set(outcome.reason) == {OUTSIDE}
        assert set(outcome.status) == {UNKNOWN}
    nothing = Scripted(lambda problem: problem.x, minimises=True)
    assert set(evaluate(nothing, HALF.model, HALF.x, HALF.y, "l2:0.3").status) == {HELD}


# What is refused before anything runs


class Says(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


def breaks(x):
    raise TypeError("mat1 and mat2\ncannot be multiplied")


LOGITS = torch.tensor([2.0, -1.0, 0.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: LOGITS.expand(len(x), 1, 3), r"logits of shape \(20, classes\), not \(20, 1, 3\)"),
        (lambda x: LOGITS.expand(len(x), 3)[:, 0], r"logits of shape \(20, classes\), not \(20,\)"),
        (lambda x: LOGITS[:1].expand(len(x), 1), r"logits of shape \(20, classes\), not \(20, 1\)"),
        (lambda x: LOGITS.expand(len(x), 3).softmax(1), "probabilities, not logits; remove the softmax"),
        (lambda x: LOGITS.expand(len(x), 3) / (x[:, :1] != 0.75), "NaN or infinite logits, first for input 3"),
        (breaks, r"the model raises on inputs of shape \(20, 4\): TypeError: mat1 and mat2 cannot be multiplied"),
    ],
)
def test_a_model_that_gives_no_logits_is_refused(call, message):
    x = torch.full((20, 4), 0.5)
    x[3] = 0.75
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(make("attack", "fgsm"), Says(call), x, torch.zeros(20, dtype=torch.long), "linf:0.1")
    assert "\n" not in str(caught.value)


def test_nan_beyond_the_first_inputs_is_refused_too():
    x = torch.full((60, 4), 0.5)
    x[50] = 0.75
    model = Says(lambda x: LOGITS.expand(len(x), 3) / (x[:, :1] != 0.75))
    with pytest.raises(ValueError, match="NaN or infinite logits for input 150"):
        evaluate(make("attack", "fgsm"), model, x, torch.zeros(60, dtype=torch.long), "linf:0.1", first_row=100)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2]), "labels out of range: 2, but the model knows 2 classes"),
        (torch.tensor([0, 1, -1]), "labels out of range: -1 is negative"),
        (torch.tensor([0, 1]), r"3 whole numbers, one an input, not torch.int64 of shape \(2,\)"),
        (torch.tensor([0]), r"3 whole numbers, one an input, not torch.int64 of shape \(1,\)"),
        (torch.tensor([[0], [1], [1]]), r"3 whole numbers, one an input, not torch.int64 of shape \(3, 1\)"),
        (torch.tensor([0.0, 1.0, 1.0]), r"3 whole numbers, one an input, not torch.float32 of shape \(3,\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate(make("attack", "fgsm"), HALF.model, HALF.x[:3], labels, "l2:0.1")


@pytest.mark.parametrize("value", [1.1, -0.1, 255.0, torch.nan])
def test_inputs_outside_the_pixel_range_are_refused(value):
    x = HALF.x.clone()
    x[-1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"inputs must lie in \[0, 1\]"):
        evaluate(make("attack", "fgsm"), HALF.model, x, HALF.y, "l2:0.1")


def test_other_pixel_ranges_are_kept():
    half = halfspace("l2", 0.1)
    wide = Linear(half.model.weight / 255, half.model.bias)
    threat = ThreatModel(find_norm("l2"), 0.11 * 255, upper=255.0)
    outcome = evaluate(make("attack", "fgsm"), wide, half.x * 255, half.y, threat)
    assert set(outcome.status) == {BROKEN}
    np.testing.assert_allclose(outcome.distance, 0.11 * 255, rtol=1e-4)


def test_no_inputs_no_norm_no_target():
    with pytest.raises(ValueError, match="there are no inputs"):
        evaluate(make("attack", "fgsm"), HALF.model, HALF.x[:0], HALF.y[:0], "l2:0.1")
    with pytest.raises(ValueError, match="fgsm does not run under l0; it knows l1, l2, linf"):
        evaluate(make("attack", "fgsm"), HALF.model, HALF.x, HALF.y, "l0:3")
    for target in (2, -1):
        with pytest.raises(ValueError, match=f"target {target} is no class; the model knows 0 to 1"):
            evaluate(make("attack", "fgsm"), HALF.model, HALF.x, HALF.y, "l2:0.1", target=target)


@pytest.mark.parametrize("end", ["well", "in an error"])
def test_the_model_is_given_back_as_it_was(end):
    seen = []
    net = nn.Sequential(nn.Flatten(), nn.Linear(100, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    net.train()
    net[2].eval()
    net[1].requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]

    def attack(problem):
        seen.append((any(module.training for module in net.modules()), any(p.requires_grad for p in net.parameters())))
        x = problem.x.requires_grad_()
        problem.logits(x).sum().backward()
        return x

    y = copy.deepcopy(net).eval()(HALF.x).argmax(1)
    if end == "well":
        evaluate(Scripted(attack), net, HALF.x, y, "l2:0.1")
        assert seen == [(False, False)]
    else:
        with pytest.raises(ValueError, match="out of range"):
            evaluate(Scripted(attack), net, HALF.x, y + 2, "l2:0.1")
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == [False] * 2 + [True] * 4
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# What is kept


def broken_but_for(wrong: list[int], **settings) -> tuple[Outcome, torch.Tensor]:
    half = halfspace("l2", 0.1, count=250)
    y = half.y.clone()
    y[wrong] = 1 - y[wrong]
    return evaluate(make("attack", "fgsm"), half.model, half.x, y, "l2:0.2", **settings), half


@pytest.mark.parametrize("batch", [16, 100, 256])
def test_every_chunk_keeps_its_first_broken_images(batch):
    outcome, half = broken_but_for([0, 5, 249], batch=batch)
    assert outcome.imaged.tolist() == [*range(1, 5), *range(6, 18), *range(100, 116), *range(200, 216)]
    assert outcome.images.shape == (48, 1, 10, 10)
    assert outcome.images.dtype == np.float32
    with torch.no_grad():
        labels = half.model(torch.from_numpy(outcome.images)).argmax(1)
    np.testing.assert_array_equal(labels, outcome.adversarial[outcome.imaged])
    size = np.linalg.norm((outcome.images - half.x.numpy()[outcome.imaged]).reshape(48, -1), axis=1)
    np.testing.assert_allclose(size, outcome.distance[outcome.imaged], rtol=1e-5)


def test_all_images_are_kept_when_asked():
    outcome, _ = broken_but_for([0, 5, 249], keep_all=True)
    assert outcome.imaged.tolist() == [row for row in range(250) if row not in (0, 5, 249)]


def test_inputs_that_are_wrong_when_clean_are_not_attacked():
    outcome, half = broken_but_for([0, 5, 249])
    wrong = np.isin(outcome.row, [0, 5, 249])
    np.testing.assert_array_equal(outcome.status, np.where(wrong, WRONG, BROKEN))
    np.testing.assert_array_equal(outcome.clean, half.y)
    assert not outcome.forwards[wrong].any()
    assert set(outcome.adversarial[wrong]) == {-1}


def test_targets_that_are_the_label_are_skipped():
    half = halfspace("l2", 0.1)
    y = half.y.clone()
    y[:2] = 1 - y[:2]
    outcome = evaluate(make("attack", "fgsm"), half.model, half.x, y, "l2:0.2", target=1)
    assert outcome.status.tolist() == [WRONG] * 2 + [BROKEN, SKIPPED] * 9
    np.testing.assert_array_equal(outcome.adversarial, [-1] * 2 + [1, -1] * 9)
    np.testing.assert_array_equal(outcome.fooled, outcome.status == BROKEN)


def test_a_missed_target_may_still_fool():
    """Class 2 lies on the way to class 1, which is out of reach."""
    model = Linear(torch.tensor([[-1.0], [2.0], [1.0]]), torch.tensor([1.0, -1.3, 0.0]))
    x, y = torch.full((20, 1), 0.4), torch.zeros(20, dtype=torch.long)
    outcome = evaluate(make("attack", "fgsm"), model, x, y, "linf:0.2", target=1)
    assert set(outcome.status) == {HELD}
    assert set(outcome.adversarial) == {2}
    assert outcome.fooled.all()


def test_parts_join_in_any_order_to_the_whole():
    outcome, _ = broken_but_for([0, 5, 249])
    parts = [outcome.part(start, start + 100) for start in (100, 200, 0)]
    assert [len(part) for part in parts] == [100, 50, 100]
    assert parts[1].imaged.tolist() == list(range(200, 216))
    assert_same(Outcome.join(parts), outcome)
    np.testing.assert_array_equal(Outcome.join(parts).seconds, outcome.seconds)


def test_a_frame_has_a_row_an_input():
    outcome, _ = broken_but_for([0, 5, 249])
    frame = outcome.to_frame()
    assert tuple(frame.columns) == COLUMNS
    assert "images" not in COLUMNS
    assert len(frame) == 250
    whole = {"row", "label", "clean", "adversarial", "forwards", "backwards"}
    real, text = {"distance", "share", "seconds"}, {"status", "reason"}
    assert {name for name in COLUMNS if frame[name].dtype == np.int64} == whole
    assert {name for name in COLUMNS if frame[name].dtype == np.float64} == real
    assert set(COLUMNS) - whole - real == text
    assert frame["status"].value_counts().to_dict() == {BROKEN: 247, WRONG: 3}
    assert frame["distance"].isna().sum() == 3
    assert (frame["seconds"] > 0).all()
