from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.classifiers import Adapted, is_reference, load
from robustbench_lite.defended import Defended, ask, steady
from robustbench_lite.models import MODELS, Shape, build, customary
from robustbench_lite.noise import Noise

IMAGES = {"mnist": (1, 28, 28), "digits": (1, 8, 8), "cifar10": (3, 32, 32)}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a.state_dict().values(), b.state_dict().values()))


# architectures


@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_images_to_logits(name: str, shape: Shape):
    model = build(name, shape, 7).eval()
    with torch.no_grad():
        logits = model(torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("side", range(4, 12))
def test_convolutions_take_images_of_any_size(side: int):
    assert build("cnn", (1, side, side + 3), 3)(torch.zeros(2, 1, side, side + 3)).shape == (2, 3)


def test_an_mlp_takes_vectors():
    assert build("mlp", (13,), 3)(torch.zeros(5, 13)).shape == (5, 3)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("cnn", (1, 28, 28), 166_406),  # Wong & Kolter (2018)
        ("cnn-large", (1, 28, 28), 839_018),
        ("lenet", (1, 28, 28), 107_786),
        ("mlp", (1, 28, 28), 784 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10),
        ("preact-resnet18", (3, 32, 32), 11_172_170),  # Rice, Wong & Kolter (2020)
    ],
)
def test_models_are_as_large_as_published(name: str, shape: Shape, count: int):
    assert parameters(build(name, shape, 10)) == count


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_the_same_seed_gives_the_same_weights(name: str):
    torch.manual_seed(5)
    model = build(name, (1, 8, 8), 10, seed=3)
    torch.rand(7)
    assert same_weights(build(name, (1, 8, 8), 10, seed=3), model)
    assert not same_weights(build(name, (1, 8, 8), 10, seed=4), model)


def test_building_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    build("cnn", (1, 8, 8), 10, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_model_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"no model 'cnn-lage'; did you mean cnn-large\?") as caught:
        build("cnn-lage", (1, 8, 8), 10)
    assert all(name in str(caught.value) for name in MODELS)
    with pytest.raises(ValueError, match="no model 'zzz'") as caught:
        build("zzz", (1, 8, 8), 10)
    assert "mean" not in str(caught.value)


@pytest.mark.parametrize("shape", [(13,), (1, 3, 8), (1, 8, 3)], ids=str)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mlp"])
def test_convolutions_want_images(name: str, shape: Shape):
    with pytest.raises(ValueError, match=f"model {name} takes images .*try mlp"):
        build(name, shape, 3)


def test_the_customary_model_takes_the_data():
    for name, shape in {**IMAGES, "mine": (3, 20, 20), "tiny": (1, 2, 9), "table": (9,)}.items():
        assert build(customary(name, shape), shape, 4)(torch.zeros(2, *shape)).shape == (2, 4)


# a user's own

