"""A chunk is written whole or not at all, and what cannot be trusted is not read."""

import errno
import json
import os
import pickle
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustbench_lite import store as module
from robustbench_lite.history import Epoch
from robustbench_lite.outcome import Certified, Outcome
from robustbench_lite.store import Cell, Store
from tests.outcomes import assert_same, assert_same_types, made, proved

IDENTITY: dict[str, Any] = {
    "data": "fingerprint",
    "model": {"defense": "none", "weights": "abc", "inputs": {"mean": (0.5,)}},
    "attack": {"name": "pgd", "version": 1, "settings": {"steps": 40, "length": None}},
    "norm": "linf",
    "eps": 0.3,
    "seed": 0,
}
CELL = Cell(IDENTITY, {"dataset": "digits", "eps": 0.3})
OUTCOME = made("whbus" * 4, start=100)


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, notes: list[str]) -> Store:
    made = Store(tmp_path / "runs", notes.append)
    made.prepare()
    return made


@pytest.fixture
def chunk(store: Store) -> Path:
    """The file of a stored chunk."""
    store.save(CELL, OUTCOME)
    (file,) = store.folder.rglob("*.npz")
    return file


def rewrite(chunk: Path, **arrays: Any) -> None:
    with np.load(chunk) as file:
        content = {name: file[name] for name in file.files}
    table, called = content.pop(module._ROWS), arrays.pop("rows", module._ROWS)
    columns = {name: table[name] for name in (*Outcome.columns(), "imaged")}
    columns |= {name: arrays.pop(name) for name in columns if name in arrays}
    kept = {name: column for name, column in columns.items() if column is not None}
    content[called] = np.empty(20, [(name, column.dtype) for name, column in kept.items()])
    for name, column in kept.items():
        content[called][name] = column
    content |= arrays
    np.savez(chunk, **{name: array for name, array in content.items() if array is not None})


