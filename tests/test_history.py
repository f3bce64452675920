"""A history as a text: what was written is read, and nothing else is believed."""

import json
from typing import Any

import pytest

from robustbench_lite.history import MOST, Epoch, parse, to_text

GONE = object()
FIRST = Epoch(1, 2.25, 0.1 + 0.2, 1 / 3, 0.0)
WHOLE = (FIRST, Epoch(2, 1e-7, 1.0, 0.5, None), Epoch(7, -1.0, 0.0, 1.0, 1.0))


def test_what_was_written_is_read_to_the_last_bit():
    assert parse(to_text(WHOLE)) == WHOLE
    assert [[type(value) for value in one] for one in parse(to_text(WHOLE))] == [
        [type(value) for value in one] for one in WHOLE
    ]
    assert parse(to_text(())) == ()
    assert parse(changed()) == (FIRST, WHOLE[2])


def changed(**fields: Any) -> str:
    """The text of two epochs, the first with other fields."""
    told = {name: value for name, value in {**FIRST._asdict(), **fields}.items() if value is not GONE}
    return json.dumps([told, WHOLE[2]._asdict()])


HOSTILE = {
    "empty": "",
    "no JSON": "<script>alert(1)</script>",
    "half": to_text(WHOLE)[:-9],
    "a number": "3",
    "no list": '{"epoch": 1}',
    "no objects": "[1, 2]",
    "lists": json.dumps([list(FIRST)]),
    "deep": "[" * 100_000,
    "a field too few": changed(robust_accuracy=GONE),
    "a field too many": changed(note="<script>"),
    "a script": changed(loss="<script>alert(1)</script>"),
    "a script as accuracy": changed(robust_accuracy="<script>alert(1)</script>"),
    "nothing": changed(clean_accuracy=None),
    "NaN": changed(loss=float("nan")),
    "infinite": changed(loss=float("inf")),
    "overflows": changed(loss=2.5).replace("2.5", "1e999"),
    "NaN accuracy": changed(robust_accuracy=float("nan")),
    "above 1": changed(clean_accuracy=1.5),
    "below 0": changed(train_accuracy=-0.5),
    "true": changed(epoch=True),
    "epoch 0": changed(epoch=0),
    "half an epoch": changed(epoch=1.5),
    "a huge epoch": changed(epoch=10**40),
    "digits without end": changed(epoch=12345).replace("12345", "9" * 5000),
    "twice": to_text((FIRST, FIRST)),
    "backwards": to_text(WHOLE[::-1]),
    "huge": f"[{' ' * 200 * MOST}]",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_any_other_text_is_an_error_in_one_line(text: str):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert "\n" not in str(error.value)
    assert "script" not in str(error.value)
    assert len(str(error.value)) < 100


def test_the_longest_history_is_read():
    longest = tuple(Epoch(k, 1 / 3e10, 1 / 3, 1 / 7, 1 / 9) for k in range(1, MOST + 1))
    assert parse(to_text(longest)) == longest
