import errno
import gzip
import hashlib
import io
import os
import pickle
import re
import socket
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from robustbench_lite import data, downloads
from robustbench_lite.data import SOURCES, Images, customary_eps, load
from robustbench_lite.downloads import cache_dir

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (12, 28, 28), np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 10
IMAGES, ANSWERS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBUST_BENCH_DATA", raising=False)
    monkeypatch.setenv("ROBUST_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A tiny training set in the place of MNIST's and Fashion-MNIST's; its idx files."""
    files = {IMAGES: idx(PIXELS), ANSWERS: idx(LABELS)}
    for name in ("mnist", "fashion-mnist"):
        for file, content in files.items():
            monkeypatch.setitem(downloads._SHA256[name], file, hashlib.sha256(content).hexdigest())
    return files


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def put(folder: Path, files: dict[str, bytes], suffix: str = ".gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / (name + suffix)).write_bytes(gzip.compress(content, 1) if suffix else content)
    return folder


def refusal(name: str, split: data.Split = "test", data_dir: Path | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        load(name, split, data_dir)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


# What ships with the package or its dependencies


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("name", "split"), [("mnist", "test"), ("digits", "test"), ("digits", "train")])
def test_carried_data_load_offline_and_are_what_the_list_says(name: str, split: data.Split) -> None:
    images, source = load(name, split), SOURCES[name]
    assert (images.name, images.split, images.classes, images.shape) == (name, split, source.classes, source.shape)
    assert len(images) == len(images.x) == getattr(source, split)
    assert (images.x.dtype, images.y.dtype) == (torch.float32, torch.int64)
    assert (images.x.min(), images.x.max()) == (0, 1)
    assert images.y.unique().tolist() == list(range(source.classes))


def test_mnist_is_mnist() -> None:
    images = load("mnist")
    assert images.y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert images.y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert images.x.mean().item() == pytest.approx(0.1325, abs=1e-4)


@pytest.mark.usefixtures("offline")
def test_the_test_split_needs_no_data_dir_even_a_wrong_one(tmp_path: Path) -> None:
    assert len(load("mnist", data_dir=tmp_path / "nowhere")) == 10_000


def test_digits_splits_share_no_image_and_leave_none_out() -> None:
    from sklearn.datasets import load_digits

    test, train = load("digits", "test"), load("digits", "train")
    whole = np.sort(load_digits().data.reshape(-1, 64) / 16, axis=0)
    both = torch.cat([test.x, train.x]).reshape(-1, 64)
    assert np.array_equal(np.sort(both.numpy(), axis=0), whole.astype(np.float32))
    assert torch.equal(test.y[:3], torch.tensor([0, 3, 6]))


def test_take_keeps_the_metadata() -> None:
    images = load("digits")
    for rows in (slice(2, 5), torch.tensor([2, 3, 4]), (torch.arange(len(images)) - 3).abs() <= 1):
        few = images.take(rows)
        assert torch.equal(few.x, images.x[2:5])
        assert torch.equal(few.y, images.y[2:5])
        assert (few.name, few.split, few.fingerprint) == (images.name, images.split, images.fingerprint)


# Names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mnits",
            "no data set 'mnits'; did you mean mnist? "
            "There are: cifar10, digits, fashion-mnist, mnist, npz:FILE, folder:DIR",
        ),
        ("?", "no data set '?'; there are: cifar10, digits, fashion-mnist, mnist, npz:FILE, folder:DIR"),
    ],
)
def test_unknown_names_get_the_nearest_and_the_list(name: str, message: str) -> None:
    assert refusal(name) == message
    with pytest.raises(ValueError, match=re.escape(message)):
        customary_eps(name, "linf")


def test_unknown_split() -> None:
    assert refusal("digits", "val") == "no split 'val'; there are: train, test"  # type: ignore[arg-type]


def test_customary_eps() -> None:
    assert customary_eps("cifar10", "linf") == 8 / 255
    assert customary_eps("mnist", "patch") == 0.1
    for name, norm in [("digits", "patch"), ("npz:mine.npz", "linf")]:
        with pytest.raises(ValueError, match=rf"{name} under {norm}; give an eps, e.g. --threat {norm}:0.1"):
            customary_eps(name, norm)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("ROBUST_BENCH_CACHE")
    assert cache_dir().name == "robustbench-lite"