def one_line(error: pytest.ExceptionInfo[ValueError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# What was saved is loaded


def test_what_is_saved_is_loaded_equal(store: Store, chunk: Path, notes: list[str]):
    assert chunk == store.folder / "cells" / CELL.key / "00000100-00000120.npz"
    loaded = store.load(CELL, 100, 120)
    assert loaded is not None
    assert_same(loaded, OUTCOME)
    assert_same_types(loaded, OUTCOME)
    assert not notes


def test_certificates_are_kept_beside_outcomes(store: Store, chunk: Path, notes: list[str]):
    """Their cell has a certifier in the attack's place; an outcome is not taken for one."""
    identity = {name: value for name, value in IDENTITY.items() if name != "attack"} | {"certifier": {"name": "crown"}}
    cell, kept = Cell(identity, {"dataset": "digits"}), proved("wvfun" * 4, start=100)
    store.save(cell, kept)
    loaded = store.load(cell, 100, 120, keep_all=True)
    assert loaded is not None
    assert_same(loaded, kept)
    assert_same_types(loaded, kept)
    assert_same(loaded.join([kept.part(110, 120), kept.part(100, 110)]), kept)
    assert {type(part) for _, chunks in store.cells() for part in chunks} == {Outcome, Certified}
    assert not notes
    (chunk.parents[1] / cell.key / chunk.name).write_bytes(chunk.read_bytes())
    assert store.load(cell, 100, 120) is None
    assert "is computed again" in notes[0]


def test_only_its_own_rows_and_cell_are_found(store: Store, chunk: Path, notes: list[str]):
    for start, stop in ((0, 100), (100, 119), (100, 200)):
        assert store.load(CELL, start, stop) is None
    assert store.load(replace(CELL, identity=IDENTITY | {"seed": 1}), 100, 120) is None
    assert not notes


def test_a_chunk_without_all_images_will_not_do_where_all_are_wanted(store: Store, chunk: Path):
    assert store.load(CELL, 100, 120, keep_all=True) is not None
    store.save(CELL, replace(OUTCOME, imaged=OUTCOME.imaged[:3], images=OUTCOME.images[:3]))
    assert store.load(CELL, 100, 120, keep_all=True) is None
    assert store.load(CELL, 100, 120) is not None


def test_cells_lists_every_cell_with_its_chunks(store: Store, notes: list[str]):
    other = Cell(IDENTITY | {"seed": 1}, {"dataset": "mnist"})
    store.save(CELL, made("h" * 100))
    store.save(CELL, made("b" * 100, start=100))
    store.save(other, made("u"))
    found = {cell.key: (cell.about, chunks) for cell, chunks in store.cells()}
    assert found.keys() == {CELL.key, other.key}
    about, chunks = found[CELL.key]
    assert about == CELL.about
    assert_same(Outcome.join(chunks), Outcome.join([made("h" * 100), made("b" * 100, start=100)]))
    assert not notes


def test_of_two_chunks_with_the_same_start_the_longer_counts(store: Store):
    store.save(CELL, made("h" * 50))
    store.save(CELL, made("h" * 80))
    store.save(CELL, made("h" * 7, start=100))
    ((_, chunks),) = store.cells()
    assert [len(part) for part in chunks] == [80, 7]


def test_files_of_other_people_in_a_cell_are_let_be(store: Store, chunk: Path, notes: list[str]):
    for name in ("my-notes.npz", "00000100-00000120 (copy).npz", "1-2-3.npz", "100-120.npz", "note.txt"):
        (chunk.parent / name).write_bytes(b"mine")
    ((_, chunks),) = store.cells()
    assert [len(part) for part in chunks] == [20]
    assert not notes


def test_every_eps_that_was_asked_is_remembered(store: Store):
    assert store.asked(CELL) == set()
    for eps in (0.3, 8 / 255, 0.3, 1e-07, 5.0):
        store.ask(CELL, eps)
    assert store.asked(CELL) == {0.3, 8 / 255, 1e-07, 5.0}
    assert list(store.cells()) == []


# Written whole or not at all


def test_a_part_is_never_read(store: Store, chunk: Path, notes: list[str]):
    chunk.rename(chunk.with_name(f"{chunk.name}.123.part"))
    assert store.load(CELL, 100, 120) is None
    assert [chunks for _, chunks in store.cells()] == [[]]
    assert not notes


@pytest.mark.parametrize("error", [RuntimeError("crash"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_a_crash_in_the_middle_of_writing_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    def crash(file: Any, **arrays: Any) -> None:
        file.write(b"PK half a chunk")
        assert list(store.folder.rglob("*.part"))
        raise error

    monkeypatch.setattr(module.np, "savez_compressed", crash)
    with pytest.raises(type(error)):
        store.save(CELL, OUTCOME)
    assert [file.name for file in store.folder.rglob("*.*")] == ["cell.json"]
    monkeypatch.undo()
    store.save(CELL, OUTCOME)
    loaded = store.load(CELL, 100, 120)
    assert loaded is not None
    assert_same(loaded, OUTCOME)


def test_a_crash_leaves_the_chunk_that_was_there(store: Store, chunk: Path, monkeypatch: pytest.MonkeyPatch):
    def crash(part: Path, path: Path) -> None:
        raise RuntimeError

    before = chunk.read_bytes()
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(RuntimeError):
        store.save(CELL, made("h" * 20, start=100))
    assert chunk.read_bytes() == before


@pytest.mark.parametrize("step", ["savez_compressed", "replace", "cell.json", "ask", "history"])
def test_a_full_disk_is_one_line(store: Store, monkeypatch: pytest.MonkeyPatch, step: str):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    where = {"savez_compressed": (module.np, step), "replace": (os, step)}
    monkeypatch.setattr(*where.get(step, (Path, "touch" if step == "ask" else "write_bytes")), full)
    writes = {"ask": lambda: store.ask(CELL, 0.3), "history": lambda: store.remember(CELL, HISTORY)}
    with pytest.raises(ValueError) as error:
        writes.get(step, lambda: store.save(CELL, OUTCOME))()
    one_line(error, "cannot write", str(store.folder), "No space left on device", "finished before is kept")


@pytest.mark.parametrize("below", ["", "runs", "runs/deep"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, below: str):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError) as error:
        Store(tmp_path / "file" / below, print).prepare()
    one_line(error, "cannot write to the results folder", str(tmp_path / "file"))


def test_a_read_only_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(ValueError) as error:
        Store(tmp_path, print).prepare()
    one_line(error, str(tmp_path), "Permission denied")


def test_preparing_leaves_no_trace(store: Store):
    assert list(store.folder.iterdir()) == []


# How models were trained

HISTORY = (Epoch(1, 0.5, 0.25, 0.75, None), Epoch(2, 0.25, 0.5, 1.0, 0.125))


def test_how_a_model_was_trained_is_kept_once_and_known_to_each_of_its_cells(store: Store):
    store.remember(CELL, ())
    assert list(store.folder.iterdir()) == []
    store.remember(CELL, HISTORY)
    (file,) = store.folder.rglob("*.json")
    before = file.stat()
    for cell in (CELL, Cell({**IDENTITY, "norm": "l2", "seed": 7}, {})):
        assert store.history(cell) == HISTORY
        store.remember(cell, HISTORY[:1])
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert store.history(Cell({**IDENTITY, "model": {**IDENTITY["model"], "weights": "abd"}}, {})) == ()


@pytest.mark.parametrize("content", [b"<script>alert(1)</script>", b"[{]", b"\xff", b'[{"epoch": NaN}]'], ids=range(4))
def test_a_damaged_history_is_none_and_is_written_again(store: Store, notes: list[str], content: bytes):
    store.remember(CELL, HISTORY)
    (file,) = store.folder.rglob("*.json")
    file.write_bytes(content)
    assert store.history(CELL) == store.history(CELL) == ()
    (note,) = notes
    assert note.startswith(f"{file} cannot be used")
    assert "\n" not in note
    store.remember(CELL, HISTORY)
    assert store.history(CELL) == HISTORY


# What cannot be trusted


def refused(store: Store, chunk: Path, notes: list[str]) -> str:
    assert store.load(CELL, 100, 120) is None
    (note,) = notes
    assert str(chunk) in note
    assert "computed again" in note
    assert "\n" not in note
    assert [chunks for _, chunks in store.cells()] == [[]]
    return note


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"not a zip" * 100, b"\x80\x04N."], ids=["empty", "pk", "text", "pickle"]
)
def test_a_file_that_is_no_chunk_is_refused(store: Store, chunk: Path, notes: list[str], content: bytes):
    chunk.write_bytes(content)
    refused(store, chunk, notes)


def test_a_bare_array_is_refused(store: Store, chunk: Path, notes: list[str]):
    with chunk.open("wb") as file:
        np.save(file, np.zeros(3))
    refused(store, chunk, notes)


def test_a_truncated_chunk_is_refused(store: Store, chunk: Path, notes: list[str]):
    whole = chunk.read_bytes()
    for length in range(0, len(whole), 97):
        notes.clear()
        chunk.write_bytes(whole[:length])
        refused(Store(store.folder, notes.append), chunk, notes)  # a store says the same only once


def test_a_damaged_chunk_is_refused_or_nothing_that_matters_was_hit(store: Store, chunk: Path, notes: list[str]):
    """Zip, deflate and numpy each have their own errors, zlib.error, NotImplementedError and TokenError among them."""
    dice, whole, outcomes = random.Random(0), chunk.read_bytes(), []
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 3, 20])):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        chunk.write_bytes(damaged)
        notes.clear()
        outcomes.append(Store(store.folder, notes.append).load(CELL, 100, 120))
        assert len(notes) == (outcomes[-1] is None)
        if outcomes[-1] is not None:
            assert_same(outcomes[-1], OUTCOME)
    assert outcomes.count(None) > 200


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"rows": f"rows of schema {module.SCHEMA + 1}"}, f"no rows of schema {module.SCHEMA}"),
        ({"imaged": np.zeros(20, bool)}, "4 images for 0 inputs"),
        ({"status": None}, "no field of name status"),
        ({"images": None}, "KeyError"),
        ({"row": OUTCOME.row + 1}, "other rows than its name says"),
        ({"row": OUTCOME.row[::-1]}, "other rows than its name says"),
    ],
    ids=["schema", "imaged", "no status", "no images", "shifted", "reversed"],
)
def test_a_chunk_of_another_make_is_refused(
    store: Store, chunk: Path, notes: list[str], arrays: dict[str, Any], reason: str
):
    rewrite(chunk, **arrays)
    assert reason in refused(store, chunk, notes)


