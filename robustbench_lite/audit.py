"""Whether robust accuracies can be believed: checks of what is stored, pure functions like the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from robustbench_lite import specs
from robustbench_lite.chance import mcnemar, wilson
from robustbench_lite.entries import Entry, Probe, grouped
from robustbench_lite.outcome import BROKEN, HELD, NAN, SATURATED, UNSEEN, WRONG, ZERO, Outcome, Probed

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

One = TypeVar("One")

LEVEL = 0.01  # of the tests: what is likelier than this by chance is silent
MARGIN = 0.02  # a difference that is silent, of the inputs
ASTRAY = 0.05  # of the inputs, what an attack may leave though a weaker one breaks it
FLAT = 0.05  # of the inputs, how many may have a gradient of zero
STEADY = 1e-3  # of the span of the logits, how far one may move between two passes


class Flag(NamedTuple):
    """What a check that failed means, and what to do about it."""

    means: str
    advice: str


FLAGS = {
    "one-step": Flag(
        "Many steps along the gradient should gain on one: gradients mislead",
        "attack through a surrogate (BPDA), or without gradients",
    ),
    "black-box": Flag(
        "Who sees gradients should be the stronger: gradients are masked",
        "attack through a surrogate (BPDA), and run every attack without gradients that there is",
    ),
    "adaptive": Flag(
        "Who knows the defense should be the stronger: what attacks see of it leads them astray",
        "mend the surrogate, average over more draws (--eot), or count what blind attacks break as well",
    ),
    "effort": Flag("The attack has not converged", "raise steps, restarts or queries until the answer stays"),
    "eps": Flag(
        "What breaks at a small eps breaks at a large one: the attacks get stuck there",
        "give them more steps, more restarts or another loss",
    ),
    "unbounded": Flag(
        "With the whole pixel range to change, every input can be broken: gradients lead nowhere",
        "attack through a surrogate (BPDA), or without gradients",
    ),
    "zero-gradients": Flag(
        "Attacks that follow gradients stand still there",
        "give the defense a surrogate (BPDA), or attack without gradients",
    ),
    "saturated": Flag(
        "The cross-entropy is flat in float32, though the margin is not", "attack by the margin, or scale the logits"
    ),
    "nan-gradients": Flag("Attacks that follow gradients go astray there", "mend the backward pass, or a surrogate"),
    "probabilities": Flag(
        "These look like probabilities: softmax, applied twice, flattens the loss",
        "return logits, or say --probabilities",
    ),
    "random": Flag(
        "The model draws anew each time: one answer does not judge it, and one gradient is noise",
        "declare it stochastic, and draw from the noise that it is handed: attacks then average over draws",
    ),
    "noise": Flag("The attacks do no better than chance", "look for a mistake in the attacks, or in the model"),
}


@dataclass(frozen=True)
class Finding:
    """A check that failed for one leaderboard row, with the two figures that were compared."""

    flag: str
    row: Entry  # any of the row
    compared: str  # a sentence with both figures
    figures: tuple[float, float]

    def __str__(self) -> str:
        row, (means, advice) = self.row, FLAGS[self.flag]
        blind = "" if row.adaptive else ", blind attacks"
        where = f"{row.defense} ({row.model}{blind}), {row.dataset} {row.norm} {row.eps:g}"
        return f"{self.flag}: {where}: {self.compared}. {means}: {advice}."


def findings(entries: Iterable[Entry], probes: Iterable[Probe] = ()) -> list[Finding]:
    """Every check that failed, row by row."""
    groups = grouped(entries)
    seen = {probe.line: probe for probe in probes}
    found = [finding for group in groups for finding in _within(group, seen.get(group[0].line))]
    return [*found, *_across(groups)]


def flags(found: Iterable[Finding]) -> dict[tuple[Any, ...], str]:
    """The flags of each leaderboard row, by its ``line``."""
    names: dict[tuple[Any, ...], dict[str, None]] = {}
    for finding in found:
        names.setdefault(finding.row.line, {})[finding.flag] = None
    return {line: "; ".join(here) for line, here in names.items()}


def table(found: Iterable[Finding]) -> pd.DataFrame:
    """A line a finding."""
    import pandas as pd

    about = ("dataset", "defense", "norm", "eps", "adaptive", "seed")
    lines = [
        {name: getattr(finding.row, name) for name in about}
        | {"flag": finding.flag, "compared": finding.compared, "first": finding.figures[0]}
        | {"second": finding.figures[1], **FLAGS[finding.flag]._asdict()}
        for finding in found
    ]
    columns = [*about, "flag", "compared", "first", "second", *Flag._fields]
    return pd.DataFrame(lines, columns=columns)


class _Duel(NamedTuple):
    """Which of the same inputs two sides break; the weak one should do no better."""

    weak: NDArray[np.bool_]
    strong: NDArray[np.bool_]

    @property
    def alone(self) -> tuple[int, int]:
        """How many inputs only the weak side breaks, and only the strong one."""
        return int((self.weak & ~self.strong).sum()), int((self.strong & ~self.weak).sum())

    @property
    def upset(self) -> bool:
        """Whether the weak side breaks more in total, or many that the strong one leaves: beyond noise."""
        (weak, strong), count = self.alone, len(self.weak)
        ahead = weak - strong > MARGIN * count and mcnemar(self.weak, self.strong, "greater") < LEVEL
        return ahead or (weak > 0 and wilson(weak, count)[0] > ASTRAY)


def _duel(weak: Sequence[Outcome], strong: Sequence[Outcome]) -> _Duel:
    """Two sides, each the union of its attacks, on the inputs of which all of them know how they ended."""
    ended = np.all([(o.status == HELD) | o.fooled for o in (*weak, *strong)], axis=0)
    return _Duel(*(np.any([o.fooled for o in side], axis=0)[ended] for side in (weak, strong)))


def _within(group: list[Entry], probe: Probe | None) -> Iterator[Finding]:
    """The checks of one leaderboard row."""
    for same in _alike(group, _target):
        blind = [entry for entry in same if not _depth(entry)]
        single = [entry for entry in same if _depth(entry) == 1]
        iterated = [entry for entry in same if _depth(entry) > 1]
        for entry in single:
            yield from _outdone("one-step", entry, iterated)
        for entry in blind:
            yield from _outdone("black-box", entry, single + iterated)
        for kin in _alike(same, _method):
            *_, less, more = [kin[0], *sorted(kin, key=_spent)]
            if _spent(less) < _spent(more):
                yield from _outdone("effort", more, [less])
    if probe is not None:
        yield from _probed(group[0], probe.probed, probe.classes)
        yield from _noise(group, probe.probed)


def _alike(ones: Iterable[One], key: Callable[[One], Any]) -> list[list[One]]:
    """In groups of equal keys, in order of the first of each."""
    groups: dict[Any, list[One]] = {}
    for one in ones:
        groups.setdefault(key(one), []).append(one)
    return list(groups.values())


def _target(entry: Entry) -> str:
    """Towards what class it goes; to reach one takes more than to leave another."""
    return _parted(entry)[1]


def _parted(entry: Entry) -> tuple[str, str]:
    """An attack's spec and its target, without in what way its queries were answered."""
    spec, _, target = entry.attack.partition(" (")[0].partition(" to ")
    return spec, target


