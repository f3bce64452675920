import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustbench_lite import data
from robustbench_lite.blackbox import Line, Terms, black_box
from robustbench_lite.evaluation import evaluate
from robustbench_lite.matrix import benchmark, load
from robustbench_lite.outcome import UNSEEN, Unfinished
from robustbench_lite.trained import Inputs
from tests.conftest import Ran

CODE = """
import json

import numpy as np
import torch
from torch import nn

from robustbench_lite.data import load

# The class whose mean image is nearest, exact in float64 and then rounded: a batch changes no bit of it.
train = load("digits", "train")
means = torch.stack([train.x[train.y == label].mean(0).flatten() for label in range(10)]).double()


class Nearest(nn.Module):
    def forward(self, x):
        flat = x.flatten(1).double()
        return ((2 * flat @ means.T - means.square().sum(1)) * 4).round(decimals=9).float()


def white():
    return Nearest().eval()


def scores(images):
    assert type(images) is np.ndarray and images.dtype == np.float32
    return Nearest()(torch.from_numpy(images)).numpy()


def odds(images):
    return torch.from_numpy(scores(images)).softmax(1).numpy()


def predict(images):
    return scores(images).argmax(1)


class Limited:
    asked, limit = 0, None


def dies(images):
    Limited.asked += len(images)
    if Limited.limit is not None and Limited.asked > Limited.limit:
        raise RuntimeError("out of memory\\nat 0x7f")
    return predict(images)
"""


@pytest.fixture
def file(place: Path) -> Path:
    (place / "mine.py").write_text(CODE)
    return place / "mine.py"


def run(model: str, access: str | None = None, attack: str = "boundary:queries=400", **settings: Any) -> Any:
    given: dict[str, Any] = {"n": 30, "probe": False, "inputs": Inputs(access=access, **settings.pop("inputs", {}))}
    return benchmark(attack, dataset="digits", model=model, **given | settings)


def statuses(results: Any) -> list[str]:
    return results.rows()["status"].tolist()


# the same classifier, seen through a door


@pytest.mark.parametrize(
    ("function", "access", "attack", "inputs"),
    [
        ("predict", "labels", "boundary:queries=400", {}),
        ("scores", "scores", "square:queries=100", {}),
        ("scores", "scores", "square:queries=100", {"bounds": (0.0, 1.0), "mean": (0.0,)}),
    ],
    ids=["labels", "scores", "adapted"],
)
def test_a_black_box_breaks_where_the_same_model_in_the_open_does(
    file: Path, function: str, access: str, attack: str, inputs: dict[str, Any]
):
    white, black = run("mine.py:white", attack=attack), run(f"mine.py:{function}", access, attack, inputs=inputs)
    columns = ["row", "clean", "status", "adversarial", "distance", "forwards"]
    assert white.rows()[columns].equals(black.rows()[columns])
    assert {"broken", "held"} <= set(statuses(black))


def test_odds_become_logits(file: Path):
    with pytest.raises(ValueError, match="say --probabilities"):
        run("mine.py:odds", "scores", "square:queries=50")
    results = run("mine.py:odds", "scores", "square:queries=50", inputs={"probabilities": True})
    assert "broken" in statuses(results)


def test_attacks_that_see_more_are_left_out_and_said(file: Path, bench: Callable[[str], Ran]):
    common = "--dataset digits --model mine.py:predict --access labels --n 20"
    ran = bench(f"{common} --attack boundary:queries=200,pgd,square --certify crown")
    assert ran.code == 0
    assert "attack pgd is left out: it needs the model's gradients, not only labels" in ran.err
    assert "attack square is left out: it needs the model's scores, not only labels" in ran.err
    assert "certifier crown is left out" in ran.err
    assert "boundary" in ran.out
    assert "!" not in ran.out, "nothing speaks against a row because its gradients cannot be seen"
    ran = bench(f"{common} --attack pgd")
    assert (ran.code, ran.out) == (2, "")
    assert "none of the attacks gets by with the model's labels; these do: boundary, transfer" in ran.errors[-1]
    ran = bench(f"{common} --attack boundary:queries=200 --dry-run")
    assert ran.code == 0
    assert "0 of 1 cells" in ran.out


