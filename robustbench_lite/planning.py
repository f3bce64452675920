"""Which attack and which certifier runs on which defense, and under which threat model, before anything is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, TypeVar, cast

import torch

from robustbench_lite import data, registry
from robustbench_lite.defended import LEVELS, Access
from robustbench_lite.norms import NORMS
from robustbench_lite.plugins import Attack, Certifier, Defense, crafted, learns
from robustbench_lite.threat import ThreatModel, find_norm
from robustbench_lite.trained import NONE, Subject, Workshop

ADAPTIVE = {"on": (True,), "off": (False,), "both": (True, False)}

Note = Callable[[str], None]
Pair = tuple[Attack, ThreatModel]
Tested = TypeVar("Tested", Attack, Certifier)


class Assault(NamedTuple):
    """An attack under a threat model; unless ``adaptive`` it is blind to a defense's last wrapper."""

    attack: Attack
    threat: ThreatModel
    adaptive: bool


@dataclass(frozen=True)
class Plan:
    """What is to be run: ``assaults`` on each chain of defenses, and what is to be proved of every one.

    ``named`` are the attacks that were asked for themselves, not by ``all``.
    """

    assaults: Mapping[str, Sequence[Assault]]
    proving: Sequence[tuple[Certifier, ThreatModel]]
    named: Sequence[Attack]

    def __len__(self) -> int:
        """How many cells there are."""
        return sum(len(assaults) + len(self.proving) for assaults in self.assaults.values())

    @property
    def attacks(self) -> list[Attack]:
        """Each attack once."""
        return list({id(one.attack): one.attack for assaults in self.assaults.values() for one in assaults}.values())

    @property
    def learns(self) -> bool:
        """Whether an attack learns from training data."""
        return any(map(learns, self.attacks))

    def with_sources(self, source: Callable[[str, str], Subject], note: Note) -> Plan:
        """The same without the attacks whose source cannot be had, and that only ``all`` asked for; makes the sources
        of the others.

        Raises:
            ValueError: where an attack was asked for itself.
        """
        lost: list[Attack] = []
        for attack in filter(crafted, self.attacks):
            try:
                source(attack.source, attack.name)
            except ValueError as error:
                if attack in self.named:
                    raise
                note(f"attack {registry.spec(attack)} is left out: {error}")
                lost.append(attack)
        left = {chain: [one for one in here if one.attack not in lost] for chain, here in self.assaults.items()}
        return replace(self, assaults=left)


def plan(
    workshop: Workshop,
    images: data.Images,
    attacks: str | Sequence[str | Attack],
    defenses: str | Sequence[str] | None,
    certifiers: str | Sequence[str | Certifier],
    threats: Sequence[str | ThreatModel] | None,
    adaptive: str,
    note: Note,
) -> Plan:
    """The plan for what :func:`robustbench_lite.matrix.benchmark` was asked.

    Raises:
        ValueError: for anything that cannot be run as asked; in one line.
    """
    if adaptive not in ADAPTIVE:
        raise ValueError(f"adaptive is {', '.join(ADAPTIVE)}, not {adaptive!r}")
    given = [attacks] if isinstance(attacks, str) else attacks
    fitting = _seeing(cast(list[Attack], _chosen("attack", given)), workshop.access, note)
    pairs = _pairs("attack", fitting, threats, images, note)
    under = threats if threats or not pairs else list(dict.fromkeys(threat for _, threat in pairs))
    certifying = cast(list[Certifier], _chosen("certifier", certifiers))
    if workshop.access != "gradients":
        for certifier in certifying:
            note(f"certifier {registry.spec(certifier)} is left out: it needs the model itself, which is a black box")
        certifying = []
    proving = _pairs("certifier", certifying, under, images, note)
    defenses = [defenses] if isinstance(defenses, str) else defenses
    chains = {workshop.name(chain): chain for chain in _expand("defense", defenses or [_unless(workshop)])}
    ways = {chain: _ways(adaptive, workshop.links(chain)) for chain in chains.values()}
    bare = [chain for chain, way in ways.items() if False not in way]
    if bare and (adaptive == "off" or (adaptive == "both" and len(bare) == len(ways))):
        raise ValueError(f"adaptive={adaptive}: {bare[0]} has no wrapper that an attack could be blind to")
    here = {chain: _foreign(workshop, chain, name, pairs, note) for name, chain in chains.items()}
    assaults = {chain: [Assault(*pair, way) for way in ways[chain] for pair in here[chain]] for chain in here}
    if not proving and not any(assaults.values()):
        raise ValueError("there is no attack to run")
    return Plan(assaults, proving, _chosen("attack", [one for one in given if one != "all"]))


def _unless(workshop: Workshop) -> str:
    """The defense where none is named."""
    return NONE if workshop.own else "madry"


def _ways(adaptive: str, links: Sequence[Defense]) -> tuple[bool, ...]:
    """Whether attacks know of a chain's last wrapper: one way, or both; where there is none they know everything."""
    return (True,) if all(link.trains for link in links) else ADAPTIVE[adaptive]


def _expand(kind: registry.Kind, items: Sequence[Any]) -> list[Any]:
    """``items`` with ``all`` replaced by the built-in plugins (of defenses: the recipes)."""
    return [one for item in items for one in (_all(kind) if item == "all" else [item])]


