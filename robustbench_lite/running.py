"""What the commands that run something have in common: an announcement, progress, tables and a verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from robustbench_lite import __version__, options

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from robustbench_lite.data import Images
    from robustbench_lite.display import Display
    from robustbench_lite.matrix import Results
    from robustbench_lite.trained import Workshop

UNKNOWN, USAGE, BELOW, STOPPED = 1, 2, 3, 130  # exit codes


def announce(
    errors: Console, what: str, defenses: list[str], model: str | None, weights: Path | None, dataset: str
) -> None:
    subject = ", ".join(defenses) or model or weights or "the customary defense"
    errors.print(f"robust-bench {__version__}: {what} on {subject}, {dataset}", soft_wrap=True)


def run(errors: Console, quiet: bool, verbose: bool, inputs: options.Described, **settings: Any) -> Results:
    """The benchmark, with its progress on the screen and an interrupt explained."""
    from robustbench_lite.display import Display
    from robustbench_lite.matrix import benchmark
    from robustbench_lite.trained import Inputs

    with Display(errors, quiet, verbose) as display:
        try:
            return benchmark(inputs=Inputs(*inputs), watcher=display, **settings)
        except KeyboardInterrupt:
            display.bars.stop()
            errors.print(
                f"stopped; what is finished ({display.finished} inputs) is kept in {settings['out']}: "
                "run the same again to go on",
                soft_wrap=True,
            )
            raise typer.Exit(STOPPED) from None


def workshop(display: Display, dataset: str, data_dir: Path | None, **settings: Any) -> tuple[Images, Workshop]:
    """The test images of a data set, and where models for it are made."""
    from robustbench_lite import data
    from robustbench_lite.trained import Workshop

    images = data.load(dataset, "test", data_dir)
    tell: dict[str, Any] = {"note": display.note, "progress": display.training}
    return images, Workshop(dataset, images.shape, images.classes, data_dir=data_dir, **tell, **settings)


def possible(inputs: options.Described, blocks: Iterable[Mapping[str, Any]]) -> None:
    """Finds what cannot be run, and training data that is not there, before hours have gone into the rest."""
    from robustbench_lite.matrix import prepare
    from robustbench_lite.trained import Inputs

    for asked in blocks:
        _, workshop, wanted = prepare(inputs=Inputs(*inputs), **asked)
        if wanted.learns:
            assert workshop.training


def foretell(
    errors: Console, quiet: bool, inputs: options.Described, blocks: Mapping[str, Mapping[str, Any]], **settings: Any
) -> None:
    """What is missing of each block, and how long it may take."""
    from robustbench_lite.display import Display, show_forecast
    from robustbench_lite.forecast import forecast, memory
    from robustbench_lite.matrix import find_device
    from robustbench_lite.trained import Inputs

    with Display(errors, quiet, verbose=False) as display:
        ahead = {
            name: list(forecast(inputs=Inputs(*inputs), watcher=display, **asked, **settings))
            for name, asked in blocks.items()
        }
    device = find_device(next(iter(blocks.values())).get("device", "auto"))
    show_forecast(stdout(), ahead, memory(device))


def verdict(found: Collection[Results], errors: Console) -> int:
    """The exit code, and a line that explains any but 0."""
    broken, unknown = violated(found, errors), Counter[str]()
    for results in found:
        unknown.update(results.unknown_reasons())
    for reason, count in unknown.items():
        errors.print(f"unknown: {count} x {reason}", style="red", soft_wrap=True)
    return UNKNOWN if broken or unknown else 0


def below(results: Results, limit: float | None, errors: Console) -> int:
    """The exit code where a robust accuracy is too low, and a line that says so."""
    board = results.leaderboard()
    lowest = min(map(float, board["robust_accuracy"][board["adaptive"].astype(bool)]), default=1.0)
    if limit is None or lowest >= limit:
        return 0
    errors.print(f"robust accuracy {lowest:.4f} is below {limit:g}", style="red")
    return BELOW


def violated(found: Collection[Results], errors: Console) -> int:
    """The exit code of certificates that were broken, and a line each; those of one run count for all."""
    from robustbench_lite.entries import violations

    entries = [entry for results in found for entry in results.entries]
    proofs = [proof for results in found for proof in results.proofs]
    lines = dict.fromkeys(violations(entries, proofs))
    for line in lines:
        errors.print(f"violation: {line}", style="red", soft_wrap=True)
    return UNKNOWN if lines else 0


def write(tables: Mapping[Path | None, Callable[[], pd.DataFrame]]) -> None:
    from robustbench_lite.matrix import write_csv

    for path, table in tables.items():
        if path is not None:
            write_csv(table(), path)


def export(path: Path | None, board: Callable[[], pd.DataFrame]) -> None:
    """Writes the leaderboard in the format that the file's name asks for."""
    from robustbench_lite.matrix import write_table

    if path is not None:
        write_table(board(), path)


def page(path: Path | None, found: Mapping[str, Results], data_dir: Path | None) -> None:
    """Writes a page of results by the names of their parts."""
    from robustbench_lite.matrix import write_html
    from robustbench_lite.report import Part

    if path is not None:
        write_html([Part(results, results.leaderboard(), name) for name, results in found.items()], path, data_dir)


def show(results: Results, as_json: bool, board: pd.DataFrame | None = None) -> None:
    """The leaderboard where something was attacked, and the certificates where something was certified; ``board``, if
    given, in place of the leaderboard."""
    from robustbench_lite.display import show_certificates, show_results

    attacked = bool(results.entries)
    board = results.leaderboard() if board is None else board
    if as_json:
        shown = board if attacked else results.certificates()
        print(shown.to_json(orient="records", indent=2, double_precision=15))
        return
    if attacked:
        show_results(stdout(), results.matrix(), board)
    if results.proofs:
        show_certificates(stdout(), results.certificates())


def show_curves(results: Results, as_json: bool) -> None:
    """The security curves, and which of their attacks not to believe."""
    from robustbench_lite import display

    frame = results.curves()
    if as_json:
        print(frame.to_json(orient="records", indent=2, double_precision=15))
        return
    display.show_curves(stdout(), frame)
    for finding in results.findings:
        stdout().print(f"! {finding}", style="yellow", soft_wrap=True)


def stdout() -> Console:
    from rich.console import Console

    return Console(markup=False, emoji=False)


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False)
