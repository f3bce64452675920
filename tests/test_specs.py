import math
import string
from contextlib import suppress
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from robustbench_lite.specs import parse, read, settle, split_chain, split_list, write


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("fgsm", ["fgsm"]),
        ("fgsm,pgd:steps=100,restarts=5", ["fgsm", "pgd:steps=100,restarts=5"]),
        (" pgd:steps=1 , fgsm ,mim:steps=2", ["pgd:steps=1", "fgsm", "mim:steps=2"]),
        ("foolbox/l2-ddn,pgd", ["foolbox/l2-ddn", "pgd"]),
        ("ensemble:x=a,of=(pgd:steps=1,mim),fgsm", ["ensemble:x=a,of=(pgd:steps=1,mim)", "fgsm"]),
        ("a:x=1,url=b:c", ["a:x=1,url=b:c"]),
        ("madry:eps=1,steps=2+fs:bits=1,fs", ["madry:eps=1,steps=2+fs:bits=1", "fs"]),
    ],
)
def test_a_list_starts_a_spec_at_each_name(text, specs):
    assert split_list(text) == specs


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("madry", ["madry"]),
        ("madry:eps=0.3+feature-squeezing:bits=1", ["madry:eps=0.3", "feature-squeezing:bits=1"]),
        ("madry + jpeg", ["madry", "jpeg"]),
        ("madry:eps=1e+5", ["madry:eps=1e+5"]),
        ("madry:of=(a+b)+jpeg", ["madry:of=(a+b)", "jpeg"]),
    ],
)
def test_a_plus_chains_only_before_a_letter_outside_parentheses(text, specs):
    assert split_chain(text) == specs


def test_parse_keeps_nested_specs_whole():
    text = " transfer : source = standard, attack=(pgd:steps=100,of=(a,b=c)) "
    assert parse(text) == ("transfer", {"source": "standard", "attack": "(pgd:steps=100,of=(a,b=c))"})


@pytest.mark.parametrize(
    ("split", "text", "error"),
    [
        (split_list, "", "an empty item in ''"),
        (split_list, "fgsm,,pgd", "an empty item in 'fgsm,,pgd'"),
        (split_list, "steps=1,pgd", "in 'steps=1,pgd' a name must come before 'steps=1'"),
        (split_list, "a:x=(1,b", "unbalanced parentheses in 'a:x=(1,b'"),
        (split_list, "a:x=)1(", "unbalanced parentheses in 'a:x=)1('"),
        (split_chain, "+madry", "an empty item in '+madry'"),
        (parse, " :x=1", "no name in ' :x=1'"),
        (parse, "pgd:", "an empty item in 'pgd:'"),
        (parse, "pgd:x=1,", "an empty item in 'pgd:x=1,'"),
        (parse, "pgd:x=(", "unbalanced parentheses in 'pgd:x=('"),
        (parse, "pgd:steps", "in 'pgd:steps' the setting 'steps' has no '='"),
        (parse, "pgd:x=1,x=2", "in 'pgd:x=1,x=2' x is given twice"),
        (parse, "pgd:x=", "in 'pgd:x=' 'x=' lacks a value"),
        (parse, "pgd:=1", "in 'pgd:=1' '=1' lacks a name"),
        (parse, "fgsm,x=1", "in 'fgsm,x=1' a name and ':' must come before the settings"),
    ],
)
def test_errors_of_the_grammar(split, text, error):
    with pytest.raises(ValueError) as raised:
        split(text)
    assert str(raised.value) == error


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("100", int, 100),
        ("-3", int, -3),
        ("8/255", float, 8 / 255),
        ("1e-3", float, 1e-3),
        (".5", float, 0.5),
        ("2", float, 2.0),
        ("Yes", bool, True),
        ("off", bool, False),
        ("a b", str, "a b"),
        ("(a,b)", str, "a,b"),
        ("(a)(b)", str, "(a)(b)"),
        ("()", str, ""),
        ("l2", Literal["l2", "linf"], "l2"),
        ("4", Literal[1, 4], 4),
        ("none", float | None, None),
        ("0.5", float | None, 0.5),
        ("none", str | None, None),
        ("(none)", str | None, "none"),
        ("none", str, "none"),
        ("auto", float | Literal["auto"], "auto"),
        ("1", str | int, 1),
        ("(1)", str | int, "1"),
    ],
)
def test_read(text, hint, value):
    got = read(text, hint)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "hint", "error"),
    [
        ("ten", int, "wants a whole number, not 'ten'"),
        ("1e3", int, "wants a whole number, not '1e3'"),
        ("1_0", int, "wants a whole number, not '1_0'"),
        ("1.0", int, "wants a whole number, not '1.0'"),
        ("1_0", float, "wants a number, not '1_0'"),
        ("nan", float, "wants a number, not 'nan'"),
        ("inf", float, "wants a number, not 'inf'"),
        ("1e999", float, "wants a number, not '1e999'"),
        ("1/0", float, "wants a number, not '1/0'"),
        ("1/", float, "wants a number, not '1/'"),
        ("/2", float, "wants a number, not '/2'"),
        ("1/1e-320", float, "wants a number, not '1/1e-320'"),
        ("1/2/3", float, "wants a number, not '1/2/3'"),
        ("maybe", bool, "wants true or false, not 'maybe'"),
        ("l3", Literal["l2", "linf"], "wants l2 or linf, not 'l3'"),
        ("x", int | None, "wants a whole number or none, not 'x'"),
        ("1", tuple[int, ...], "wants tuple[int, ...], not '1'"),
    ],
)
def test_read_says_what_the_type_wants(text, hint, error):
    with pytest.raises(ValueError) as raised:
        read(text, hint)
    assert str(raised.value) == error


