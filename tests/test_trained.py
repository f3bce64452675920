"""Where defended models come from: shipped, from the cache, trained once, or a user's own."""

import contextlib
import hashlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from robustbench_lite import classifiers, data, models, registry, training, zoo
from robustbench_lite.certifying import certify_inputs
from robustbench_lite.defended import Defended
from robustbench_lite.evaluation import evaluate
from robustbench_lite.history import Epoch, parse
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import HELD, VERIFIED, WRONG
from robustbench_lite.registry import defense, make
from robustbench_lite.trained import Inputs, Workshop, fill, save, weights_hash
from robustbench_lite.training import Lab, Progress

RECIPE = "standard:epochs=3"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROBUST_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ROBUST_BENCH_DATA", raising=False)
    return tmp_path / "cache"


class Shop:
    """Workshops on digits that keep what they say."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[str, int, int]] = []

    def watch(self, name: str, progress: Progress) -> None:
        self.steps.append((name, progress.epoch, progress.step))

    def __call__(self, **settings: Any) -> Workshop:
        usual: dict[str, Any] = {"model": "mlp", "note": self.notes.append, "progress": self.watch}
        return Workshop("digits", (1, 8, 8), 10, **(usual | settings))


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
def net() -> nn.Module:
    return models.build("mlp", (1, 8, 8), 10, seed=7).eval()


@pytest.fixture
def images() -> Tensor:
    return data.load("digits").x[:50]


@pytest.fixture
def halving() -> Iterator[type]:
    """A wrapper that shows the model half of every pixel."""

    @defense("halving")
    @dataclass(frozen=True)
    class Halving:
        factor: float = 0.5

        trains: ClassVar[bool] = False

        def __call__(self, model: nn.Module, lab: Lab) -> Defended:
            return Half(model, self.factor)

    yield Halving
    del registry._tables["defense"]["halving"]


class Half(Defended):
    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__(model)
        self.factor = factor

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        return super().forward(self.factor * x)


def one_line(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# Chains


@pytest.mark.parametrize(
    ("own", "chain", "complaint"),
    [
        (False, "halving", "defense halving guards a trained model; write standard+halving"),
        (False, "halving+standard", "defense halving guards a trained model"),
        (False, "standard+madry", "defense madry trains a model, but only the first of a chain trains"),
        (False, "standard+halving+standard", "only the first of a chain trains"),
        (False, "none", "defense none needs a trained model"),
        (False, "standrad", "no defense 'standrad'; did you mean standard?"),
        (False, "standard:epoch=1", "defense standard has no setting 'epoch'"),
        (False, "standard+", ""),
        (False, "madry:norm=l1", "no customary eps for digits under l1"),
        (True, "standard", "defense standard trains a model, but the model is evaluated as it is"),
        (True, "halving+madry", "defense madry trains a model, but the model is evaluated as it is"),
    ],
)
def test_a_chain_that_cannot_be_is_one_line(
    shop: Shop, halving: type, net: nn.Module, own: bool, chain: str, complaint: str
):
    workshop = shop(model=net if own else "mlp")
    one_line(lambda: workshop.subject(chain), complaint)
    one_line(lambda: workshop.links(chain), complaint)
    assert not shop.steps


def test_a_wrapper_guards_what_was_trained(shop: Shop, halving: type, images: Tensor):
    workshop = shop()
    bare, guarded, twice = (workshop.subject(f"standard:epochs=1{more}") for more in ("", "+halving", "+halving" * 2))
    with torch.no_grad():
        torch.testing.assert_close(guarded.model(images), bare.model(images / 2))
        torch.testing.assert_close(twice.model(images), bare.model(images / 4))
        assert not torch.equal(guarded.model(images), bare.model(images))
    assert len(shop.notes) == 1  # trained once
    assert guarded.defense == "standard:epochs=1+halving"
    assert bare.parameters == guarded.parameters == 64 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10
    identities = [bare.identity, guarded.identity, workshop.subject("standard:epochs=1+halving:factor=0.4").identity]
    assert all(one != other for i, one in enumerate(identities) for other in identities[:i])


def test_a_new_version_of_a_wrapper_is_another_model(
    shop: Shop, halving: type, net: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    before = shop(model=net).subject("halving").identity
    monkeypatch.setattr(halving, "version", 2, raising=False)
    assert shop(model=net).subject("halving").identity != before


def test_a_wrapper_guards_a_model_of_one_s_own(shop: Shop, halving: type, net: nn.Module, images: Tensor):
    subject = shop(model=net).subject("halving")
    with torch.no_grad():
        torch.testing.assert_close(subject.model(images), net(images / 2))
    assert subject.defense == "halving"


def test_a_recipe_takes_the_customary_eps(shop: Shop):
    assert shop().spec(shop().links("madry")) == "madry:eps=0.1"
    assert shop().spec(shop().links("madry:norm=l2")) == "madry:norm=l2,eps=1.0"
    assert shop().spec(shop().links("madry:eps=0.2")) == "madry:eps=0.2"


# The cache


def test_a_second_subject_is_read_and_not_trained(shop: Shop, cache: Path):
    first = shop().subject(RECIPE)
    assert {name for name, *_ in shop.steps} == {RECIPE}
    assert {epoch for _, epoch, _ in shop.steps} == {0, 1, 2}
    (note,) = shop.notes
    (file,) = cache.rglob("*.*")
    assert "training it once" in note
    assert str(file) in note
    shop.steps.clear()
    second = shop().subject(RECIPE)
    assert not shop.steps
    assert len(shop.notes) == 1
    assert weights_hash(first.model) == weights_hash(second.model)
    assert first.identity == second.identity
    assert not first.model.training
    assert not second.model.training


# Histories


def test_the_history_travels_with_the_weights(shop: Shop, halving: type, cache: Path):
    subject = shop().subject(RECIPE)
    assert [epoch.epoch for epoch in subject.history] == [1, 2, 3]
    assert shop().subject(RECIPE).history == subject.history  # from the cache
    assert shop().subject(f"{RECIPE}+halving").history == subject.history
    (file,) = cache.rglob("*.safetensors")
    with safe_open(file, "pt") as kept:
        assert parse(kept.metadata()["history"]) == subject.history
    assert shop(weights=file).subject("none").history == subject.history
    assert Workshop("mnist", (1, 28, 28), 10).subject("standard").history == ()  # ships without


def test_weights_do_not_depend_on_their_history(net: nn.Module, shop: Shop, tmp_path: Path):
    path, other = tmp_path / "with.safetensors", tmp_path / "without.safetensors"
    save(net, path, history=(Epoch(1, 0.5, 0.5, 0.5, None),))
    save(net, other)
    one, two = (shop(weights=file).subject("none") for file in (path, other))
    assert one.identity == two.identity
    assert (len(one.history), two.history) == (1, ())


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", '[{"epoch": NaN}]', "[" * 10**6], ids=["script", "nan", "huge"]
)
def test_a_history_that_is_malformed_is_none_and_is_said_in_a_line(
    shop: Shop, net: nn.Module, tmp_path: Path, text: str
):
    file = tmp_path / "weights.safetensors"
    save_file(net.state_dict(), file, {"history": text})
    subject = shop(weights=file).subject("none")
    assert subject.history == ()
    assert same(subject.model.model, net)
    (note,) = shop.notes
    assert note.startswith(f"{file} has a history of its training that cannot be used: ")
    assert "\n" not in note
    assert len(note) < len(str(file)) + 200


@pytest.mark.parametrize("other", [{"chain": "standard:epochs=2"}, {"model": "cnn"}], ids=["recipe", "model"])
def test_another_recipe_or_model_is_trained_anew(shop: Shop, cache: Path, other: dict[str, str]):
    shop().subject("standard:epochs=1")
    shop(model=other.get("model", "mlp")).subject(other.get("chain", "standard:epochs=1"))
    assert len(shop.notes) == 2
    assert len(list(cache.rglob("*.safetensors"))) == 2


def test_training_teaches(shop: Shop):
    digits, model = data.load("digits"), shop().subject(RECIPE).model
    with torch.no_grad():
        right = model(digits.x).argmax(1) == digits.y
    assert right.double().mean() > 0.6


class Killed(BaseException):
    pass


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_training_that_was_killed_goes_on_and_ends_the_same(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
):
    whole = weights_hash(shop().subject(RECIPE).model)
    monkeypatch.setenv("ROBUST_BENCH_CACHE", str(tmp_path / "again"))

    def kill(name: str, progress: Progress) -> None:
        if (progress.epoch, progress.step) == (epoch, 5):
            raise Killed

    with pytest.raises(Killed):
        shop(progress=kill).subject(RECIPE)
    assert not list((tmp_path / "again").rglob("*.safetensors"))
    shop.steps.clear()
    assert weights_hash(shop().subject(RECIPE).model) == whole
    assert min(at for _, at, _ in shop.steps) == epoch
    assert [path.suffix for path in (tmp_path / "again").rglob("*.*")] == [".safetensors"]


def test_a_kill_while_the_checkpoint_is_written_costs_that_epoch_only(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = weights_hash(shop().subject(RECIPE).model)
    monkeypatch.setenv("ROBUST_BENCH_CACHE", str(tmp_path / "again"))
    write = torch.save

    def half(state: dict[str, Any], file: Path) -> None:
        if state["epoch"] == 2:
            file.write_bytes(b"half")
            raise Killed
        write(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(training.torch, "save", half)
        with pytest.raises(Killed):
            shop().subject(RECIPE)
    shop.steps.clear()
    assert weights_hash(shop().subject(RECIPE).model) == whole
    assert min(at for _, at, _ in shop.steps) == 1


def test_a_damaged_file_in_the_cache_is_one_line_that_names_it(shop: Shop, cache: Path):
    shop().subject("standard:epochs=1")
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    one_line(lambda: shop().subject("standard:epochs=1"), str(file))


def test_a_data_set_without_training_images_cannot_train(shop: Shop, tmp_path: Path):
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 8), np.float32), y=np.arange(4) % 2)
    workshop = Workshop(f"npz:{tmp_path / 'x.npz'}", (8,), 2)
    one_line(lambda: workshop.subject("standard"), "no array x_train")


# Weights


def same(one: nn.Module, other: nn.Module) -> bool:
    return weights_hash(one) == weights_hash(other)


WRITERS: dict[str, Callable[[nn.Module, Path], object]] = {
    "weights.safetensors": save,
    "weights.pth": lambda net, path: torch.save(net.state_dict(), path),
    "old.pt": lambda net, path: torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False),
    "nested.pth": lambda net, path: torch.save({"state_dict": net.state_dict(), "epoch": 3}, path),
    "double.pth": lambda net, path: torch.save(
        {name: value.double() for name, value in net.state_dict().items()}, path
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_weights_go_round(shop: Shop, net: nn.Module, tmp_path: Path, name: str):
    WRITERS[name](net, tmp_path / name)
    other = models.build("mlp", (1, 8, 8), 10, seed=8)
    assert not same(net, other)
    fill(other, tmp_path / name)
    assert same(net, other)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
    assert same(shop(weights=tmp_path / name).subject("none").model.model, net)
    assert not shop.notes


def test_half_precision_halves_the_file_and_is_read_as_float32(net: nn.Module, tmp_path: Path):
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    for path, halved in ((whole, False), (half, True)):
        assert save(net, path, halved) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert half.stat().st_size < 0.51 * whole.stat().st_size
    other = models.build("mlp", (1, 8, 8), 10, seed=8)
    fill(other, half)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
    for one, two in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(two, one.half().float(), rtol=0, atol=0)


def test_counters_of_batch_norm_stay_whole(tmp_path: Path):
    net = nn.Sequential(nn.BatchNorm1d(3))
    net(torch.randn(5, 3))
    save(net, tmp_path / "w.safetensors", half=True)
    other = nn.Sequential(nn.BatchNorm1d(3))
    fill(other, tmp_path / "w.safetensors")
    assert other[0].num_batches_tracked.dtype == torch.int64
    assert other[0].num_batches_tracked.item() == 1


class Bomb:
    def __init__(self, fuse: Path) -> None:
        self.fuse = fuse

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.fuse,)


@pytest.mark.parametrize("kind", ["bare", "torch", "old torch", "in a state dict", "named safetensors"])
def test_code_in_a_weights_file_is_refused_and_not_run(net: nn.Module, tmp_path: Path, kind: str):
    fuse, path = tmp_path / "exploded", tmp_path / "evil.pth"
    if kind == "bare":
        path.write_bytes(pickle.dumps(Bomb(fuse), protocol=2))
    elif kind == "named safetensors":
        path = tmp_path / "evil.safetensors"
        torch.save(Bomb(fuse), path)
    else:
        content = net.state_dict() | {"more": Bomb(fuse)} if kind == "in a state dict" else Bomb(fuse)
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old torch")
    one_line(lambda: fill(net, path), str(path), "no safetensors file and no torch state dict")
    assert not fuse.exists()
    if kind != "named safetensors":
        torch.load(path, weights_only=False) if kind != "bare" else pickle.loads(path.read_bytes())
        assert fuse.exists()  # it would have


def test_a_whole_pickled_model_is_refused(net: nn.Module, tmp_path: Path):
    torch.save(net, tmp_path / "model.pth")
    one_line(lambda: fill(net, tmp_path / "model.pth"), "model.pth", "no torch state dict")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "old.pt"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_one_line(net: nn.Module, tmp_path: Path, name: str, share: float):
    path = tmp_path / name
    WRITERS[name](net, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    one_line(lambda: fill(net, path), str(path))


@pytest.mark.parametrize("position", range(0, 1200, 60))
def test_damaged_weights_are_one_line_or_still_load(net: nn.Module, tmp_path: Path, position: int):
    path = tmp_path / "weights.pth"
    torch.save(net.state_dict(), path)
    content = bytearray(path.read_bytes())
    for byte in range(position, position + 60):
        content[byte] ^= 0x55
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        fill(net, path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (models.build("mlp", (1, 8, 8), 9).state_dict(), "does not fit the model"),
        (models.build("cnn", (1, 8, 8), 10).state_dict(), "does not fit the model"),
        ({}, "does not fit the model"),
        ([1, 2], "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        (torch.zeros(3), "holds no state dict"),
    ],
    ids=["classes", "architecture", "empty", "list", "numbers", "tensor"],
)
def test_weights_of_something_else_are_one_line(shop: Shop, tmp_path: Path, content: object, complaint: str):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    one_line(lambda: shop(weights=path).subject("none"), str(path), complaint)


def test_weights_that_are_not_there_are_one_line(shop: Shop, tmp_path: Path):
    one_line(lambda: shop(weights=tmp_path / "w.pth").subject("none"), "there is no weights file", "w.pth")
    one_line(lambda: shop(weights=tmp_path).subject("none"), "there is no weights file")


def test_saving_is_atomic(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "weights.safetensors"
    save(net, path)
    before = path.read_bytes()

    def crash(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(Killed):
        save(models.build("mlp", (1, 8, 8), 10), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["value", "name", "shape", "type"])
def test_a_hash_of_weights_covers_all_of_them(change: str):
    net = nn.Linear(4, 2, bias=False)
    before = weights_hash(net)
    assert weights_hash(nn.Linear(4, 2, bias=False)) != before
    with torch.no_grad():
        if change == "value":
            net.weight[1, 3] = torch.nextafter(net.weight[1, 3], torch.tensor(9.0))
        elif change == "name":
            net.mass = net.weight
            del net.weight
        elif change == "shape":
            net.weight = nn.Parameter(net.weight.view(2, 4).T.reshape(4, 2))
        else:
            net.weight = nn.Parameter(net.weight.view(torch.int32), requires_grad=False)
    assert weights_hash(net) != before


# A model of one's own

FACTORY = """
import torch
from torch import nn

