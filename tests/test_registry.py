import hashlib
import json
import sys
from dataclasses import MISSING, FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from robustbench_lite import registry
from robustbench_lite.registry import (
    attack,
    builtin,
    certifier,
    defense,
    family,
    find,
    identity,
    load_file,
    make,
    origin,
    plugins,
    spec,
)


@pytest.fixture
def bare(monkeypatch):
    """Empty tables that take themselves for filled: no test here sees or spoils the real ones."""
    monkeypatch.setattr(registry, "_tables", {kind: {} for kind in registry._FOLDERS})
    monkeypatch.setattr(registry, "_filled", set(registry._FOLDERS))
    monkeypatch.setattr(registry, "_families", {})
    monkeypatch.setattr(registry, "_dists", {})
    monkeypatch.setattr(registry, "_files", {})
    yield
    for name in list(sys.modules):
        if name.startswith(("acme_", "pretend_attacks", "_robustbench_lite_file_")):
            del sys.modules[name]


@pytest.fixture
def pgd(bare):
    @attack("pgd")
    @dataclass(frozen=True)
    class PGD:
        steps: int = 40
        length: float | None = None
        restarts: int = 1
        momentum: float = 0.0
        start: Literal["random", "clean"] = "random"
        keep: bool = True
        source: str = ""
        version: ClassVar[int] = 3
        _hidden: int = 0
        derived: int = field(default=7, init=False)

        def __post_init__(self):
            if self.steps < 1:
                raise ValueError("steps must be positive")

    return PGD


def write_plugin(path, name="mine", kind="attack", more=""):
    path.write_text(
        f"from dataclasses import dataclass\nfrom robustbench_lite.registry import {kind}\n\n"
        f'@{kind}("{name}")\n@dataclass(frozen=True)\nclass Mine:\n    steps: int = 1\n{more}'
    )
    return path


def raises(call, *args):
    with pytest.raises((ValueError, TypeError)) as raised:
        call(*args)
    return str(raised.value)


def test_make_and_find(pgd):
    assert find("attack", "pgd") is pgd
    assert pgd.name == "pgd"
    assert make("attack", "pgd") == pgd()
    assert make("attack", "pgd:steps=100,length=2/255") == pgd(steps=100, length=2 / 255)
    assert make("attack", "pgd:source=(fgsm:eps=1,b=2)").source == "fgsm:eps=1,b=2"
    with pytest.raises(FrozenInstanceError):
        make("attack", "pgd").steps = 3


def test_each_kind_has_its_own_table(bare):
    @defense("same")
    @dataclass(frozen=True)
    class D:
        pass

    @certifier("same")
    @dataclass(frozen=True)
    class C:
        pass

    assert (plugins("attack"), plugins("defense"), plugins("certifier")) == ({}, {"same": D}, {"same": C})


def test_a_family_is_called_once_when_a_member_is_first_asked_for(pgd):
    calls = []

    @family("acme")
    def acme():
        calls.append("called")
        return {f"acme/{name}": type(name, (), {}) for name in ("anvil", "rocket")}

    assert (plugins("attack"), calls) == ({"pgd": pgd}, [])
    assert raises(find, "attack", "anvil") == "no attack 'anvil'; there are: pgd, acme/..."
    assert calls == []
    assert find("attack", "acme/anvil").__name__ == "anvil"
    assert find("attack", "acme/rocket") is find("attack", "acme/rocket")
    assert raises(find, "attack", "acme/anvli").startswith("no attack 'acme/anvli'; did you mean acme/anvil? ")
    assert raises(find, "defense", "acme/anvil") == "no defense 'acme/anvil'; there are none"
    assert calls == ["called"]


