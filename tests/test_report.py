"""The page and the figures: tables worked out by hand, names that want to be markup, and a look through Chromium."""

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors import safe_open

from robustbench_lite import charts, figures, gallery, report
from robustbench_lite.chance import wilson
from robustbench_lite.entries import Entry, Proof
from robustbench_lite.history import Epoch
from robustbench_lite.matrix import Results
from robustbench_lite.store import Cell
from tests.outcomes import made, proved

SETTING: dict[str, Any] = {"dataset": "digits", "model": "mlp", "parameters": 10, "seed": 0}
SCRIPT = "<script>alert(1)</script>"
NAMES = (SCRIPT, "\"quoted\" & 'so' </script> <img src=x onerror=alert(1)> {{ 7 * 7 }}", "long" * 1250)
HOSTILE = [(name, f"mine:note={name}") for name in NAMES]  # defenses, attacks


def cell(**identity: Any) -> Cell:
    """What a cell's file says, where it matters here."""
    usual = {"data": "d" * 64, "model": {"weights": "w" * 64}, "range": [0.0, 1.0], "precision": "float32", "seed": 0}
    plugin = {"attack": {"name": "fab"}, "eps": 0.1, "target": None}
    return Cell(usual | plugin | identity, {"version": "0.1.0", "torch": "2.4", "attack": "fab", "shape": [1, 2, 2]})


def entry(letters: str, attack: str = "pgd", defense: str = "madry", eps: float = 0.1, **given: Any) -> Entry:
    columns = {name: given.pop(name) for name in ("distance", "forwards", "backwards", "images") if name in given}
    about = {**SETTING, "norm": "linf", "eps": eps, "defense": defense, "attack": attack, **given}
    return Entry(**about, outcome=made(letters, **columns))


# Tables, by hand


def test_a_cell_has_its_own_accuracy_interval_and_success():
    frame = figures.cells([entry("hhbuw"), entry("bbbbw", "fab"), entry("hhhhh", defense="other")])
    first = frame.iloc[0]
    assert list(frame["line"]) == [0, 0, 1]
    assert (first["robust_accuracy"], first["success"], first["unknown"]) == (0.4, 0.25, 1)
    assert (first["robust_low"], first["robust_high"]) == wilson(2, 5)
    assert list(frame["success"]) == [0.25, 1, 0]


def test_distances_are_counted_by_twentieths_of_eps():
    frame = figures.distances([entry("bbbhw", eps=0.2, distance=[0.005, 0.015, 0.2, np.nan, np.nan]), entry("hhhhw")])
    counts = dict(zip(frame["up_to"].round(3), frame["inputs"]))
    assert len(frame) == 20
    assert {edge: count for edge, count in counts.items() if count} == {0.01: 1, 0.02: 1, 0.2: 1}
    assert frame["share"].sum() == 0.75  # of the four that were attacked


def test_a_patch_is_as_far_as_its_side():
    patch = entry("bb", norm="patch", eps=0.25, distance=[1, 1])  # of 2x2 pixels: a side of one
    frame = figures.distances([patch])
    assert (frame["up_to"].max(), frame["inputs"].iloc[-1]) == (1, 2)


def test_success_grows_with_the_forwards_that_it_took():
    frame = figures.queries([entry("bbbhsw", forwards=[1, 3, 40, 60, 0, 0])])
    assert list(frame["forwards"]) == [1, 2, 5, 10, 20, 50, 100]
    assert list(frame["broken"]) == [1, 1, 2, 2, 2, 3, 3]
    assert list(frame["success"]) == [0.25, 0.25, 0.5, 0.5, 0.5, 0.75, 0.75]


