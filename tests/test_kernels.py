"""Gradients of images against the ones that torch takes."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustbench_lite import kernels
from robustbench_lite.ascent import input_gradient
from robustbench_lite.defended import Defended, ask


def both(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value and gradient without and with our kernels."""
    answers = []
    for model in (lambda at: layer(at), lambda at: ask(Defended(layer), at, 256, differentiable=True)):
        at = x.clone().requires_grad_()
        value = model(at)
        way = torch.linspace(-1, 2, value.numel(), dtype=x.dtype).view_as(value)
        answers += [value.detach(), torch.autograd.grad((value * way).sum(), at)[0]]
    return answers[0], answers[1], answers[2], answers[3]


CONVOLUTIONS = {
    "grey": (nn.Conv2d(1, 5, 4, stride=2, padding=1), (1, 9, 8)),
    "colour": (nn.Conv2d(3, 4, 3, bias=False), (3, 7, 7)),
    "dilated": (nn.Conv2d(2, 4, 3, stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (2, 8, 9)),
    "leftover": (nn.Conv2d(1, 3, 3, stride=3), (1, 10, 11)),  # a stride that leaves the last pixels unread
    "same": (nn.Conv2d(1, 3, 3, padding="same"), (1, 6, 6)),
    "reflect": (nn.Conv2d(1, 3, 3, padding=1, padding_mode="reflect"), (1, 6, 6)),
    "groups": (nn.Conv2d(2, 4, 3, groups=2), (2, 6, 6)),
    "deep": (nn.Conv2d(4, 4, 3), (4, 6, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_same_value_and_gradient_as_torch(name: str, dtype: torch.dtype) -> None:
    layer, shape = CONVOLUTIONS[name]
    layer = nn.Sequential(deepcopy(layer), nn.Flatten()).to(dtype).requires_grad_(False)
    x = torch.rand(20, *shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    value, gradient, ours, our_gradient = both(layer, x)
    assert torch.equal(ours, value)
    assert torch.allclose(our_gradient, gradient, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize(
    ("name", "taken"), [("grey", True), ("colour", True), ("dilated", True), ("groups", False), ("deep", False)]
)
def test_only_convolutions_of_images_are_taken(name: str, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = CONVOLUTIONS[name]
    folded = []
    fold = F.fold
    monkeypatch.setattr(kernels.F, "fold", lambda *args: folded.append(1) or fold(*args))
    both(nn.Sequential(layer, nn.Flatten()).requires_grad_(False), torch.rand(2, *shape))
    assert bool(folded) == taken


def test_the_step_of_a_training_attack_is_the_one_that_torch_gives() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten())  # its weights want gradients
    x = torch.rand(3, 1, 5, 5)
    gradient = input_gradient(model, lambda logits: logits.square().sum(1))(x)
    at = x.clone().requires_grad_()
    model(at).square().sum().backward()
    torch.testing.assert_close(gradient, at.grad)


def test_a_gradient_can_be_differentiated_again() -> None:
    layer = nn.Conv2d(1, 3, 3, dtype=torch.float64).requires_grad_(False)

    def answer(x: torch.Tensor) -> torch.Tensor:
        with kernels.ImageGradients():
            return layer(x).square()

    x = torch.rand(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(answer, x)