def test_plugins_are_sorted_and_a_copy(bare):
    for name in ("b", "a", "foolbox/l2-ddn"):
        attack(name)(dataclass(frozen=True)(type(name, (), {})))
    assert list(plugins("attack")) == ["a", "b", "foolbox/l2-ddn"]
    plugins("attack").clear()
    assert len(plugins("attack")) == 3


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("pdg", "no attack 'pdg'; did you mean pgd? There are: pgd"),
        ("zzz", "no attack 'zzz'; there are: pgd"),
        ("pgd:steps=ten", "attack pgd: steps wants a whole number, not 'ten'"),
        ("pgd:steps=0", "attack pgd: steps must be positive"),
        ("pgd:start=near", "attack pgd: start wants random or clean, not 'near'"),
        (
            "pgd:stps=1",
            "attack pgd has no setting 'stps'; did you mean steps? "
            "It has: steps, length, restarts, momentum, start, keep, source",
        ),
        (
            "pgd:_hidden=1",
            "attack pgd has no setting '_hidden'; it has: steps, length, restarts, momentum, start, keep, source",
        ),
        (
            "pgd:derived=1",
            "attack pgd has no setting 'derived'; it has: steps, length, restarts, momentum, start, keep, source",
        ),
    ],
)
def test_what_cannot_be_made_says_what_there_is(pgd, text, error):
    assert raises(make, "attack", text) == error


def test_an_empty_table_and_a_plugin_without_settings_say_so(bare):
    assert raises(find, "defense", "x") == "no defense 'x'; there are none"
    defense("x")(dataclass(frozen=True)(type("X", (), {})))
    assert raises(make, "defense", "x:a=1") == "defense x has no setting 'a'; it has none"


def test_settings_without_default_are_needed_and_always_written(bare):
    @attack("transfer")
    @dataclass(frozen=True)
    class Transfer:
        source: str
        seed: int
        steps: int = field(default_factory=lambda: 3)

    assert raises(make, "attack", "transfer:steps=1") == "attack transfer needs source, seed"
    assert spec(Transfer("a+b", 0)) == "transfer:source=(a+b),seed=0"
    assert make("attack", spec(Transfer("a+b", 0, 4))) == Transfer("a+b", 0, 4)


def test_spec_writes_what_differs_in_field_order(pgd):
    assert spec(pgd()) == "pgd"
    assert spec(pgd(restarts=5, steps=100)) == "pgd:steps=100,restarts=5"
    assert spec(pgd(momentum=1, keep=False)) == "pgd:momentum=1.0,keep=false"
    assert spec(pgd(momentum=0)) == "pgd"
    assert raises(spec, pgd(source="(")) == "pgd: source wants its parentheses in pairs, not '('"


def test_identity_holds_every_setting(pgd):
    settings = {
        "steps": 40,
        "length": 1.0,
        "restarts": 1,
        "momentum": 0.0,
        "start": "random",
        "keep": True,
        "source": "",
    }
    assert identity(pgd(length=1)) == {"name": "pgd", "version": 3, "settings": settings}
    assert json.dumps(identity(pgd(length=1))) == json.dumps(identity(make("attack", "pgd:length=1")))


def test_an_unregistered_class_goes_by_its_own_name(pgd):
    class Heir(pgd):
        pass

    assert spec(Heir(steps=7)) == "Heir:steps=7"
    assert identity(Heir())["name"] == "Heir"


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_specs_round_trip(pgd, data):
    plugin = pgd(
        steps=data.draw(st.integers(1)),
        length=data.draw(st.none() | FINITE | st.integers(0, 3)),
        momentum=data.draw(FINITE),
        start=data.draw(st.sampled_from(["random", "clean"])),
        keep=data.draw(st.booleans()),
        source=data.draw(st.text(alphabet="ab ,:=+e1") | st.sampled_from(["none", "x(y)", "(a)(b)", "((", ""])),
    )
    if plugin.source == "((":
        return
    again = make("attack", spec(plugin))
    assert again == plugin
    assert (spec(again), identity(again)) == (spec(plugin), identity(plugin))


@pytest.mark.parametrize("name", ["", "PGD", "1pgd", "p gd", "p:x", "a+b", "-a", "pgd\n", "é"])
def test_names_that_a_spec_could_not_hold_are_refused(bare, name):
    assert raises(attack, name).endswith("a name is lowercase letters, digits, - and /, and starts with a letter")