def load(scale=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5))
    return model

def scaled():
    return Scaled(load())

class Scaled(nn.Sequential):
    def forward(self, x):
        return super().forward(3 * x)

def rested():
    return load().eval()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FACTORY)
    return path


def test_a_model_from_a_file_is_evaluated_as_it_is(shop: Shop, file: Path, images: Tensor):
    subject = shop(model=f"{file}:load").subject("none")
    expected = classifiers.load(f"{file}:load", (1, 8, 8), 10).eval()
    with torch.no_grad():
        torch.testing.assert_close(subject.model(images), expected(images), rtol=0, atol=0)
    assert (subject.defense, subject.architecture, subject.parameters) == ("none", f"{file}:load", 650)


def test_a_model_in_training_mode_is_told(shop: Shop, file: Path, images: Tensor):
    subject = shop(model=f"{file}:load").subject("none")
    (note,) = shop.notes
    assert f"{file}:load was in training mode" in note
    assert not any(module.training for module in subject.model.modules())
    shop(model=f"{file}:rested").subject("none")
    shop(model=nn.Linear(2, 2).eval()).subject("none")
    assert len(shop.notes) == 1


def test_weights_fill_a_model_from_a_file(shop: Shop, file: Path, tmp_path: Path):
    net = classifiers.load(f"{file}:load", (1, 8, 8), 10)
    with torch.no_grad():
        net[1].weight += 1
    save(net, tmp_path / "w.safetensors")
    subject = shop(model=f"{file}:load", weights=tmp_path / "w.safetensors").subject("none")
    assert same(subject.model.model, net)


