"""What the pages take from the code, for each line ``{{ name }}``; a name that is not here fails the build."""

import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from inspect import cleandoc
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

import robustbench_lite as rb
from robustbench_lite import audit, comparison, curves, data, figures, leaderboard, models, outcome, registry
from robustbench_lite.defended import Defended
from robustbench_lite.noise import Noise
from robustbench_lite.norms import NORMS
from robustbench_lite.plugins import learns
from robustbench_lite.trained import complete
from robustbench_lite.training import Lab, Recipe

HERE = Path(__file__).parent
FRAME = ("dataset", "defense", "norm", "eps")  # begins a line of the rows CSV
TABLES: dict[str, Sequence[str]] = {
    "leaderboard": leaderboard.LEADERBOARD,
    "certificates": leaderboard.CERTIFICATES,
    "per_class": leaderboard.PER_CLASS,
    "curves": curves.CURVES,
    "comparison": comparison.COMPARISON,
    "trainings": figures.TRAININGS,
    "audit": [*audit.table([]).columns],
    "outcome": [*FRAME, "attack", "seed", "adaptive", *outcome.Outcome.columns()],
    "certified": [*FRAME, "certifier", "seed", *outcome.Certified.columns()],
    "probed": outcome.Probed.columns(),
}
SIDE, CLASSES = 8, 10
EPS = {"linf": 0.001, "l2": 0.001, "l1": 0.001, "l0": 1, "patch": 0.02}


def table(heads: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in row)} |" for row in rows)


def said(name: str, needed: Iterable[str], common: bool = True) -> dict[str, str]:
    """What ``said.toml`` says of each of these, in their order."""
    texts = tomllib.loads((HERE / "said.toml").read_text())
    about = {**texts["common"], **texts[name]} if common else texts[name]
    missing = [one for one in needed if one not in about]
    idle = [one for one in texts[name] if one not in needed]
    idle += [one for one in texts["common"] if not any(one in columns for columns in TABLES.values())]
    if missing or idle:
        raise ValueError(f"said.toml: {name} lacks {missing}, and has lines for nothing: {idle}")
    return {one: about[one] for one in needed}


def columns(name: str) -> str:
    """A line a column, in order."""
    return table(
        ["column", "what it says"], ([f"`{column}`", text] for column, text in said(name, TABLES[name]).items())
    )


def arrays(chunk: type[outcome.Rows]) -> str:
    """The columns of a stored chunk with their types."""
    hints = get_type_hints(chunk)
    types = {name: get_args(get_args(hints[name])[1])[0].__name__ for name in chunk.columns()}
    return ", ".join(f"`{name}` ({'text' if kind == 'str_' else kind})" for name, kind in types.items())


def flags() -> str:
    when = said("flags", audit.FLAGS, common=False)
    lines = ([f"`{name}`", when[name], flag.means, flag.advice] for name, flag in audit.FLAGS.items())
    return table(["flag", "fails when", "what it means", "what to do"], lines)


def datasets() -> str:
    heads = ["name", "shape", "classes", "train", "test", "customary eps", "what it is"]
    return table(
        heads,
        (
            [
                f"`{source.name}`",
                " × ".join(map(str, source.shape)),
                source.classes,
                f"{source.train:,}",
                f"{source.test:,}",
                ", ".join(f"{norm} {eps:.3g}" for norm, eps in source.eps.items()),
                f"{source.about} ({source.paper})",
            ]
            for source in data.SOURCES.values()
        ),
    )


def limits() -> str:
    """The README's, which is where they stand."""
    readme = (HERE.parent / "README.md").read_text()
    return readme.partition("## Limits\n")[2].partition("\n## ")[0]


