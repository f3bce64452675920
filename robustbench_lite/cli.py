"""The command line: ``robust-bench --attack pgd --defense madry``."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from robustbench_lite import __version__, options, reading, registry, running, scaffold
from robustbench_lite.options import HOW, RESULTS, TALK, WHAT
from robustbench_lite.running import STOPPED, USAGE

app = typer.Typer(
    name="robust-bench",
    help="Attacks defended models and says what survives every attack.",
    epilog="Example: robust-bench --attack fgsm,pgd:steps=100,restarts=5 --defense standard,madry --csv board.csv",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
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
    defense: options.Defenses = None,
    certify: Annotated[
        list[str] | None,
        typer.Option("--certify", help="Certifiers, whose proofs stand beside what survives.", rich_help_panel=WHAT),
    ] = None,
    dataset: options.Dataset = "mnist",
    threat: options.Threats = None,
    norm: options.OneNorm = None,
    eps: options.Eps = None,
    n: options.Count = None,
    target: options.Towards = None,
    adaptive: options.Adaptive = "on",
    eot: options.Eot = None,
    plugin: options.Plugins = None,
    model: options.Model = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bounds: options.Bounds = "0:1",
    probabilities: options.Probabilities = False,
    access: options.Access = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    precision: Annotated[
        str,
        typer.Option(
            help="What attacks compute in: float32, or bf16, faster and weaker; judged in float32.", rich_help_panel=HOW
        ),
    ] = "float32",
    layout: Annotated[
        str,
        typer.Option(
            help="How the model lies in memory for attacks: as-built, or channels-last with batch norms folded, which "
            "may be faster.",
            rich_help_panel=HOW,
        ),
    ] = "as-built",
    batch: Annotated[str, typer.Option(help="Inputs at once; changes no result.", rich_help_panel=HOW)] = "auto",
    workers: options.Workers = 0,
    ray: options.Ray = None,
    threads: options.Threads = 1,
    timeout: options.Timeout = None,
    isolate: options.Isolate = False,
    data_dir: options.DataDir = None,
    out: options.Out = Path("runs"),
    fresh: options.Fresh = False,
    dry_run: options.DryRun = False,
    audit: Annotated[
        bool,
        typer.Option(
            "--audit/--no-audit", help="Probe each model, for flags of what not to believe.", rich_help_panel=HOW
        ),
    ] = True,
    csv: options.Csv = None,
    table: options.Table = None,
    html: options.Html = None,
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
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
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
    threats = options.threats(threat, norm, eps)
    options.count(n or "all")  # a mistake is told before anything else
    size = None if batch == "auto" else options.whole("--batch", batch)
    towards = options.target(target)
    inputs = options.described(mean, std, bounds, probabilities, access)
    if fail_below is not None and not 0 <= fail_below <= 1:
        raise ValueError(f"--fail-below is a fraction between 0 and 1, not {fail_below:g}")
    files = [file for file in (csv, table, html, matrix, rows, save_adversarials, save_patch) if file is not None]
    options.writable(*files)
    options.exported(table)
    if save_patch is not None and save_patch.suffix.lower() != ".png":
        raise ValueError(f"--save-patch writes a PNG file; {save_patch.name} does not end in .png")
    attacks, certifiers = options.specs(attack) or ["pgd"], options.specs(certify)
    defenses, errors = options.specs(defense), running.stderr()
    if not quiet and not as_json:
        running.announce(errors, ", ".join(attacks), defenses, model, weights, dataset)
    options.known(attacks, certifiers, defenses)
    if save_patch is not None and not any(spec == "all" or options.learns(spec) for spec in attacks):
        raise ValueError("--save-patch needs an attack that learns a patch: --attack patch --threat patch:0.1")
    asked: dict[str, Any] = {
        "n": options.images(n, dataset, data_dir),
        "attacks": attacks,
        "defenses": defenses or None,
        "certifiers": certifiers,
        "dataset": dataset,
        "threats": threats,
        "model": model,
        "weights": weights,
        "adaptive": adaptive,
        "device": device,
        "data_dir": data_dir,
    }
    kept: dict[str, Any] = {
        "seed": seed,
        "target": towards,
        "eot": eot,
        "precision": precision,
        "layout": layout,
        "threads": threads,
        "out": out,
        "fresh": fresh,
    }
    if dry_run:
        running.foretell(errors, quiet, inputs, {"": asked}, **kept)
        return
    results = running.run(
        errors,
        quiet or as_json,
        verbose,
        inputs,
        **asked,
        **kept,
        batch=size,
        workers=workers,
        ray=ray,
        timeout=timeout,
        isolate=isolate,
        probe=audit,
        keep_all=save_adversarials is not None,
    )
    running.write({csv: results.leaderboard, matrix: results.matrix, rows: results.rows})
    running.export(table, results.leaderboard)
    running.page(html, {"": results}, data_dir)
    if save_adversarials is not None:
        results.save_adversarials(save_adversarials)
    if save_patch is not None:
        errors.print(f"{save_patch} is the patch of {results.save_patch(save_patch)}", soft_wrap=True)
    running.show(results, as_json)
    if not as_json:
        if results.findings:
            running.stdout().print(f"robust-bench audit {out} says what ! means", soft_wrap=True)
        running.stdout().print(f"Results are in {', '.join(map(str, [out, *files]))}", soft_wrap=True)
    raise typer.Exit(running.verdict([results], errors) or running.below(results, fail_below, errors))


@app.command()
def curve(
    eps: Annotated[
        str,
        typer.Option("--eps", help="START:STOP:STEP, stop included, or a list: 0,0.1,8/255.", rich_help_panel=WHAT),
    ],
    attack: Annotated[
        list[str] | None,
        typer.Option("--attack", help="Attacks; a list, or repeat it; or all.", rich_help_panel=WHAT),
    ] = None,
    defense: options.Defenses = None,
    dataset: options.Dataset = "mnist",
    norm: Annotated[str, typer.Option("--norm", help="Of all eps.", rich_help_panel=WHAT)] = "linf",
    n: options.Count = None,
    target: options.Towards = None,
    adaptive: options.Adaptive = "on",
    eot: options.Eot = None,
    model: options.Model = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bounds: options.Bounds = "0:1",
    probabilities: options.Probabilities = False,
    access: options.Access = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    workers: options.Workers = 0,
    ray: options.Ray = None,
    threads: options.Threads = 1,
    timeout: options.Timeout = None,
    isolate: options.Isolate = False,
    data_dir: options.DataDir = None,
    out: options.Out = Path("runs"),
    fresh: options.Fresh = False,
    csv: options.Csv = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the curves, as .svg, .pdf or .png.", rich_help_panel=RESULTS)
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show how robust accuracy falls as eps grows; an attack that seeks the nearest adversarial runs once."""
    options.count(n or "all")  # a mistake is told before anything else
    inputs = options.described(mean, std, bounds, probabilities, access)
    files = [file for file in (csv, plot) if file is not None]
    options.writable(*files)
    attacks, defenses, errors = options.specs(attack) or ["pgd"], options.specs(defense), running.stderr()
    options.known(attacks, [], defenses)

    from robustbench_lite import curves

    if plot is not None:
        curves.format_of(plot)
    threats = [f"{norm}:{level!r}" for level in curves.grid(eps) if level]
    if not quiet and not as_json:
        running.announce(errors, f"{', '.join(attacks)} at {len(threats)} eps", defenses, model, weights, dataset)
    results = running.run(
        errors,
        quiet or as_json,
        verbose,
        inputs,
        n=options.images(n, dataset, data_dir),
        attacks=attacks,
        defenses=defenses or None,
        dataset=dataset,
        threats=threats,
        target=options.target(target),
        adaptive=adaptive,
        eot=eot,
        seed=seed,
        model=model,
        weights=weights,
        device=device,
        data_dir=data_dir,
        workers=workers,
        ray=ray,
        threads=threads,
        timeout=timeout,
        isolate=isolate,
        out=out,
        fresh=fresh,
        probe=False,
    )
    running.write({csv: results.curves})
    if plot is not None:
        results.plot_curves(plot)
    running.show_curves(results, as_json)
    if not as_json:
        running.stdout().print(f"Results are in {', '.join(map(str, [out, *files]))}", soft_wrap=True)
    raise typer.Exit(running.verdict([results], errors))