def test_what_changes_a_model_s_answers_changes_its_identity(shop: Shop, file: Path, tmp_path: Path):
    weights = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, path in enumerate(weights):
        save(models.build("mlp", (1, 8, 8), 10, seed), path)
    other = tmp_path / "other.py"
    other.write_text(FACTORY.replace("3 * x", "4 * x"))
    wanted = [
        shop(model="mlp", weights=weights[0]),
        shop(model="mlp", weights=weights[1]),
        shop(model=f"{file}:load"),
        shop(model=f"{file}:scaled"),
        shop(model=f"{other}:scaled"),
        shop(model="mlp", weights=weights[0], inputs=Inputs(mean=(0.1,))),
        shop(model="mlp", weights=weights[0], inputs=Inputs(std=(0.1,))),
        shop(model="mlp", weights=weights[0], inputs=Inputs(bounds=(0, 255))),
        shop(model="mlp", weights=weights[0], inputs=Inputs(probabilities=True)),
    ]
    identities = [workshop.subject("none").identity for workshop in wanted]
    assert all(one != other for i, one in enumerate(identities) for other in identities[:i])
    assert [workshop.subject("none").identity for workshop in wanted] == identities


def test_two_factories_of_one_file_with_equal_weights_are_two_models(shop: Shop, file: Path):
    file.write_text(FACTORY + "\n\ndef twin():\n    return load()\n")
    one, other = (shop(model=f"{file}:{name}").subject("none") for name in ("load", "twin"))
    assert one.identity["weights"] == other.identity["weights"]
    assert one.identity != other.identity


