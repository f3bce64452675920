"""What a model was worth after each epoch of its training, as a text that travels with its weights."""

import json
from typing import NamedTuple

MOST = 10_000  # epochs of a text that is read
LARGEST = 1e39  # no loss in float32 is as large


class Epoch(NamedTuple):
    """How a training stood after an epoch: ``loss`` and ``train_accuracy`` are means over it, the accuracies measured
    at its end, ``robust_accuracy`` where the recipe says against what."""

    epoch: int  # counts from 1
    loss: float
    train_accuracy: float
    clean_accuracy: float
    robust_accuracy: float | None

    @property
    def sound(self) -> bool:
        """Whether it can be what it says; where it was read, anything may stand in it."""
        accuracies = [self.train_accuracy, self.clean_accuracy]
        accuracies += [] if self.robust_accuracy is None else [self.robust_accuracy]
        return (
            type(self.epoch) is int
            and 1 <= self.epoch <= MOST
            and all(type(value) is float for value in (self.loss, *accuracies))
            and abs(self.loss) < LARGEST
            and all(0 <= accuracy <= 1 for accuracy in accuracies)
        )


History = tuple[Epoch, ...]


def to_text(history: History) -> str:
    """JSON, an object an epoch."""
    return json.dumps([epoch._asdict() for epoch in history])


def parse(text: str) -> History:
    """The history that :func:`to_text` wrote.

    Raises:
        ValueError: for any other text, in one line.
    """
    if len(text) > 200 * MOST:
        raise ValueError(f"a history has at most {MOST} epochs, and {len(text)} characters are more")
    try:
        history = tuple(Epoch(**fields) for fields in json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError("it is no list of epochs in JSON") from error
    if not all(epoch.sound for epoch in history):
        raise ValueError("a figure in it is missing, no number, or out of range")
    numbers = [epoch.epoch for epoch in history]
    if numbers != sorted(set(numbers)):
        raise ValueError("its epochs are not in order")
    return history