def test_nothing_of_a_black_box_is_probed_by_gradients(file: Path):
    results = run("mine.py:predict", "labels", "boundary:queries=200", probe=True)
    (probe,) = results.probes
    assert set(probe.probed.gradient) == {UNSEEN}
    assert set(probe.probed.noise) <= {"wrong", "held", "broken"}
    assert results.findings == []
    assert load("runs").findings == []


def test_access_and_code_are_part_of_the_key(file: Path):
    queries = "square:queries=50"
    ours = {entry.subject for entry in run("mine.py:scores", "scores", queries).entries}
    assert {entry.subject for entry in run("mine.py:scores", "scores:retries=1", queries).entries} == ours
    file.write_text(CODE + "\n# changed\n")
    assert {entry.subject for entry in run("mine.py:scores", "scores", queries).entries}.isdisjoint(ours)


# answers that are none


@pytest.mark.parametrize(
    ("code", "access", "reason"),
    [
        ("predict(images)[1:]", "labels", "not 30 labels"),
        ("predict(images).astype(float)", "labels", "float64 of shape (30,), not 30 labels"),
        ("predict(images) + 10", "labels", "not 0 to 9"),
        ("scores(images)", "labels", "not 30 labels"),
        ("scores(images) * np.nan", "scores", "NaN or infinite"),
        ("scores(images)[:, 0]", "scores", "not scores of shape (30, classes)"),
        ("scores(images)[:, :9]", "scores", "of 9 classes, and before of 10"),
        ("[[1], [2, 3]]", "scores", "is no array"),
        ("None", "scores", "not scores"),
    ],
)
def test_an_answer_that_is_none_leaves_inputs_unknown(file: Path, code: str, access: str, reason: str):
    proper = "predict" if access == "labels" else "scores"
    odd = "\ncalls = []\n\n\ndef odd(images):\n    calls.append(1)\n    good = len(calls) == 1\n"
    file.write_text(f"{CODE}\n{odd}    return {proper}(images) if good else {code}\n")
    attack = "boundary:queries=200" if access == "labels" else "square:queries=50"
    results = run("mine.py:odd", access, attack)
    board = results.leaderboard().iloc[0]
    assert (board["unknown"], board["robust_accuracy"], board["clean_accuracy"]) == (30, 0, 0)
    (said,) = results.unknown_reasons()
    assert reason in said


def test_what_a_black_box_answered_before_it_died_is_kept(file: Path, bench: Callable[[str], Ran]):
    line = "--dataset digits --model mine.py:dies --access labels --n 300 --batch 100"
    line += " --attack boundary:queries=100,boundary:queries=110"
    whole = bench(f"{line} --out whole --no-audit --rows whole.csv")
    assert whole.code == 0
    file.write_text(CODE.replace("limit = 0, None", "limit = 0, 15_000"))
    ran = bench(f"{line} --rows some.csv")
    assert ran.code == 1
    assert "unknown: 500 x error: Unfinished: the black box failed: RuntimeError: out of memory at 0x7f" in ran.err
    assert "is not audited" in ran.err
    rows = [Path(name).read_text().splitlines() for name in ("whole.csv", "some.csv")]
    shown = [[row.split(",")[7:16] for row in table[:101]] for table in rows]
    assert shown[0] == shown[1]
    assert all(",unknown,error: Unfinished" in row for row in rows[1][101:])


def test_a_failed_attack_that_had_come_near_proves_nothing(file: Path):
    results = run("mine.py:predict", "labels:queries=3500", "boundary:queries=2000")
    board, rows = results.leaderboard().iloc[0], results.rows()
    assert board["robust_accuracy"] == 0
    assert set(rows["status"]) <= {"unknown", "broken", "wrong"}
    assert (rows["reason"][rows["status"] == "broken"] == "").all()
    again = run("mine.py:predict", "labels", "boundary:queries=2000")
    assert again.unknown == 0, "what had no answer is asked again in the next run"


# terms


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def line(predict: Callable[[Any], Any], terms: str) -> tuple[Line, Clock]:
    clock = Clock()
    return Line(predict, Terms.parse(terms), clock, clock.sleep), clock