def test_where_the_file_lies_changes_nothing(shop: Shop, file: Path, tmp_path: Path):
    (tmp_path / "else").mkdir()
    copy = tmp_path / "else" / "where.py"
    copy.write_bytes(file.read_bytes())
    one, other = (shop(model=f"{path}:load").subject("none") for path in (file, copy))
    assert one.identity == other.identity


def test_inputs_are_adapted(shop: Shop, net: nn.Module, images: Tensor):
    inputs = Inputs(mean=(100.0,), std=(50.0,), bounds=(0.0, 255.0))
    subject = shop(model=net, inputs=inputs).subject("none")
    with torch.no_grad():
        torch.testing.assert_close(subject.model(images), net((255 * images - 100) / 50))
        soft = shop(model=nn.Sequential(net, nn.Softmax(1)).eval(), inputs=Inputs(probabilities=True)).subject("none")
        torch.testing.assert_close(soft.model(images), net(images).log_softmax(1), atol=1e-4, rtol=1e-4)


def test_inputs_of_a_model_that_is_trained_here_are_refused(shop: Shop):
    one_line(
        lambda: shop(inputs=Inputs(mean=(0.5,))).subject("standard"), "mean, std, bounds, probabilities and access"
    )


def test_a_std_of_zero_is_one_line(shop: Shop, net: nn.Module):
    one_line(lambda: shop(model=net, inputs=Inputs(std=(0.0,))).subject("none"), "std must be above 0")


