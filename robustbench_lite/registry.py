"""Three tables of plugins by name, filled from the built-in folders, entry points and files when first asked."""

import hashlib
import pkgutil
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from robustbench_lite.specs import parse, read, settle, write
from robustbench_lite.specs import split_chain as split_chain
from robustbench_lite.specs import split_list as split_list
from robustbench_lite.specs import split_source as split_source
from robustbench_lite.wording import one_line, suggest

Kind = Literal["attack", "defense", "certifier"]
Plugin = TypeVar("Plugin")

KINDS: tuple[Kind, ...] = get_args(Kind)
_FOLDERS: dict[Kind, str] = {
    "attack": "robustbench_lite.attacks",
    "defense": "robustbench_lite.defenses",
    "certifier": "robustbench_lite.certify",
}
GROUPS: dict[Kind, str] = {kind: f"robustbench_lite.{kind}s" for kind in _FOLDERS}
_NAME = re.compile(r"[a-z][a-z0-9/-]*")

_tables: dict[Kind, dict[str, type]] = {kind: {} for kind in _FOLDERS}
_filled: set[Kind] = set()
_families: dict[str, Callable[[], dict[str, type]]] = {}
_dists: dict[type, str] = {}
_files: dict[str, str] = {}  # SHA-256 by module


def attack(name: str) -> Callable[[type[Plugin]], type[Plugin]]:
    """Puts a frozen dataclass into the table of attacks as ``name``: lowercase letters, digits, ``-`` and ``/``."""
    return _register("attack", name)


def defense(name: str) -> Callable[[type[Plugin]], type[Plugin]]:
    """Puts a frozen dataclass into the table of defenses."""
    return _register("defense", name)


def certifier(name: str) -> Callable[[type[Plugin]], type[Plugin]]:
    """Puts a frozen dataclass into the table of certifiers."""
    return _register("certifier", name)


def family(name: str) -> Callable[[Callable[[], dict[str, type]]], Callable[[], dict[str, type]]]:
    """Puts many attacks into the table at once: those that a function returns, by names that begin with ``name/``.

    It is called when one of them is first asked for; a class that goes by several names says its own, ``cls.name``.
    """

    def register(members: Callable[[], dict[str, type]]) -> Callable[[], dict[str, type]]:
        _families[name] = cache(members)
        return _families[name]

    return register


def families(kind: Kind) -> dict[str, Callable[[], dict[str, type]]]:
    """What makes the members of each family of a kind, by the family's name."""
    plugins(kind)
    return dict(sorted(_families.items())) if kind == "attack" else {}


def plugins(kind: Kind) -> dict[str, type]:
    """All plugins of a kind, by name and in its order, without the members of families."""
    if kind not in _filled:
        _scan(kind)
        _filled.add(kind)
    return dict(sorted(_tables[kind].items()))


def builtin(kind: Kind) -> list[str]:
    """What ``all`` means: the names that come with the package, without other toolkits' (``foolbox/...``)."""
    return [name for name, cls in plugins(kind).items() if origin(cls) == "built-in" and "/" not in name]


def find(kind: Kind, name: str) -> type:
    """The plugin class called ``name``."""
    there = plugins(kind)
    group, slash, _ = name.partition("/")
    if name not in there and slash and group in families(kind):
        there = families(kind)[group]()
        if name not in there:
            near = get_close_matches(name, there, cutoff=0)
            more = f"; robust-bench {kind}s {group} lists them all"
            raise ValueError(f"no {kind} {name!r}; {suggest(name, near, 'closest are', more)}")
    if name not in there:
        more = "".join(f", {group}/..." for group in families(kind))
        raise ValueError(f"no {kind} {name!r}; {suggest(name, there, more=more)}")
    return there[name]


def make(kind: Kind, text: str) -> Any:
    """The plugin that a spec describes: ``pgd:steps=100,length=2/255`` is ``PGD(steps=100, length=2/255)``."""
    name, texts = parse(text)
    cls = find(kind, name)
    settings, hints = _settings(cls), get_type_hints(cls)
    for setting in texts:
        if setting not in settings:
            raise ValueError(f"{kind} {name} has no setting {setting!r}; {suggest(setting, settings, 'it has')}")
    lacking = [field.name for field in settings.values() if _default(field) is MISSING and field.name not in texts]
    if lacking:
        raise ValueError(f"{kind} {name} needs {', '.join(lacking)}")
    values = {}
    for setting, value in texts.items():
        nested, where = _nested(settings[setting]), f"{kind} {name}: {setting}"
        if nested:
            values[setting] = _named(f"{where}:", make, nested, read(value, str))
        else:
            values[setting] = _named(where, read, value, hints[setting])
    return _named(f"{kind} {name}:", cls, **values)


def spec(plugin: object) -> str:
    """The shortest spec that makes ``plugin`` again: its name and the settings that are not the default."""
    cls, settings = type(plugin), _settings(type(plugin))
    texts = [
        f"{name}={_text(settings[name], cls, value)}"
        for name, value in _values(plugin).items()
        if value != _default(settings[name])
    ]
    return f"{_name(cls)}:{','.join(texts)}" if texts else _name(cls)


def defaults(cls: type) -> dict[str, str | None]:
    """The text of every setting's default; None for a setting that has none."""
    values = {name: (field, _default(field)) for name, field in _settings(cls).items()}
    return {name: None if value is MISSING else _text(field, cls, value) for name, (field, value) in values.items()}