def images(count: int) -> NDArray[np.float32]:
    return np.zeros((count, 1), np.float32)


def test_images_are_sent_at_the_rate(place: Path):
    times: list[float] = []
    ask, clock = line(lambda x: times.append(clock.now), "labels:rate=10")
    for count in (20, 5, 1):
        ask(images(count))
    clock.now += 100
    ask(images(5))
    ask(images(1))
    assert times == [100, 102, 102.5, 202.5, 203]


def failing(*failures: Exception | None) -> Callable[[Any], int]:
    left = list(failures)

    def predict(x: object) -> int:
        if left and (failure := left.pop(0)) is not None:
            raise failure
        return len(left)

    return predict


def http(code: int) -> HTTPError:
    return HTTPError("http://x", code, "said the server", {}, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "failure", [http(503), http(429), URLError("refused"), ConnectionError(), TimeoutError()], ids=repr
)
def test_what_may_pass_is_tried_again_ever_later(failure: Exception):
    ask, clock = line(failing(failure, failure, None), "labels")
    assert ask(images(4)) == 0
    assert (clock.slept, ask.asked) == ([1, 2], 12)


@pytest.mark.parametrize("failure", [http(404), ValueError("odd"), MemoryError()], ids=repr)
def test_what_will_not_pass_is_not_tried_again(failure: Exception):
    ask, clock = line(failing(failure, None), "labels")
    with pytest.raises(Unfinished, match="the black box failed"):
        ask(images(1))
    assert clock.slept == []
    assert ask(images(1)) == 0


def test_a_black_box_that_is_gone_is_left_alone():
    asked: list[int] = []
    ask, clock = line(lambda x: asked.append(1) or failing(http(503))(x), "scores:retries=2")
    for _ in range(3):
        with pytest.raises(Unfinished, match="no answer in 3 tries: HTTPError: HTTP Error 503"):
            ask(images(1))
    assert (len(asked), clock.slept) == (3, [1, 2])


def test_no_more_than_the_budget_is_asked():
    sent: list[int] = []
    ask, _ = line(lambda x: sent.append(len(x)), "labels:queries=10")
    ask(images(6))
    with pytest.raises(Unfinished, match="the budget of 10 queries is spent"):
        ask(images(5))
    ask(images(4))
    assert sent == [6, 4]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--model mine.py:predict --access logits", "access is labels or scores, not 'logits'"),
        ("--model mine.py:predict --access labels:rat=3", "no setting 'rat'; did you mean rate?"),
        ("--model mine.py:predict --access labels:rate=0", "rate must be above 0"),
        ("--model mine.py:predict --access labels:queries=0", "queries 1 or more"),
        ("--model mine.py:gone --access labels", "mine.py has no function 'gone'"),
        ("--model mine.py:predict --access labels --probabilities", "--probabilities is about scores"),
        ("--model mine.py:predict --access labels:rate=9 --workers 2", "kept by one process"),
        ("--model http://127.0.0.1:1/x", "is a black box; say what it answers"),
        ("--model onnx:x --access labels", "--access is for a black box"),
        ("--model cnn --access labels", "access describe a model of yours"),
    ],
)
def test_mistakes_are_one_line(file: Path, bench: Callable[[str], Ran], options: str, complaint: str):
    ran = bench(f"--dataset digits --attack boundary --n 10 {options}")
    assert (ran.code, ran.out) == (2, "")
    assert complaint in ran.errors[-1]
    assert "Traceback" not in ran.err


# from Python


def test_a_function_is_evaluated_from_python(place: Path):
    test = data.load("digits")
    weight = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).numpy()
    x, y = test.x[:10], torch.from_numpy((test.x[:10].flatten(1).numpy() @ weight).argmax(1))
    sent: list[int] = []

    def predict(x: NDArray[np.float32]) -> NDArray[np.int64]:
        sent.append(len(x))
        return (x.reshape(len(x), -1) @ weight).argmax(1)

    model = black_box(predict, "labels", classes=10)
    assert "broken" in evaluate("boundary:queries=200", model, x, y, "l2:2").status
    assert sent[:2] == [10, 10], "a look, and the clean labels: no batches are compared, and none is padded"
    with pytest.raises(ValueError, match="attack pgd needs the model's gradients, not only labels"):
        evaluate("pgd", model, x, y, "linf:0.1")
    with pytest.raises(ValueError, match="a black box is named here as FILE"):
        benchmark("boundary", dataset="digits", model=model, n=10)


