"""Every figure of the tables, worked out by hand from rows that are made up."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robustbench_lite import leaderboard as module
from robustbench_lite.chance import wilson
from robustbench_lite.entries import Entry, Probe, Proof, Setting, robust, unknown, violations
from robustbench_lite.leaderboard import CERTIFICATES, LEADERBOARD, certificates, leaderboard, matrix, per_class, rows
from robustbench_lite.matrix import Results, write_csv
from robustbench_lite.outcome import Certified, Outcome
from tests.outcomes import looked_at, made, proved

GOLDEN = Path(__file__).parent / "golden"
NUMBERS = {
    "rank": "Int64",
    "parameters": "int64",
    "eps": "float64",
    "examples": "int64",
    "clean_accuracy": "float64",
    "certified_accuracy": "float64",
    "certified_low": "float64",
    "certified_high": "float64",
    "robust_accuracy": "float64",
    "robust_low": "float64",
    "robust_high": "float64",
    "p_above": "float64",
    "unknown": "int64",
    "forwards": "float64",
    "backwards": "float64",
    "seconds": "float64",
    "seed": "int64",
}


def entry(outcome: Outcome | str, attack: str = "pgd", defense: str = "madry", **others: object) -> Entry:
    settings: dict = {"dataset": "digits", "model": "mlp", "parameters": 10, "norm": "linf", "eps": 0.1, "seed": 0}
    outcome = made(outcome) if isinstance(outcome, str) else outcome
    return Entry(**(settings | others), attack=attack, defense=defense, outcome=outcome)


def proof(certified: Certified | str, certifier: str = "crown", defense: str = "madry", **others: object) -> Proof:
    settings: dict = {"dataset": "digits", "model": "mlp", "parameters": 10, "norm": "linf", "eps": 0.1, "seed": 0}
    certified = proved(certified) if isinstance(certified, str) else certified
    return Proof(**(settings | others), certifier=certifier, defense=defense, certified=certified)


def accuracy(*outcomes: Outcome | str) -> float:
    board = leaderboard([entry(outcome, attack=f"attack{i}") for i, outcome in enumerate(outcomes)])
    assert len(board) == 1
    return board["robust_accuracy"][0]


# What counts as robust


def test_robust_accuracy_is_the_union_over_attacks_input_by_input():
    """Each attack alone breaks 2 of 4; together they break 3. The mean would be 0.5."""
    assert accuracy("bbhh", "hbbh") == 0.25
    assert accuracy("bbhh") == accuracy("hbbh") == 0.5
    assert accuracy("bbhh", "hhbb") == 0.0


def test_wrong_inputs_are_neither_robust_nor_out_of_the_count():
    board = leaderboard([entry("wwhb")])
    assert board["clean_accuracy"][0] == 0.5
    assert board["robust_accuracy"][0] == 0.25
    assert board["examples"][0] == 4


def test_an_unknown_is_never_robust_and_never_a_success():
    assert accuracy("uuhh") == 0.5
    assert accuracy("uuhh", "hhhh") == 0.5
    one, other = made("uuhhw"), made("hbhbw")
    np.testing.assert_array_equal(robust([one, other]), [False, False, True, False, False])
    np.testing.assert_array_equal(unknown([one, other]), [True, False, False, False, False])


def test_an_unknown_is_counted_once_and_only_where_no_attack_fooled():
    board = leaderboard([entry("uuuh", "a"), entry("ubuh", "b"), entry("uhhh", "c")])
    assert board["unknown"][0] == 2
    assert board["robust_accuracy"][0] == 0.25


def test_an_unknown_that_fooled_on_its_way_counts_as_fooled():
    third = made("uu", adversarial=[2, -1])
    np.testing.assert_array_equal(unknown([third]), [False, True])


def test_inputs_that_every_attack_skipped_are_not_robust():
    assert accuracy("sshh") == 0.5
    assert accuracy("sshh", "shsh") == 0.75
    assert accuracy("ssss", "ssss") == 0.0
    assert accuracy("sh", "bh") == 0.5
    assert accuracy("sh", "uh") == 0.5


def test_a_targeted_attack_that_lands_on_a_third_label_breaks_the_input_for_the_union():
    landed = made("hhhh", adversarial=[2, 0, -1, 0])
    np.testing.assert_array_equal(landed.fooled, [True, False, False, False])
    assert accuracy(landed) == 0.75
    assert accuracy(landed, "hhhb") == 0.5
    assert accuracy("hhhb", landed) == 0.5


# A smaller budget


def test_within_a_smaller_budget_what_was_far_is_held():
    outcome = made("bbbwhu", distance=[0.1, 0.2, 0.30001, np.nan, np.nan, np.nan])
    short = outcome.within(0.2)
    assert short.status.tolist() == ["broken", "broken", "held", "wrong", "held", "unknown"]
    assert short.adversarial.tolist() == [1, 1, -1, -1, -1, -1]
    np.testing.assert_array_equal(short.distance, [0.1, 0.2, np.nan, np.nan, np.nan, np.nan])
    assert short.imaged.tolist() == [0, 1]
    np.testing.assert_array_equal(short.images, outcome.images[:2])


def test_a_third_label_at_an_unknown_distance_proves_nothing_within_a_budget():
    landed = made("hhb", adversarial=[2, -1, 1])
    assert landed.fooled.tolist() == [True, False, True]
    assert landed.within(0.25).fooled.tolist() == [False, False, True]


# The other columns


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # p = 1/2, n = 10: z² = 3.841459; (0.5 + z²/20 ± z·sqrt(1/40 + z²/400)) / (1 + z²/10)
        (5, 10, 0.236593, 0.763407),
        # p = 0: 0 and z²/(n + z²) = 3.841459 / 13.841459
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        # p = 0.9, n = 100
        (90, 100, 0.825634, 0.944771),
    ],
)
def test_the_wilson_interval_by_hand(successes: int, trials: int, low: float, high: float):
    z, p = 1.959964, successes / trials
    centre, spread = p + z**2 / (2 * trials), z * (p * (1 - p) / trials + z**2 / (4 * trials**2)) ** 0.5
    by_hand = [(centre + sign * spread) / (1 + z**2 / trials) for sign in (-1, 1)]
    assert by_hand == pytest.approx([low, high], abs=1e-5)
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-5)


def test_the_interval_in_the_table_is_that_of_the_union():
    board = leaderboard([entry("hhhhhhbbbb", "a"), entry("hhhhhbbbbb", "b")])
    assert (board["robust_low"][0], board["robust_high"][0]) == pytest.approx((0.236593, 0.763407), abs=1e-5)


def test_the_worst_attack_is_the_one_that_leaves_fewest_robust():
    assert leaderboard([entry("hhbb", "a"), entry("hbbb", "b"), entry("hhhb", "c")])["worst_attack"][0] == "b"
    assert leaderboard([entry("hhbb", "a"), entry("bbhh", "b")])["worst_attack"][0] == "a"
    landed = made("hhhh", adversarial=[2, 2, 2, -1])
    assert leaderboard([entry("hhbb", "a"), entry(landed, "b")])["worst_attack"][0] == "b"


def test_costs_are_means_an_input_over_all_attacks_together():
    one = made("hhbw", forwards=[40, 40, 8, 0], backwards=[40, 40, 4, 0], seconds=[1.0, 1.0, 1.0, 0.5])
    other = made("hhbw", forwards=[100, 200, 0, 0], backwards=[0, 0, 0, 2], seconds=[0.0, 0.25, 0.0, 0.0])
    board = leaderboard([entry(one, "a"), entry(other, "b")])
    assert board["forwards"][0] == (88 + 300) / 4
    assert board["backwards"][0] == (84 + 2) / 4
    assert board["seconds"][0] == 3.75
    assert board["attacks"][0] == "a; b"


def test_attacks_of_different_row_counts_are_compared_on_the_rows_that_all_have():
    long, short = entry("hhbbhhhhhh", "long"), entry(made("bhhw", start=2), "short")
    board = leaderboard([long, short])
    assert board["examples"][0] == 4  # rows 2 to 5: long bbhh, short bhhw
    assert board["robust_accuracy"][0] == 0.25
    assert board["clean_accuracy"][0] == 1.0
    table = matrix([long, short])
    assert table.loc[0, ["long", "short"]].tolist() == [0.5, 0.5]


def test_attacks_without_a_row_in_common_make_no_line():
    one, other = entry("hh", "a"), entry(made("hh", start=2), "b")
    assert len(leaderboard([one, other])) == 0
    assert leaderboard([one])["robust_accuracy"].tolist() == [1.0]


# Rows, blocks and ranks


def test_ranks_are_within_a_block_and_ties_share_one():
    letters = {"a": "hbbb", "b": "hhhb", "c": "bhbb", "d": "bhhh", "e": "hbhh"}
    board = leaderboard([entry(status, defense=name) for name, status in letters.items()])
    assert board["defense"].tolist() == ["b", "d", "e", "a", "c"]
    assert board["rank"].tolist() == [1, 1, 1, 4, 4]


def test_each_threat_data_set_and_seed_is_a_block_of_its_own():
    entries = [
        entry(letters, defense=defense, **block)
        for block in ({}, {"eps": 0.2}, {"norm": "l2"}, {"dataset": "mnist"}, {"seed": 1})
        for defense, letters in (("worse", "hbbb"), ("better", "hhbb"))
    ]
    board = leaderboard(entries)
    assert board["rank"].tolist() == [1, 2] * 5
    assert board["defense"].tolist() == ["better", "worse"] * 5
    assert board[["dataset", "norm", "eps", "seed"]].drop_duplicates().values.tolist() == [
        ["digits", "linf", 0.1, 0],
        ["digits", "linf", 0.2, 0],
        ["digits", "l2", 0.1, 0],
        ["mnist", "linf", 0.1, 0],
        ["digits", "linf", 0.1, 1],
    ]


def test_a_rank_says_by_mcnemar_whether_the_row_above_differs():
    """best and next: 6 inputs to 0, so 2 / 2^6; next and tied: 1 to 1, so 1. Of blind attacks, or of others: none."""
    letters = {"best": "hhhhhhhh", "next": "bbbbbbhh", "tied": "bbbbbhbh"}
    entries = [entry(status, defense=name) for name, status in letters.items()]
    others = [entry("hhhhhhhhh", defense="more"), entry("bbbbbbbb", defense="best", adaptive=False)]
    board = leaderboard([*others, *entries, entry("bbbbbbbb", eps=0.2)]).set_index(["defense", "adaptive", "eps"])
    expected = {
        ("best", True, 0.1): np.nan,
        ("next", True, 0.1): 2 / 2**6,
        ("tied", True, 0.1): 1.0,
        ("more", True, 0.1): np.nan,
        ("best", False, 0.1): np.nan,
        ("madry", True, 0.2): np.nan,
    }
    assert board["p_above"].to_dict() == pytest.approx(expected, nan_ok=True)
    relabelled = entry(made("bbbbbbhh", label=[1] * 8), defense="next")
    assert leaderboard([entries[0], relabelled])["p_above"].isna().all()


def test_accuracy_by_class_counts_the_examples_of_that_label():
    outcomes = [made(letters, label=[0, 0, 0, 2, 2]) for letters in ("hhwbh", "hbwhh")]
    table = per_class([entry(outcome, attack=f"attack{i}") for i, outcome in enumerate(outcomes)])
    figures = table[["class", "examples", "clean_accuracy", "robust_accuracy"]].values.tolist()
    assert figures == [[0, 3, pytest.approx(2 / 3), pytest.approx(1 / 3)], [2, 2, 1.0, 0.5]]
    assert table[["robust_low", "robust_high"]].values.tolist() == [[*wilson(1, 3)], [*wilson(1, 2)]]
    assert tuple(per_class([]).columns) == tuple(table.columns)


def test_models_of_one_name_are_not_mixed():
    board = leaderboard([entry("hbbb", "pgd", subject="weights 1"), entry("hhhb", "pgd", subject="weights 2")])
    assert board["robust_accuracy"].tolist() == [0.75, 0.25]
    assert board["attacks"].tolist() == ["pgd", "pgd"]


def test_the_columns_are_those_that_are_promised():
    assert tuple(leaderboard([entry("hb")]).columns) == LEADERBOARD
    assert " ".join(LEADERBOARD) == (
        "rank dataset defense model parameters norm eps adaptive examples clean_accuracy certified_accuracy"
        " certified_low certified_high robust_accuracy robust_low robust_high draws draw_mean draw_std p_above"
        " worst_attack attacks certifiers detection_rate false_positives threshold unknown flags forwards backwards"
        " seconds seed version"
    )


def test_a_matrix_has_a_column_an_attack_and_gaps_where_it_did_not_run():
    table = matrix([entry("hb", "a"), entry("bb", "b"), entry("hh", "b", norm="l2")])
    assert table.columns.tolist() == ["dataset", "norm", "eps", "defense", "adaptive", "a", "b"]
    assert table["norm"].tolist() == ["linf", "l2"]
    np.testing.assert_array_equal(table[["a", "b"]], [[0.5, 0.0], [np.nan, 1.0]])


def test_rows_have_a_line_an_input_and_attack():
    table = rows([entry("hb", "a"), entry(made("bw", start=7), "b")])
    assert table.columns[:7].tolist() == ["dataset", "defense", "norm", "eps", "attack", "seed", "adaptive"]
    assert table["attack"].tolist() == ["a", "a", "b", "b"]
    assert table["row"].tolist() == [0, 1, 7, 8]
    assert table["status"].tolist() == ["held", "broken", "broken", "wrong"]


# The files


# What is certified


def test_an_input_is_certified_if_any_method_verified_it():
    proofs = [proof("wvuufu"), proof("wuvuuu", "ibp"), proof("wnnnnn", "milp"), proof("vvvvvv", eps=0.2)]
    row = leaderboard([entry("whhhbh")], proofs).iloc[0]
    assert row["certified_accuracy"] == 2 / 6
    assert (row["certified_low"], row["certified_high"]) == wilson(2, 6)
    assert row["certifiers"] == "crown; ibp"
    for others in ([], [proof("wnnnnn")], [proof("vvvvv")], [proof("vvvvvv", norm="l2")]):
        row = leaderboard([entry("whhhbh")], others).iloc[0]
        assert np.isnan(row["certified_accuracy"])
        assert row["certifiers"] == ""


def test_a_counterexample_breaks_its_input_as_an_attack_does():
    entries, milp = [entry("whhhb", "pgd"), entry("whbbb", "pgd", adaptive=False)], proof("wfvuu", "milp")
    knows, blind = leaderboard(entries, [milp]).to_dict("records")
    assert (knows["robust_accuracy"], knows["attacks"]) == (2 / 5, "pgd; milp (counterexamples)")
    assert (blind["robust_accuracy"], blind["attacks"]) == (1 / 5, "pgd")
    column = matrix(entries, [milp])["milp (counterexamples)"]
    assert column.tolist() == [pytest.approx(3 / 5), pytest.approx(np.nan, nan_ok=True)]
    for other in (proof("wuvuu", "milp"), proof("wfvu", "milp"), proof("wfvuu", "milp", eps=0.2)):
        assert leaderboard(entries, [other])["attacks"].tolist() == ["pgd", "pgd"]


def test_certificates_count_what_became_of_each_input():
    (row,) = certificates([proof(proved("wvvfunnn", radius=[0, 0.3, 0.1] + [0] * 5))]).to_dict("records")
    counts = {"verified": 2, "falsified": 1, "unknown": 1, "unsupported": 3, "examples": 8}
    expected = counts | {"clean_accuracy": 7 / 8, "certified_accuracy": 1 / 4, "mean_margin": 1.5, "mean_radius": 0.05}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert tuple(row) == CERTIFICATES


def test_a_violation_is_an_adversarial_that_was_found_inside_a_certified_ball():
    near = entry(made("bbbbhuw", distance=[0.09, 0.1, 0.1001, 0.04] + [np.nan] * 3), eps=0.2, seed=4)
    lines = violations([near], [proof("vvvuvvv")])
    assert [line.split(",")[0] for line in lines] == ["input 0 of digits", "input 1 of digits"]
    assert lines[0] == (
        "input 0 of digits, madry: crown certifies linf:0.1 (seed 0), but pgd (seed 4) found an adversarial at 0.09"
    )
    assert violations([near], [proof(proved("vuvvvvv", start=2))]) == []
    for other in ({"norm": "l2"}, {"subject": "another"}, {"defense": "standard"}, {"dataset": "mnist"}):
        assert violations([near], [proof("vvvvvvv", **other)]) == []
    wider = proof(proved("vvvvvvv", radius=[0.05] * 3 + [0.5] * 4))
    assert [line.split(",")[0] for line in violations([near], [wider])] == ["input 3 of digits"]
    patch = entry(made("b", distance=[5.0]), norm="patch", eps=0.1)  # a side of 5 pixels
    assert len(violations([patch], [proof("v", norm="patch")])) == 1


def test_a_certifiers_counterexample_inside_anothers_ball_is_a_violation():
    (line,) = violations([], [proof("vvu"), proof("uff", "milp", eps=0.05)])
    assert line.startswith("input 1 of digits, madry: crown certifies linf:0.1 (seed 0), but milp (seed 0) found")


ENTRIES = (
    entry("hhbwbhhuhs", "pgd"),
    entry("hbhwbhhhhh", "fgsm"),
    entry(made("hhhwhhhuhh", adversarial=[3, *[-1] * 9]), "pgd:steps=100,restarts=5 to 3"),
    entry("hhhhhhhhhb", "pgd", defense="standard", parameters=12_345, eps=8 / 255, norm="l2", seed=3),
    entry("bbbbbbbbbb", "fgsm", defense='my "own", net', model="net.py:load", eps=8 / 255, norm="l2", seed=3),
    entry("bbbbbbbbbh", "square", defense="standard"),
)


PROOFS = (
    proof("wvvfuvvvvu", "crown"),
    proof("wuufuuuvvv", "ibp"),
    proof("wnnnnnnnnn", "milp"),
    proof("vvvvvvvvvv", "crown", defense="standard", seed=1),
)
PROBES = tuple(
    Probe(**{field.name: getattr(one, field.name) for field in fields(Setting)}, probed=probed, classes=10)
    for one, probed in ((ENTRIES[-1], looked_at(10, moved=np.ones(10), again=[1] * 10)), (ENTRIES[0], looked_at(10)))
)
RESULTS = Results(ENTRIES, PROOFS, PROBES)
TABLES = ["leaderboard", "matrix", "rows", "certificates", "certified_rows"]


@pytest.mark.parametrize("name", TABLES)
def test_the_files_are_what_they_always_were(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """To renew one on purpose, copy what this writes to tests/golden and read the difference."""
    monkeypatch.setattr(module, "__version__", "1.2.3")
    write_csv(getattr(RESULTS, name)(), tmp_path / "made.csv")
    assert (tmp_path / "made.csv").read_bytes() == (GOLDEN / f"{name}.csv").read_bytes()


def test_pandas_reads_numbers_as_numbers():
    board = pd.read_csv(GOLDEN / "leaderboard.csv").astype({"rank": "Int64"})
    assert {name: str(board[name].dtype) for name in NUMBERS} == NUMBERS
    assert board["eps"].tolist() == [0.1, 0.1, 8 / 255, 8 / 255]
    table = pd.read_csv(GOLDEN / "matrix.csv")
    words = ("dataset", "norm", "defense", "adaptive")
    assert all(table[name].dtype == np.float64 for name in table.columns if name not in words)
    lines = pd.read_csv(GOLDEN / "rows.csv")
    whole = ["seed", "row", "label", "clean", "adversarial", "forwards", "backwards"]
    assert all(lines[name].dtype == np.int64 for name in whole)
    assert all(lines[name].dtype == np.float64 for name in ("eps", "distance", "seconds"))
    assert len(lines) == 60


@pytest.mark.parametrize("name", TABLES)
def test_what_pandas_reads_is_what_was_written(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "__version__", "1.2.3")
    written = getattr(RESULTS, name)()
    read = pd.read_csv(GOLDEN / f"{name}.csv", keep_default_na=not name.endswith("rows")).replace("", np.nan)
    for column in written.columns:
        expected = written[column].replace("", np.nan)
        if pd.api.types.is_numeric_dtype(expected):
            np.testing.assert_array_equal(pd.to_numeric(read[column]), expected, err_msg=column)
        else:
            assert read[column].fillna("").tolist() == expected.fillna("").tolist(), column


def test_a_file_that_cannot_be_written_is_one_line_and_nothing_is_left(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "board.csv", tmp_path / "none" / "board.csv"):
        with pytest.raises(ValueError, match=r"cannot write .*board.csv: \w.*\w") as error:
            Results(ENTRIES).to_csv(path)
        assert "None" not in str(error.value)
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