def _method(entry: Entry) -> tuple[Any, ...]:
    """An attack but for its whole numbers: steps, restarts, queries."""
    name, settings = specs.parse(_parted(entry)[0])
    return name, *sorted((name, value) for name, value in settings.items() if not value.isdigit())


def _depth(entry: Entry) -> int:
    """How many gradients it took of an input, at most; none where it sees scores or labels alone."""
    return int(entry.outcome.backwards.max())


def _spent(entry: Entry) -> int:
    """How often it asked about an input, at most: about one that it did not break soon, if there is any."""
    return int((entry.outcome.forwards + entry.outcome.backwards).max())


def _outdone(flag: str, weak: Entry, strong: Sequence[Entry]) -> Iterator[Finding]:
    """Where an attack does what stronger ones together do not."""
    if strong:
        duel = _duel([weak.outcome], [entry.outcome for entry in strong])
        yield from _upset(flag, weak, weak.attack, ", ".join(entry.attack for entry in strong), duel)


def _upset(flag: str, row: Entry, weak: str, strong: str, duel: _Duel) -> Iterator[Finding]:
    if duel.upset:
        one, other = duel.alone
        compared = f"of {len(duel.weak)} inputs {one} are broken by {weak} alone, {other} by {strong} alone"
        yield Finding(flag, row, compared, (one, other))


