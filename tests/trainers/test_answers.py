"""Which number a text comes to."""

from fractions import Fraction

import pytest

from trainers.answers import answered_number, behind, reference_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = 4\n#### 1,234", 1234),
        ("#### -7", -7),
        ("#### \u22127", -7),
        ("#### -$1,200.50", Fraction("-1200.5")),
        ("#### $-3", -3),
        ("#### 18.00", 18),
        ("#### 18.", 18),
        ("#### 18 eggs, of 20", 18),
        ("####\n18\n19", 18),
        ("#### 9 x 2 = 18", 18),
        ("#### 18 =", 18),
        ("#### 2 = 3 = 4", 4),
        ("1/2.5", Fraction(5, 2)),
        (r"\boxed{-\$5}", -5),
        ("#### 5\nno:\n#### 6", 6),
        ("#### 20%", 20),
        ("#### 3/4", Fraction(3, 4)),
        ("#### 0/4", 0),
        ("#### 1,000/4", 250),
        ("#### 1 1/2 cups", Fraction(3, 2)),
        ("it is 5\n#### nothing", None),
        (r"5, so \boxed{18} and not 7", 18),
        (r"\boxed{1} then \boxed{2}", 2),
        (r"\boxed{\$1{,}234\text{ a {b}}} 5", 1234),
        (r"\boxed{x = 20\%}", 20),
        (r"\boxed{-\frac{3}{4}}", Fraction(-3, 4)),
        (r"\boxed{1\dfrac34}", Fraction(7, 4)),
        (r"\boxed{1\,234}", 1234),
        (r"5 \boxed{12", None),
        (r"\boxed{5} #### 6", 6),
        ("The answer is 18.", 18),
        ("from 10-20", 20),
        ("10 - 4", 4),
        ("(3)-4", 4),
        ("it is -4", -4),
        ("**4**", 4),
        ("COVID-19", 19),
        ("wait...5", 5),
        ("half is .5", Fraction(1, 2)),
        ("Rs.5", 5),
        ("on 12/25/2024", 2024),
        ("1,2345", 2345),
        ("12,345", 12345),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert answered_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        *("9" * 5000, "#### " + "9" * 5000, "#### 1/0", "1/" + "9" * 5000, "\u0661\u0668", "#### \uff11\uff18"),
        *("\\boxed{" * 3000, "\\boxed{" + "{" * 100_000, "\\frac{" * 20_000, "\\boxed{}", "####", "-", "$", "\x00"),
    ],
)
def test_texts_without_a_number_that_could_be_read(text):
    assert answered_number(text) is None
    assert reference_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("18", 18), ("$1,234.00", 1234), ("18 eggs", 18), ("2 of 3\n#### 5", 5), (r"\boxed{\frac{1}{2}}", 0.5)),
        *(("x^2 + 3", None), ("4 or 5", None), ("yes", None), ("None", None), ("1/0", None)),
    ],
)
def test_a_reference_has_one_number_or_says_which(text, number):
    assert reference_number(text) == number


def test_behind_the_last_marker():
    assert behind("a|b|c", "|") == "c"
    assert behind("abc", "|") is None
    assert behind("abc", None) == "abc"
