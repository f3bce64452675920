"""Protocols with a name and a version: which attacks and certifiers run on what, written in TOML."""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from robustbench_lite import data, models, registry
from robustbench_lite.leaderboard import LEADERBOARD
from robustbench_lite.matrix import Results
from robustbench_lite.planning import ADAPTIVE
from robustbench_lite.threat import ThreatModel
from robustbench_lite.wording import one_line, suggest

if TYPE_CHECKING:
    import pandas as pd

Texts = tuple[str, ...]
Made = TypeVar("Made")

_NAME = re.compile(r"[a-z][a-z0-9-]*")
_WANTS = {
    str: "text",
    str | None: "text",
    int: "a whole number",
    Texts: "a list of texts",
    dict: "a table",
}


@dataclass(frozen=True, kw_only=True)
class Block:
    """Attacks and certifiers under the same threat models, on the same defenses and the first ``n`` test images."""

    name: str
    threat: Texts
    n: int
    attack: Texts = ()
    certify: Texts = ()
    defense: Texts = ()  # none of its own: those of the suite
    adaptive: str = "on"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A protocol: its fields, and those of a block, are called as the options of the command line are."""

    name: str
    version: int
    description: str
    dataset: str
    defense: Texts
    block: tuple[Block, ...]
    model: str | None = None
    seed: int = 0

    def on(self, defense: Sequence[str]) -> "Suite":
        """The same protocol for other defenses; a block with defenses of its own keeps those that are among them."""
        wanted = {_plain(chain) for chain in defense}
        own = {block.name: tuple(one for one in block.defense if _plain(one) in wanted) for block in self.block}
        kept = [replace(block, defense=own[block.name]) for block in self.block if own[block.name] or not block.defense]
        if not kept:
            raise ValueError(f"suite {self.name} has no block for {', '.join(defense)}")
        return replace(self, defense=tuple(defense), block=tuple(kept))

    def shrunk(self, n: int) -> "Suite":
        """At most ``n`` images a block; no longer the protocol, and its name says so."""
        if all(block.n <= n for block in self.block):
            return self
        kept = tuple(replace(block, n=min(n, block.n)) for block in self.block)
        return replace(self, name=f"{self.name} (n={n})", block=kept)

    def asked(self, block: Block) -> dict[str, Any]:
        """A block, as :func:`robustbench_lite.matrix.prepare` is asked for it."""
        return {
            "attacks": block.attack,
            "defenses": block.defense or self.defense,
            "certifiers": block.certify,
            "threats": block.threat,
            "n": block.n,
            "adaptive": block.adaptive,
            "dataset": self.dataset,
            "model": self.model,
        }

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def builtin() -> dict[str, Traversable]:
    """The files of the suites that come with the package, by name."""
    folder = files("robustbench_lite.benchmarks.suites")
    return dict(sorted((file.name.removesuffix(".toml"), file) for file in folder.iterdir()))


def load(asked: str) -> Suite:
    """The suite of that name, or of a file that ends in ``.toml``.

    Raises:
        ValueError: for one that there is not, or whose file says what cannot be; names the file and the field.
    """
    there = builtin()
    if not asked.endswith(".toml"):
        if asked not in there:
            raise ValueError(f"no suite {asked!r}; {suggest(asked, there, more=', and FILE.toml')}")
        return _parsed(there[asked].name, there[asked].read_bytes())
    try:
        suite = _parsed(asked, Path(asked).read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {asked}: {error.strerror}") from error
    if suite.name in there and suite != load(suite.name):
        raise ValueError(f"{asked}: name: {suite.name} is a built-in suite, and another one; give yours another name")
    return suite


def leaderboard(suite: Suite, found: Mapping[str, Results]) -> "pd.DataFrame":
    """The leaderboards of the blocks, each ranked by itself; ``protocol`` and ``block`` come first."""
    import pandas as pd

    boards = [(name, results.leaderboard()) for name, results in found.items() if results.entries]
    named = [board.assign(protocol=str(suite), block=name) for name, board in boards]
    columns = ["protocol", "block", *LEADERBOARD]
    return pd.concat(named, ignore_index=True)[columns] if named else pd.DataFrame(columns=columns)


def _parsed(file: str, content: bytes) -> Suite:
    with _naming(file):
        try:
            table = tomllib.loads(content.decode())
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        blocks = table.pop("block", {})
        _fits("block", blocks, dict)
        made = []
        for name, block in blocks.items():
            _fits(f"block {name!r}", block, dict)
            with _naming(f"block {name!r}" if not _NAME.fullmatch(name) else f"block {name}"):
                made.append(_filled(Block, block, name=name))
                _check_block(made[-1])
        suite = _filled(Suite, table, block=tuple(made))
        _check(suite)
    return suite


def _filled(cls: type[Made], table: Mapping[str, Any], **given: Any) -> Made:
    """A dataclass from the fields of a table, each of the type that it wants."""
    hints, known = get_type_hints(cls), {field.name: field for field in fields(cls) if field.name not in given}  # type: ignore[arg-type]
    for name, value in table.items():
        if name not in known:
            raise ValueError(f"there is no field {name!r}; {suggest(name, known)}")
        _fits(name, value, hints[name])
    lacking = [name for name, field in known.items() if field.default is MISSING and name not in table]
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    return cls(**given, **{name: tuple(value) if hints[name] == Texts else value for name, value in table.items()})


def _fits(name: str, value: Any, hint: Any) -> None:
    """Sees that a value is of a field's type."""
    fits = {
        int: type(value) is int,
        Texts: isinstance(value, list) and all(isinstance(one, str) for one in value),
        dict: isinstance(value, dict),
    }
    if not fits.get(hint, isinstance(value, str)):
        raise ValueError(f"{name} wants {_WANTS[hint]}, not {repr(value)[:60]}")


