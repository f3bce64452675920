"""Classifiers from ONNX, timm and RobustBench."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_lite import data
from robustbench_lite.classifiers import load
from robustbench_lite.evaluation import evaluate
from robustbench_lite.models import build
from robustbench_lite.trained import save
from tests.conftest import Ran

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """A convolutional net that knows the digits a little: its last layer was fitted by least squares."""
    train = data.load("digits", "train")
    model = build("cnn", SHAPE, 10, seed=1).eval()
    with torch.no_grad():
        features = model[:-1](train.x)
        wanted = nn.functional.one_hot(train.y, 10) * 10.0
        model[-1].weight.copy_(torch.linalg.lstsq(features, wanted).solution.T)
        model[-1].bias.zero_()
    return model


def export(net: nn.Module, file: Path) -> Path:
    """Writes a net such as ``cnn`` as an ONNX graph, node by node."""
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnx2torch", reason="the extra onnx is not installed")
    nodes, weights, value = [], [], "images"
    for name, layer in net.named_children():
        inputs = [value, *(f"{name}.{key}" for key in layer.state_dict())]
        weights += [onnx.numpy_helper.from_array(v.numpy(), f"{name}.{key}") for key, v in layer.state_dict().items()]
        settings: dict[str, Any] = {}
        if isinstance(layer, nn.Conv2d):
            settings = {"strides": layer.stride, "pads": [*layer.padding, *layer.padding]}
        if isinstance(layer, nn.Linear):
            settings = {"transB": 1}
        value = f"after {name}"
        kind = {nn.Conv2d: "Conv", nn.ReLU: "Relu", nn.Flatten: "Flatten", nn.Linear: "Gemm"}[type(layer)]
        nodes.append(onnx.helper.make_node(kind, inputs, [value], **settings))
    ends = [("images", ["N", *SHAPE]), (value, ["N", 10])]
    given, gives = [[onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s)] for n, s in ends]
    graph = onnx.helper.make_graph(nodes, "net", given, gives, weights)
    opset = [onnx.helper.make_opsetid("", 13)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), file)
    return file


def test_an_onnx_file_is_the_model_that_it_was_made_of(net: nn.Module, tmp_path: Path):
    again = load(f"onnx:{export(net, tmp_path / 'net.onnx')}", SHAPE, 10)
    test = data.load("digits")
    x, y = test.x[:60], test.y[:60]
    with torch.no_grad():
        torch.testing.assert_close(again(x), net(x))
    before, after = (evaluate("fgsm", model, x, y, "linf:0.1") for model in (net, again))
    assert {"broken", "held"} <= set(before.status)
    assert np.array_equal(before.status, after.status)


def test_an_onnx_model_is_known_by_its_file_not_by_its_place(net: nn.Module, place: Path, bench: Callable[[str], Ran]):
    export(net, place / "net.onnx")
    line = "--attack fgsm --dataset digits --n 20 -v --model onnx:"
    assert bench(f"{line}net.onnx").code == 0
    made = {path: path.stat().st_mtime_ns for path in (place / "runs").rglob("*.npz")}
    (place / "net.onnx").rename(place / "other.onnx")
    assert bench(f"{line}other.onnx").code == 0
    assert {path: path.stat().st_mtime_ns for path in (place / "runs").rglob("*.npz")} == made


def test_a_timm_model_runs_on_weights_of_one_s_own(place: Path, bench: Callable[[str], Ran]):
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 32, 32, generator=generator)
    model = timm.create_model("resnet18", num_classes=3).eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    np.savez(place / "tiny.npz", x=x, y=y, classes=3)
    save(model, place / "w.safetensors")
    line = "--dataset npz:tiny.npz --attack fgsm --threat linf:0.01 --no-audit --model timm:resnet18"
    before = torch.get_rng_state()
    ran = bench(f"{line} --weights w.safetensors --mean 0,0,0 --std 1,1,1 --json")
    assert ran.code == 0
    assert '"clean_accuracy":1.0' in ran.out
    assert torch.equal(torch.get_rng_state(), before)
    ran = bench(f"{line} --weights w.safetensors")
    assert "trained with --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225; say so if yours was" in ran.err
    ran = bench(line)
    assert (ran.code, "timm:resnet18 has no weights of its own; give --weights FILE" in ran.err) == (2, True)
    ran = bench(f"{line.replace('net18', 'nt18')} --weights w.safetensors")
    assert (ran.code, "timm has no such model; did you mean resn" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("model", "missing", "extra"),
    [
        ("onnx:m.onnx", "onnx2torch", "onnx"),
        ("timm:resnet18", "timm", "timm"),
        ("robustbench:X", "robustbench", "robustbench"),
    ],
)
def test_a_missing_extra_is_one_line(
    place: Path, bench: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch, model: str, missing: str, extra: str
):
    (place / "m.onnx").touch()
    save(build("mlp", SHAPE, 10), place / "w.safetensors")
    monkeypatch.setitem(sys.modules, missing, None)
    ran = bench(f"--dataset digits --n 4 --attack fgsm --model {model} --weights w.safetensors")
    assert (ran.code, ran.out) == (2, "")
    assert ran.errors[-1].endswith(f"is not installed: pip install 'robustbench-lite[{extra}]'")


@pytest.fixture
def stand_in(place: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """RobustBench's loader, which reads its checkpoint as the real one does."""

    def load_model(name: str, model_dir: Path, dataset: str, threat_model: str) -> nn.Module:
        model = build("cnn", (3, 32, 32), 10)
        model.load_state_dict(torch.load(model_dir / dataset / threat_model / f"{name}.pt", weights_only=False))
        return model

    module = ModuleType("robustbench.utils")
    module.load_model = load_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "robustbench", ModuleType("robustbench"))
    monkeypatch.setitem(sys.modules, "robustbench.utils", module)
    return module


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_a_robustbench_model_is_loaded_from_its_checkpoint(place: Path, stand_in: ModuleType):
    with pytest.raises(ValueError, match=r"there is no .*cifar10.Linf.Wong2020Fast\.pt; put RobustBench's checkpoint"):
        load("robustbench:Wong2020Fast", (3, 32, 32), 10)
    folder = place / "cache/robustbench/cifar10/L2"
    folder.mkdir(parents=True)
    net = build("cnn", (3, 32, 32), 10, seed=3)
    torch.save(net.state_dict(), folder / "Mine.pt")
    loaded = load("robustbench:cifar10/L2/Mine", (3, 32, 32), 10)
    assert not loaded.training
    assert torch.equal(loaded[0].weight, net[0].weight)