@app.command()
def certify(
    method: Annotated[
        list[str],
        typer.Option("--method", help="Certifiers; a list, or repeat it; or all.", rich_help_panel=WHAT),
    ],
    defense: options.Defenses = None,
    dataset: options.Dataset = "mnist",
    threat: options.Threats = None,
    norm: options.OneNorm = None,
    eps: options.Eps = None,
    n: options.Count = None,
    radius: Annotated[
        bool,
        typer.Option("--radius", help="Search each input's largest certified radius, up to eps.", rich_help_panel=WHAT),
    ] = False,
    model: options.Model = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bounds: options.Bounds = "0:1",
    probabilities: options.Probabilities = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    workers: options.Workers = 0,
    ray: options.Ray = None,
    threads: options.Threads = 1,
    timeout: options.Timeout = None,
    isolate: options.Isolate = False,
    data_dir: options.DataDir = None,
    out: options.Out = Path("runs"),
    fresh: options.Fresh = False,
    csv: options.Csv = None,
    rows: Annotated[
        Path | None, typer.Option(help="Write a line an input and certifier.", rich_help_panel=RESULTS)
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Prove that no input of a threat model changes a model's answer."""
    threats = options.threats(threat, norm, eps)
    options.count(n or "all")  # a mistake is told before anything else
    inputs = options.described(mean, std, bounds, probabilities)
    files = [file for file in (csv, rows) if file is not None]
    options.writable(*files)
    certifiers, defenses, errors = options.specs(method), options.specs(defense), running.stderr()
    if not quiet and not as_json:
        running.announce(errors, f"certifying by {', '.join(certifiers)}", defenses, model, weights, dataset)
    options.known([], certifiers, defenses)
    results = running.run(
        errors,
        quiet or as_json,
        verbose,
        inputs,
        n=options.images(n, dataset, data_dir),
        attacks=[],
        defenses=defenses or None,
        certifiers=certifiers,
        radius=radius,
        dataset=dataset,
        threats=threats,
        seed=seed,
        model=model,
        weights=weights,
        device=device,
        data_dir=data_dir,
        workers=workers,
        ray=ray,
        threads=threads,
        timeout=timeout,
        isolate=isolate,
        out=out,
        fresh=fresh,
    )
    running.write({csv: results.certificates, rows: results.certified_rows})
    running.show(results, as_json)
    if not as_json:
        running.stdout().print(f"Results are in {', '.join(map(str, [out, *files]))}", soft_wrap=True)

    from robustbench_lite.matrix import load

    against = replace(results, entries=load(out).entries)
    raise typer.Exit(running.violated([against], errors) or running.verdict([results], errors))


@app.command("run")
def run_suite(
    suite: Annotated[str, typer.Argument(help="A name from `robust-bench suites`, or FILE.toml.")],
    defense: options.Defenses = None,
    n: Annotated[
        int | None,
        typer.Option("--n", min=1, help="At most so many images a block: not the protocol.", rich_help_panel=WHAT),
    ] = None,
    dry_run: options.DryRun = False,
    model: options.Model = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bounds: options.Bounds = "0:1",
    probabilities: options.Probabilities = False,
    access: options.Access = None,
    device: options.Device = "auto",
    workers: options.Workers = 0,
    ray: options.Ray = None,
    threads: options.Threads = 1,
    timeout: options.Timeout = None,
    isolate: options.Isolate = False,
    data_dir: options.DataDir = None,
    out: options.Out = Path("runs"),
    fresh: options.Fresh = False,
    csv: options.Csv = None,
    table: options.Table = None,
    html: options.Html = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Run a suite: a protocol of attacks and certifiers, with a name and a version."""
    described = options.described(mean, std, bounds, probabilities, access)
    files = [file for file in (csv, table, html) if file is not None]
    options.writable(*files)
    options.exported(table)
    defenses, errors = options.specs(defense), running.stderr()
    options.known([], [], defenses)

    from robustbench_lite import suites
    from robustbench_lite.classifiers import is_reference
    from robustbench_lite.trained import NONE

    protocol = suites.load(suite)
    if defenses or weights or is_reference(model or ""):
        protocol = protocol.on(defenses or [NONE])
    if n is not None:
        protocol = protocol.shrunk(n)
    given = {"model": model or protocol.model, "weights": weights, "device": device, "data_dir": data_dir}
    blocks = {block.name: protocol.asked(block) | given for block in protocol.block}
    running.possible(described, blocks.values())
    if not quiet:
        errors.print(f"robust-bench {__version__}: {protocol}, {protocol.dataset}", soft_wrap=True)
    kept: dict[str, Any] = {"seed": protocol.seed, "out": out, "fresh": fresh, "threads": threads}
    if dry_run:
        running.foretell(errors, quiet, described, blocks, **kept)
        return
    how: dict[str, Any] = {"workers": workers, "ray": ray, "timeout": timeout, "isolate": isolate}
    found = {}
    for name, asked in blocks.items():
        running.stdout().print(f"{protocol}, block {name}", style="bold", soft_wrap=True)
        found[name] = running.run(errors, quiet, verbose, described, **asked, **kept, **how)
        running.show(found[name], as_json=False)
    running.write({csv: lambda: suites.leaderboard(protocol, found)})
    running.export(table, lambda: suites.leaderboard(protocol, found))
    running.page(html, {f"{protocol}, {name}": results for name, results in found.items()}, data_dir)
    running.stdout().print(f"Results are in {', '.join(map(str, [out, *files]))}", soft_wrap=True)
    raise typer.Exit(running.verdict(found.values(), errors))


@app.command()
def train(
    defense: Annotated[str, typer.Option(help="A recipe, as madry:eps=0.3.")],
    out: Annotated[Path, typer.Option(help="Where the weights go, as safetensors.")],
    dataset: options.Dataset = "mnist",
    model: Annotated[str | None, typer.Option(help="An architecture; by default the data set's customary one.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and noise.")] = 0,
    half: Annotated[bool, typer.Option("--half", help="Save in half precision, as the shipped weights are.")] = False,
    device: options.Device = "auto",
    data_dir: options.DataDir = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line an epoch.")] = False,
) -> None:
    """Train a defense and save its weights; a training that was stopped goes on where it was."""
    options.writable(out)
    errors = running.stderr()
    if not quiet:
        errors.print(f"robust-bench {__version__}: training {defense} on {dataset}", soft_wrap=True)

    from robustbench_lite import models, trained
    from robustbench_lite.display import Display
    from robustbench_lite.matrix import find_device

    with Display(errors, quiet, verbose) as display:
        _, workshop = running.workshop(display, dataset, data_dir, model=model, device=find_device(device))
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
        sha256 = trained.save(defended.model, out, half, defended.history)
    running.stdout().print(f"{registry.spec(links[0])}: wrote {out}, SHA-256 {sha256}", soft_wrap=True)
    running.stdout().print(
        f"measure it: robust-bench --attack pgd --dataset {dataset} --model {workshop.architecture} --weights {out}",
        soft_wrap=True,
    )


for _command in reading.TABLES:
    app.command()(_command)
for _kind in registry.KINDS:
    app.command(f"{_kind}s", help=f"List the {_kind}s with their settings, or explain one.")(reading.listing(_kind))
for _command in (*reading.LISTS, scaffold.new):
    app.command()(_command)


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
