"""Labelled images: four data sets by name, and any ``.npz`` or folder of images of your own."""

import hashlib
import io
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_lite import folders
from robustbench_lite.downloads import data_folder, first_line, read, verified
from robustbench_lite.wording import suggest

Split = Literal["train", "test"]
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Images:
    """One split of a labelled data set."""

    name: str
    split: str
    x: Tensor  # (N, C, H, W) or (N, D), float32 in [0, 1]
    y: Tensor  # (N,) int64
    classes: int
    fingerprint: str  # SHA-256 of the whole split as it was read: shape, pixels, labels; a subset keeps it

    def __len__(self) -> int:
        return len(self.y)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return tuple(self.x.shape[1:])

    def take(self, rows: slice | Tensor) -> "Images":
        return replace(self, x=self.x[rows], y=self.y[rows])


@dataclass(frozen=True)
class Source:
    """A data set that can be asked for by name."""

    name: str
    classes: int
    shape: tuple[int, ...]
    train: int
    test: int
    eps: Mapping[str, float]  # customary, by norm
    about: str
    paper: str


_SOURCES = (
    Source(
        name="cifar10",
        classes=10,
        shape=(3, 32, 32),
        train=50_000,
        test=10_000,
        eps={"linf": 8 / 255, "l2": 0.5, "l1": 12, "l0": 5, "patch": 0.05},
        about="small colour photographs of animals and vehicles",
        paper="Krizhevsky, Learning multiple layers of features from tiny images, 2009",
    ),
    Source(
        name="digits",
        classes=10,
        shape=(1, 8, 8),
        train=1_198,
        test=599,
        eps={"linf": 0.1, "l2": 1},
        about="handwritten digits that scikit-learn carries; every third image is a test image",
        paper="Alpaydin & Kaynak, Optical recognition of handwritten digits, UCI, 1998",
    ),
    Source(
        name="fashion-mnist",
        classes=10,
        shape=(1, 28, 28),
        train=60_000,
        test=10_000,
        eps={"linf": 0.1},
        about="clothes from Zalando's shop, in MNIST's format",
        paper="Xiao, Rasul & Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking ML algorithms, 2017",
    ),
    Source(
        name="mnist",
        classes=10,
        shape=(1, 28, 28),
        train=60_000,
        test=10_000,
        eps={"linf": 0.3, "l2": 2, "l1": 10, "l0": 10, "patch": 0.1},
        about="handwritten digits; the test split ships with the package",
        paper="LeCun, Bottou, Bengio & Haffner, Gradient-based learning applied to document recognition, 1998",
    ),
)
SOURCES: dict[str, Source] = {source.name: source for source in _SOURCES}


def load(name: str, split: Split = "test", data_dir: Path | None = None) -> Images:
    """The images called ``name``: one of ``SOURCES``, ``npz:FILE``, or ``folder:DIR``.

    What the package does not carry is looked for in ``data_dir`` (else $ROBUST_BENCH_DATA), laid out as torchvision
    does, then in the cache folder, then downloaded. A file that is truncated, altered or unreadable is a ValueError.

    An ``.npz`` holds ``x`` and ``y``, and may hold ``x_train``, ``y_train`` and the number of ``classes``. x is uint8
    or floats in [0, 1], of shape (N, D), (N, H, W), (N, C, H, W), or (N, H, W, C): the last where that axis is 1, 3
    or 4 long and axis 1 is not. For a folder see :mod:`robustbench_lite.folders`.
    """
    if split not in get_args(Split):
        raise ValueError(f"no split {split!r}; there are: {', '.join(get_args(Split))}")
    if name.startswith("npz:"):
        return _npz(name, split)
    if name.startswith("folder:"):
        x, y, classes = folders.read(Path(name.removeprefix("folder:")).expanduser(), split)
        return _images(name, split, x, y, classes)
    source = _source(name)
    if name == "digits":
        x, y = _digits(split)
    elif name == "cifar10":
        x, y = _cifar10(split, data_dir)
    else:
        x, y = _mnist(name, split, data_dir)
    return _images(name, split, x, y, source.classes)


def is_own(name: str) -> bool:
    """Whether a data set's name points to one of the person's own."""
    return name.startswith(("npz:", "folder:"))


def customary_eps(name: str, norm: str) -> float:
    """The eps that papers use for this data set under this norm."""
    eps = {} if is_own(name) else _source(name).eps
    if norm not in eps:
        raise ValueError(f"no customary eps for {name} under {norm}; give an eps, e.g. --threat {norm}:0.1")
    return eps[norm]


def _source(name: str) -> Source:
    if name in SOURCES:
        return SOURCES[name]
    raise ValueError(f"no data set {name!r}; {suggest(name, SOURCES, more=', npz:FILE, folder:DIR')}")


def _images(name: str, split: str, x: Array, y: Array, classes: int) -> Images:
    """``x`` is uint8, or float32 in [0, 1]."""
    x, y = np.ascontiguousarray(x), np.array(y, "<i8")
    content = hashlib.sha256(f"{x.dtype.name} {x.shape}".encode())
    content.update(x.data)
    content.update(y.data)
    unit = np.divide(x, 255, dtype=np.float32) if x.dtype == np.uint8 else x
    return Images(name, split, torch.from_numpy(unit), torch.from_numpy(y), classes, content.hexdigest())


def _digits(split: Split) -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    test = np.arange(len(y)) % 3 == 0
    rows = test if split == "test" else ~test
    return (x[rows] / 16).astype(np.float32).reshape(-1, 1, 8, 8), y[rows]