# MNIST's files in the user's folder


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_train_split_from_a_folder(
    name: str,
    folder: str,
    suffix: str,
    how: str,
    published: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(tmp_path / folder / "raw", published, suffix)
    if how == "environment":
        monkeypatch.setenv("ROBUST_BENCH_DATA", str(tmp_path))
    images = load(name, "train", tmp_path if how == "argument" else None)
    assert torch.equal((images.x * 255).round().byte()[:, 0], torch.from_numpy(PIXELS))
    assert torch.equal(images.y, torch.from_numpy(LABELS).long())
    assert (images.x.shape, images.classes) == ((12, 1, 28, 28), 10)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("file", [IMAGES, ANSWERS])
def test_an_altered_file_is_refused(file: str, published: dict[str, bytes], tmp_path: Path) -> None:
    altered = published[file][:-1] + bytes([published[file][-1] ^ 1])
    folder = put(tmp_path / "MNIST/raw", {**published, file: altered})
    message = refusal("mnist", "train", tmp_path)
    assert str(folder / f"{file}.gz") in message
    for content in (altered, published[file]):
        assert hashlib.sha256(content).hexdigest()[:12] in message


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("keep", [0, 1, 9, 20, -20, -1])
@pytest.mark.parametrize("suffix", [".gz", ""])
def test_a_truncated_file_is_refused(keep: int, suffix: str, published: dict[str, bytes], tmp_path: Path) -> None:
    path = put(tmp_path / "MNIST/raw", published, suffix) / (IMAGES + suffix)
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal("mnist", "train", tmp_path).startswith(f"{path}: ")


@pytest.mark.usefixtures("offline")
def test_a_folder_that_is_not_there_is_not_passed_over(tmp_path: Path) -> None:
    for name in ("mnist", "cifar10"):
        assert refusal(name, "train", tmp_path / "typo") == f"no folder {tmp_path / 'typo'} to read data from"


@pytest.mark.usefixtures("offline")
def test_an_unreadable_file(published: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    path = put(tmp_path / "MNIST/raw", published) / f"{IMAGES}.gz"
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert refusal("mnist", "train", tmp_path) == f"{path}: Permission denied"


# Downloads, from a server of our own

Answer = tuple[int, bytes, int]  # status, body, bytes really sent


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Mirrors, each a dict of its answers, for one data set; the list of requests they got."""
    servers = []

    def start(name: str, *mirrors: dict[str, Answer]) -> list[str]:
        requests: list[str] = []

        def handler(number: int, answers: dict[str, Answer]) -> type[BaseHTTPRequestHandler]:
            class Handler(BaseHTTPRequestHandler):
                def do_GET(self) -> None:
                    requests.append(f"{number}{self.path}")
                    status, body, sent = answers.get(self.path[1:], (404, b"", 0))
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[:sent])

                def log_message(self, *_: object) -> None:
                    pass

            return Handler

        urls = []
        for number, answers in enumerate(mirrors):
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler(number, answers))
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            servers.append(server)
            urls.append(f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setitem(downloads._MIRRORS, name, tuple(urls))
        return requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answers(files: dict[str, bytes]) -> dict[str, Answer]:
    packed = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    return {name: (200, body, len(body)) for name, body in packed.items()}


def cached() -> set[str]:
    return {path.name for path in cache_dir().rglob("*") if path.is_file()}


def test_download_once_then_from_the_cache(serve: Callable[..., list[str]], published: dict[str, bytes]) -> None:
    requests = serve("mnist", answers(published))
    first = load("mnist", "train")
    assert requests == [f"0/{IMAGES}.gz", f"0/{ANSWERS}.gz"]
    assert cached() == {f"{IMAGES}.gz", f"{ANSWERS}.gz"}
    serve("mnist", {})
    assert torch.equal(load("mnist", "train").x, first.x)
    path = cache_dir() / "MNIST/raw" / f"{IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:-9])
    assert refusal("mnist", "train").startswith(f"{path}: truncated or damaged")


@pytest.mark.parametrize("bad", ["absent", "broken", "truncated", "altered", "not gzip"])
def test_the_next_mirror_serves_when_the_first_does_not(
    bad: str, serve: Callable[..., list[str]], published: dict[str, bytes]
) -> None:
    good = answers(published)
    body = good[f"{IMAGES}.gz"][1]
    altered = gzip.compress(published[IMAGES][:-1] + b"!")
    answer = {
        "absent": (404, b"", 0),
        "broken": (500, b"oh", 2),
        "truncated": (200, body, len(body) // 2),
        "altered": (200, altered, len(altered)),
        "not gzip": (200, b"<html>", 6),
    }[bad]
    requests = serve("mnist", {**good, f"{IMAGES}.gz": answer}, good)
    assert torch.equal(load("mnist", "train").y, torch.from_numpy(LABELS).long())
    assert requests == [f"0/{IMAGES}.gz", f"1/{IMAGES}.gz", f"0/{ANSWERS}.gz"]
    assert cached() == {f"{IMAGES}.gz", f"{ANSWERS}.gz"}


def test_a_failed_download_leaves_nothing_and_starts_again(
    serve: Callable[..., list[str]], published: dict[str, bytes]
) -> None:
    good = answers(published)
    serve("mnist", {**good, f"{IMAGES}.gz": (200, good[f"{IMAGES}.gz"][1], 99)})
    refusal("mnist", "train")
    assert cached() == set()
    serve("mnist", {**good, f"{IMAGES}.gz": (200, b"<html>", 6)})
    assert "(127.0.0.1:" in (message := refusal("mnist", "train"))
    assert ": wrong content)" in message
    assert cached() == set()
    serve("mnist", good)
    assert len(load("mnist", "train")) == 12


@pytest.mark.parametrize("given", [True, False])
def test_without_any_mirror_the_error_says_what_to_put_where(given: bool, tmp_path: Path, monkeypatch: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setitem(downloads._MIRRORS, "mnist", (f"http://{host}/",))
    root = tmp_path if given else Path("DIR")
    path = root / "MNIST/raw" / f"{IMAGES}.gz"
    assert refusal("mnist", "train", tmp_path if given else None) == (
        f"mnist: no {IMAGES}.gz here, and it could not be downloaded ({host}: ConnectionError); "
        f"put it at {path} and say --data-dir {root}"
    )


def test_only_what_is_missing_is_downloaded(
    serve: Callable[..., list[str]], published: dict[str, bytes], tmp_path: Path
) -> None:
    requests = serve("mnist", answers(published))
    put(tmp_path / "MNIST/raw", {IMAGES: published[IMAGES]})
    assert len(load("mnist", "train", tmp_path)) == 12
    assert requests == [f"0/{ANSWERS}.gz"]


# CIFAR-10


def batch(rows: int, start: int = 0) -> dict[bytes, Any]:
    x = np.random.default_rng(start).integers(0, 256, (rows, 3072), np.uint8)
    return {b"batch_label": b"some", b"data": x, b"labels": [(start + i) % 10 for i in range(rows)]}


def cifar(root: Path, protocol: int = 2) -> list[dict[bytes, Any]]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    batches = [batch(3, start) for start in range(5)]
    for number, content in enumerate(batches, 1):
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(content, protocol))
    (folder / "test_batch").write_bytes(pickle.dumps(batch(4, 7), protocol))
    return batches


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar10_from_a_folder(protocol: int, tmp_path: Path) -> None:
    batches = cifar(tmp_path, protocol)
    train, test = load("cifar10", "train", tmp_path), load("cifar10", "test", tmp_path)
    whole = np.concatenate([part[b"data"] for part in batches]).reshape(-1, 3, 32, 32)
    assert np.array_equal((train.x.numpy() * 255).round(), whole)
    assert train.y.tolist() == [label for part in batches for label in part[b"labels"]]
    assert (len(test), test.shape, test.classes, test.y.tolist()) == (4, (3, 32, 32), 10, [7, 8, 9, 0])


@pytest.mark.usefixtures("offline")
def test_cifar10_as_python_2_and_old_numpy_wrote_it(tmp_path: Path) -> None:
    """In its pickles text is bytes, and so are the type's code, the pixels and the keys."""
    content = batch(2)
    pixels = content[b"data"].tobytes()
    long = len(pixels).to_bytes(4, "little")
    old = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89T" + long + pixels + b"tbU\x06labels](K\x00K\x01eu."
    )
    cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(old)
    images = load("cifar10", "test", tmp_path)
    assert np.array_equal((images.x.numpy() * 255).round().reshape(2, 3072), content[b"data"])
    assert images.y.tolist() == [0, 1]


@pytest.mark.usefixtures("offline")
def test_cifar10_in_fortran_order_and_with_text_keys(tmp_path: Path) -> None:
    cifar(tmp_path)
    content = batch(3)
    for protocol in (2, 5):
        fortran = {"data": np.asfortranarray(content[b"data"]), "labels": content[b"labels"]}
        (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps(fortran, protocol))
        images = load("cifar10", "test", tmp_path)
        assert np.array_equal((images.x.numpy() * 255).round().reshape(3, 3072), content[b"data"])


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.system, eval, np.load, os.mkdir])
def test_a_malicious_pickle_is_refused_and_not_run(function: Callable[..., Any], protocol: int, tmp_path: Path) -> None:
    cifar(tmp_path)
    path, trace = tmp_path / "cifar-10-batches-py/test_batch", tmp_path / "trace"
    argument = {
        os.system: f"echo > {trace}",
        eval: f"open({str(trace)!r}, 'w')",
        np.load: str(trace),
        os.mkdir: str(trace),
    }[function]
    path.write_bytes(pickle.dumps({**batch(2), b"more": Call(function, argument)}, protocol))
    message = refusal("cifar10", "test", tmp_path)
    assert not trace.exists()
    assert message.startswith(f"{path}: not a batch of CIFAR-10 (refused: it asks for ")
    assert function.__name__ in message


