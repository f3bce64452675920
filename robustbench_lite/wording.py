"""How errors are worded: one line that says what was asked and what there is."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, get_args


def one_line(error: BaseException, named: bool = True) -> str:
    """``ValueError: what went wrong``, or without its type, on one line."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(f"{type(error).__name__}: {message}".split() if named else message.split())


def suggest(asked: str, there: Iterable[str], lead: str = "there are", more: str = "") -> str:
    """``did you mean pgd? There are: fgsm, pgd``; ``more`` ends the list."""
    there = list(there)
    listed = f"{lead}: {', '.join(there)}{more}" if there else f"{lead} none"
    close = get_close_matches(asked, there, n=1)
    return f"did you mean {close[0]}? {listed[0].upper()}{listed[1:]}" if close else listed


def require_one_of(what: str, text: str, choices: Any) -> None:
    """Sees that ``text`` is one of ``choices``, a Literal.

    Raises:
        ValueError: where it is not.
    """
    if text not in get_args(choices):
        raise ValueError(f"{what} is {' or '.join(get_args(choices))}, not {text!r}")