def test_one_run_that_minimises_distance_gives_the_whole_curve():
    whole = entry("bbhw", "fab", eps=0.2, distance=[0.05, 0.125, np.nan, np.nan], cell=cell(eps=None))
    frame = figures.security([whole, entry("hhhw", eps=0.2)])
    left = dict(zip(frame["eps"].round(3), frame["robust_accuracy"]))
    assert set(frame["attack"]) == {"fab", "all"}  # one point is no curve
    assert len(left) == 21
    assert [left[eps] for eps in (0, 0.04, 0.05, 0.12, 0.13, 0.2)] == [0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


def test_colours_grow_darker_and_figures_on_them_can_be_read():
    grey = [report.luminance(report.shade(share)) for share in np.linspace(0, 1, 101)]
    assert (np.diff(grey) < 0).all()
    assert (report.shade(0), report.shade(1)) == (report.BLUES[0], report.BLUES[-1])
    ink = [0.0 if one > 0.179 else 1.0 for one in grey]
    contrast = [(max(pair) + 0.05) / (min(pair) + 0.05) for pair in zip(grey, ink)]
    assert min(contrast) >= 4.5


def test_ticks_lie_within_the_axis_and_are_round():
    assert [label for _, label in charts.Chart("eps", "", 0.3).ticks] == ["0", "0.1", "0.2", "0.3"]
    assert [label for _, label in charts.Chart("eps", "", 8 / 255).ticks][-1] == "0.03"
    assert [label for _, label in charts.Chart("", "", 5000, log=True).ticks] == ["1", "10", "100", "1,000"]
    for top in (1e-3, 0.7, 1, 9, 12, 1e6):
        assert charts.LEFT <= max(place for place, _ in charts.Chart("", "", top).ticks) <= charts.RIGHT


def test_epochs_are_whole_and_a_loss_has_an_axis_of_its_own():
    for top, labels in ((1, "0 1"), (2, "0 1 2"), (7, "0 2 4 6"), (12, "0 5 10"), (24, "0 5 10 15 20")):
        assert " ".join(label for _, label in charts.Chart("", "", top, whole=True).ticks) == labels
    chart = charts.Chart("epoch", "loss", 2, whole=True, height=2.3)
    assert [label for _, label in chart.levels] == ["0", "0.5", "1", "1.5", "2"]
    assert (chart.y(0), chart.y(2.3)) == (charts.BOTTOM, charts.TOP)


# The page


def page(*entries: Entry, proofs: tuple[Proof, ...] = (), data_dir: Path | None = None) -> str:
    results = Results(tuple(entries), proofs)
    return report.html([report.Part(results, results.leaderboard())], data_dir)


@pytest.fixture
def stored(place, bench):
    """A folder with results of a model of one's own."""
    Path("model.py").write_text(
        "import torch\n\ndef load():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()\n"
    )
    command = "--attack fgsm,pgd:steps=3 --model model.py:load --dataset digits --n 20 --seed 3 --mean 0.4 --no-audit"
    assert bench(f"{command} --threat linf:8/255 --html page.html").code == 0
    return Path("page.html").read_text()


def test_the_same_results_are_the_same_page(stored, bench):
    """Read from the store, too."""
    assert bench("leaderboard runs --html again.html").code == 0
    assert Path("again.html").read_text() == stored


def test_the_command_of_a_row_asks_for_what_is_stored(stored, bench):
    cells = sorted(Path("runs/cells").iterdir())
    commands = [unescape(text) for text in re.findall(r"<code>(robust-bench .*?)</code>", stored)]
    assert len(commands) == 1
    for command in commands:
        assert "pgd:steps=3" in command
        assert bench(f"{command.removeprefix('robust-bench')} --no-audit --html anew.html").code == 0
    assert sorted(Path("runs/cells").iterdir()) == cells
    assert Path("model.py").exists()


def test_the_gallery_shows_what_was_stored_beside_what_is_clean(place):
    clean = np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 1, 2, 2)
    np.savez("data.npz", x=clean, y=np.array([0, 0]))
    from robustbench_lite import data

    fingerprint = data.load("npz:data.npz").fingerprint
    images = np.full((1, 1, 2, 2), 0.6, np.float32)
    broken = entry("hb", dataset="npz:data.npz", images=images, cell=cell(data=fingerprint))
    [shown] = gallery.pictures([broken], None)
    [one] = shown.pictures
    assert (one.row, one.label, one.answer, shown.lacking) == (1, 0, 1, "")
    assert levels(one.clean) == np.rint(255 * clean[1, 0]).ravel().tolist()
    assert levels(one.adversarial) == [153] * 4
    assert one.gain == pytest.approx(0.5 / 0.4)  # 0.6 to 1 is the farthest
    assert levels(one.difference)[-1] == 0
    [other] = gallery.pictures([entry("hb", dataset="npz:data.npz", images=images, cell=cell())], None)
    assert "no longer the data" in other.lacking
    text = page(entry("hb", dataset="npz:gone.npz", images=images, cell=cell()))
    assert "npz:gone.npz is not at hand" in text
    assert 'alt="input 1, adversarial"' in text


def levels(uri: str) -> list[int]:
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return np.asarray(image).ravel().tolist()


def test_a_patch_is_on_the_page():
    patch = np.array([[[0.0, 1.0], [0.2, 0.4]]], np.float32)
    found = re.findall(r'<img src="([^"]*)" alt="patch of mine', page(entry("hb", "mine", learned=patch)))
    assert levels(found[0]) == [0, 255, 51, 102]


