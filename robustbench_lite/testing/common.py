"""What the contracts of attacks, defenses and certifiers share."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch

from robustbench_lite import registry
from robustbench_lite.defended import LEVELS
from robustbench_lite.norms import NORMS

Check = Callable[[], None]  # raises AssertionError, with a sentence, where a contract is broken


def require(holds: object, said: str) -> None:
    """An ``assert`` that no option of Python's switches off."""
    if not holds:
        raise AssertionError(said)


def hold(checks: Iterable[tuple[str, Check]]) -> None:
    """Makes each check; what is broken is said with the check's name."""
    for name, check in checks:
        try:
            check()
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@contextmanager
def keyed(source: str) -> Iterator[None]:
    """Nothing in here may draw from a generator that all share; ``source`` is what to draw from."""
    before = _generators()
    yield
    used = [name for name, state in _generators().items() if state != before[name]]
    require(not used, f"draws from the global generator of {' and '.join(used)}; draw from {source}")


def _generators() -> dict[str, object]:
    numpy: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (numpy[1].tobytes(), *numpy[2:]),
        "random": random.getstate(),
    }


def declaration(kind: registry.Kind, plugin: Any) -> None:
    """It is a registered, frozen dataclass that says what it is, and that its spec makes again."""
    cls = type(plugin)
    article = "an" if kind == "attack" else "a"
    frozen = is_dataclass(cls) and vars(cls).get("__dataclass_params__").frozen  # type: ignore[union-attr]
    require(frozen, f"{cls.__name__} is no frozen dataclass: give it @dataclass(frozen=True), its fields its settings")
    name = vars(cls).get("name", "")
    registered = registry.plugins(kind).get(name) is cls
    require(registered, f"{cls.__name__} is not registered: put @{kind}(...) above @dataclass(frozen=True)")
    about = (cls.__doc__ or "").strip()
    require(about and not about.startswith(f"{cls.__name__}("), f"{cls.__name__} has no docstring to list it by")
    if kind == "defense":
        require(
            getattr(cls, "trains", None) in (True, False), "a defense says whether it trains: trains = True or False"
        )
    else:
        norms = getattr(cls, "norms", None)
        known = isinstance(norms, frozenset) and norms and norms <= NORMS.keys()
        require(known, f"{article} {kind} names its norms: a frozenset out of {', '.join(NORMS)}, not {norms!r}")
    if kind == "attack":
        access = getattr(cls, "access", None)
        require(access in LEVELS, f"an attack says what it sees: access is {', '.join(LEVELS)}, not {access!r}")
    text = registry.spec(plugin)
    try:
        again = registry.make(kind, text)
    except ValueError as error:
        raise AssertionError(f"its spec {text!r} does not make it again: {error}") from error
    require(again == plugin and hash(again) == hash(plugin), f"its spec {text!r} makes another one: {again!r}")