def test_autoattack_is_found_by_the_name_that_robustbench_imports(
    place: Path, stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    package = place / "library/pyautoattack"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "state.py").write_text("HERE = True")
    monkeypatch.syspath_prepend(package.parent)
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "autoattack" else known(name))
    monkeypatch.setitem(sys.modules, "autoattack", None)
    folder = place / "cache/robustbench/cifar10/Linf"
    folder.mkdir(parents=True)
    torch.save(build("cnn", (3, 32, 32), 10).state_dict(), folder / "Mine.pt")
    load("robustbench:Mine", (3, 32, 32), 10)
    assert importlib.import_module("autoattack.state").HERE


@pytest.mark.reference
def test_what_robustbench_itself_builds_is_loaded(place: Path):
    """Needs the extra, and no network: the checkpoint is one of random weights, for an entry of its model zoo."""
    pytest.importorskip("robustbench", reason="the extra robustbench is not installed", exc_type=ImportError)
    folder = place / "cache/robustbench/cifar10/Linf"
    folder.mkdir(parents=True)
    (folder / "Wong2020Fast.pt").touch()
    with pytest.raises(ValueError, match="could not be made"):  # and now AutoAttack is found
        load("robustbench:Wong2020Fast", (3, 32, 32), 10)
    zoo = importlib.import_module("robustbench.model_zoo").model_dicts
    enums = importlib.import_module("robustbench.model_zoo.enums")
    net = zoo[enums.BenchmarkDataset.cifar_10][enums.ThreatModel.Linf]["Wong2020Fast"]["model"]()
    torch.save(net.state_dict(), folder / "Wong2020Fast.pt")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load("robustbench:Wong2020Fast", (3, 32, 32), 10)(x), net.eval()(x))


def test_no_checkpoint_of_robustbench_runs_code(place: Path, stand_in: ModuleType):
    folder = place / "cache/robustbench/cifar10/Linf"
    folder.mkdir(parents=True)
    torch.save({"state_dict": Code()}, folder / "Evil.pt")
    with pytest.raises(ValueError, match="could not be made"):
        load("robustbench:Evil", (3, 32, 32), 10)
    assert not (place / "ran").exists()