def test_write_is_plain_where_it_can_be():
    assert [write(v, t) for v, t in [(0.3, float), (5, int), (True, bool), (None, int | None), ("l2", str)]] == [
        "0.3",
        "5",
        "true",
        "none",
        "l2",
    ]
    assert write("pgd:steps=1", str) == "(pgd:steps=1)"
    with pytest.raises(ValueError, match="in pairs"):
        write("a)(", str)


def test_settle_makes_whole_floats_floats():
    assert [repr(settle(1, hint)) for hint in (float, float | None, int, int | float, bool)] == ["1.0", "1.0", *"111"]
    assert settle(True, float) is True


TEXT = st.text(alphabet=string.printable + "é\u2003") | st.text(alphabet="a1 ,:=+()")
HINTS = {
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: TEXT,
    str | None: st.none() | TEXT | st.sampled_from(["none", "None"]),
    int | str: st.integers() | TEXT | st.integers().map(str),
    float | bool: st.booleans() | st.floats(allow_nan=False, allow_infinity=False),
    Literal["a", "b,c", 3]: st.sampled_from(["a", "b,c", 3]),
}
TYPED = st.sampled_from(list(HINTS)).flatmap(lambda hint: st.tuples(HINTS[hint], st.just(hint)))


def paired(text):
    depths = [text[:i].count("(") - text[:i].count(")") for i in range(len(text) + 1)]
    return min(depths) == depths[-1] == 0


@given(st.lists(TYPED, min_size=1, max_size=4))
@example([("1e+a", str), ("a+b", str), ("x=1,y", str), ("(a)(b)", str), (" ", str), (1e16, float)])
def test_what_is_written_is_read_again_wherever_it_stands(settings):
    settings = [(value, hint) for value, hint in settings if not isinstance(value, str) or paired(value)]
    texts = [f"s{i}={write(value, hint)}" for i, (value, hint) in enumerate(settings)]
    spec = f"one:{','.join(texts)}" if texts else "one"
    assert split_list(f"{spec},two,{spec}") == [spec, "two", spec]
    assert split_chain(f"{spec}+two+{spec}") == [spec, "two", spec]
    name, again = parse(spec)
    assert name == "one"
    for (value, hint), text in zip(settings, again.values(), strict=True):
        got = read(text, hint)
        assert (got, type(got)) == (value, type(value))
        assert write(got, hint) == text


@given(st.text(alphabet="ab01,:=+()/. e-"))
def test_no_text_does_worse_than_a_value_error(text):
    for call in (split_list, split_chain, parse, *(lambda text, hint=hint: read(text, hint) for hint in HINTS)):
        with suppress(ValueError):
            call(text)


@given(st.integers(-999, 999), st.integers(1, 999))
def test_a_fraction_is_what_python_divides(over, under):
    assert read(f"{over}/{under}", float) == over / under


@given(st.text(alphabet=string.printable))
def test_numbers_are_finite(text):
    with suppress(ValueError):
        assert math.isfinite(read(text, float))
