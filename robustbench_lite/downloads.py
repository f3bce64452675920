"""Files of data sets: from the package, a person's folder, the cache, or a mirror; known by their hash."""

import gzip
import hashlib
import os
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

# An idx file is known by its decompressed content: compressed anew, it is still the same data.
_SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    "cifar10": {
        "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    },
}
_MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
    "cifar10": (
        "https://www.cs.toronto.edu/~kriz/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    ),
}
_FOLDER = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw", "cifar10": ""}  # as torchvision lays them out


def cache_dir() -> Path:
    """Where downloads are kept: $ROBUST_BENCH_CACHE, else the system's place for caches."""
    if folder := os.environ.get("ROBUST_BENCH_CACHE"):
        return Path(folder).expanduser()
    import pooch

    return Path(pooch.os_cache("robustbench-lite"))


def data_folder(data_dir: Path | None) -> Path | None:
    """The folder that a person has named, or None.

    Raises:
        ValueError: where it is not there.
    """
    named = data_dir or os.environ.get("ROBUST_BENCH_DATA")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise ValueError(f"no folder {folder} to read data from")
    return folder


def verified(name: str, file: str, data_dir: Path | None) -> bytes:
    """The content of a file with a known hash: from the package, the user's folder, the cache or a mirror."""
    sha256 = _SHA256[name][file]
    archive = file if file.endswith(".gz") else f"{file}.gz"
    for path in _places(name, file, archive, data_dir):
        if path.is_file():
            return _content(path, sha256)
    return _download(name, archive, sha256, data_dir)


def _places(name: str, file: str, archive: str, data_dir: Path | None) -> Iterator[Path]:
    yield Path(__file__).parent / name / archive
    for find in (partial(data_folder, data_dir), cache_dir):
        if root := find():
            yield root / _FOLDER[name] / archive
            yield root / _FOLDER[name] / file


def _content(path: Path, sha256: str) -> bytes:
    """What ``path`` holds, decompressed if that is what has the hash."""
    content = read(path)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256 and content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: truncated or damaged ({first_line(error)})") from None
        found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: not the published data: its SHA-256 is {found[:12]}..., want {sha256[:12]}...")
    return content


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _download(name: str, archive: str, sha256: str, data_dir: Path | None) -> bytes:
    import pooch

    def fetch(url: str, part: str, pool: pooch.Pooch) -> None:
        http = pooch.HTTPDownloader(progressbar=_Megabytes(archive), chunk_size=1 << 16, timeout=(10, 60))
        http(url, part, pool)
        _content(Path(part), sha256)

    failures = []
    for mirror in _MIRRORS[name]:
        pool = pooch.create(cache_dir() / _FOLDER[name], mirror, registry={archive: None})
        try:
            return _content(Path(pool.fetch(archive, downloader=fetch)), sha256)
        except (OSError, ValueError) as error:  # those of requests are OSErrors
            reason = "wrong content" if isinstance(error, ValueError) else type(error).__name__
            failures.append(f"{urlsplit(mirror).netloc}: {reason}")
    root = data_folder(data_dir) or Path("DIR")
    raise ValueError(
        f"{name}: no {archive} here, and it could not be downloaded ({', '.join(failures)}); "
        f"put it at {root / _FOLDER[name] / archive} and say --data-dir {root}"
    )


class _Megabytes:
    """What pooch asks of a progress bar."""

    def __init__(self, file: str) -> None:
        self.file, self.done, self.total = file, 0, 0

    def update(self, size: int) -> None:
        self.done = min(self.done + size, self.total)
        self._print("")

    def reset(self) -> None:
        self.done = 0

    def close(self) -> None:
        self._print("\n")

    def _print(self, end: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{self.file}: {self.done >> 20} of {self.total >> 20} MiB", end=end, file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    """Of what it says, or else its type."""
    return (str(error) or type(error).__name__).splitlines()[0]
