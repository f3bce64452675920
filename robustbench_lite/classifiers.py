"""A person's own classifier: from code, ONNX, timm or RobustBench, and what it expects of its inputs."""

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_lite.downloads import cache_dir
from robustbench_lite.models import Shape
from robustbench_lite.wording import one_line


def is_reference(name: str) -> bool:
    """Whether a model's name points to a classifier of one's own: to code (``FILE.py:factory``, or a module in place of
    the file), to one of ``KINDS`` (``onnx:FILE``), or to a URL."""
    return ":" in name or name.endswith(".py")


def load(reference: str, shape: Shape, classes: int) -> nn.Module:
    """The classifier, in eval mode, for inputs of this shape.

    Raises:
        ValueError: where it is not there or cannot be made, or a library is missing.
    """
    kind, _, rest = reference.partition(":")
    with _explained(reference):
        model = KINDS[kind](rest, shape, classes) if kind in KINDS else _find(reference)()
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {reference!r} returned a {type(model).__name__}, not an nn.Module")
    return model


def function(reference: str) -> Callable[..., Any]:
    """The function that ``FILE.py:function`` or ``package.module:function`` names.

    Raises:
        ValueError: where there is no such file, module or function, or the file does not run.
    """
    with _explained(reference):
        return _find(reference)


@contextmanager
def _explained(reference: str) -> Iterator[None]:
    """Whatever a person's code raises is a ValueError that says whose it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"model {reference!r}: {one_line(error, named=False)}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"model {reference!r} could not be made: {one_line(error)}") from error


def _find(reference: str) -> Callable[..., Any]:
    place, _, attribute = reference.rpartition(":")
    if not place or not attribute:
        raise ValueError(f"it names no function; write {reference.strip(':')}:NAME")
    module = _module_from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    found: Callable[..., Any] | None = getattr(module, attribute, None)
    if found is None or not callable(found):
        raise ValueError(f"{place} has no function {attribute!r}")
    return found


def fingerprint(reference: str) -> str:
    """What stands for a reference in a key: the hash of its file, or the name of what is not a file."""
    kind, _, rest = reference.partition(":")
    if kind == "onnx":
        return f"onnx:{_sha256(rest)}"
    place, _, function = reference.rpartition(":")
    return f"{_sha256(place)}:{function}" if place.endswith(".py") and kind not in KINDS else reference


def _sha256(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _module_from_file(path: Path) -> object:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    name = f"_robust_bench_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _extra(library: str, extra: str) -> Any:
    """A library that comes with an extra.

    Raises:
        ValueError: where it is not installed; says how to get it.
    """
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name not in (library, library.partition(".")[0]):
            raise
        raise ValueError(f"{extra} is not installed: pip install 'robustbench-lite[{extra}]'") from None


def _onnx(file: str, shape: Shape, classes: int) -> nn.Module:
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}")
    model: nn.Module = _extra("onnx2torch", "onnx").convert(file)
    return model.eval()


def _timm(name: str, shape: Shape, classes: int) -> nn.Module:
    timm = _extra("timm", "timm")
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models())
        raise ValueError(
            f"timm has no such model; {f'did you mean {close[0]}?' if close else 'see timm.list_models()'}"
        )
    if len(shape) != 3:
        raise ValueError(f"timm's models take images, not inputs of shape {shape}")
    with torch.random.fork_rng():
        model: nn.Module = timm.create_model(name, num_classes=classes, in_chans=shape[0])
    return model.eval()


def _robustbench(name: str, shape: Shape, classes: int) -> nn.Module:
    if not importlib.util.find_spec("autoattack") and importlib.util.find_spec("pyautoattack"):
        # RobustBench's release requires AutoAttack under the one name and imports it under the other.
        sys.modules["autoattack"] = importlib.import_module("pyautoattack")
    utils = _extra("robustbench.utils", "robustbench")
    dataset, threat, model, *more = name.split("/") if "/" in name else ("cifar10", "Linf", name)
    folder = cache_dir() / "robustbench"
    place = folder / dataset / threat
    if more or not list(place.glob(f"{model}.pt*")):
        raise ValueError(f"there is no {place / model}.pt; put RobustBench's checkpoint there (DATASET/THREAT/NAME.pt)")
    with _arrays_only():
        made: nn.Module = utils.load_model(model, model_dir=folder, dataset=dataset, threat_model=threat)
    return made.eval()


def customary_inputs(model: nn.Module) -> str:
    """The options for the normalisation that a model of timm was trained with; empty where it does not say."""
    about = getattr(model, "pretrained_cfg", {})
    stated = {name: about[name] for name in ("mean", "std") if name in about}
    return " ".join(f"--{name} {','.join(f'{value:g}' for value in values)}" for name, values in stated.items())


@contextmanager
def _arrays_only() -> Iterator[None]:
    """torch.load runs no code of a checkpoint, whoever calls it."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


KINDS: dict[str, Callable[[str, Shape, int], nn.Module]] = {"onnx": _onnx, "timm": _timm, "robustbench": _robustbench}


class Adapted(nn.Module):
    """A classifier that expects other inputs than [0, 1], or returns probabilities, as one from [0, 1] to logits.

    ``bounds`` is the pixel range that it expects, ``mean`` and ``std`` (one number, or one a channel) are applied after
    scaling to that range, and probabilities are turned into their logarithms.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        bounds: tuple[float, float] = (0.0, 1.0),
        probabilities: bool = False,
    ) -> None:
        super().__init__()
        if any(s <= 0 for s in std):
            raise ValueError(f"std must be above 0, not {', '.join(f'{s:g}' for s in std)}")
        self.model, self.bounds, self.probabilities = model, bounds, probabilities
        self.register_buffer("mean", torch.tensor(list(mean) or [0.0]), persistent=False)
        self.register_buffer("std", torch.tensor(list(std) or [1.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.bounds
        channels = [-1, 1, 1] if x.dim() == 4 else [-1]
        mean, std = self.get_buffer("mean").to(x.dtype), self.get_buffer("std").to(x.dtype)
        answer: Tensor = self.model((low + x * (high - low) - mean.view(channels)) / std.view(channels))
        return answer.clamp_min(torch.finfo(answer.dtype).tiny).log() if self.probabilities else answer