def _mnist(name: str, split: Split, data_dir: Path | None) -> tuple[Array, Array]:
    stem = {"train": "train", "test": "t10k"}[split]
    x, y = (_idx(verified(name, f"{stem}-{kind}-ubyte", data_dir)) for kind in ("images-idx3", "labels-idx1"))
    return x[:, None], y


def _idx(content: bytes) -> Array:
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _cifar10(split: Split, data_dir: Path | None) -> tuple[Array, Array]:
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    files = [Path("cifar-10-batches-py", name) for name in names]
    folder = data_folder(data_dir)
    if folder and (folder / files[0]).parent.is_dir():
        parts = [_batch(read(folder / file), folder / file) for file in files]
    else:
        content = verified("cifar10", "cifar-10-python.tar.gz", data_dir)
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            parts = [_batch(tar.extractfile(file.as_posix()).read(), file) for file in files]  # type: ignore[union-attr]
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def _batch(content: bytes, path: Path) -> tuple[Array, Array]:
    try:
        stored = _Batch(io.BytesIO(content), encoding="bytes").load()
        batch = {key if isinstance(key, bytes) else key.encode(): value for key, value in stored.items()}
        x, y = batch[b"data"].array.reshape(-1, 3, 32, 32), np.array(batch[b"labels"])
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{path}: not a batch of CIFAR-10 ({first_line(error)})") from None
    _check_labels(path, "labels", y, len(x), classes=10)
    return x, y


class _Batch(pickle.Unpickler):
    """Reads uint8 arrays, numbers, text, lists and dicts; whatever the pickle would call has a stand-in here."""

    def find_class(self, module: str, name: str) -> Any:
        stand_ins = {
            "multiarray._reconstruct": lambda *_: _PickledArray(),
            "numeric._frombuffer": lambda raw, _, shape, order: _PickledArray(raw, shape, order),
            "numpy.ndarray": None,
            "numpy.dtype": _PickledType,
            "_codecs.encode": lambda text, _: text.encode("latin-1"),
        }
        asked = f"{module}.{name}"
        known = asked.removeprefix("numpy.core.").removeprefix("numpy._core.")
        if known not in stand_ins:
            raise ValueError(f"refused: it asks for {asked}")
        return stand_ins[known]


class _PickledType:
    def __init__(self, code: str | bytes, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise ValueError(f"an array of {code!r}, not of 'u1'")

    def __setstate__(self, state: object) -> None:
        """Byte order and the like: nothing that a uint8 needs."""


class _PickledArray:
    def __init__(self, raw: bytes = b"", shape: tuple[int, ...] = (0,), order: Literal["C", "F"] = "C") -> None:
        self.array = np.frombuffer(raw, np.uint8).reshape(shape, order=order)

    def __setstate__(self, state: tuple[int, tuple[int, ...], object, bool, bytes]) -> None:
        _, shape, _, fortran, raw = state
        self.array = _PickledArray(raw, shape, "F" if fortran else "C").array


def _npz(name: str, split: Split) -> Images:
    path = Path(name.removeprefix("npz:")).expanduser()
    if not path.is_file():
        raise ValueError(f"no file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz file, or a truncated one")
    x_key, y_key = ("x", "y") if split == "test" else ("x_train", "y_train")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key]) for key in file.files if key in {x_key, "y", "y_train", "classes"}}
            there = ", ".join(file.files) or "none"
    except Exception as error:  # a damaged zip raises anything
        raise ValueError(f"{path}: not a readable .npz file ({first_line(error)})") from None
    for key in (x_key, y_key):
        if key not in arrays:
            raise ValueError(f"{path}: no array {key} for the {split} split; there are: {there}")
    x = _pixels(path, x_key, arrays[x_key])
    labels = {key: arrays[key] for key in ("y", "y_train") if key in arrays}
    classes = _classes(path, arrays["classes"]) if "classes" in arrays else None
    for key, y in labels.items():
        _check_labels(path, key, y, len(x) if key == y_key else y.size, classes)
    return _images(name, split, x, labels[y_key], classes or 1 + max(int(y.max()) for y in labels.values()))


def _pixels(path: Path, key: str, x: Array) -> Array:
    """uint8 or float32; (N, D) or (N, C, H, W)."""
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise ValueError(f"{path}: {key} is {x.dtype}; give uint8, or floats in [0, 1]")
    if x.ndim not in (2, 3, 4):
        raise ValueError(f"{path}: {key} has shape {x.shape}; give (N, C, H, W), (N, H, W, C), (N, H, W) or (N, D)")
    if not x.size:
        raise ValueError(f"{path}: {key} is empty, of shape {x.shape}")
    if x.dtype != np.uint8:
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        low, high = x.min(), x.max()
        if np.isnan(low):
            raise ValueError(f"{path}: {key} has NaN")
        if low < 0 or high > 1:
            raise ValueError(f"{path}: {key} runs from {low:g} to {high:g}, not within [0, 1]; divide by 255?")
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        return x.transpose(0, 3, 1, 2)
    return x


def _classes(path: Path, given: Array) -> int:
    if given.size != 1 or given.dtype.kind not in "iu" or given.item() < 1:
        raise ValueError(f"{path}: classes must be their number, a whole one")
    return int(given.item())


def _check_labels(path: Path, key: str, y: Array, images: int, classes: int | None) -> None:
    if y.shape != (images,):
        raise ValueError(f"{path}: {images} images, but {key} has shape {y.shape}")
    if y.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels out of range: {key} is {y.dtype}, want integers")
    if not images:
        raise ValueError(f"{path}: {key} is empty")
    top = np.iinfo(np.int64).max if classes is None else classes - 1
    if y.min() < 0 or y.max() > top:
        raise ValueError(f"{path}: labels out of range: {key} runs from {y.min()} to {y.max()}, want 0 to {top}")