@pytest.mark.parametrize("decorate", [lambda cls: cls, dataclass])
def test_only_frozen_dataclasses_are_plugins(bare, decorate):
    cls = decorate(type("Loose", (), {}))
    assert raises(attack("x"), cls) == "attack 'x': Loose lacks @dataclass(frozen=True) under @attack('x')"
    assert not plugins("attack")


def test_an_heir_of_a_dataclass_is_none(pgd):
    assert "lacks @dataclass" in raises(attack("heir"), type("Heir", (pgd,), {}))


def test_name_and_version_are_no_settings(bare):
    @dataclass(frozen=True)
    class X:
        version: int = 1

    assert raises(attack("x"), X) == "attack 'x': no setting can be called name or version"


def test_a_taken_name_is_refused_and_a_reload_replaces(bare):
    def define(qualname, module):
        cls = type("X", (), {"__module__": module})
        cls.__qualname__ = qualname
        return attack("x")(dataclass(frozen=True)(cls))

    define("X", "first")
    reloaded = define("X", "first")
    assert find("attack", "x") is reloaded
    with pytest.raises(ValueError, match="attack 'x' is in both first and second"):
        define("X", "second")
    with pytest.raises(ValueError):
        define("Y", "first")
    assert find("attack", "x") is reloaded


@pytest.fixture
def package(monkeypatch, tmp_path, bare):
    """An empty package that stands for the built-in attacks, which have not been scanned yet."""
    folder = tmp_path / "pretend_attacks"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry._FOLDERS, "attack", "pretend_attacks")
    monkeypatch.setattr(registry, "_filled", {"defense", "certifier"})
    return folder


def install(site, dist, *points):
    info = site / f"{dist}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("\n".join(["[robustbench_lite.attacks]", *points]))


def test_the_first_call_scans_the_folder(package):
    write_plugin(package / "one.py", "one")
    write_plugin(package / "two.py", "foolbox/two")
    write_plugin(package / "_helper.py", "helper")
    attack("before")(dataclass(frozen=True)(type("Before", (), {})))
    assert list(plugins("attack")) == ["before", "foolbox/two", "one"]
    assert builtin("attack") == ["one"]
    assert origin(find("attack", "one")) == origin(find("attack", "foolbox/two")) == "built-in"
    write_plugin(package / "late.py", "late")
    assert "late" not in plugins("attack")


def test_a_broken_built_in_raises(package):
    (package / "bad.py").write_text("1 / 0")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            plugins("attack")


def test_entry_points_register_and_a_broken_one_only_warns(package, tmp_path):
    write_plugin(tmp_path / "acme_good.py", "good")
    write_plugin(tmp_path / "acme_bad.py", "half", more="\nraise RuntimeError('no\\nluck')")
    write_plugin(tmp_path / "acme_taken.py", "one")
    write_plugin(package / "one.py", "one")
    install(tmp_path, "acme", "bad = acme_bad", "good = acme_good:Mine", "taken = acme_taken", "gone = acme_gone")
    with pytest.warns(UserWarning, match="acme==1.2") as caught:
        assert list(plugins("attack")) == ["good", "one"]
    assert sorted(str(warning.message) for warning in caught) == [
        "acme==1.2: entry point bad does not load: RuntimeError: no luck",
        "acme==1.2: entry point gone does not load: ModuleNotFoundError: No module named 'acme_gone'",
        "acme==1.2: entry point taken does not load: ValueError: attack 'one' is in both pretend_attacks.one "
        "and acme_taken",
    ]
    assert origin(find("attack", "good")) == "entry-point:acme==1.2"
    assert builtin("attack") == ["one"]


def test_an_entry_point_imported_before_the_scan_keeps_its_origin(package, tmp_path):
    write_plugin(tmp_path / "acme_early.py", "early")
    install(tmp_path, "acme", "early = acme_early")
    __import__("acme_early")
    assert origin(find("attack", "early")) == "entry-point:acme==1.2"