def _across(groups: Sequence[list[Entry]]) -> Iterator[Finding]:
    """Of one model at several eps: what the same attacks break at a smaller one, they should break at a larger; and
    what they break blindly, they should break once they know the defense."""
    for same in _alike(groups, lambda group: (*group[0].place, group[0].seed, group[0].adaptive)):
        for small, large in combinations(sorted(same, key=lambda group: group[0].eps), 2):
            ways = f"at eps {small[0].eps:g}", f"at eps {large[0].eps:g}"
            yield from _outgrown("eps", small, large, ways)
    for same in _alike(groups, lambda group: group[0].row):
        if len(same) == 2:
            blind, adaptive = sorted(same, key=lambda group: group[0].adaptive)
            yield from _outgrown("adaptive", blind, adaptive, ("blindly", "adaptively"))


def _outgrown(flag: str, weak: list[Entry], strong: list[Entry], ways: tuple[str, str]) -> Iterator[Finding]:
    """Where the attacks that two leaderboard rows share do less in the one where they should do more."""
    shared = sorted({entry.attack for entry in weak} & {entry.attack for entry in strong})
    rows = np.intersect1d(weak[0].outcome.row, strong[0].outcome.row)
    if shared and len(rows):
        sides = ([one.outcome.select(rows) for one in group if one.attack in shared] for group in (weak, strong))
        less, more = (f"{', '.join(shared)} {way}" for way in ways)
        yield from _upset(flag, strong[0], less, more, _duel(*sides))


def _probed(row: Entry, probed: Probed, classes: int) -> Iterator[Finding]:
    """What a probe of the model says of its row."""
    right, count = probed.status != WRONG, len(probed)
    left, chance = int((right & (probed.status != BROKEN)).sum()), 1 / classes
    if not (probed.gradient == UNSEEN).any() and _by_chance(left, count, chance) < LEVEL:
        compared = f"{left / count:.1%} of the inputs survive an attack without bounds, by chance {chance:.1%}"
        yield Finding("unbounded", row, compared, (left / count, chance))
    for kind, flag, most in ((ZERO, "zero-gradients", FLAT), (SATURATED, "saturated", FLAT), (NAN, "nan-gradients", 0)):
        share = float((probed.gradient[right] == kind).mean()) if right.any() else 0.0
        if share > most:
            compared = f"the gradients of {share:.1%} of the inputs are {kind}, tolerated {most:.1%}"
            yield Finding(flag, row, compared, (share, most))
    low, high = float(probed.low.min()), float(probed.high.max())
    if low >= 0 and high <= 1:
        yield Finding("probabilities", row, f"every answer lies between {low:.3g} and {high:.3g}", (low, high))
    moved, other = float((probed.moved > STEADY).mean()), float((probed.again != probed.clean).mean())
    if moved:
        compared = f"in a second pass {moved:.1%} of the inputs get other logits, {other:.1%} another label"
        yield Finding("random", row, compared, (moved, other))


def _noise(group: Sequence[Entry], probed: Probed) -> Iterator[Finding]:
    """Whether random noise breaks inputs, and the attacks, though they leave some, hardly more."""
    probed = probed.select(group[0].outcome.row)
    right = probed.status != WRONG
    noise = (probed.noise == BROKEN)[right]
    attacks = np.any([entry.outcome.select(probed.row).fooled for entry in group], axis=0)[right]
    some = noise.any() and wilson(int(noise.sum()), len(noise))[0] > MARGIN
    if some and not attacks.all() and mcnemar(attacks, noise, "greater") > LEVEL:
        one, other = int(noise.sum()), int(attacks.sum())
        compared = f"of {len(noise)} inputs random noise breaks {one}, the attacks together {other}"
        yield Finding("noise", group[0], compared, (one, other))


def _by_chance(count: int, trials: int, chance: float) -> float:
    """The p-value of at least ``count`` of ``trials``."""
    from scipy.special import betainc  # scipy.stats has the test, and takes seconds to import

    return float(betainc(count, trials - count + 1, chance)) if count else 1.0