@pytest.mark.usefixtures("offline")
def test_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    cifar(tmp_path)
    path = tmp_path / "cifar-10-batches-py/test_batch"
    path.write_bytes(pickle.dumps({**batch(2), b"data": np.array([None, 1])}))
    assert refusal("cifar10", "test", tmp_path) == f"{path}: not a batch of CIFAR-10 (an array of 'O8', not of 'u1')"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"labels": [0, 1, 10]}, "labels out of range: labels runs from 0 to 10, want 0 to 9"),
        ({b"labels": [0, -1, 2]}, "labels out of range: labels runs from -1 to 2, want 0 to 9"),
        ({b"labels": [0.5, 1, 2]}, "labels out of range: labels is float64, want integers"),
        ({b"labels": [0, 1]}, "3 images, but labels has shape (2,)"),
        ({b"labels": [[0], [1, 2]]}, "not a batch of CIFAR-10 ("),
        ({b"data": b"12"}, "not a batch of CIFAR-10 ("),
        ({b"data": np.zeros((3, 3071), np.uint8)}, "not a batch of CIFAR-10 ("),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "labels"),
    ],
)
def test_a_wrong_batch_is_refused(change: dict[bytes, Any], message: str, tmp_path: Path) -> None:
    cifar(tmp_path)
    path = tmp_path / "cifar-10-batches-py/test_batch"
    path.write_bytes(pickle.dumps({**batch(3), **change}))
    assert refusal("cifar10", "test", tmp_path).startswith(f"{path}: {message}")