def times(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def plugins(kind: registry.Kind, about: Callable[[str, Any], str]) -> str:
    """A section a plugin that comes with the package."""
    parts = []
    for name in registry.builtin(kind):
        cls: Any = registry.find(kind, name)
        parts += [f"## {name}", cleandoc(cls.__doc__), about(name, cls)]
        if settings := registry.defaults(cls):
            lines = ([f"`{setting}`", f"`{value}`"] for setting, value in settings.items())
            parts.append(table(["setting", "default"], lines))
        if paper := getattr(cls, "bibtex", ""):
            parts.append(f"```bibtex\n{paper}\n```")
    return "\n\n".join(parts)


def facts(pairs: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"* **{name}**: {value}" for name, value in pairs)


def norms(cls: Any) -> str:
    return ", ".join(norm for norm in NORMS if norm in cls.norms)


class Stubborn(nn.Module):
    """A linear model whose answer changes within the pixel range, but not within any of ``EPS``."""

    def __init__(self) -> None:
        super().__init__()
        pixels = SIDE * SIDE
        signs = Noise(0, torch.arange(CLASSES)).signs(torch.empty(CLASSES, pixels))
        self.weight = nn.Parameter(signs / pixels)
        own = nn.functional.one_hot(torch.tensor(0), CLASSES)
        self.bias = nn.Parameter(0.05 * own - self.weight.detach().sum(1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.flatten(1), self.weight, self.bias)


def grey(count: int) -> tuple[Tensor, Tensor]:
    """Images of which :class:`Stubborn` says class 0 by a margin of 0.05."""
    return torch.full((count, 1, SIDE, SIDE), 0.5), torch.zeros(count, dtype=torch.int64)


@cache
def cost(attack: Any) -> tuple[int, int]:
    """The forwards and backwards of an input that an attack does not break: measured, for a cascade stage by stage."""
    if stages := getattr(attack, "attacks", ()):
        forwards, backwards = zip(*map(cost, stages))
        return sum(forwards), sum(backwards)
    model, (x, y) = Stubborn(), grey(1)
    norm = next(norm for norm in NORMS if norm in attack.norms)
    threat = f"{norm}:{EPS[norm]}"
    if learns(attack):
        attack = rb.fit_attack(attack, model, *grey(attack.images), threat)
    found = rb.evaluate(attack, model, x, y, threat, sources=lambda spec: Defended(model))
    return int(found.forwards[0]), int(found.backwards[0])


def attack(name: str, cls: Any) -> str:
    made = registry.make("attack", name)
    forwards, backwards = cost(made)
    costs = f"{times(forwards, 'forward')} and {times(backwards, 'backward')}"
    if learns(made):
        costs += f", after it has learned from {made.images:,} images"
    seeks = "the nearest adversarial input, whatever eps" if getattr(cls, "minimises", False) else "one within eps"
    about = [["sees", cls.access], ["norms", norms(cls)], ["seeks", seeks], ["costs", costs]]
    return facts(about)


class Counter:
    """Counts how often a model answers about a batch, and how often gradients pass back, as a hook of the model."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.forwards = self.backwards = 0
        self._batch = batch
        model.register_forward_hook(self._forward)

    def _forward(self, model: nn.Module, asked: object, answer: Tensor) -> None:
        if len(answer) != self._batch:
            return  # bounds trace the network with another
        self.forwards += 1
        if answer.requires_grad:
            answer.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += 1


def defense(name: str, cls: Any) -> str:
    """What a recipe asks of the model for a training image and epoch, what a wrapper does for an answer; measured."""
    plugin = complete(registry.make("defense", name), "digits")
    images = data.load("digits", "train")
    images = images.take(slice(0, 64))
    model, source = (models.build("mlp", images.shape, images.classes, seed) for seed in (0, 1))
    lab = Lab(lambda: images, Noise(0, torch.arange(len(images))), lambda spec: Defended(source).eval())
    if isinstance(plugin, Recipe):
        counter = Counter(model, len(images))
        loss, _ = plugin.objective(model, lab)(images.x, images.y, lab.noise, float(plugin.epochs))
        loss.backward()
        each = f"{times(counter.forwards, 'forward')} and {times(counter.backwards, 'backward')} an epoch"
        about = [["kind", "a recipe"], ["a training image costs", each]]
    else:
        guarded = plugin(model, lab)
        counter = Counter(model, len(images))
        guarded.answer(images.x, noise=lab.noise)
        about = [["kind", "a wrapper"], ["an answer costs", times(counter.forwards, "forward")]]
        if guarded.stochastic:
            about += [["answers at random", f"{guarded.draws} draws vote on what is judged"]]
    return facts(about)


def certifier(name: str, cls: Any) -> str:
    radius = (
        "the largest that it can prove" if getattr(cls, "exact_radius", False) else "eps; by bisection with `--radius`"
    )
    return facts([["norms", norms(cls)], ["radius", radius]])


def foolbox() -> str:
    members: set[Any] = set(registry.families("attack")["foolbox"]().values())
    lines = sorted([f"`{cls.name}`", norms(cls), cls.access] for cls in members)
    return table(["attack", "norms", "sees"], lines)


INSERTS: dict[str, Callable[[], str]] = {
    **{f"columns of {name}": lambda name=name: columns(name) for name in TABLES},
    "chunk of an attack": lambda: arrays(outcome.Outcome),
    "chunk of a certifier": lambda: arrays(outcome.Certified),
    "chunk of a probe": lambda: arrays(outcome.Probed),
    "flags": flags,
    "datasets": datasets,
    "limits": limits,
    "attacks": lambda: plugins("attack", attack),
    "defenses": lambda: plugins("defense", defense),
    "certifiers": lambda: plugins("certifier", certifier),
    "foolbox": foolbox,
}


def on_page_markdown(markdown: str, **_: object) -> str:
    """MkDocs calls this for every page."""
    return re.sub(r"^\{\{ (.+) \}\}$", lambda insert: INSERTS[insert[1]](), markdown, flags=re.MULTILINE)
