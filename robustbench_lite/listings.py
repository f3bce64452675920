"""What there is: plugins and their settings, data sets, models, the cache, and the state of this installation."""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from robustbench_lite import __version__, data, downloads, registry, zoo
from robustbench_lite import models as architectures
from robustbench_lite import suites as protocols
from robustbench_lite.display import table
from robustbench_lite.exports import percent
from robustbench_lite.norms import NORMS

if TYPE_CHECKING:
    from torch import Tensor, nn

OURS = ("trained/*", "MNIST/raw/*", "FashionMNIST/raw/*", "cifar-10-python.tar.gz*")  # below the cache folder


def overview(kind: registry.Kind) -> RenderableType:
    """A line a plugin, and a line a family of them."""
    plugins: dict[str, Any] = dict(registry.plugins(kind))
    if not plugins:
        return Text(f"There is no {kind} yet.")
    heads = [kind, "does", "norms", *(["sees"] if kind == "attack" else [])]
    lines = [
        [name, _summary(cls), _norms(cls), *([cls.access] if kind == "attack" else [])] for name, cls in plugins.items()
    ]
    families = [
        Text(f"{name}/...: {_summary(members)} robust-bench {kind}s {name} lists them.")
        for name, members in registry.families(kind).items()
    ]
    note = Text(f"robust-bench {kind}s NAME says more, with the settings and the paper's BibTeX.")
    return Group(table(f"{kind}s", heads, lines), *families, note)


def explain(kind: registry.Kind, name: str) -> RenderableType:
    """All there is to say about one plugin, or the members of a family."""
    if name in registry.families(kind):
        members: set[Any] = set(registry.families(kind)[name]().values())
        lines = [f"{cls.name}  ({_norms(cls)}; {cls.access})\n    {_summary(cls)}" for cls in members]
        return Text("\n".join([*sorted(lines), f"robust-bench {kind}s {name}/NAME says more."]))
    cls: Any = registry.find(kind, name)
    parts = [Text(f"{name}  ({registry.origin(cls)})", style="bold"), *_paragraphs(cls)]
    if kind == "attack":
        parts.append(Text(f"norms: {_norms(cls)}; needs the model's {cls.access}"))
    settings = _settings(cls)
    parts.append(Text(f"settings: {', '.join(settings)}" if settings else "no settings"))
    if getattr(cls, "bibtex", ""):
        parts.append(Text(cls.bibtex))
    return Group(*parts)


def datasets() -> RenderableType:
    """A line a data set."""
    lines = [
        [
            source.name,
            "x".join(map(str, source.shape)),
            source.classes,
            source.train,
            source.test,
            ", ".join(f"{norm}:{eps:g}" for norm, eps in source.eps.items()),
            source.about,
        ]
        for source in data.SOURCES.values()
    ]
    heads = ["data set", "shape", "classes", "train", "test", "customary eps", "where it comes from"]
    note = Text(
        "npz:FILE is a data set of yours: arrays x (images in NCHW or NHWC, or vectors) and y. "
        "folder:DIR holds PNG or JPEG files in a sub-folder a class."
    )
    return Group(table("data sets", heads, lines), note)


def suites() -> RenderableType:
    """A line a suite that comes with the package."""
    lines = [
        [suite.name, suite.version, suite.description, ", ".join(block.name for block in suite.block)]
        for suite in map(protocols.load, protocols.builtin())
    ]
    note = Text("robust-bench run NAME runs one; robust-bench run FILE.toml one of yours.")
    return Group(table("suites", ["suite", "version", "what it runs", "blocks"], lines), note)


