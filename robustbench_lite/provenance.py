"""Where a leaderboard row comes from: data, weights, settings and versions, and the command that makes it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from robustbench_lite import classifiers, registry
from robustbench_lite.entries import Entry, Proof, grouped
from robustbench_lite.trained import NONE

if TYPE_CHECKING:
    from robustbench_lite.matrix import Results
    from robustbench_lite.store import Cell


@dataclass(frozen=True)
class Origin:
    """Of a leaderboard row: ``facts`` by name, ``plugins`` as (spec, settings, version, from where), ``commands``."""

    first: Entry | Proof
    facts: dict[str, str]
    plugins: list[tuple[str, str, str, str]]
    commands: list[str]


def origins(results: Results) -> Iterator[Origin]:
    """Of every leaderboard row, and of what was only certified."""
    groups = [*grouped(results.entries)]
    proofs: dict[tuple[Any, ...], list[Proof]] = {}
    for proof in results.proofs:
        proofs.setdefault(proof.row, []).append(proof)
    rows = [(group, proofs.get(group[0].row, []) if group[0].adaptive else []) for group in groups]
    attacked = {group[0].row for group in groups}
    rows += [([], found) for row, found in proofs.items() if row not in attacked]
    for attacks, beside in rows:
        first = [*attacks, *beside][0]
        if first.cell is not None:
            yield _origin(attacks, beside, first.cell)


def _origin(attacks: Sequence[Entry], proofs: Sequence[Proof], cell: Cell) -> Origin:
    every: list[Entry | Proof] = [*attacks, *proofs]
    group = [one for one in every if one.cell is not None]
    model, about = cell.identity["model"], cell.about
    facts = {
        "data (SHA-256)": str(cell.identity["data"]),
        "weights (SHA-256)": str(model.get("weights", "")),
        "model code": str(model.get("code", "")),
        "pixel range": " to ".join(f"{end:g}" for end in cell.identity["range"]),
        "precision": str(cell.identity["precision"]),
        "seed": str(cell.identity["seed"]),
        "robustbench-lite": str(about["version"]),
        "torch": str(about["torch"]),
    }
    plugins = []
    for one in group:
        known = cast("Cell", one.cell).identity[one.kind]
        settings = ", ".join(f"{name}={value}" for name, value in known.get("settings", {}).items())
        plugins.append((one.plugin, settings, str(known.get("version", "")), str(known.get("origin", ""))))
    return Origin(group[0], {name: text for name, text in facts.items() if text}, plugins, list(_commands(group)))


def _commands(group: Sequence[Entry | Proof]) -> Iterator[str]:
    """One for the attacks with the certifiers beside them, and one for certifiers that searched for radii."""
    attacks = [one for one in group if isinstance(one, Entry)]
    searched, plain = ([one for one in group if _searched(one) is search] for search in (True, False))
    for ways in dict.fromkeys(map(_ways, attacks)):
        beside = ["--certify", _specs(plain)] if plain and ways == _ways(attacks[0]) else []
        alike = [one for one in attacks if _ways(one) == ways]
        yield _command(["robust-bench", "--attack", _specs(alike)], alike[0], [*ways, *beside])
    if plain and not attacks:
        yield _command(["robust-bench", "certify", "--method", _specs(plain)], plain[0], [])
    if searched:
        yield _command(["robust-bench", "certify", "--method", _specs(searched)], searched[0], ["--radius"])


def _ways(one: Entry) -> tuple[str, ...]:
    """The options that say how an attack's queries were answered."""
    identity, usual = cast("Cell", one.cell).identity, cast("Cell", one.cell).about.get("draws")
    averaged = ["--eot", str(identity["eot"])] if identity.get("eot", usual) != usual else []
    coarse = ["--precision", identity["precision"]] if identity["precision"] != "float32" else []
    return (*averaged, *coarse, *(["--layout", identity["layout"]] if "layout" in identity else []))


def _searched(one: Entry | Proof) -> bool | None:
    """Whether a certifier searched for radii; None of an attack."""
    return cast("Cell", one.cell).identity.get("search") if isinstance(one, Proof) else None


def _specs(found: Sequence[Entry | Proof]) -> str:
    return ",".join(dict.fromkeys(str(cast("Cell", one.cell).about[one.kind]) for one in found))


def _command(words: list[str], one: Entry | Proof, more: list[str]) -> str:
    assert one.cell is not None
    rows = (one.outcome if isinstance(one, Entry) else one.certified).row
    target = one.cell.identity.get("target")
    words += [*_subject(one), "--dataset", one.dataset, "--threat", f"{one.norm}:{one.eps!r}", *more]
    words += ["--n", str(int(np.max(rows)) + 1)]
    words += ["--target", str(target)] if target is not None else []
    words += ["--adaptive", "off"] if not one.adaptive else []
    words += ["--seed", str(one.seed)] if one.seed else []
    return shlex.join(words)


def _subject(one: Entry | Proof) -> list[str]:
    """The options that name the model; ``FILE`` stands for weights, whose hash is known and not their place."""
    assert one.cell is not None
    words = ["--model", one.model]
    if one.defense != NONE:
        words += ["--defense", one.defense]
    known = registry.plugins("defense").get(registry.split_chain(one.defense)[0].partition(":")[0])
    if not classifiers.is_reference(one.model) and (one.defense == NONE or not getattr(known, "trains", True)):
        words += ["--weights", "FILE"]
    given = dict(one.cell.identity["model"].get("inputs", {}))
    for name in ("mean", "std"):
        if given.get(name):
            words += [f"--{name}", ",".join(map(str, given[name]))]
    if list(given.get("bounds", (0.0, 1.0))) != [0.0, 1.0]:
        words += ["--bounds", ":".join(map(str, given["bounds"]))]
    words += ["--access", known_access] if (known_access := one.cell.identity["model"].get("access")) else []
    return [*words, *["--probabilities"] * bool(given.get("probabilities"))]