FACTORIES = """
import torch

def good():
    return torch.nn.Linear(3, 2)

def fails():
    raise RuntimeError("Error(s) in loading state_dict:\\n\\tMissing key(s)")

def refuses():
    raise ValueError("no weights\\nhere")

def number():
    return 3

constant = 4
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FACTORIES)
    return path


def test_a_factory_is_called(file: Path):
    model = load(f"{file}:good", (3,), 2)
    assert isinstance(model, nn.Linear)
    assert model.in_features == 3
    assert isinstance(load("torch.nn:Identity", (3,), 2), nn.Identity)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("gone", "has no function 'gone'"),
        ("constant", "has no function 'constant'"),
        ("fails", "RuntimeError: Error(s) in loading state_dict: Missing key(s)"),
        ("refuses", "no weights here"),
        ("number", "returned a int, not an nn.Module"),
        ("", "names no function"),
    ],
)
def test_a_factory_that_gives_no_model_is_refused_in_one_line(file: Path, name: str, complaint: str):
    with pytest.raises(ValueError) as caught:
        load(f"{file}:{name}", (3,), 2)
    assert complaint in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("nowhere/mine.py:good", "there is no file nowhere"),
        ("nowhere/mine.py", "names no function"),
        ("no_such_module_here:good", "ModuleNotFoundError"),
        (":good", "names no function"),
    ],
)
def test_a_factory_that_is_not_there_is_refused_in_one_line(reference: str, complaint: str):
    with pytest.raises(ValueError) as caught:
        load(reference, (3,), 2)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_does_not_run_is_refused_in_one_line(tmp_path: Path):
    for name, source in {"syntax": "def f(:", "imports": "import no_such_module_here", "raises": "1 / 0"}.items():
        (tmp_path / f"{name}.py").write_text(source)
        with pytest.raises(ValueError, match="could not be made") as caught:
            load(f"{tmp_path / name}.py:f", (3,), 2)
        assert "\n" not in str(caught.value)


def test_references_and_names_are_told_apart():
    assert [is_reference(name) for name in ("a.py:f", "a.py", "pkg.mod:f", "cnn-large")] == [True, True, True, False]


# inputs of another kind


def test_inputs_are_scaled_to_the_range_before_mean_and_std():
    x = torch.tensor([[0.0, 0.5, 1.0]])
    assert Adapted(nn.Identity())(x).tolist() == [[0, 0.5, 1]]
    assert Adapted(nn.Identity(), bounds=(-1, 1))(x).tolist() == [[-1, 0, 1]]
    assert Adapted(nn.Identity(), bounds=(0, 255), mean=[127.5], std=[0.5])(x).tolist() == [[-255, 0, 255]]


def test_mean_and_std_are_a_channel_s_own():
    x = torch.full((2, 3, 4, 5), 0.5)
    adapted = Adapted(nn.Identity(), mean=[0.5, 0.25, 0.0], std=[1.0, 0.5, 0.25])(x)
    assert adapted.shape == x.shape
    assert adapted[1, :, 2, 3].tolist() == [0, 0.5, 2]
    assert adapted.std((0, 2, 3)).tolist() == [0, 0, 0]


def test_adapting_keeps_float64():
    assert Adapted(nn.Identity(), mean=[0.1], std=[0.3])(torch.zeros(1, 2, dtype=torch.float64)).dtype == torch.float64


def test_probabilities_become_their_logarithms():
    odds = torch.tensor([[0.7, 0.3, 0.0]])
    logits = Adapted(nn.Identity(), probabilities=True)(odds)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.softmax(1), odds)


@pytest.mark.parametrize("std", [0.0, -1.0])
def test_a_std_of_nothing_is_refused(std: float):
    with pytest.raises(ValueError, match="std must be above 0, not 1, "):
        Adapted(nn.Identity(), mean=[0.0, 0.0], std=[1.0, std])


# behind a defense


class Quantised(Defended):
    """Rounds to five grey levels; its stand-in is far from it in value, so that the two cannot be mixed up."""

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        logits: Tensor = self.model((x * 4).round() / 4)
        return logits

    def surrogate(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        logits: Tensor = 1000 + self.model(x)
        return logits


def input_gradient(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(call(x).square().sum(), x)[0]


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return build("cnn", (1, 8, 8), 10).eval()


def test_a_defense_answers_with_its_own_value_and_its_stand_in_s_gradient(net: nn.Module, x: Tensor):
    quantised = Quantised(net)
    assert torch.equal(quantised.differentiable(x), quantised(x))
    assert not input_gradient(quantised.forward, x).any()
    inputs = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(quantised.differentiable(inputs).sum(), inputs)
    (expected,) = torch.autograd.grad(quantised.surrogate(inputs).sum(), inputs)
    assert torch.equal(gradient, expected)
    assert gradient.any()


def test_a_differentiable_defense_is_its_own_stand_in(net: nn.Module, x: Tensor):
    plain = Defended(net)
    assert torch.equal(plain.surrogate(x), net(x))
    assert torch.equal(input_gradient(plain.differentiable, x), input_gradient(net, x))


@pytest.mark.parametrize("name", ["cnn", "mlp", "cnn-large"])
def test_the_batch_changes_no_bit_of_an_answer(name: str):
    model = Defended(build(name, (1, 28, 28), 10).eval())
    x = torch.rand(1003, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    model.least = steady(model, x[:32])
    with torch.no_grad():
        answers = ask(model, x, 1000)
        for batch in (16, 37, 256):
            assert torch.equal(ask(model, x, batch), answers)
        assert torch.equal(ask(model, x[500:501], 256), answers[500:501])
        assert torch.equal(ask(model, x[500:511], 1), answers[500:511])


@pytest.mark.parametrize("width", [27, 54, 64])
def test_it_changes_no_bit_where_a_row_lies(width: int):
    torch.manual_seed(0)
    model, x = Defended(nn.Linear(width, 4)), torch.randn(128, width)
    with torch.no_grad():
        answers = ask(model, x, 128)
        for first in range(1, 33):
            assert torch.equal(ask(model, x[first : first + 64], 64), answers[first : first + 64])


class Spy(Defended):
    """Keeps what it was asked; every answer depends on the whole batch."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        self.asked.append(x)
        return x.flatten(1) + x.sum()


@pytest.mark.parametrize(
    ("count", "batch", "sizes"),
    [
        (1, 256, [16]),
        (16, 16, [16]),
        (17, 256, [17]),
        (40, 16, [16, 16, 16]),
        (40, 37, [32, 16]),
        (40, 1, [16, 16, 16]),
        (0, 16, [0]),
    ],
)
def test_small_pieces_are_padded_and_answers_are_not(x: Tensor, count: int, batch: int, sizes: list[int]):
    spy = Spy()
    answers = ask(spy, x[:count], batch)
    assert [len(piece) for piece in spy.asked] == sizes
    assert answers.shape == (count, 64)
    for piece, part, answer in zip(spy.asked, x[:count].split(sizes[0] or 1), answers.split(sizes[0] or 1)):
        assert torch.equal(piece[: len(part)], part)
        assert torch.equal(answer, (piece.flatten(1) + piece.sum())[: len(part)])


def test_padding_takes_no_share_of_the_gradient(x: Tensor):
    inputs = x[:5].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ask(Spy(), inputs, 16, differentiable=True).sum(), inputs)
    assert torch.equal(gradient, gradient[:1].expand_as(gradient))


@pytest.mark.parametrize("batch", [16, 256])
def test_gradients_come_through_all_pieces(net: nn.Module, x: Tensor, batch: int):
    quantised = Quantised(net)
    gradient = input_gradient(lambda inputs: ask(quantised, inputs, batch, differentiable=True), x)
    torch.testing.assert_close(gradient, input_gradient(quantised.differentiable, x))
    assert gradient.flatten(1).any(1).all()


class Moody(Defended):
    """Its answers depend on whether it sees fewer than 50 rows."""

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        return self.model(x) + (len(x) < 50)


def test_batches_are_padded_to_where_the_answers_settle(net: nn.Module, x: Tensor):
    moody = Moody(net)
    assert steady(Defended(net), x) == 16
    moody.least = steady(moody, x)
    assert moody.least == 64
    assert torch.equal(ask(moody, x[:3], 256), ask(moody, x.repeat(2, 1, 1, 1), 256)[:3])
