"""What changed between two sets of results, worked out by hand."""

from io import StringIO

import pandas as pd
import pytest
from rich.console import Console

from robustbench_lite.comparison import COMPARISON, changed
from robustbench_lite.display import show_comparison
from robustbench_lite.matrix import Results
from tests.outcomes import made, proved
from tests.test_leaderboard import entry, proof

FIGURES = ["accuracy", "plugin", "examples", "before", "after", "lost", "gained", "p_value"]


def compared(before: list, after: list) -> pd.DataFrame:
    one, other = (
        Results(
            tuple(found for found in side if hasattr(found, "attack")),
            tuple(found for found in side if hasattr(found, "certifier")),
        )
        for side in (before, after)
    )
    return one.compare(other)


def figures(table: pd.DataFrame) -> list[list]:
    """Its last columns; None where there is none."""
    return table[FIGURES].astype(object).where(table[FIGURES].notna(), None).values.tolist()


def test_every_accuracy_is_compared_on_the_same_inputs():
    """pgd loses 6 and gains none: 2 / 2^6. fgsm is only before, square only after, and the clean accuracy is better
    on one input: p is 1. Together all attacks leave 7 of 8 before, and 1 after."""
    before = [entry("hhhhhhhw", "pgd"), entry("hhhhhhhw", "fgsm")]
    after = [entry("bbbbbbhh", "pgd"), entry("hhhhhhhb", "square")]
    table = compared(before, after)
    assert tuple(table.columns) == COMPARISON
    assert figures(table) == [
        ["clean", "", 8, 7 / 8, 1.0, 0, 1, 1.0],
        ["robust", "", 8, 7 / 8, 1 / 8, 6, 0, 2 / 2**6],
        ["robust", "fgsm", 8, 7 / 8, None, None, None, None],
        ["robust", "pgd", 8, 7 / 8, 2 / 8, 6, 1, pytest.approx(2 * (1 + 7) / 2**7)],
        ["robust", "square", 8, None, 7 / 8, None, None, None],
    ]
    assert table["change"].dropna().tolist() == [1 / 8, -6 / 8, -5 / 8]
    assert changed(table).all()
    assert set(table["same_model"]) == {True}
    assert not changed(compared(before, before)).any()


def test_what_is_certified_is_compared_too():
    before = [entry("hhhh"), proof("vuuu"), proof("uvuu", "ibp")]
    table = compared(before, [entry("hhhh"), proof("vvvu")])
    assert figures(table)[3:] == [
        ["certified", "", 4, 2 / 4, 3 / 4, 0, 1, 1.0],
        ["certified", "crown", 4, 1 / 4, 3 / 4, 0, 2, 0.5],
        ["certified", "ibp", 4, 1 / 4, None, None, None, None],
    ]
    alone = compared([proof("vwuu")], [proof("vvuu")])  # without any attack
    assert figures(alone) == [
        ["clean", "", 4, 3 / 4, 1.0, 0, 1, 1.0],
        ["certified", "crown", 4, 1 / 4, 2 / 4, 0, 1, 1.0],
    ]


def test_only_inputs_that_both_have_are_compared():
    table = compared([entry("bbhh")], [entry(made("hbhhh", start=2))])
    assert table[["examples", "before", "after"]].values.tolist() == [[2, 1.0, 1.0], [2, 1.0, 0.5], [2, 1.0, 0.5]]
    for other in (made("hhhh", start=4), made("hhhh", label=[0, 0, 0, 9])):  # other inputs, other data
        table = compared([entry("hhhh")], [entry(other)])
        assert table["before"].notna().tolist() == [True, False] * 3
        assert table["after"].notna().tolist() == [False, True] * 3
        assert table["p_value"].isna().all()


@pytest.mark.parametrize(
    "other",
    [{"eps": 0.2}, {"norm": "l2"}, {"seed": 1}, {"dataset": "mnist"}, {"defense": "standard"}, {"adaptive": False}],
    ids=lambda other: next(iter(other)),
)
def test_rows_about_something_else_are_not_compared(other):
    table = compared([entry("hh")], [entry("hb", **other)])
    assert table["lost"].isna().all()
    assert table["same_model"].isna().all()
    assert len(table) == 6


def test_a_model_is_compared_with_itself_or_else_with_the_one_that_took_its_place():
    one, two = entry("hhhh", subject="one"), entry("hhbb", subject="two")
    table = compared([one, two], [entry("bbbb", subject="three"), entry("hhhb", subject="one")])
    robust = table[(table["accuracy"] == "robust") & (table["plugin"] == "")]
    assert robust[["same_model", "before", "after"]].values.tolist() == [[True, 1.0, 0.75], [False, 0.5, 0.0]]
    table = compared([one, two], [entry("bbbb", subject="three")])  # in whose place?
    assert table["lost"].isna().all()
    assert len(table) == 9


def test_the_screen_shows_what_changed_and_whether_it_is_noise():
    before = [entry("hhhhhhhh", "pgd"), entry("hh", "fgsm", defense="[red]", subject="one")]
    after = [entry("bbbbbbhh", "pgd"), entry("hb", "fgsm", defense="[red]", subject="two"), proof(proved("vu"))]
    console = Console(width=120, record=True, file=StringIO())
    show_comparison(console, compared(before, after))
    text = " ".join(console.export_text().split())
    assert "digits madry linf 0.1 robust, pgd 8 100.0 25.0 -6 +0 0.031 *" in text
    assert "digits [red] (another model) linf 0.1 robust 2 100.0 50.0 -1 +0 1" in text
    assert "certified, crown 2 - 50.0" in text
    assert "clean" not in text
    assert text.endswith("5 of 7 accuracies differ")
