"""The problems of the quickstart: right, worked correctly, and without held-out pairs where they are learnt from."""

import itertools
import random
import re
from collections import Counter

import pytest

from quickstart.problems import FAMILIES, LARGEST, Operation, draw_operation, draw_problem, held_out


def problems(count: int, *, held: bool, seed: int = 0) -> list:
    rng = random.Random(seed)
    return [draw_problem(rng, held=held) for _ in range(count)]


def solve(question: str) -> int:
    """The answer by reading the question, without the generator's operations."""
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    if match := re.fullmatch(r"What is (\d+)([+*-])(\d+)\?", question):
        return {"+": sum(numbers), "-": numbers[0] - numbers[1], "*": numbers[0] * numbers[1]}[match[2]]
    if "in each" in question:
        return numbers[0] * numbers[1]
    if "together" in question:
        return sum(numbers)
    if "How many more" in question:
        return max(numbers) - min(numbers)
    signs = [
        1 if verb in ("buys", "finds", "gets", "picks up") else -1
        for verb in re.findall(r"\b(buys|finds|gets|picks up|gives away|loses|sells|drops)\b", question)
    ]
    return numbers[0] + sum(sign * number for sign, number in zip(signs, numbers[1:], strict=True))


@pytest.mark.parametrize("held", [False, True])
def test_answers_are_those_of_the_questions(held):
    for problem in problems(2000, held=held):
        assert solve(problem.question) == problem.answer, problem
        assert 0 < problem.answer <= LARGEST


def test_every_family_comes_up_as_often_as_any_other():
    for held in (False, True):
        counts = Counter(problem.family for problem in problems(2100, held=held))
        assert set(counts) == set(FAMILIES) and min(counts.values()) > 220


def test_worked_steps_are_true_and_make_up_the_result():
    """Each column's line is a true equation, and the columns' last digits are those of the result."""
    rng = random.Random(1)
    for operation in (draw_operation(rng) for _ in range(3000)):
        head, *columns = operation.worked().split("\n")
        assert head == f"{operation.a}{operation.sign}{operation.b}"
        digits = ""
        for number, column in enumerate(columns, 1):
            left, right = column.split("=")
            assert eval(left) == int(right), operation
            digits = (right if number == len(columns) else right[-1]) + digits
        assert int(digits) == operation.result, operation


@pytest.mark.parametrize(
    ("operation", "worked"),
    [
        (Operation(a=27, sign="+", b=35), "27+35\n7+5=12\n2+3+1=6"),
        (Operation(a=52, sign="-", b=17), "52-17\n12-7=5\n5-1-1=3"),
        (Operation(a=58, sign="-", b=51), "58-51\n8-1=7\n5-5=0"),
        (Operation(a=3, sign="*", b=24), "3*24\n3*4=12\n3*2+1=7"),
        (Operation(a=4, sign="+", b=5), "4+5\n4+5=9"),
    ],
)
def test_examples_of_working(operation, worked):
    assert operation.worked() == worked


def test_about_a_seventh_of_all_pairs_is_held_out_in_either_order():
    pairs = list(itertools.product(range(1, 100), repeat=2))
    share = sum(held_out(a, b) for a, b in pairs) / len(pairs)
    assert 0.12 < share < 0.16
    assert all(held_out(a, b) == held_out(b, a) for a, b in pairs)
    assert not any(held_out(a, b) for a in range(20) for b in range(10))
    assert held_out(20, 22) and not held_out(20, 21)  # on every machine


def test_held_out_problems_combine_held_out_pairs_only():
    for problem in problems(1000, held=True):
        assert all(held_out(operation.a, operation.b) for operation in problem.operations)


def test_nothing_that_is_learnt_from_has_a_held_out_pair_in_it():
    for problem in problems(3000, held=False):
        numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
        assert not any(held_out(a, b) for a, b in itertools.combinations(numbers, 2))
        assert not any(held_out(operation.a, operation.b) for operation in problem.operations)


def test_the_seed_decides():
    assert problems(50, held=False, seed=3) == problems(50, held=False, seed=3)
    assert problems(50, held=False, seed=3) != problems(50, held=False, seed=4)