def _all(kind: registry.Kind) -> list[str]:
    return [name for name in registry.builtin(kind) if getattr(registry.find(kind, name), "trains", True)]


def _chosen(kind: registry.Kind, given: str | Sequence[Any]) -> list[Any]:
    """The attacks or certifiers that are asked for, each once."""
    plugins = [_plugin(kind, one) for one in _expand(kind, [given] if isinstance(given, str) else given)]
    return list({(type(plugin), registry.spec(plugin)): plugin for plugin in plugins}.values())


def _plugin(kind: registry.Kind, given: Any) -> Any:
    plugin = registry.make(kind, given) if isinstance(given, str) else given
    what = f"{given!r} is no {kind}"
    for needed in ("access", "norms", "__call__") if kind == "attack" else ("norms", "__call__"):
        if not hasattr(plugin, needed):
            raise ValueError(f"{what}: it has no {needed}")
    if isinstance(plugin, type) or not is_dataclass(type(plugin)):
        raise ValueError(f"{what}: an object of a frozen dataclass is wanted")
    if not plugin.norms & NORMS.keys():
        raise ValueError(f"{kind} {registry.spec(plugin)} knows none of the norms {', '.join(NORMS)}")
    if learns(plugin) and plugin.learned is not None:
        raise ValueError(f"{kind} {registry.spec(plugin)} has learned already, but must learn anew for each defense")
    try:
        json.dumps(registry.identity(plugin))
    except TypeError as error:
        raise ValueError(f"{given!r} has a setting that cannot be part of a key: {error}") from error
    return plugin


def _seeing(attacks: list[Attack], access: Access, note: Note) -> list[Attack]:
    """The attacks that need to see no more of the model than there is."""
    level = LEVELS.index(access)
    for attack in attacks:
        if LEVELS.index(attack.access) > level:
            note(f"attack {registry.spec(attack)} is left out: it needs the model's {attack.access}, not only {access}")
    fitting = [attack for attack in attacks if LEVELS.index(attack.access) <= level]
    if attacks and not fitting:
        there = [
            name
            for name in registry.builtin("attack")
            if LEVELS.index(cast(Any, registry.find("attack", name)).access) <= level
        ]
        raise ValueError(f"none of the attacks gets by with the model's {access}; these do: {', '.join(there)}")
    return fitting


def _pairs(
    kind: registry.Kind,
    plugins: Sequence[Tested],
    threats: Sequence[str | ThreatModel] | None,
    images: data.Images,
    note: Note,
) -> list[tuple[Tested, ThreatModel]]:
    """Which attack or certifier runs under which threat model, one threat model after the other."""
    if not plugins:
        return []
    if threats is None:
        customary = data.SOURCES[images.name].eps if images.name in data.SOURCES else {}
        found = []
        for plugin in plugins:
            norms = [norm for norm in NORMS if norm in plugin.norms]
            norm = next((norm for norm in norms if norm in customary), norms[0])
            out = f"{kind} {registry.spec(plugin)} is left out"
            if len(plugins) == 1 or (norm in customary and not hasattr(plugin, "fit")):
                found.append((plugin, _threat(norm, images)))
            elif norm in customary:
                note(f"{out}: it learns from training data; give --threat {norm}")
            else:
                note(f"{out}: {images.name} has no customary eps for {norm}")
        if not found:
            raise ValueError(f"{images.name} has no customary eps for any of the {kind}s; give --threat linf:0.1")
        return [pair for _, block in groupby(sorted(found, key=_rank), key=_rank) for pair in block]
    pairs = []
    for threat in dict.fromkeys(_threat(threat, images) for threat in threats):
        for plugin in plugins:
            if threat.norm.name in plugin.norms:
                pairs.append((plugin, threat))
            else:
                knows = ", ".join(norm for norm in NORMS if norm in plugin.norms)
                note(f"{kind} {registry.spec(plugin)} is left out under {threat}: it knows {knows}")
    if not pairs:
        raise ValueError(f"none of the {kind}s runs under {', '.join(map(str, threats))}")
    return pairs


def _foreign(workshop: Workshop, chain: str, name: str, pairs: Sequence[Pair], note: Note) -> list[Pair]:
    """The pairs that run on a chain, of that full name: not those whose attack is crafted on this very model."""
    own = []
    for attack in filter(crafted, {id(attack): attack for attack, _ in pairs}.values()):
        place, source = workshop.elsewhere(attack.source, attack.name)
        if place.name(source) == name:
            note(f"attack {registry.spec(attack)} is left out on {chain}, which is its source")
            own.append(attack)
    return [pair for pair in pairs if pair[0] not in own]


def _rank(pair: tuple[Any, ThreatModel]) -> int:
    return list(NORMS).index(pair[1].norm.name)


def _threat(given: str | ThreatModel, images: data.Images) -> ThreatModel:
    """A threat model for these images; a norm alone stands for the data set's customary eps."""
    if isinstance(given, str):
        named = ":" in given
        given = (
            ThreatModel.parse(given) if named else ThreatModel(find_norm(given), data.customary_eps(images.name, given))
        )
    most = float(given.norm.size(torch.ones(1, *images.shape)))
    if max(given.eps, given.norm.limit(given.eps, images.x)) > most:
        raise ValueError(f"{given}: eps is above the range; two images of {images.name} differ by at most {most:g}")
    return given