def test_every_figure_can_be_downloaded():
    text = usual()
    names = re.findall(r'href="data:text/csv;charset=utf-8;base64,([^"]*)" download="(\w+).csv"', text)
    found = {name: base64.b64decode(content).decode() for content, name in names}
    assert set(found) == {"leaderboard", "matrix", "bounds", "curves", "distances", "queries", "audit"}
    assert found["matrix"].startswith("dataset,norm,eps,defense")
    assert len(found["matrix"].splitlines()) == 1 + 7


def test_hostile_names_are_text():
    text = page(
        *[
            entry("hb", spec, name, dataset=f"npz:{name}", model=name, cell=cell(), history=HISTORY)
            for name, spec in HOSTILE
        ]
    )
    assert text.count("<script") == 1
    assert text.count("</script") == 1
    assert "<img src=x" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "{{ 7 * 7 }}" in text


def test_parts_are_ranked_by_themselves(place, bench):
    parts = [report.Part(r, r.leaderboard(), name) for name in ("one", "two") for r in [Results((entry("hb"),))]]
    text = report.html(parts)
    assert text.count('<td data-value="1" class="number">') >= 2
    assert text.count("<caption>one, digits, linf 0.1") == text.count("<caption>two, digits, linf 0.1") == 1


def test_what_is_only_certified_has_a_page_too(stored, bench):
    command = "certify --method ibp,crown --radius --model model.py:load --dataset digits --n 5 --eps 0.01 --out proofs"
    assert bench(command).code == 0
    assert bench("leaderboard proofs --html proofs.html").code == 0
    text = Path("proofs.html").read_text()
    assert 'id="matrix"' not in text
    assert len(re.findall(r'<td><span class="name">(?:ibp|crown)</span></td><td>5</td>', text)) == 2
    assert re.findall("<code>(.*?)</code></pre>", text) == [
        "robust-bench certify --method crown,ibp --model model.py:load "
        "--dataset digits --threat linf:0.01 --radius --n 5"
    ]


def test_what_others_report_is_in_the_leaderboard(stored, bench):
    Path("Linf").mkdir()
    theirs = (
        '{"name": "T", "dataset": "digits", "architecture": "net", "eps": "8/255", "clean_acc": 90, "external": 50}'
    )
    Path("Linf/Theirs.json").write_text(theirs)
    assert bench("leaderboard runs --with-robustbench Linf --html both.html").code == 0
    assert '<span class="name">reported</span>' in Path("both.html").read_text()


def test_a_suite_is_a_page_of_its_blocks(stored, bench):
    blocks = "".join(f'[block.{name}]\nthreat = ["linf:0.1"]\nattack = ["fgsm"]\nn = {n}\n' for name, n in SIZES)
    Path("mine.toml").write_text(
        f'name = "mine"\nversion = 2\ndescription = ""\ndataset = "digits"\ndefense = ["standard"]\n{blocks}'
    )
    assert bench("run mine.toml --model model.py:load --html suite.html").code == 0
    text = Path("suite.html").read_text()
    assert "<caption>mine 2, small, digits, linf 0.1" in text
    assert "<caption>mine 2, large, digits, linf 0.1" in text


SIZES = (("small", 5), ("large", 10))


def test_plot_writes_the_same_figures_each_time(stored, bench):
    ran = bench("plot runs --out one")
    written = {Path(line).name for line in ran.out.splitlines()}
    kinds = ("matrix", "bounds", "distances", "queries")
    assert written == {f"{kind}-digits-linf-8_255-seed3.svg" for kind in kinds}
    assert bench("plot runs --out two").code == 0
    for name in written:
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    assert "pgd:steps=3" in Path("one/matrix-digits-linf-8_255-seed3.svg").read_text()
    assert "a plot is written as" in bench("plot runs --format doc").err


# Training curves

HISTORY = (Epoch(1, 2.0, 0.25, 0.5, 0.125), Epoch(2, 1.0, 0.5, 0.75, 0.25), Epoch(4, 0.5, 0.75, 1.0, 0.5))