def identity(plugin: object) -> dict[str, object]:
    """Name, version and every setting, for keys and logs; of a setting that is a plugin, its own identity."""
    cls, values = type(plugin), _values(plugin)
    for name, field in _settings(cls).items():
        if _nested(field):
            values[name] = {**identity(values[name]), "origin": origin(type(values[name]))}
        elif isinstance(value := values[name], tuple):
            values[name] = list(value)
    return {"name": _name(cls), "version": getattr(cls, "version", 1), "settings": values}


def origin(cls: type) -> str:
    """Where a plugin comes from: ``built-in``, ``entry-point:DIST==VERSION`` or ``file:SHA256``; never a path."""
    module = cls.__module__
    if module.startswith(tuple(f"{folder}." for folder in _FOLDERS.values())):
        return "built-in"
    if cls in _dists:
        return f"entry-point:{_dists[cls]}"
    if module in _files:
        return f"file:{_files[module]}"
    source = getattr(sys.modules.get(module), "__file__", None)
    return f"file:{_sha256(Path(source).read_bytes())}" if source else f"module:{module}"


def files() -> dict[Path, str]:
    """The files that were loaded, and the SHA-256 of each."""
    return {Path(str(sys.modules[module].__file__)): sha256 for module, sha256 in _files.items()}


def load_file(path: Path) -> str:
    """Runs a Python file whose decorators register plugins, and returns its SHA-256; nothing else can import it."""
    if path.suffix != ".py":
        raise ValueError(f"a plugin file ends in .py, not {path.name!r}")
    if not path.is_file():
        raise ValueError(f"no plugin file {str(path)!r}")
    source, place = path.read_bytes(), str(path.resolve())
    module = ModuleType(f"_robustbench_lite_file_{_sha256(place.encode())[:16]}_{path.stem}")
    module.__file__ = place
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        with _all_or_nothing():
            exec(compile(source, place, "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        if before:
            sys.modules[module.__name__] = before
        raise ValueError(f"{path}:{_line(error, place)}: {one_line(error)}") from error
    _files[module.__name__] = _sha256(source)
    return _files[module.__name__]


def _register(kind: Kind, name: str) -> Callable[[type[Plugin]], type[Plugin]]:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{kind} {name!r}: a name is lowercase letters, digits, - and /, and starts with a letter")

    def register(cls: type[Plugin]) -> type[Plugin]:
        params = vars(cls).get("__dataclass_params__")
        if not params or not params.frozen:
            raise TypeError(
                f"{kind} {name!r}: {cls.__qualname__} lacks @dataclass(frozen=True) under @{kind}({name!r})"
            )
        if {"name", "version"} & _settings(cls).keys():
            raise TypeError(f"{kind} {name!r}: no setting can be called name or version")
        other = _tables[kind].get(name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{kind} {name!r} is in both {other.__module__} and {cls.__module__}")
        plugin: Any = cls
        plugin.name = name
        _tables[kind][name] = cls
        return cls

    return register


def _scan(kind: Kind) -> None:
    folder = import_module(_FOLDERS[kind])
    for module in pkgutil.iter_modules(folder.__path__):
        if not module.name.startswith("_"):
            import_module(f"{folder.__name__}.{module.name}")
    for point in entry_points(group=GROUPS[kind]):
        dist = f"{point.dist.name}=={point.dist.version}" if point.dist else point.module
        before = set(_tables[kind].values())
        try:
            with _all_or_nothing():
                point.load()
        except Exception as error:
            warnings.warn(f"{dist}: entry point {point.name} does not load: {one_line(error)}", stacklevel=3)
        for cls in _tables[kind].values():
            if cls not in before or f"{cls.__module__}.".startswith(f"{point.module}."):
                _dists.setdefault(cls, dist)


@contextmanager
def _all_or_nothing() -> Iterator[None]:
    before, groups = {kind: dict(table) for kind, table in _tables.items()}, dict(_families)
    try:
        yield
    except BaseException:
        _tables.update(before)
        _families.clear()
        _families.update(groups)
        raise


def _settings(cls: Any) -> dict[str, Field[Any]]:
    """What a spec can set; a field that is not compared is what a plugin has learned, no setting."""
    return {f.name: f for f in fields(cls) if f.init and f.compare and not f.name.startswith("_")}


def _nested(field: Field[Any]) -> Kind | None:
    """The kind of plugin that a setting takes: that of its default, where this is a plugin."""
    return next((kind for kind, table in _tables.items() if type(_default(field)) in table.values()), None)


def _text(field: Field[Any], cls: type, value: Any) -> str:
    """What a spec says of a setting's value."""
    if _nested(field):
        return write(spec(value), str)
    return str(_named(f"{_name(cls)}: {field.name}", write, value, get_type_hints(cls)[field.name]))


def _values(plugin: object) -> dict[str, object]:
    hints = get_type_hints(type(plugin))
    return {name: settle(getattr(plugin, name), hints[name]) for name in _settings(type(plugin))}


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _name(cls: type) -> str:
    """A plugin that was handed over as an object, unregistered, goes by the name of its class."""
    return str(vars(cls).get("name", cls.__name__))


def _named(prefix: str, call: Callable[..., Any], *args: object, **settings: object) -> Any:
    """``call``, with ``prefix`` before the message of its ValueError."""
    try:
        return call(*args, **settings)
    except ValueError as error:
        raise ValueError(f"{prefix} {error}") from error


def _line(error: BaseException, place: str) -> int | None:
    if isinstance(error, SyntaxError) and error.filename == place:
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == place]
    return lines[-1] if lines else 1


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