def models() -> list[RenderableType]:
    """The architectures, and the weights that ship."""
    known = [[name, inspect.cleandoc(build.__doc__ or "")] for name, build in architectures.MODELS.items()]
    shipped = [
        [
            entry.defense,
            entry.dataset,
            entry.model,
            percent(entry.clean_accuracy),
            f"{percent(entry.robust_accuracy)} ({entry.threat}, {entry.attack}, n={entry.examples})",
            "" if entry.certified_accuracy is None else f"{percent(entry.certified_accuracy)} ({entry.certifier})",
        ]
        for entry in zoo.manifest()
    ]
    heads = ["defense", "data set", "model", "clean %", "robust %", "certified %"]
    made = [Text(f"{entry.file} is made by\n    {entry.command}") for entry in zoo.manifest()]
    return [table("architectures", ["model", "layers"], known), table("weights that ship", heads, shipped), *made]


def layers(model: nn.Module, x: Tensor) -> RenderableType:
    """A line a layer with weights, and what the layers together do to a difference of inputs shaped as ``x``."""
    from robustbench_lite import lipschitz

    norms, net = lipschitz.layer_norms(model), lipschitz.bare(model)[0]
    lines = []
    for name, values in lipschitz.singular_values(model).items():
        layer = net.get_submodule(name)
        some = values[values > 1e-4 * values.max()]
        shape = "x".join(map(str, layer.get_parameter("weight").shape))
        lines.append([name, type(layer).__name__, shape, f"{some.min():.4f} to {some.max():.4f}", f"{norms[name]:.4f}"])
    title = f"layers: no logits move further than {lipschitz.constant(model, x):.4g} times the input (l2)"
    note = Text("Singular values: without zeros; of a convolution, of its unfolded kernel, scaled to bound its norm.")
    return Group(table(title, ["layer", "kind", "weight", "singular values", "norm at most"], lines), note)


def cache(clear: bool) -> RenderableType:
    """What was downloaded and trained; ``clear`` deletes these files and no other that the folder may hold."""
    folder = downloads.cache_dir()
    files = sorted(path for ours in OURS for path in folder.glob(ours) if path.is_file())
    if clear:
        for path in files:
            path.unlink()
        return Text(f"deleted {len(files)} files in {folder}")
    lines = [[str(path.relative_to(folder)), f"{path.stat().st_size / 1e6:.1f}"] for path in files]
    return table(f"{folder}", ["file", "MB"], lines) if lines else Text(f"{folder} is empty")


def doctor(data_dir: Path | None) -> RenderableType:
    """Versions, devices, folders, and what is missing."""
    import torch

    packages = ("torch", "numpy", "pandas", "scipy", "scikit-learn", "cvxpy", "safetensors", "pooch", "typer", "rich")
    lines = [["robustbench-lite", __version__], ["python", platform.python_version()]]
    lines += [[name, _installed(name)] for name in packages]
    lines += [[f"extra: {name}", _installed(name)] for name in ("foolbox", "onnx2torch", "timm", "robustbench")]
    gpus = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
    lines.append(["devices", ", ".join([*gpus, *["mps"] * torch.backends.mps.is_available(), "cpu"])])
    lines.append(["cpu threads", str(torch.get_num_threads())])
    lines.append(["cache", str(downloads.cache_dir())])
    lines.append(["data folder", str(data_dir) if data_dir else "none (--data-dir or ROBUST_BENCH_DATA)"])
    lines += [[f"{kind}s", ", ".join(registry.plugins(kind)) or "none"] for kind in registry.KINDS]
    return table("robust-bench doctor", ["what", "found"], lines)


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed (pip install {package})"


def _summary(cls: object) -> str:
    """The first sentence or so: what stands before the docstring's first empty line."""
    return _paragraphs(cls)[0].plain.strip()


def _paragraphs(cls: object) -> list[Text]:
    """The docstring, each paragraph on one line, for the screen to wrap."""
    text = inspect.cleandoc(cls.__doc__ or "").replace("``", "")
    return [Text(" ".join(paragraph.split()) + "\n") for paragraph in text.split("\n\n")]


def _norms(cls: Any) -> str:
    return " ".join(norm for norm in NORMS if norm in getattr(cls, "norms", ()))


def _settings(cls: Any) -> list[str]:
    return [name if value is None else f"{name}={value}" for name, value in registry.defaults(cls).items()]