@pytest.mark.usefixtures("offline")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 3100), text=st.binary(max_size=30))
def test_a_damaged_batch_is_refused(cut: int, text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-batches-py/test_batch"
    path.parent.mkdir(exist_ok=True)
    whole = pickle.dumps(batch(1), 2)
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    assert refusal("cifar10", "test", tmp_path).startswith(f"{path}: ")
    path.write_bytes(text)
    assert refusal("cifar10", "test", tmp_path).startswith(f"{path}: ")


@pytest.mark.usefixtures("offline")
def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py/data_batch_3").unlink()
    path = tmp_path / "cifar-10-batches-py/data_batch_3"
    assert refusal("cifar10", "train", tmp_path) == f"{path}: No such file or directory"


def test_cifar10_archive_from_a_mirror_and_from_the_folder(
    serve: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar(tmp_path)
    written = load("cifar10", "train", tmp_path)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    archive, body = "cifar-10-python.tar.gz", packed.getvalue()
    monkeypatch.setitem(downloads._SHA256["cifar10"], archive, hashlib.sha256(body).hexdigest())

    requests = serve("cifar10", {archive: (200, body[:-1] + b"!", len(body))}, {archive: (200, body, len(body))})
    assert load("cifar10", "train").fingerprint == written.fingerprint
    assert requests == [f"0/{archive}", f"1/{archive}"]
    assert load("cifar10", "test").y.tolist() == [7, 8, 9, 0]
    assert len(requests) == 2

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / archive).write_bytes(body[:-9])
    assert refusal("cifar10", "train", mine).startswith(f"{mine / archive}: truncated or damaged")


# npz:FILE


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path / "mine.npz", **arrays)
    return f"npz:{path / 'mine.npz'}"


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ((5, 3, 8, 6), (3, 8, 6)),
        ((5, 8, 6, 3), (3, 8, 6)),
        ((5, 8, 6, 1), (1, 8, 6)),
        ((5, 8, 6, 4), (4, 8, 6)),
        ((5, 3, 8, 3), (3, 8, 3)),
        ((5, 1, 1, 1), (1, 1, 1)),
        ((5, 2, 8, 8), (2, 8, 8)),
        ((5, 8, 6), (1, 8, 6)),
        ((5, 7), (7,)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.float16])
