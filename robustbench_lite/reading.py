"""The commands that read: tables of results folders, and lists of what there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from robustbench_lite import options, registry, running

NAME = typer.Argument(help="Say all about this one, with its paper.")


def leaderboard(
    folder: Annotated[Path, typer.Argument(help="A results folder.")],
    csv: Annotated[Path | None, typer.Option(help="Write the leaderboard.")] = None,
    table: options.Table = None,
    html: options.Html = None,
    matrix: Annotated[Path | None, typer.Option(help="Write the matrix.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Write a line an input and attack.")] = None,
    per_class: Annotated[Path | None, typer.Option(help="Write accuracies by class.")] = None,
    with_robustbench: Annotated[
        Path | None, typer.Option(help="Rank the entries of RobustBench's model_info in this folder too.")
    ] = None,
    data_dir: options.DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the leaderboard as JSON.")] = False,
) -> None:
    """The tables of all that a results folder holds."""
    options.writable(*(file for file in (csv, table, html, matrix, rows, per_class) if file is not None))
    options.exported(table)
    from robustbench_lite import model_info
    from robustbench_lite.matrix import load, write_html
    from robustbench_lite.report import Part

    results = load(folder, _note)
    board = results.leaderboard()
    if with_robustbench is not None:
        board = model_info.joined(board, model_info.read(with_robustbench, _note))
        if not (board["source"] == model_info.REPORTED).any():
            _note(f"{with_robustbench} has no entry for a data set and threat model of {folder}")
    running.write({csv: lambda: board, matrix: results.matrix, rows: results.rows, per_class: results.per_class})
    running.export(table, lambda: board)
    if html is not None:
        write_html([Part(results, board)], html, data_dir)
    running.show(results, as_json, board)
    raise typer.Exit(running.violated([results], running.stderr()))


def plot(
    folder: Annotated[Path, typer.Argument(help="A results folder.")],
    out: Annotated[Path, typer.Option("--out", help="A folder for the figures.")] = Path("figures"),
    kind: Annotated[str, typer.Option("--format", help="svg, pdf or png.")] = "svg",
) -> None:
    """Draw the figures of a results folder for a paper: matrix, bounds, curves, distances, queries, training."""
    from robustbench_lite import drawing
    from robustbench_lite.curves import format_of
    from robustbench_lite.matrix import load

    format_of(f"figure.{kind}")
    for file in drawing.draw(load(folder, _note), out, kind):
        running.stdout().print(str(file), soft_wrap=True)


def compare(
    before: Annotated[Path, typer.Argument(help="A results folder.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    csv: Annotated[Path | None, typer.Option(help="Write a line an accuracy, changed or not.")] = None,
) -> None:
    """Say what changed between two results folders, and whether it is more than noise."""
    options.writable(*(file for file in (csv,) if file is not None))
    from robustbench_lite.display import show_comparison
    from robustbench_lite.matrix import load

    comparison = load(before, _note).compare(load(after, _note))
    running.write({csv: lambda: comparison})
    show_comparison(running.stdout(), comparison)


def audit(
    folder: Annotated[Path, typer.Argument(help="A results folder.")],
    csv: Annotated[Path | None, typer.Option(help="Write a line a flag, with its two figures.")] = None,
) -> None:
    """Say which rows of a results folder not to believe, by what figures, and what to do."""
    options.writable(*(file for file in (csv,) if file is not None))
    from robustbench_lite.matrix import load

    results = load(folder, _note)
    running.write({csv: results.audit})
    output = running.stdout()
    for finding in results.findings:
        output.print(str(finding), soft_wrap=True)
    board = results.leaderboard()
    output.print(f"{(board['flags'] != '').sum()} of {len(board)} rows flagged", soft_wrap=True)
    if bare := results.unprobed:
        output.print(f"not probed: {'; '.join(bare)}; run them again without --no-audit", soft_wrap=True)


def _note(text: str) -> None:
    running.stderr().print(f"note: {text}", style="yellow", soft_wrap=True)


def listing(kind: registry.Kind) -> Callable[..., None]:
    """The command that lists the plugins of a kind."""

    def command(name: Annotated[str | None, NAME] = None) -> None:
        from robustbench_lite import listings

        running.stdout().print(listings.explain(kind, name) if name else listings.overview(kind))

    return command


def datasets() -> None:
    """List the data sets, with each norm's customary eps."""
    from robustbench_lite import listings

    running.stdout().print(listings.datasets())


def suites() -> None:
    """List the suites that come with the package."""
    from robustbench_lite import listings

    running.stdout().print(listings.suites())


def models() -> None:
    """List the architectures, and the weights that ship."""
    from robustbench_lite import listings

    running.stdout().print(*listings.models(), sep="\n")


def layers(
    defense: Annotated[str, typer.Option(help="A defense, as parseval; none for a model of yours.")] = "none",
    dataset: options.Dataset = "mnist",
    model: options.Model = None,
    weights: options.Weights = None,
    data_dir: options.DataDir = None,
) -> None:
    """Show the singular values of a model's layers, and the Lipschitz bound that they give."""
    from robustbench_lite import listings
    from robustbench_lite.display import Display

    with Display(running.stderr(), quiet=False, verbose=False) as display:
        images, workshop = running.workshop(display, dataset, data_dir, model=model, weights=weights)
        defended = workshop.subject(defense).model
    running.stdout().print(listings.layers(defended, images.x[:2]))


def cache(clear: Annotated[bool, typer.Option("--clear", help="Delete it all.")] = False) -> None:
    """Show what was downloaded and trained, and where it is."""
    from robustbench_lite import listings

    running.stdout().print(listings.cache(clear))


def doctor(data_dir: options.DataDir = None) -> None:
    """Print versions, devices and folders, and say what is missing."""
    from robustbench_lite import listings

    running.stdout().print(listings.doctor(data_dir))


TABLES: tuple[Callable[..., None], ...] = (leaderboard, plot, compare, audit)
LISTS: tuple[Callable[..., None], ...] = (datasets, suites, models, layers, cache, doctor)