# What ships


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, net: nn.Module) -> Iterator[zoo.Shipped]:
    """A zoo that holds one model: ``net``, as standard on digits."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    entry = zoo.Shipped(
        file="digits.safetensors",
        sha256=save(net, folder / "digits.safetensors", half=True),
        dataset="digits",
        model="mlp",
        defense="standard:epochs=7",
        seed=0,
        examples=100,
        clean_accuracy=0.9,
        robust_accuracy=0.1,
        threat="linf:0.1",
        attack="pgd",
        command="none",
        version="0",
    )
    lines = "\n".join(f"{name} = {value!r}" for name, value in vars(entry).items() if value is not None)
    (folder / "manifest.toml").write_text(f"[[weights]]\n{lines}\n")
    monkeypatch.setattr(zoo, "FOLDER", folder)
    zoo.manifest.cache_clear()
    yield entry
    zoo.manifest.cache_clear()


def test_what_ships_is_not_trained(shop: Shop, shipped: zoo.Shipped, net: nn.Module, cache: Path):
    assert zoo.manifest() == (shipped,)
    subject = shop().subject("standard:epochs=7")
    assert not shop.steps
    assert not shop.notes
    assert not cache.exists()
    for one, other in zip(subject.model.parameters(), net.parameters()):
        torch.testing.assert_close(one, other.half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("other", [{"model": "cnn"}, {"chain": "standard:epochs=1"}], ids=["model", "recipe"])
def test_what_ships_stands_for_nothing_else(shop: Shop, shipped: zoo.Shipped, other: dict[str, str]):
    def stop(*_: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        shop(model=other.get("model", "mlp"), progress=stop).subject(other.get("chain", "standard:epochs=7"))


@pytest.mark.parametrize("damage", ["a bit", "truncated", "missing"])
def test_shipped_weights_that_were_altered_are_refused(shop: Shop, shipped: zoo.Shipped, damage: str):
    file = zoo.FOLDER / shipped.file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content if damage == "a bit" else content[:100])
    one_line(lambda: shop().subject("standard:epochs=7"), str(file), "install the package again")


def test_every_shipped_file_is_what_the_manifest_says():
    for entry in zoo.manifest():
        model = models.build(entry.model, data.SOURCES[entry.dataset].shape, data.SOURCES[entry.dataset].classes)
        model.load_state_dict(zoo.load(entry))
        assert all(value.isfinite().all() for value in model.state_dict().values())
    files = {path.name for path in zoo.FOLDER.iterdir() if path.suffix == ".safetensors"}
    assert files == {entry.file for entry in zoo.manifest()}


@pytest.mark.parametrize("defense", [entry.defense for entry in zoo.manifest()])
def test_a_shipped_model_is_as_good_as_the_manifest_says(defense: str):
    (entry,) = (entry for entry in zoo.manifest() if entry.defense == defense)
    measured(entry, 500, "pgd:steps=5", at_most=1.0)  # a weaker attack leaves more


@pytest.mark.reference
@pytest.mark.parametrize("defense", [entry.defense for entry in zoo.manifest()])
def test_a_shipped_model_is_just_as_robust_as_the_manifest_says(defense: str):
    (entry,) = (entry for entry in zoo.manifest() if entry.defense == defense)
    measured(entry, 500, entry.attack, at_most=entry.robust_accuracy)


CERTIFIED = [entry for entry in zoo.manifest() if entry.certified_accuracy is not None]


@pytest.mark.parametrize("entry", CERTIFIED, ids=[entry.defense for entry in CERTIFIED])
def test_as_much_of_a_shipped_model_is_proved_as_the_manifest_says(entry: zoo.Shipped):
    few = data.load(entry.dataset).take(slice(500))
    found = certify_inputs(entry.certifier, fresh(entry).eval(), few.x, few.y, entry.threat)
    assert float((found.status == VERIFIED).mean()) == pytest.approx(entry.certified_accuracy, abs=0.045)  # 3 sigma


def measured(entry: zoo.Shipped, count: int, attack: str, at_most: float) -> None:
    """Measures an entry on few images: figures may differ by three standard deviations, and one image."""
    few = data.load(entry.dataset).take(slice(count))
    outcome = evaluate(attack, fresh(entry).eval(), few.x, few.y, entry.threat)

    def slack(share: float) -> float:
        return 3 * (share * (1 - share) / count) ** 0.5 + 1 / count

    clean, robust = float((outcome.status != WRONG).mean()), float((outcome.status == HELD).mean())
    assert clean == pytest.approx(entry.clean_accuracy, abs=slack(entry.clean_accuracy))
    assert entry.robust_accuracy - slack(entry.robust_accuracy) <= robust <= at_most + slack(at_most)


def test_every_shipped_defense_is_found_by_its_own_spec():
    def stop(*_: object) -> None:
        raise Killed

    for entry in zoo.manifest():
        source = data.SOURCES[entry.dataset]
        workshop = Workshop(entry.dataset, source.shape, source.classes, model=entry.model, progress=stop)
        (recipe,) = workshop.links(entry.defense)
        assert registry.identity(recipe) == registry.identity(make("defense", entry.defense))
        assert same(workshop._trained(recipe), Defended(fresh(entry)))


def fresh(entry: zoo.Shipped) -> nn.Module:
    source = data.SOURCES[entry.dataset]
    model = models.build(entry.model, source.shape, source.classes)
    model.load_state_dict(zoo.load(entry))
    return model
