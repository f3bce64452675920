"""The random step of r-fgsm, worked out by hand."""

import pytest
import torch

from robustbench_lite.attacks.r_fgsm import RFGSM
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import frozen
from robustbench_lite.noise import Noise
from robustbench_lite.norms import NORMS
from robustbench_lite.problem import Problem
from robustbench_lite.registry import make
from robustbench_lite.threat import Goal, ThreatModel, find_norm
from tests.nets import convolutional

EPS = {"linf": 0.1, "l2": 0.5, "l1": 0.4}


def problem(norm: str, low: float = 0.3, high: float = 0.7) -> Problem:
    net, x, y = convolutional(16, low=low, high=high)
    threat = ThreatModel(find_norm(norm), EPS[norm])
    return Problem(Defended(net), x, Goal(y), threat, Noise(0, torch.arange(16)), classes=4)


def test_two_sign_steps_as_in_the_paper():
    here = problem("linf")
    with frozen(here._model):
        found = RFGSM(share=0.25)(here)
        start = here.x + 0.025 * here.noise.normal(here.x).sign()
        start.requires_grad_()
        loss = torch.nn.functional.cross_entropy(here._model(start), here.goal.labels, reduction="sum")
        expected = start + 0.075 * torch.autograd.grad(loss, start)[0].sign()
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)
    sizes = ((found - here.x).abs() / 0.1)[expected != start]
    assert torch.minimum((sizes - 1).abs(), (sizes - 0.5).abs()).max() < 1e-4  # with or against the random step


@pytest.mark.parametrize("norm", EPS)
def test_the_random_step_takes_its_share_of_eps(norm):
    here = problem(norm)
    asked = []
    here.gradient = lambda x: (asked.append(x), (torch.zeros_like(x), None))[1]
    found = RFGSM(share=0.5)(here)
    torch.testing.assert_close(found, asked[0])
    torch.testing.assert_close(NORMS[norm].size(asked[0] - here.x), torch.full((16,), EPS[norm] / 2))
    assert len(torch.unique((asked[0] - here.x).flatten(1).sign(), dim=0)) >= 10


@pytest.mark.parametrize("norm", EPS)
def test_no_random_step_is_fgsm(norm):
    with frozen(problem(norm)._model):
        torch.testing.assert_close(RFGSM(share=0)(problem(norm)), make("attack", "fgsm")(problem(norm)))


@pytest.mark.parametrize("share", ["1", "-0.1"])
def test_refuses_shares_that_make_no_sense(share):
    with pytest.raises(ValueError, match="share must be"):
        make("attack", f"r-fgsm:share={share}")