def test_a_file_registers_and_shadows_nothing(bare, tmp_path):
    path = write_plugin(tmp_path / "colorsys.py")
    before = list(sys.path)
    digest = load_file(path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert spec(make("attack", "mine:steps=3")) == "mine:steps=3"
    assert origin(find("attack", "mine")) == f"file:{digest}"
    import colorsys

    assert (sys.path, colorsys.__file__ == str(path)) == (before, False)
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_file_loaded_again_replaces_its_plugins(bare, tmp_path):
    path = write_plugin(tmp_path / "mine.py")
    first, old = load_file(path), find("attack", "mine")
    write_plugin(path, more="    restarts: int = 1\n")
    second = load_file(path)
    assert first != second
    assert find("attack", "mine") is not old
    assert make("attack", "mine:restarts=2").restarts == 2
    assert origin(find("attack", "mine")) == f"file:{second}"


def test_two_files_of_one_name_are_two_files(bare, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        load_file(write_plugin(tmp_path / folder / "mine.py", folder))
    assert list(plugins("attack")) == ["a", "b"]
    (tmp_path / "c").mkdir()
    assert "attack 'a' is in both" in raises(load_file, write_plugin(tmp_path / "c" / "mine.py", "a"))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("x = 1\n\nx / 0\n", "3: ZeroDivisionError: division by zero"),
        ("x = 1\nx = = 2\n", "2: SyntaxError: invalid syntax"),
        ("import json\njson.loads('{')\n", "2: JSONDecodeError: "),
        ("import no_such_module\n", "1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f():\n    raise ValueError('two\\nlines')\nf()\n", "2: ValueError: two lines"),
        ("raise SystemExit(3)\n", "1: SystemExit: 3"),
    ],
)
def test_a_file_that_raises_is_one_line_and_leaves_nothing(bare, tmp_path, content, error):
    path = write_plugin(tmp_path / "bad.py", "half")
    good = path.read_text()
    path.write_text(content)
    modules = set(sys.modules)
    message = raises(load_file, path)
    assert message.startswith(f"{path}:{error}")
    assert "\n" not in message
    assert not [name for name in set(sys.modules) - modules if "file" in name]
    path.write_text(good + content)
    raises(load_file, path)
    assert not plugins("attack")


def test_a_failed_reload_keeps_the_file_that_was(bare, tmp_path):
    path = write_plugin(tmp_path / "mine.py")
    digest, old = load_file(path), find("attack", "mine")
    write_plugin(path, more="\n1 / 0")
    raises(load_file, path)
    assert find("attack", "mine") is sys.modules[old.__module__].Mine is old
    assert origin(old) == f"file:{digest}"
    assert make("attack", "mine:steps=2").steps == 2


def test_files_that_are_none(bare, tmp_path):
    (tmp_path / "folder.py").mkdir()
    assert raises(load_file, tmp_path / "gone.py") == f"no plugin file '{tmp_path / 'gone.py'}'"
    assert raises(load_file, tmp_path / "folder.py") == f"no plugin file '{tmp_path / 'folder.py'}'"
    assert raises(load_file, tmp_path / "mine.txt") == "a plugin file ends in .py, not 'mine.txt'"


def test_the_origin_of_a_class_in_a_script_is_its_file(pgd):
    assert origin(pgd) == f"file:{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"
    assert origin(type("X", (), {"__module__": "typed_by_hand"})) == "module:typed_by_hand"


@pytest.mark.parametrize("kind", ["attack", "defense", "certifier"])
def test_every_real_plugin_makes_itself_again(kind):
    for name, cls in plugins(kind).items():
        if MISSING in map(registry._default, registry._settings(cls).values()):
            continue  # it needs a setting
        assert spec(cls()) == name
        assert make(kind, spec(cls())) == cls()
        assert json.loads(json.dumps(identity(cls()))) == identity(cls())
