"""The command line: ``robust-bench --attack pgd --defense madry``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from robustbench_lite import __version__, registry

if TYPE_CHECKING:
    from rich.console import Console

    from robustbench_lite.evaluation import Target
    from robustbench_lite.matrix import Results

UNKNOWN, USAGE, BELOW, STOPPED = 1, 2, 3, 130  # exit codes

app = typer.Typer(
    name="robust-bench",
    help="Attacks defended models and says what survives every attack.",
    epilog="Example: robust-bench --attack fgsm,pgd:steps=100,restarts=5 --defense standard,madry --csv board.csv",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

WHAT, MODEL, HOW, RESULTS, TALK = "What to run", "Whose model", "How", "Results", "Talk"

DATASET = typer.Option("--dataset", help="A name from `robust-bench datasets`, or npz:FILE.", rich_help_panel=WHAT)
DATA_DIR = typer.Option(
    "--data-dir", envvar="ROBUST_BENCH_DATA", help="Data sets in torchvision's layout.", rich_help_panel=HOW
)
DEVICE = typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=HOW)
NAME = typer.Argument(help="Say all about this one, with its paper.")
PLUGIN = typer.Option(
    "--plugin", help="A Python file that registers plugins of yours; may repeat.", rich_help_panel=WHAT
)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            "--attack", help="Attacks, as pgd:steps=100,restarts=5; a list, or repeat it; or all.", rich_help_panel=WHAT
        ),
    ] = None,
    defense: Annotated[
        list[str] | None,
        typer.Option("--defense", help="Defenses, as madry:eps=0.3; chain them with +; or all.", rich_help_panel=WHAT),
    ] = None,
    dataset: Annotated[str, DATASET] = "mnist",
    threat: Annotated[
        list[str] | None,
        typer.Option(
            "--threat", help="Threat models, as linf:8/255,l2:0.5. Default: customary ones.", rich_help_panel=WHAT
        ),
    ] = None,
    norm: Annotated[
        str | None, typer.Option(help="Short for one threat model: its norm.", rich_help_panel=WHAT)
    ] = None,
    eps: Annotated[str | None, typer.Option(help="... and its eps, 0.3 or 8/255.", rich_help_panel=WHAT)] = None,
    n: Annotated[
        str | None,
        typer.Option(
            "--n", help="How many test images, from the first on; or all. Default: at most 1000.", rich_help_panel=WHAT
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Attack towards a class: its number, next, random or least-likely.", rich_help_panel=WHAT),
    ] = None,
    plugin: Annotated[list[Path] | None, PLUGIN] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="An architecture, or your classifier: FILE.py:factory, package.module:factory.", rich_help_panel=MODEL
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Fills the model: safetensors, or a torch state dict.", rich_help_panel=MODEL)
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Subtracted inside the model, one a channel.", rich_help_panel=MODEL)
    ] = None,
    std: Annotated[str | None, typer.Option(help="Divided by inside the model.", rich_help_panel=MODEL)] = None,
    bounds: Annotated[str, typer.Option(help="The pixel range your model expects.", rich_help_panel=MODEL)] = "0:1",
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Your model returns probabilities.", rich_help_panel=MODEL)
    ] = False,
    seed: Annotated[int, typer.Option(help="Of all randomness in the attacks.", rich_help_panel=HOW)] = 0,
    device: Annotated[str, DEVICE] = "auto",
    batch: Annotated[str, typer.Option(help="Inputs at once; changes no result.", rich_help_panel=HOW)] = "auto",
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    out: Annotated[
        Path, typer.Option(help="Results folder; what it has is not computed again.", rich_help_panel=RESULTS)
    ] = Path("runs"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compute again what is there.", rich_help_panel=RESULTS)
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the leaderboard.", rich_help_panel=RESULTS)] = None,
    matrix: Annotated[
        Path | None, typer.Option(help="Write the matrix, attack by defense.", rich_help_panel=RESULTS)
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Write a line an input and attack.", rich_help_panel=RESULTS)
    ] = None,
    save_adversarials: Annotated[
        Path | None, typer.Option(help="Write every adversarial image, as npz.", rich_help_panel=RESULTS)
    ] = None,
    save_patch: Annotated[
        Path | None,
        typer.Option(help="Write the patch that an attack has learned, as PNG.", rich_help_panel=RESULTS),
    ] = None,
    fail_below: Annotated[
        float | None,
        typer.Option(help="Exit with 3 if a robust accuracy (a fraction) is below this.", rich_help_panel=RESULTS),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the leaderboard as JSON.", rich_help_panel=TALK)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Tables only.", rich_help_panel=TALK)] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="A line for each piece of work.", rich_help_panel=TALK)
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", rich_help_panel=TALK)] = False,
) -> None:
    if version:
        print(f"robust-bench {__version__}")
        raise typer.Exit
    for file in plugin or ():
        registry.load_file(file)
    if context.invoked_subcommand:
        return
    if not sys.argv[1:]:
        print(context.get_help())
        raise typer.Exit
    errors = _errors()
    threats = _threats(threat, norm, eps)
    count = None if n is None or n == "all" else _whole("--n", n)
    size = None if batch == "auto" else _whole("--batch", batch)
    towards = _target(target)
    inputs = _numbers("--mean", mean), _numbers("--std", std), _bounds(bounds), probabilities
    if fail_below is not None and not 0 <= fail_below <= 1:
        raise ValueError(f"--fail-below is a fraction between 0 and 1, not {fail_below:g}")
    files = [file for file in (csv, matrix, rows, save_adversarials, save_patch) if file is not None]
    _writable(*files)
    if save_patch is not None and save_patch.suffix.lower() != ".png":
        raise ValueError(f"--save-patch writes a PNG file; {save_patch.name} does not end in .png")
    attacks = _specs(attack) or ["pgd"]
    defenses = _specs(defense)
    if not quiet and not as_json:
        subject = ", ".join(defenses) or model or weights or "the customary defense"
        errors.print(f"robust-bench {__version__}: {', '.join(attacks)} on {subject}, {dataset}", soft_wrap=True)
    _known(attacks, defenses)
    if save_patch is not None and not any(spec == "all" or _learns(spec) for spec in attacks):
        raise ValueError("--save-patch needs an attack that learns a patch: --attack patch --threat patch:0.1")

    from robustbench_lite.display import Display
    from robustbench_lite.matrix import benchmark
    from robustbench_lite.trained import Inputs

    with Display(errors, quiet or as_json, verbose) as display:
        try:
            results = benchmark(
                attacks,
                defenses or None,
                dataset,
                threats,
                n=_first(dataset, data_dir) if n is None else count,
                seed=seed,
                model=model,
                weights=weights,
                inputs=Inputs(*inputs),
                target=towards,
                device=device,
                batch=size,
                data_dir=data_dir,
                out=out,
                fresh=fresh,
                keep_all=save_adversarials is not None,
                watcher=display,
            )
        except KeyboardInterrupt:
            display.bars.stop()
            errors.print(
                f"stopped; what is finished ({display.finished} inputs) is kept in {out}: run the same again to go on",
                soft_wrap=True,
            )
            raise typer.Exit(STOPPED) from None

    _write(results, csv, matrix, rows)
    if save_adversarials is not None:
        results.save_adversarials(save_adversarials)
    if save_patch is not None:
        errors.print(f"{save_patch} is the patch of {results.save_patch(save_patch)}", soft_wrap=True)
    _show(results, as_json)
    if not as_json:
        _output().print(f"Results are in {', '.join(map(str, [out, *files]))}", soft_wrap=True)
    raise typer.Exit(_verdict(results, fail_below, errors))


def _verdict(results: Results, fail_below: float | None, errors: Console) -> int:
    """The exit code, and a line that explains any but 0."""
    if results.unknown:
        reasons = results.rows().query("status == 'unknown'")["reason"].value_counts()
        for reason, count in reasons.items():
            errors.print(f"unknown: {count} x {reason}", style="red", soft_wrap=True)
        return UNKNOWN
    lowest = float(results.leaderboard()["robust_accuracy"].min())
    if fail_below is not None and lowest < fail_below:
        errors.print(f"robust accuracy {lowest:.4f} is below {fail_below:g}", style="red")
        return BELOW
    return 0


@app.command()
def train(
    defense: Annotated[str, typer.Option(help="A recipe, as madry:eps=0.3.")],
    out: Annotated[Path, typer.Option(help="Where the weights go, as safetensors.")],
    dataset: Annotated[str, DATASET] = "mnist",
    model: Annotated[str | None, typer.Option(help="An architecture; by default the data set's customary one.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and noise.")] = 0,
    half: Annotated[bool, typer.Option("--half", help="Save in half precision, as the shipped weights are.")] = False,
    device: Annotated[str, DEVICE] = "auto",
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line an epoch.")] = False,
) -> None:
    """Train a defense and save its weights; a training that was stopped goes on where it was."""
    _writable(out)
    errors = _errors()
    if not quiet:
        errors.print(f"robust-bench {__version__}: training {defense} on {dataset}", soft_wrap=True)

    from robustbench_lite import data, models, trained
    from robustbench_lite.display import Display
    from robustbench_lite.matrix import find_device

    test = data.load(dataset, "test", data_dir)
    with Display(errors, quiet, verbose) as display:
        workshop = trained.Workshop(
            dataset,
            test.shape,
            test.classes,
            data_dir=data_dir,
            model=model,
            device=find_device(device),
            note=display.note,
            progress=display.training,
        )
        if workshop.own:
            raise ValueError(f"train builds an architecture by name ({', '.join(models.MODELS)}), not {model!r}")
        links = workshop.links(defense)
        if len(links) != 1:
            raise ValueError(f"train takes one recipe, not the chain {defense!r}")
        try:
            defended = workshop.train(links[0], seed)
        except KeyboardInterrupt:
            display.bars.stop()
            errors.print("stopped; finished epochs are kept: run the same again to go on", soft_wrap=True)
            raise typer.Exit(STOPPED) from None
        sha256 = trained.save(defended.model, out, half)
    _output().print(f"{registry.spec(links[0])}: wrote {out}, SHA-256 {sha256}", soft_wrap=True)
    _output().print(
        f"measure it: robust-bench --attack pgd --dataset {dataset} --model {workshop.architecture} --weights {out}",
        soft_wrap=True,
    )


@app.command()
def leaderboard(
    folder: Annotated[Path, typer.Argument(help="A results folder.")],
    csv: Annotated[Path | None, typer.Option(help="Write the leaderboard.")] = None,
    matrix: Annotated[Path | None, typer.Option(help="Write the matrix.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Write a line an input and attack.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the leaderboard as JSON.")] = False,
) -> None:
    """The tables of all that a results folder holds."""
    _writable(*(file for file in (csv, matrix, rows) if file is not None))
    from robustbench_lite.matrix import load

    results = load(folder, lambda text: _errors().print(f"note: {text}", style="yellow", soft_wrap=True))
    _write(results, csv, matrix, rows)
    _show(results, as_json)


def _write(results: Results, csv: Path | None, matrix: Path | None, rows: Path | None) -> None:
    from robustbench_lite.matrix import write_csv

    for path, frame in ((csv, results.leaderboard), (matrix, results.matrix), (rows, results.rows)):
        if path is not None:
            write_csv(frame(), path)


def _show(results: Results, as_json: bool) -> None:
    from robustbench_lite.display import show_results

    if as_json:
        print(results.leaderboard().to_json(orient="records", indent=2, double_precision=15))
    else:
        show_results(_output(), results.matrix(), results.leaderboard())


def _listing(kind: registry.Kind) -> None:
    @app.command(f"{kind}s", help=f"List the {kind}s with their settings, or explain one.")
    def command(name: Annotated[str | None, NAME] = None) -> None:
        from robustbench_lite import listings

        _output().print(listings.explain(kind, name) if name else listings.overview(kind))


for _kind in registry.KINDS:
    _listing(_kind)


@app.command()
def datasets() -> None:
    """List the data sets, with each norm's customary eps."""
    from robustbench_lite import listings

    _output().print(listings.datasets())