def test_a_model_that_was_trained_has_its_curves_once_whatever_was_run():
    known = [entry("hb", eps=eps, attack=name, history=HISTORY) for eps in (0.1, 0.2) for name in ("fgsm", "pgd")]
    other = entry("hb", defense="gaussian", history=(Epoch(1, 1.0, 0.5, 0.5, None),), subject="other")
    frame = figures.trainings([*known, other, entry("hb", defense="standard"), proof()])
    assert list(frame.columns) == ["line", *figures.TRAININGS]
    assert frame["defense"].tolist() == ["madry"] * 3 + ["gaussian"]
    assert frame["line"].tolist() == [0, 0, 0, 1]
    assert [tuple(row) for row in frame[list(Epoch._fields)].to_numpy()[:3]] == list(HISTORY)
    assert np.isnan(frame["robust_accuracy"].iloc[3])


def test_training_curves_go_through_the_figures():
    text = page(entry("hb", history=HISTORY))
    section = re.search('<section id="training".*?</section>', text, re.DOTALL)[0]
    titles, lines = (re.findall(what, section) for what in ("<title>(.*?)</title>", 'class="line" d="([^"]*)"'))
    assert titles == ["accuracy, % by epoch: madry", "training loss by epoch: madry"]
    x = [charts.LEFT + (charts.RIGHT - charts.LEFT) * epoch / 4 for epoch in (1, 2, 4)]
    curves = [line for line in lines if line != "M0,5H34"]  # which is in a legend
    for path, heights in zip(curves, ((0.5, 0.75, 1), (0.125, 0.25, 0.5), (1, 0.5, 0.25)), strict=True):
        y = [charts.BOTTOM - (charts.BOTTOM - charts.TOP) * height for height in heights]
        assert path == "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))


def test_a_training_without_a_curve_to_draw_is_in_the_table():
    text = page(entry("hb", history=(Epoch(1, -1.0, 0.5, 0.5, None), Epoch(2, 5e-324, 0.5, 0.5, None))))
    assert re.findall("<title>(.*by epoch.*)</title>", text) == ["accuracy, % by epoch: madry"]
    assert 'download="training.csv"' in text
    assert 'id="training"' not in usual()


def test_a_page_tells_what_training_left_with_the_weights(place, bench):
    line = "--attack fgsm --defense standard:epochs=2 --model mlp --dataset digits --n 20 --no-audit"
    assert bench(f"{line} --html page.html").code == 0
    [weights] = Path("cache").rglob("*.safetensors")
    with safe_open(weights, "pt") as file:
        kept = json.loads(file.metadata()["history"])
    text = Path("page.html").read_text()
    [table] = re.findall(r'base64,([^"]*)" download="training.csv"', text)
    frame = pd.read_csv(io.BytesIO(base64.b64decode(table)))
    assert frame[list(Epoch._fields)].to_dict("records") == kept
    assert frame["epoch"].tolist() == [1, 2]
    assert 0 < frame["robust_accuracy"].iloc[1] < frame["clean_accuracy"].iloc[1]
    assert bench("leaderboard runs --html again.html").code == 0
    assert Path("again.html").read_text() == text
    written = bench("plot runs --out figures").out.split()
    assert str(Path("figures/training-digits.svg")) in written
    assert "training loss" in Path("figures/training-digits.svg").read_text()
    [file] = Path("runs/trained").iterdir()
    file.write_text('[{"epoch": "<script>alert(1)</script>"}]')
    ran = bench("leaderboard runs --html third.html")
    assert (ran.code, ran.err.count("note: ")) == (0, 1)
    assert 'id="training"' not in Path("third.html").read_text()


# In a browser


def board() -> list[Entry]:
    """Two data sets, two threat models, a flag, and a whole curve."""
    half = "h" * 40 + "b" * 40
    return [
        entry(half, "fgsm", "flagged", backwards=[1] * 80),
        entry("h" * 80, "pgd", "flagged"),
        entry("h" * 60 + "b" * 20, "pgd", "madry"),
        entry("b" * 80, "fab", "madry", cell=cell(eps=None), distance=np.linspace(0.01, 0.1, 80)),
        entry(half, "pgd", "madry", eps=0.2),
        entry(half, "pgd", "trades", dataset="mnist", forwards=range(1, 81)),
        entry("h" * 8 + "b" * 72, "pgd", "standard", dataset="mnist", learned=np.ones((1, 2, 2), np.float32)),
    ]


