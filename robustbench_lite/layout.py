"""How a model lies in memory while it is attacked: another layout gives the same answers but for the last bits."""

import copy
from contextlib import suppress
from typing import Literal

import torch
from torch import Tensor
from torch.fx.experimental.optimization import fuse

from robustbench_lite.defended import Defended
from robustbench_lite.noise import Noise
from robustbench_lite.wording import one_line

Layout = Literal["as-built", "channels-last"]
FAR = 1e-3  # of the largest logit: no two layouts differ by as much


@torch.no_grad()
def channels_last(model: Defended, x: Tensor) -> Defended:
    """A copy that keeps the channels of a pixel beside each other, with batch norms folded into the convolutions before
    them where torch.fx can follow the network. It is held against the model on images ``x`` (B, ...).

    Raises:
        ValueError: for a black box, and where the network does not run so or answers otherwise.
    """
    if model.access != "gradients":
        raise ValueError("layout channels-last is for a model whose layers can be seen")
    laid = copy.deepcopy(model).eval().requires_grad_(False)
    inner = laid
    while isinstance(inner.model, Defended):
        inner = inner.model
    with suppress(Exception):  # a network that torch.fx cannot follow raises anything; it is left as it is
        inner.model = fuse(inner.model, inplace=True)
    laid = laid.to(memory_format=torch.channels_last)
    noise = Noise(0, torch.arange(len(x))) if model.stochastic else None
    expected = model.answer(x, noise=noise)
    try:
        answer = laid.answer(x, noise=noise)
    except RuntimeError as error:
        raise ValueError(f"layout channels-last: the model does not run so: {one_line(error)}") from error
    if not (answer - expected).abs().amax() <= FAR * expected.abs().amax():
        raise ValueError("layout channels-last: the model answers otherwise so")
    return laid