def test_npz_layouts(given: tuple[int, ...], shape: tuple[int, ...], dtype: Any, tmp_path: Path) -> None:
    x = RANDOM.integers(0, 256, given) if dtype == np.uint8 else RANDOM.random(given)
    images = load(npz(tmp_path, x=x.astype(dtype), y=np.array([0, 2, 1, 0, 2])))
    assert (images.shape, images.classes, images.y.tolist()) == (shape, 3, [0, 2, 1, 0, 2])
    assert images.x.dtype == torch.float32
    moved = images.x.permute(0, 2, 3, 1) if len(given) == 4 and given[1:] != shape else images.x
    want = x.astype(dtype).astype(np.float32) / (255 if dtype == np.uint8 else 1)
    assert np.allclose(moved.reshape(given).numpy(), want)


def test_npz_splits_and_classes(tmp_path: Path) -> None:
    x, y = RANDOM.random((4, 2)), np.array([0, 1, 0, 1])
    name = npz(tmp_path, x=x, y=y, x_train=x[:3] / 2, y_train=np.array([0, 5, 1]))
    test, train = load(name), load(name, "train")
    assert (test.classes, train.classes) == (6, 6)  # a model trained on one must fit the other
    assert torch.equal(train.x, torch.from_numpy((x[:3] / 2).astype(np.float32)))
    assert test.name == name
    assert load(npz(tmp_path, x=x, y=y, classes=10)).classes == 10
    path = tmp_path / "mine.npz"
    assert refusal(f"npz:{path}", "train") == f"{path}: no array x_train for the train split; there are: x, y, classes"