def _check_block(block: Block) -> None:
    _check_name(block.name)
    kinds: dict[registry.Kind, Texts] = {"attack": block.attack, "certifier": block.certify}
    for kind, given in kinds.items():
        for spec in given:
            with _naming("certify" if kind == "certifier" else kind):
                registry.make(kind, spec)
    _check_defenses(block.defense)
    for threat in block.threat:
        with _naming("threat"):
            ThreatModel.parse(threat)
    if block.n < 1:
        raise ValueError(f"n must be 1 or more, not {block.n}")
    if block.adaptive not in ADAPTIVE:
        raise ValueError(f"adaptive is {', '.join(ADAPTIVE)}, not {block.adaptive!r}")
    for wanted, given in {"threat": block.threat, "attack or certify": block.attack + block.certify}.items():
        if not given:
            raise ValueError(f"{wanted} must name at least one")


def _check(suite: Suite) -> None:
    _check_name(suite.name)
    _check_defenses(suite.defense)
    if suite.version < 1:
        raise ValueError(f"version must be 1 or more, not {suite.version}")
    if suite.dataset not in data.SOURCES and not data.is_own(suite.dataset):
        more = ", npz:FILE, folder:DIR"
        raise ValueError(f"dataset: no data set {suite.dataset!r}; {suggest(suite.dataset, data.SOURCES, more=more)}")
    if suite.model is not None and suite.model not in models.MODELS:
        more = "; code (FILE.py:factory) is named on the command line alone"
        raise ValueError(f"model: no model {suite.model!r}; {suggest(suite.model, models.MODELS, more=more)}")
    for wanted, given in {"defense": suite.defense, "block": suite.block}.items():
        if not given:
            raise ValueError(f"{wanted} must name at least one")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: {name!r} must be lowercase letters, digits and -, and start with a letter")


def _check_defenses(chains: Texts) -> None:
    for chain in chains:
        with _naming("defense"):
            for link in registry.split_chain(registry.split_source(chain)[0]):
                registry.make("defense", link)


def _plain(chain: str) -> str:
    """A chain from the command line as its shortest spec, which is equal for equal ones."""
    if chain in ("all", "none"):
        return chain
    links, architecture = registry.split_source(chain)
    plain = "+".join(registry.spec(registry.make("defense", link)) for link in registry.split_chain(links))
    return f"{plain}@{architecture}" if architecture else plain


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Errors say where they are, on one line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {one_line(error, named=False)}") from error
