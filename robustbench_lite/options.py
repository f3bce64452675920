"""The options that commands share, and what their texts mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from robustbench_lite import registry

if TYPE_CHECKING:
    from robustbench_lite.evaluation import Target

Described = tuple[tuple[float, ...], tuple[float, ...], tuple[float, float], bool, str | None]

WHAT, MODEL, HOW, RESULTS, TALK = "What to run", "Whose model", "How", "Results", "Talk"

Defenses = Annotated[
    list[str] | None,
    typer.Option("--defense", help="Defenses, as madry:eps=0.3; chain them with +; or all.", rich_help_panel=WHAT),
]
Dataset = Annotated[
    str,
    typer.Option(
        "--dataset", help="A name from `robust-bench datasets`, npz:FILE, or folder:DIR.", rich_help_panel=WHAT
    ),
]
Threats = Annotated[
    list[str] | None,
    typer.Option(
        "--threat", help="Threat models, as linf:8/255,l2:0.5. Default: customary ones.", rich_help_panel=WHAT
    ),
]
OneNorm = Annotated[
    str | None, typer.Option("--norm", help="Short for one threat model: its norm.", rich_help_panel=WHAT)
]
Eps = Annotated[str | None, typer.Option("--eps", help="... and its eps, 0.3 or 8/255.", rich_help_panel=WHAT)]
Count = Annotated[
    str | None,
    typer.Option(
        "--n", help="How many test images, from the first on; or all. Default: at most 1000.", rich_help_panel=WHAT
    ),
]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", help="A Python file that registers plugins of yours; may repeat.", rich_help_panel=WHAT),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="An architecture, or your classifier: FILE.py:factory, onnx:FILE, timm:NAME, robustbench:NAME; or a "
        "black box, see --access.",
        rich_help_panel=MODEL,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="Fills the model: safetensors, or a torch state dict.", rich_help_panel=MODEL),
]
Mean = Annotated[
    str | None, typer.Option("--mean", help="Subtracted inside the model, one a channel.", rich_help_panel=MODEL)
]
Std = Annotated[str | None, typer.Option("--std", help="Divided by inside the model.", rich_help_panel=MODEL)]
Bounds = Annotated[str, typer.Option("--bounds", help="The pixel range your model expects.", rich_help_panel=MODEL)]
Probabilities = Annotated[
    bool, typer.Option("--probabilities", help="Your model returns probabilities.", rich_help_panel=MODEL)
]
Access = Annotated[
    str | None,
    typer.Option(
        "--access",
        help="The model, FILE.py:function or a URL, is a black box that answers labels or scores; on terms, as "
        "labels:rate=50,queries=100000.",
        rich_help_panel=MODEL,
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", help="Of all randomness in the attacks and certifiers.", rich_help_panel=HOW)
]
Towards = Annotated[
    str | None,
    typer.Option(
        "--target", help="Attack towards a class: its number, next, random or least-likely.", rich_help_panel=WHAT
    ),
]
Adaptive = Annotated[
    str,
    typer.Option(
        "--adaptive",
        help="on: attacks know a defense's last wrapper; off: they are blind to it; both: a row each.",
        rich_help_panel=WHAT,
    ),
]
Eot = Annotated[
    int | None,
    typer.Option(
        "--eot",
        min=1,
        help="Draws of a stochastic defense that gradients are averaged over; by default its own.",
        rich_help_panel=WHAT,
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=HOW)]
Workers = Annotated[
    int, typer.Option("--workers", help="Processes that share the work; 0: none but this one.", rich_help_panel=HOW)
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Share the work among the actors of a Ray cluster; local: one on this machine.",
        rich_help_panel=HOW,
    ),
]
Threads = Annotated[
    int, typer.Option("--threads", help="CPU threads of each process; may change last bits.", rich_help_panel=HOW)
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout", help="Seconds for 100 inputs, or they end unknown until the next run.", rich_help_panel=HOW
    ),
]
Isolate = Annotated[bool, typer.Option("--isolate", help="Run each cell in a process of its own.", rich_help_panel=HOW)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what is missing, and roughly how long it takes.", rich_help_panel=HOW)
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", envvar="ROBUST_BENCH_DATA", help="Data sets in torchvision's layout.", rich_help_panel=HOW
    ),
]
Out = Annotated[
    Path, typer.Option("--out", help="Results folder; what it has is not computed again.", rich_help_panel=RESULTS)
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Compute again what is there.", rich_help_panel=RESULTS)]
Csv = Annotated[Path | None, typer.Option("--csv", help="Write the table.", rich_help_panel=RESULTS)]
Table = Annotated[
    Path | None,
    typer.Option(
        "--table",
        help="Write the leaderboard: FILE.md, .tex, or RobustBench's .json.",
        rich_help_panel=RESULTS,
    ),
]
Html = Annotated[
    Path | None, typer.Option("--html", help="Write all there is to see as one page.", rich_help_panel=RESULTS)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the table as JSON.", rich_help_panel=TALK)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Tables only.", rich_help_panel=TALK)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="A line for each piece of work.", rich_help_panel=TALK)]


def specs(given: list[str] | None) -> list[str]:
    return [spec for text in given or () for spec in registry.split_list(text)]


def threats(threat: list[str] | None, norm: str | None, eps: str | None) -> list[str] | None:
    short = (norm, eps) != (None, None)
    if threat and short:
        raise ValueError("--threat names whole threat models; leave out --norm and --eps")
    if short:
        return [str(norm) if eps is None else f"{norm or 'linf'}:{eps}"]
    return [part.strip() for text in threat for part in text.split(",")] if threat else None


def known(attacks: list[str], certifiers: list[str], defenses: list[str]) -> None:
    """Answers for names and settings, before any data set is read or downloaded."""
    kinds: dict[registry.Kind, list[str]] = {"attack": attacks, "certifier": certifiers}
    for kind, given in kinds.items():
        for spec in given:
            if spec != "all":
                registry.make(kind, spec)
    for chain in defenses:
        for link in registry.split_chain(registry.split_source(chain)[0]):
            if link not in ("all", "none"):
                registry.make("defense", link)


def learns(spec: str) -> bool:
    return hasattr(registry.make("attack", spec), "fit")


def writable(*files: Path) -> None:
    """Sees that there is a place for each file, before the work that fills it."""
    for file in files:
        if not file.resolve().parent.is_dir():
            raise ValueError(f"there is no folder {file.parent} to write {file.name} into")
        if file.is_dir():
            raise ValueError(f"{file} is a folder; name a file to write")


def exported(file: Path | None) -> None:
    """Sees that a leaderboard can be written in the format that the file's name asks for."""
    from robustbench_lite import exports

    if file is not None:
        exports.check(file)


