"""A classifier behind a closed door: a function or a server, of which only labels or scores can be seen."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from http.client import HTTPException
from typing import Any, Literal, Self, cast, get_args, get_type_hints
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustbench_lite import specs
from robustbench_lite.defended import Access, Defended
from robustbench_lite.noise import Noise
from robustbench_lite.outcome import Unfinished
from robustbench_lite.problem import AccessError
from robustbench_lite.wording import one_line, suggest

Seen = Literal["labels", "scores"]
Predict = Callable[[NDArray[np.float32]], Any]

PATIENCE = 60.0  # seconds without a byte, after which a server is taken not to answer
LARGEST = 1 << 28  # bytes of an answer that are read
TRANSIENT = (ConnectionError, TimeoutError, URLError, HTTPException)


@dataclass(frozen=True)
class Terms:
    """What a black box answers, and how often it may be asked: ``labels:rate=50,queries=100000``.

    ``rate`` is images a second and ``queries`` images a run, where there is a limit. Where there is no connection, or
    the server is at fault (5xx) or busy (429), it is asked again up to ``retries`` times, after 1, 2, 4, ... seconds.
    """

    access: Seen
    rate: float | None = None
    retries: int = 3
    queries: int | None = None

    def __post_init__(self) -> None:
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"rate must be above 0, not {self.rate:g}")
        if self.retries < 0 or (self.queries is not None and self.queries < 1):
            raise ValueError("retries must be 0 or more, and queries 1 or more")

    @property
    def limited(self) -> bool:
        """Whether questions are counted or spaced, for which there has to be one process that asks them."""
        return self.rate is not None or self.queries is not None

    @classmethod
    def parse(cls, text: str) -> Self:
        """The terms that a text such as ``scores:rate=50`` names.

        Raises:
            ValueError: for another access than labels and scores, or a setting that there is not.
        """
        access, texts = specs.parse(text)
        if access not in get_args(Seen):
            raise ValueError(f"access is {' or '.join(get_args(Seen))}, not {access!r}")
        settings, hints = [one.name for one in fields(cls)][1:], get_type_hints(cls)
        for name in texts:
            if name not in settings:
                raise ValueError(f"access {access} has no setting {name!r}; {suggest(name, settings, 'it has')}")
        try:
            return cls(cast(Seen, access), **{name: specs.read(value, hints[name]) for name, value in texts.items()})
        except ValueError as error:
            raise ValueError(f"access {text}: {error}") from error


@dataclass(frozen=True)
class Server:
    """A black box at a URL: ``{"images": [...]}``, nested lists of numbers, is posted as JSON, and the answer is
    ``{"labels": [...]}`` or ``{"scores": [[...], ...]}``, in the same order."""

    url: str
    access: Seen

    def __call__(self, x: NDArray[np.float32]) -> Any:
        body = json.dumps({"images": x.tolist()}).encode()
        request = Request(self.url, body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=PATIENCE) as response:
            answer = json.loads(response.read(LARGEST))
        if not isinstance(answer, dict) or self.access not in answer:
            raise ValueError(f'the answer is no {{"{self.access}": [...]}}')
        return answer[self.access]


@dataclass
class Line:
    """Asks a black box on its terms, one question after the other."""

    predict: Predict
    terms: Terms
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    asked: int = field(default=0, init=False)
    free: float = field(default=0.0, init=False)  # when the next question may be asked
    lost: str = field(default="", init=False)  # why it is not asked any more

    def __call__(self, x: NDArray[np.float32]) -> Any:
        """What it answers to images (N, ...).

        Raises:
            Unfinished: where there is no answer. One that cannot be reached is not asked again.
        """
        for tries in range(1, self.terms.retries + 2):
            if self.lost:
                raise Unfinished(self.lost)
            self._turn(len(x))
            try:
                return self.predict(x.copy())
            except Exception as error:  # of whatever a person's function raises
                if not _transient(error):
                    raise Unfinished(f"the black box failed: {one_line(error)}") from error
                reason = one_line(error)
            if tries <= self.terms.retries:
                self.sleep(2.0 ** (tries - 1))
        self.lost = f"the black box gave no answer in {tries} tries: {reason}"
        raise Unfinished(self.lost)

    def _turn(self, count: int) -> None:
        """Waits until so many images may be sent."""
        terms = self.terms
        if terms.queries is not None and self.asked + count > terms.queries:
            raise Unfinished(f"the budget of {terms.queries} queries is spent")
        self.asked += count
        if terms.rate is not None:
            now = self.clock()
            if now < self.free:
                self.sleep(self.free - now)
            self.free = max(now, self.free) + count / terms.rate


def _transient(error: Exception) -> bool:
    """Whether it may go well the next time."""
    if isinstance(error, HTTPError):
        return error.code >= 500 or error.code == 429
    return isinstance(error, TRANSIENT)


class Answers(nn.Module):
    """What a line answers, as logits: scores as they are; of labels 1 for the label, and -1 for the others."""

    def __init__(self, line: Line, classes: int) -> None:
        super().__init__()
        self.line, self.classes = line, classes
        self.width = 0  # of the scores, once there are any

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_zeros(0, self.width or self.classes)
        given = self.line(x.detach().float().cpu().numpy())
        try:
            answers = np.asarray(given)
        except Exception as error:
            raise Unfinished(f"the black box's answer is no array: {one_line(error)}") from error
        read = self._labels if self.line.terms.access == "labels" else self._scores
        return read(answers, len(x)).to(x.device)

    def _labels(self, answers: NDArray[Any], count: int) -> Tensor:
        if answers.shape != (count,) or answers.dtype.kind not in "iu":
            raise Unfinished(f"the black box answered {answers.dtype} of shape {answers.shape}, not {count} labels")
        low, high = answers.min(), answers.max()
        if low < 0 or high >= self.classes:
            raise Unfinished(f"the black box answered labels from {low} to {high}, not 0 to {self.classes - 1}")
        one_hot = nn.functional.one_hot(torch.from_numpy(answers.astype(np.int64)), self.classes)
        return 2.0 * one_hot - 1.0

    def _scores(self, answers: NDArray[Any], count: int) -> Tensor:
        if answers.ndim != 2 or len(answers) != count or answers.dtype.kind not in "fiu":
            shape = f"{answers.dtype} of shape {answers.shape}"
            raise Unfinished(f"the black box answered {shape}, not scores of shape ({count}, classes)")
        self.width = self.width or answers.shape[1]
        if answers.shape[1] != self.width:
            raise Unfinished(f"the black box answered scores of {answers.shape[1]} classes, and before of {self.width}")
        scores = torch.from_numpy(answers.astype(np.float32))
        if not scores.isfinite().all():
            raise Unfinished("the black box answered NaN or infinite scores")
        return scores


class BlackBox(Defended):
    """A model that shows labels or scores only; who asks for gradients gets an error."""

    least = 1  # no batch is padded: each row may cost

    def __init__(self, model: nn.Module, access: Seen) -> None:
        super().__init__(model)
        self.seen = access

    @property
    def access(self) -> Access:
        return self.seen

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise AccessError(f"a black box that gives {self.seen} has no gradients")
        return super().forward(x, noise)


def black_box(predict: Predict, access: str, classes: int) -> BlackBox:
    """A function as a model to be evaluated: images (N, ...), an array of float32, to ``labels`` (N,) or to ``scores``
    (N, classes), logits or the like. ``access`` may name terms, as ``labels:queries=100000``; see :class:`Terms`.

    Raises:
        ValueError: for terms that there are not.
    """
    terms = Terms.parse(access)
    return BlackBox(Answers(Line(predict, terms), classes).eval(), terms.access)


def is_address(model: object) -> bool:
    """Whether a model is a server's URL."""
    return isinstance(model, str) and model.startswith(("http://", "https://"))
