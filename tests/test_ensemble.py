"""Ensemble adversarial training: which model a batch is crafted on, what that gives, and what it is good for."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.data import Images, load
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate
from robustbench_lite.models import build
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import HELD
from robustbench_lite.registry import make, spec
from robustbench_lite.trained import Workshop, weights_hash
from robustbench_lite.training import Lab, Progress

X = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.25
Y = torch.arange(20) % 4
SOURCES = {"one": build("mlp", (1, 8, 8), 4, 1), "two": build("cnn", (1, 8, 8), 4, 2)}


@pytest.fixture
def lab() -> Lab:
    """Twenty images, and two sources as a workshop hands them over."""
    sources = {name: Defended(model).eval().requires_grad_(False) for name, model in SOURCES.items()}
    return Lab(lambda: Images("few", "train", X, Y, 4, ""), Noise(0, torch.arange(20)), sources.__getitem__)


def net(seed: int = 3) -> nn.Module:
    return build("mlp", (1, 8, 8), 4, seed)


def stepped(model: nn.Module, eps: float) -> Tensor:
    """``X`` after one step of length eps away from what the model says, whether it is right or not."""
    x = X.clone().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), x)
    return (X + eps * gradient.sign()).clamp(0, 1)


def recipe(more: str = ""):
    return make("defense", f"ensemble:eps=0.2,warmup=2,epochs=4,varied=false,sources=(one,two){more}")


def test_a_batch_is_crafted_on_one_model_drawn_by_its_key_and_counts_half(lab: Lab):
    model = net()
    loss, drawn = recipe().objective(model, lab), Counter()
    with torch.no_grad():
        clean = F.cross_entropy(model(X), Y)
    crafted = {name: stepped(crafter, 0.1) for name, crafter in {**SOURCES, "itself": model}.items()}
    assert any((crafter(X).argmax(1) != Y).any() for crafter in SOURCES.values())
    for key in range(60):
        noise = lab.noise.at("epoch", key)
        value, logits = loss(X, Y, noise, 1.0)  # halfway through the warm-up
        with torch.no_grad():
            (name,) = [name for name, x in crafted.items() if torch.allclose(model(x), logits, atol=1e-6)]
        drawn[name] += 1
        torch.testing.assert_close(value, (clean + F.cross_entropy(logits, Y)) / 2)
        assert torch.equal(loss(X, Y, noise, 1.0)[1], logits)
    assert min(drawn[name] for name in crafted) >= 10


def test_a_varied_step_is_of_any_size_up_to_eps(lab: Lab):
    model, sizes = net(), []
    loss = recipe().objective(model, lab)
    varied = replace(recipe(), varied=True).objective(model, lab)
    for key in range(40):
        noise = lab.noise.at("epoch", key)
        share = float(noise.at("eps")[:1].uniform(torch.empty(1, 1)))
        assert torch.equal(varied(X, Y, noise, 2.0)[1], loss(X, Y, noise, 2.0 * share)[1])
        sizes.append(share)
    assert min(sizes) < 0.1 < 0.9 < max(sizes)


def test_eps_begins_at_nothing(lab: Lab):
    model = net()
    value, logits = recipe().objective(model, lab)(X, Y, lab.noise, 0.0)
    torch.testing.assert_close(logits, model(X))
    torch.testing.assert_close(value, F.cross_entropy(model(X), Y))


def test_the_static_models_change_no_more(lab: Lab):
    before = {name: weights_hash(model) for name, model in SOURCES.items()}
    model = net()
    recipe(",batch=5")(model, lab)
    assert {name: weights_hash(source) for name, source in SOURCES.items()} == before
    assert all(parameter.grad is None for source in SOURCES.values() for parameter in source.parameters())
    assert weights_hash(model) != weights_hash(net())


def test_the_same_weights_twice_and_after_a_kill(lab: Lab, tmp_path: Path):
    once, again = (weights_hash(recipe(",batch=5")(net(), lab)) for _ in range(2))
    assert once == again
    checkpointed = replace(lab, checkpoint=tmp_path / "checkpoint")

    def kill(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (2, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe(",batch=5")(net(), replace(checkpointed, report=kill))
    assert weights_hash(recipe(",batch=5")(net(seed=4), checkpointed)) == once
    other = replace(lab, noise=Noise(1, torch.arange(20)))
    assert weights_hash(recipe(",batch=5")(net(), other)) != once


def test_its_sources_are_a_setting():
    plain = make("defense", "ensemble")
    assert plain.sources == ("standard@cnn", "standard@mlp")
    assert plain == make("defense", "ensemble:sources=(standard@cnn, standard@mlp)")
    text = "ensemble:eps=0.3,sources=(madry:eps=0.3,steps=7@cnn,standard)"
    assert make("defense", text).sources == ("madry:eps=0.3,steps=7@cnn", "standard")
    assert spec(make("defense", text)) == text
    assert make("defense", "ensemble:sources=standard@mlp").sources == ("standard@mlp",)
    with pytest.raises(ValueError, match="sources must name a model"):
        replace(plain, sources=())


def test_it_pays_against_transfer_from_a_model_that_it_never_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ROBUST_BENCH_CACHE", str(tmp_path))
    trained, digits = [], load("digits", "test")

    def watch(name: str, progress: Progress) -> None:
        if name not in trained:
            trained.append(name)

    shop = Workshop("digits", (1, 8, 8), 10, model="mlp", progress=watch)
    quick, told = "standard:epochs=3,rate=0.003", "epochs=6,rate=0.003,eps=0.2,warmup=3"
    specs = [f"fgsm-training:{told}", f"ensemble:{told},varied=false,sources=({quick}@cnn,{quick}@mlp)"]
    models = [shop.subject(text).model for text in specs]
    assert trained == [specs[0], f"{quick}@cnn", f"{quick}@mlp", specs[1]]
    held = [
        evaluate(
            f"transfer:source=({quick}@cnn-large),attack=fgsm",
            model,
            digits.x,
            digits.y,
            "linf:0.2",
            sources=lambda text: shop.source(text, "transfer").model,
        )
        for model in models
    ]
    one, ensemble = ((outcome.status == HELD).mean() for outcome in held)
    assert ensemble > one + 0.05