@app.command()
def models() -> None:
    """List the architectures, and the weights that ship."""
    from robustbench_lite import listings

    _output().print(*listings.models(), sep="\n")


@app.command()
def cache(clear: Annotated[bool, typer.Option("--clear", help="Delete it all.")] = False) -> None:
    """Show what was downloaded and trained, and where it is."""
    from robustbench_lite import listings

    _output().print(listings.cache(clear))


@app.command()
def doctor(data_dir: Annotated[Path | None, DATA_DIR] = None) -> None:
    """Print versions, devices and folders, and say what is missing."""
    from robustbench_lite import listings

    _output().print(listings.doctor(data_dir))


def main() -> int:
    """Runs the command line; errors of the person at it are one line and exit code 2."""
    warnings.showwarning = lambda message, *_, **__: print(f"robust-bench: warning: {message}", file=sys.stderr)
    usage: Any = typer.BadParameter.__base__
    try:
        return int(app(standalone_mode=False) or 0)
    except usage as error:
        message = error.format_message()
    except (ValueError, OSError) as error:
        message = str(error)
    except (KeyboardInterrupt, typer.Abort):
        print("robust-bench: stopped", file=sys.stderr)
        return STOPPED
    print(f"robust-bench: error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE


def _specs(given: list[str] | None) -> list[str]:
    return [spec for text in given or () for spec in registry.split_list(text)]


def _threats(threat: list[str] | None, norm: str | None, eps: str | None) -> list[str] | None:
    short = (norm, eps) != (None, None)
    if threat and short:
        raise ValueError("--threat names whole threat models; leave out --norm and --eps")
    if short:
        return [str(norm) if eps is None else f"{norm or 'linf'}:{eps}"]
    return [part.strip() for text in threat for part in text.split(",")] if threat else None


def _known(attacks: list[str], defenses: list[str]) -> None:
    """Answers for names and settings, before any data set is read or downloaded."""
    for spec in attacks:
        if spec != "all":
            registry.make("attack", spec)
    for chain in defenses:
        for link in registry.split_chain(chain):
            if link not in ("all", "none"):
                registry.make("defense", link)


def _learns(spec: str) -> bool:
    return hasattr(registry.make("attack", spec), "fit")


def _writable(*files: Path) -> None:
    """Sees that there is a place for each file, before the work that fills it."""
    for file in files:
        if not file.resolve().parent.is_dir():
            raise ValueError(f"there is no folder {file.parent} to write {file.name} into")
        if file.is_dir():
            raise ValueError(f"{file} is a folder; name a file to write")


def _first(dataset: str, data_dir: Path | None) -> int:
    """How many images are attacked where the person does not say: 1,000, or all of a smaller data set."""
    from robustbench_lite import data

    source = data.SOURCES.get(dataset)
    return min(1000, source.test if source else len(data.load(dataset, "test", data_dir)))


def _whole(option: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        other = "all" if option == "--n" else "auto"
        raise ValueError(f"{option} wants a whole number or {other}, not {text!r}") from None
    if number < 1:
        raise ValueError(f"{option} must be 1 or more, not {text}")
    return number


def _target(text: str | None) -> Target | None:
    if text in (None, "next", "random", "least-likely"):
        return cast("Target | None", text)
    try:
        return int(str(text))
    except ValueError:
        raise ValueError(f"--target wants a class's number, next, random or least-likely, not {text!r}") from None


def _numbers(option: str, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"{option} wants numbers with commas between, not {text!r}") from None


def _bounds(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    try:
        bounds = float(low), float(high)
    except ValueError:
        raise ValueError(f"--bounds wants LOW:HIGH, as 0:255, not {text!r}") from None
    if not bounds[0] < bounds[1]:
        raise ValueError(f"--bounds wants LOW below HIGH, not {text}")
    return bounds


def _output() -> Console:
    from rich.console import Console

    return Console(markup=False, emoji=False)


def _errors() -> Console:
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False)