def first(dataset: str, data_dir: Path | None) -> int:
    """How many images are attacked where the person does not say: 1,000, or all of a smaller data set."""
    from robustbench_lite import data

    source = data.SOURCES.get(dataset)
    return min(1000, source.test if source else len(data.load(dataset, "test", data_dir)))


def images(text: str | None, dataset: str, data_dir: Path | None) -> int | None:
    """How many images are attacked; None stands for all."""
    return first(dataset, data_dir) if text is None else count(text)


def count(text: str) -> int | None:
    return None if text == "all" else whole("--n", text)


def whole(option: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        other = "all" if option == "--n" else "auto"
        raise ValueError(f"{option} wants a whole number or {other}, not {text!r}") from None
    if number < 1:
        raise ValueError(f"{option} must be 1 or more, not {text}")
    return number


def target(text: str | None) -> Target | None:
    if text in (None, "next", "random", "least-likely"):
        return cast("Target | None", text)
    try:
        return int(str(text))
    except ValueError:
        raise ValueError(f"--target wants a class's number, next, random or least-likely, not {text!r}") from None


def numbers(option: str, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"{option} wants numbers with commas between, not {text!r}") from None


def span(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    try:
        ends = float(low), float(high)
    except ValueError:
        raise ValueError(f"--bounds wants LOW:HIGH, as 0:255, not {text!r}") from None
    if not ends[0] < ends[1]:
        raise ValueError(f"--bounds wants LOW below HIGH, not {text}")
    return ends


def described(
    mean: str | None, std: str | None, bounds: str, probabilities: bool, access: str | None = None
) -> Described:
    """What a user's model expects and returns."""
    return numbers("--mean", mean), numbers("--std", std), span(bounds), probabilities, access
