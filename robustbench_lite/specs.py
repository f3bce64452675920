"""The text form of plugins and their settings: ``pgd:steps=100,length=2/255``. Knows no plugin."""

import re
from collections.abc import Iterator
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_COMMA = re.compile(",")
_AT = re.compile("@")
_PLUS = re.compile(r"\+(?=\s*[A-Za-z])")  # not the one in eps=1e+5
_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_WANTS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "none"}


def split_list(text: str) -> list[str]:
    """The specs of ``fgsm,pgd:steps=100,restarts=5``: an item with ``=`` before any ``:`` continues the last."""
    specs: list[str] = []
    for item in _split(text, _COMMA):
        if "=" not in item.partition(":")[0]:
            specs.append(item)
        elif specs:
            specs[-1] += f",{item}"
        else:
            raise ValueError(f"in {text!r} a name must come before {item!r}")
    return specs


def split_chain(text: str) -> list[str]:
    """The specs of ``madry:eps=0.3+feature-squeezing:bits=1``, first to last."""
    return _split(text, _PLUS)


def split_source(text: str) -> tuple[str, str | None]:
    """The chain and the architecture of ``madry:eps=0.3@mlp``; the latter is None where none is named."""
    *chain, last = _split(text, _AT)
    return ("@".join(chain), last) if chain else (last, None)


def parse(text: str) -> tuple[str, dict[str, str]]:
    """The name and the settings, still as text, of one spec."""
    name, colon, rest = (part.strip() for part in text.partition(":"))
    if not name:
        raise ValueError(f"no name in {text!r}")
    if "=" in name:
        raise ValueError(f"in {text!r} a name and ':' must come before the settings")
    settings: dict[str, str] = {}
    for item in _split(rest, _COMMA, text) if colon else ():
        setting, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"in {text!r} the setting {setting!r} has no '='")
        if not setting or not value:
            raise ValueError(f"in {text!r} {item!r} lacks a {'value' if setting else 'name'}")
        if setting in settings:
            raise ValueError(f"in {text!r} {setting} is given twice")
        settings[setting] = value
    return name, settings


def read(text: str, hint: Any) -> Any:
    """The value of type ``hint`` that ``text`` writes; ValueError says what the type wants."""
    kinds = _kinds(hint)
    bare = _unwrap(text)
    if hint == tuple[str, ...]:
        return tuple(split_list(bare))
    if bare != text and str in kinds:
        return bare
    if NoneType in kinds and text.lower() == "none":
        return None
    for kind in sorted(kinds, key=lambda kind: kind is str):
        for value in _read(bare, kind):
            return value
    raise ValueError(f"wants {' or '.join(map(_wants, kinds))}, not {text!r}")


def write(value: object, hint: Any) -> str:
    """The text that ``read`` turns back into ``value``; ValueError where there is none."""
    if isinstance(value, tuple):
        return f"({','.join(value)})"
    text = _write(value)
    if not isinstance(value, str):
        return text
    if not _balanced(text):
        raise ValueError(f"wants its parentheses in pairs, not {text!r}")
    plain = text and text == text.strip() and not set(text) & set(",:=+()") and read(text, hint) == value
    return text if plain else f"({text})"


def settle(value: Any, hint: Any) -> Any:
    """``value`` as ``read`` would have given it: 1 where a float is wanted is 1.0."""
    kinds = _kinds(hint)
    return float(value) if type(value) is int and float in kinds and int not in kinds else value


def _split(text: str, mark: re.Pattern[str], whole: str | None = None) -> list[str]:
    """The pieces between the marks outside parentheses; errors quote ``whole``, of which ``text`` is a part."""
    whole = text if whole is None else whole
    if not _balanced(text):
        raise ValueError(f"unbalanced parentheses in {whole!r}")
    cuts = [i for i, depth in enumerate(_depths(text)) if not depth and mark.match(text, i)]
    pieces = [text[i + 1 : j].strip() for i, j in zip([-1, *cuts], [*cuts, len(text)])]
    if not all(pieces):
        raise ValueError(f"an empty item in {whole!r}")
    return pieces


def _depths(text: str) -> Iterator[int]:
    depth = 0
    for char in text:
        depth += (char == "(") - (char == ")")
        yield depth


def _balanced(text: str) -> bool:
    depths = [0, *_depths(text)]
    return min(depths) == depths[-1] == 0


def _unwrap(text: str) -> str:
    inner = text[1:-1]
    return inner if text == f"({inner})" and _balanced(inner) else text


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _read(text: str, kind: Any) -> Iterator[Any]:
    """The value that ``text`` has as a ``kind``, or nothing."""
    if get_origin(kind) is Literal:
        yield from (choice for choice in get_args(kind) if _write(choice) == text)
    elif kind is bool and text.lower() in _BOOLS:
        yield _BOOLS[text.lower()]
    elif kind is int and _WHOLE.fullmatch(text):
        yield int(text)
    elif kind is float:
        over, slash, under = (part.strip() for part in text.partition("/"))
        if _NUMBER.fullmatch(over) and (not slash or (_NUMBER.fullmatch(under) and float(under))):
            number = float(over) / float(under or 1)
            yield from [number] if isfinite(number) else []
    elif kind is str:
        yield text


def _write(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _wants(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(_write, get_args(kind)))
    return _WANTS.get(kind) or str(kind)