class Bomb:
    fuse: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.fuse,)


def test_pickled_objects_are_refused_and_not_run(store: Store, chunk: Path, notes: list[str], tmp_path: Path):
    Bomb.fuse = tmp_path / "exploded"
    pickle.loads(pickle.dumps(Bomb()))
    assert Bomb.fuse.exists()  # it would
    Bomb.fuse.unlink()
    rewrite(chunk, reason=np.array([Bomb()] * 20, object))
    assert "hold objects" in refused(store, chunk, notes)
    assert not Bomb.fuse.exists()


@pytest.mark.parametrize(
    "tamper",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: text.replace('"abc"', '"abd"'),
    ],
    ids=["empty", "truncated", "list", "no identity", "seed", "weights"],
)
def test_a_cell_whose_description_was_tampered_with_is_left_out(
    store: Store, chunk: Path, notes: list[str], tamper: Any
):
    other = Cell(IDENTITY | {"seed": 5}, {})
    store.save(other, OUTCOME)
    about = chunk.parent / "cell.json"
    changed = tamper(about.read_text())
    assert changed != about.read_text()
    about.write_text(changed)
    assert [cell.key for cell, _ in store.cells()] == [other.key]
    (note,) = notes
    assert str(about) in note
    assert "left out" in note


def test_a_cell_moved_to_another_folder_is_left_out(store: Store, chunk: Path, notes: list[str]):
    chunk.parent.rename(chunk.parent.with_name("0" * 64))
    assert list(store.cells()) == []
    assert "does not belong to its folder" in notes[0]