@cache
def usual() -> str:
    return page(*board())


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens a page; at the end it must have been silent, and have asked for nothing but itself."""
    contexts, heard = [], []

    def look(text: str, width: int = 1280) -> Any:
        file = tmp_path / "page.html"
        file.write_text(text, "utf-8")
        contexts.append(chromium.new_context(viewport={"width": width, "height": 800}))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(5000)
        tab.on("console", lambda message: heard.append(message.text))
        tab.on("pageerror", lambda error: heard.append(str(error)))
        tab.on("dialog", lambda dialog: heard.append(dialog.message))
        tab.on("request", lambda request: heard.append(request.url) if not request.url.startswith("data:") else None)
        tab.goto(file.as_uri())
        assert heard.pop(0) == file.as_uri()
        return tab

    yield look
    assert heard == []
    for context in contexts:
        context.close()


def shown(tab: Any, selector: str) -> list[str]:
    return [text.strip() for text in tab.locator(f"{selector} >> visible=true").all_inner_texts()]


DEFENSES = "#leaderboard .sortable tbody th"
OPEN = "document.querySelectorAll('details').forEach(one => { one.open = true; })"


def test_the_leaderboard_sorts_both_ways(opened):
    tab = opened(usual())
    head = tab.get_by_role("columnheader", name="robust, %")
    column = head.evaluate("node => node.cellIndex")
    assert head.get_attribute("aria-sort") is None
    for direction, order in (("ascending", 1), ("descending", -1)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        values = tab.locator("#leaderboard .sortable tbody tr").evaluate_all(
            "(rows, at) => rows.map(row => Number(row.cells[at].dataset.value))", column
        )
        assert values == sorted(values)[::order]
        assert len(set(values)) > 2
    tab.get_by_role("columnheader", name="defense").get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") is None
    assert shown(tab, DEFENSES) == sorted(shown(tab, DEFENSES))


def test_the_whole_page_filters(opened):
    tab = opened(usual())
    everything = shown(tab, DEFENSES)
    tab.get_by_label("Data set").select_option("mnist")
    assert shown(tab, DEFENSES) == ["trades", "standard"]
    assert shown(tab, "#queries figcaption .name") == ["trades", "standard"]
    assert "2 of 5 rows" in tab.locator("output").inner_text()
    tab.get_by_label("Defense", exact=True).fill("TRA")
    assert shown(tab, DEFENSES) == ["trades"]
    tab.get_by_label("Defense", exact=True).fill("")
    tab.get_by_label("Data set").select_option("")
    tab.get_by_label("Threat").select_option("linf 0.2")
    assert shown(tab, DEFENSES) == ["madry"]
    assert shown(tab, "#curves figcaption .name") == ["madry"]  # over all eps
    tab.get_by_label("Threat").select_option("")
    tab.locator("[name=flags]").select_option("one-step")
    assert shown(tab, DEFENSES) == ["flagged"]
    tab.locator("[name=flags]").select_option("none")
    assert sorted([*shown(tab, DEFENSES), "flagged"]) == sorted(everything)


def test_an_interval_shows_where_one_points_and_where_the_focus_is(opened):
    tab = opened(usual())
    cell = tab.locator("#matrix td button").first
    opacity = "node => getComputedStyle(node.querySelector('small')).opacity"
    low, high = wilson(40, 80)
    assert cell.inner_text().split("\n") == ["50.0", f"{100 * low:.1f} to {100 * high:.1f}"]
    assert cell.evaluate(opacity) == "0"
    cell.hover()
    assert cell.evaluate(opacity) == "1"
    tab.mouse.move(0, 0)
    assert cell.evaluate(opacity) == "0"
    cell.focus()
    assert cell.evaluate(opacity) == "1"


def test_hostile_names_do_nothing_in_a_browser(opened):
    entries = [
        entry("hb", spec, name, dataset=f"npz:{name}", model=name, cell=cell(), history=HISTORY)
        for name, spec in HOSTILE
    ]
    tab = opened(page(*entries), 390)
    assert shown(tab, DEFENSES)[0] == SCRIPT
    tab.evaluate(OPEN)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_nothing_is_in_the_way_of_those_who_see_little(opened):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    trained = replace(board()[3], history=HISTORY)
    tab = opened(page(*board()[:3], trained, board()[-1], proofs=(proof(),)), 390)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.evaluate(OPEN)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.evaluate(
        "document.querySelectorAll('.data tr:nth-child(n+4)').forEach(row => row.remove())"
    )  # more of the same
    for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
        tab.emulate_media(color_scheme=scheme)
        found = axe.Axe().run(tab, options=rules).response
        assert "color-contrast" in {one["id"] for one in found["passes"]}
        assert [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]] == []


def proof() -> Proof:
    about = {**SETTING, "norm": "linf", "eps": 0.2, "defense": "madry", "certifier": "crown"}
    return Proof(**about, certified=proved("v" * 20 + "u" * 60))