BAD = {
    "x missing": ({"y": [0, 1]}, "no array x for the test split; there are: y"),
    "y missing": ({"x": [[0.1], [0.2]]}, "no array y for the test split; there are: x"),
    "too few labels": ({"x": [[0.1], [0.2]], "y": [1]}, "2 images, but y has shape (1,)"),
    "labels in a column": ({"x": [[0.1], [0.2]], "y": [[1], [0]]}, "2 images, but y has shape (2, 1)"),
    "NaN": ({"x": [[0.1], [np.nan]], "y": [0, 1]}, "x has NaN"),
    "infinite": ({"x": [[0.1], [np.inf]], "y": [0, 1]}, "x runs from 0.1 to inf, not within [0, 1]; divide by 255?"),
    "huge": ({"x": [[0.1], [1e300]], "y": [0, 1]}, "x runs from 0.1 to inf, not within [0, 1]; divide by 255?"),
    "bytes as floats": (
        {"x": [[0.0], [255.0]], "y": [0, 1]},
        "x runs from 0 to 255, not within [0, 1]; divide by 255?",
    ),
    "below 0": ({"x": [[-0.5], [0.5]], "y": [0, 1]}, "x runs from -0.5 to 0.5, not within [0, 1]"),
    "integers": ({"x": [[0], [255]], "y": [0, 1]}, "x is int64; give uint8, or floats in [0, 1]"),
    "text": ({"x": [["a"], ["b"]], "y": [0, 1]}, "x is <U1; give uint8, or floats in [0, 1]"),
    "a vector": ({"x": [0.1, 0.2], "y": [0, 1]}, "x has shape (2,); give "),
    "a number": ({"x": 0.1, "y": [0, 1]}, "x has shape (); give "),
    "no images": ({"x": np.zeros((0, 3)), "y": np.zeros(0, int)}, "x is empty, of shape (0, 3)"),
    "no pixels": ({"x": np.zeros((2, 0)), "y": [0, 1]}, "x is empty, of shape (2, 0)"),
    "no labels to train": (
        {"x": [[0.1]], "y": [0], "y_train": np.zeros(0, int)},
        "y_train is empty",
    ),
    "negative label": ({"x": [[0.1], [0.2]], "y": [0, -1]}, "labels out of range: y runs from -1 to 0"),
    "label too big": (
        {"x": [[0.1], [0.2]], "y": [0, 2], "classes": 2},
        "labels out of range: y runs from 0 to 2, want 0 to 1",
    ),
    "label far too big": ({"x": [[0.1]], "y": np.array([2**63], np.uint64)}, "labels out of range: y runs from 92"),
    "labels as floats": ({"x": [[0.1], [0.2]], "y": [0.0, 1.5]}, "labels out of range: y is float64, want integers"),
    "training labels": ({"x": [[0.1]], "y": [0], "y_train": [-3]}, "labels out of range: y_train runs from -3 to -3"),
    "one training label": ({"x": [[0.1]], "y": [0], "y_train": 3}, "1 images, but y_train has shape ()"),
    "no classes": ({"x": [[0.1]], "y": [0], "classes": 0}, "classes must be"),
    "many classes": ({"x": [[0.1]], "y": [0], "classes": [1, 2]}, "classes must be"),
    "half a class": ({"x": [[0.1]], "y": [0], "classes": 1.5}, "classes must be"),
    "objects": (
        {"x": np.array([[None], [1]]), "y": [0, 1]},
        "not a readable .npz file (Object arrays cannot be loaded",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_npz_refusals(case: str, tmp_path: Path) -> None:
    arrays, message = BAD[case]
    name = npz(tmp_path, **arrays)
    assert refusal(name).startswith(f"{tmp_path / 'mine.npz'}: {message}")


def test_npz_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    assert refusal(f"npz:{path}") == f"no file {path}"
    assert refusal(f"npz:{tmp_path}") == f"no file {tmp_path}"
    path.write_bytes(b"")
    assert refusal(f"npz:{path}") == f"{path}: not an .npz file, or a truncated one"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert refusal(f"npz:{path}") == f"{path}: not an .npz file, or a truncated one"


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), compressed=st.booleans())
def test_a_damaged_npz_is_refused_or_is_the_same(where: float, flip: int, compressed: bool, tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    save = np.savez_compressed if compressed else np.savez
    save(path, x=np.arange(12).reshape(4, 3) / 12, y=np.arange(4))
    whole, fingerprint = path.read_bytes(), load(f"npz:{path}").fingerprint
    at = int(where * len(whole))
    path.write_bytes(whole[:at])
    assert refusal(f"npz:{path}").startswith(f"{path}: ")
    path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    try:
        assert load(f"npz:{path}").fingerprint == fingerprint
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)  # noqa: PT017, PT018


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    x=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=4), elements=st.floats(0, 1, width=32))
)
def test_npz_keeps_every_pixel(x: np.ndarray, tmp_path: Path) -> None:
    images = load(npz(tmp_path, x=x, y=np.zeros(len(x), int)))
    assert np.array_equal(np.sort(images.x.numpy(), axis=None), np.sort(x, axis=None))
    assert len(images) == len(x)


def test_fingerprint_is_of_the_content_not_of_the_path_or_layout(tmp_path: Path) -> None:
    x, y = RANDOM.integers(0, 256, (4, 3, 8, 8), np.uint8), np.arange(4)
    other = tmp_path / "other"
    other.mkdir()
    first = load(npz(tmp_path, x=x, y=y)).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert load(npz(other, x=x.transpose(0, 2, 3, 1), y=y.astype(np.int32))).fingerprint == first
    assert load(npz(other, x=np.asfortranarray(x), y=y)).fingerprint == first
    pixel, label = x.copy(), y.copy()
    pixel[3, 2, 7, 7] ^= 1
    label[0] = 1
    changed = [load(npz(other, x=a, y=b)) for a, b in [(pixel, y), (x, label), (x.reshape(4, 3, 4, 16), y)]]
    assert len({first, *(images.fingerprint for images in changed)}) == 4


# The rest


def test_images_are_told_apart_by_identity() -> None:
    images = load("digits")
    assert images == images
    assert images != images.take(slice(None))
    assert isinstance(images, Images)


def test_progress_is_shown_on_a_terminal_only(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = downloads._Megabytes("file")
    bar.total = 3 << 20
    bar.update(2 << 20)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar.update(2 << 20)
    assert capsys.readouterr().err == "\rfile: 3 of 3 MiB"