# Keys


@pytest.mark.parametrize(
    "change",
    [
        {"data": "other"},
        {"model": {**IDENTITY["model"], "weights": "abd"}},
        {"model": {**IDENTITY["model"], "inputs": {"mean": (0.4,)}}},
        {"attack": {**IDENTITY["attack"], "version": 2}},
        {"attack": {**IDENTITY["attack"], "settings": {"steps": 41, "length": None}}},
        {"norm": "l2"},
        {"eps": 0.30000000000000004},
        {"eps": None},
        {"seed": 1},
        {"more": None},
    ],
    ids=str,
)
def test_whatever_changes_the_answer_changes_the_key(change: dict[str, Any]):
    assert Cell(IDENTITY | change, CELL.about).key != CELL.key


def test_the_schema_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch):
    before = CELL.key
    monkeypatch.setattr(module, "SCHEMA", module.SCHEMA + 1)
    assert CELL.key != before


def test_what_changes_no_answer_changes_no_key():
    shuffled = dict(reversed(IDENTITY.items()))
    assert Cell(shuffled, {"dataset": "other"}).key == CELL.key
    assert Cell(json.loads(json.dumps(IDENTITY)), {}).key == CELL.key
    assert len(CELL.key) == 64


def test_names_never_become_paths(tmp_path: Path, notes: list[str]):
    store = Store(tmp_path / "deep" / "runs", notes.append)
    store.prepare()
    evil = "npz:../../../x"
    store.save(Cell({"data": evil, "attack": {"name": "../../y"}}, {"dataset": evil, "defense": "/etc"}), OUTCOME)
    written = [path.relative_to(tmp_path).parts for path in tmp_path.rglob("*") if path.is_file()]
    assert {parts[:3] for parts in written} == {("deep", "runs", "cells")}
    assert {parts[4:] for parts in written} == {("cell.json",), ("00000100-00000120.npz",)}


def test_every_field_of_an_outcome_is_stored(chunk: Path):
    with np.load(chunk, allow_pickle=False) as file:
        assert set(file.files) == {module._ROWS, "images"}
        assert {*file[module._ROWS].dtype.names, "images"} == {field.name for field in fields(Outcome)}