def test_an_object_with_logits_is_a_model_as_well():
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Face(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Output:
            return Output(self.net(x))

    test = data.load("digits")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    outcomes = [evaluate("pgd:steps=3", m, test.x[:20], test.y[:20], "linf:0.1") for m in (net, Face(net))]
    assert outcomes[0].to_frame().drop(columns="seconds").equals(outcomes[1].to_frame().drop(columns="seconds"))


# over HTTP


class Service:
    """A classifier on 127.0.0.1; ``script`` holds what comes before proper answers, status codes or bodies."""

    def __init__(self) -> None:
        self.script: list[int | bytes] = []
        self.asked: list[int] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["images"]
                service.asked.append(len(asked))
                planned = service.script.pop(0) if service.script else 200
                labels = [int(np.asarray(image)[:, :, :4].sum() > np.asarray(image)[:, :, 4:].sum()) for image in asked]
                self.send_response(planned if isinstance(planned, int) else 200)
                self.end_headers()
                self.wfile.write(planned if isinstance(planned, bytes) else json.dumps({"labels": labels}).encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/predict"
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def service(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(Line, "__init__", patient(Line.__init__))  # no test sleeps
    images = data.load("digits").x[:120]
    labels = (images[..., :4].sum((1, 2, 3)) > images[..., 4:].sum((1, 2, 3))).long()
    np.savez(place / "sides.npz", x=images, y=labels)
    made = Service()
    yield made
    made.server.shutdown()
    made.server.server_close()


def patient(init: Callable[..., None]) -> Callable[..., None]:
    def patient(self: Line, predict: Callable[[Any], Any], terms: Terms) -> None:
        clock = Clock()
        init(self, predict, terms, clock, clock.sleep)

    return patient


SIDES = "--dataset npz:sides.npz --attack boundary:queries=100 --threat l2:1 --no-audit"


def test_a_server_is_asked_for_labels(service: Service, bench: Callable[[str], Ran]):
    service.script = [503, 200, 503, 503]
    ran = bench(f"{SIDES} --model {service.url} --access labels --rows rows.csv")
    assert ran.code == 0
    assert "100.0" in ran.out
    assert "broken" in Path("rows.csv").read_text()
    assert service.script == []
    asked = len(service.asked)
    assert bench(f"{SIDES} --model {service.url} --access labels").code == 0
    assert len(service.asked) == asked, "what is stored is not asked again"


def test_a_server_that_dies_leaves_the_rest_unknown_until_it_is_back(service: Service, bench: Callable[[str], Ran]):
    line = f"{SIDES} --model {service.url} --access labels:retries=1 --batch 100"
    assert bench(f"{line} --n 100").code == 0
    kept = len(service.asked)
    service.script = [200, *[500] * 50]  # a first look, and then no more
    ran = bench(f"{line} --rows some.csv")
    assert ran.code == 1
    assert "unknown: 20 x error: Unfinished: the black box gave no answer in 2 tries: HTTPError" in ran.err
    assert len(service.asked) == kept + 3
    service.script = []
    ran = bench(f"{line} --rows all.csv")
    assert (ran.code, "unknown" in Path("all.csv").read_text()) == (0, False)


@pytest.mark.parametrize(
    "body", [b"<html>", b"[1]", b'{"scores": [[1, 2]]}', b'{"labels": [1, 0]}', b"\xff", b""], ids=repr
)
def test_a_malformed_answer_is_one_line(service: Service, bench: Callable[[str], Ran], body: bytes):
    service.script = [body]
    ran = bench(f"{SIDES} --model {service.url} --access labels")
    assert (ran.code, ran.out) == (2, "")
    assert "the black box" in ran.errors[-1]
    assert "Traceback" not in ran.err
