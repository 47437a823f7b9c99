"""Word problems and sums with worked steps, drawn from a seeded generator, with pairs of numbers that are held out.

A pair of numbers is held out of training by its hash. In what is trained on, at any stage, no two numbers of a question
or of an operation are such a pair; in a held-out problem the two numbers of every operation are.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

NAMES = (
    *("Anna", "Ben", "Cara", "Dan", "Ella", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo"),
    *("Mia", "Nico", "Olga", "Paul", "Rosa", "Sam", "Tina", "Udo", "Vera", "Will", "Yara", "Zoe"),
)
THINGS = (
    *("apples", "books", "cards", "coins", "eggs", "flowers", "hats", "keys", "lemons", "marbles", "nuts", "pens"),
    *("plums", "pots", "ropes", "shells", "socks", "stamps", "stones", "toys"),
)
BOXES = ("bags", "boxes", "baskets", "rows", "jars", "bowls")
GAINS = ("buys", "finds", "gets", "picks up")
LOSSES = ("gives away", "loses", "sells", "drops")

LARGEST = 99  # of any number in a problem
_HELD_OUT_OF = 7  # one pair in so many is held out


def held_out(a: int, b: int) -> bool:
    """Whether this pair, in either order, is kept out of training.

    What is learnt by heart never is: sums of two digits and what is taken from them, so pairs of a digit and a number
    below 20.
    """
    low, high = sorted((a, b))
    return not (low < 10 and high < 20) and zlib.crc32(f"{low} {high}".encode()) % _HELD_OUT_OF == 0


@dataclass(frozen=True, kw_only=True)
class Operation:
    """a + b, a - b or a * b with numbers of at most two digits, worked digit by digit."""

    a: int
    sign: str
    b: int

    @property
    def result(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.sign]

    @property
    def possible(self) -> bool:
        """Whether its numbers and its result are from 1 to `LARGEST`."""
        return all(1 <= number <= LARGEST for number in (self.a, self.b, self.result))

    @property
    def held_out(self) -> bool:
        return held_out(self.a, self.b)

    def worked(self) -> str:
        """The operation and a line for each column: 27+35, 7+5=12, 2+3+1=6."""
        columns = {"+": self._added, "-": self._taken, "*": self._multiplied}[self.sign]()
        return "\n".join((f"{self.a}{self.sign}{self.b}", *columns))

    def _added(self) -> list[str]:
        (tens_a, a), (tens_b, b) = divmod(self.a, 10), divmod(self.b, 10)
        carry = (a + b) // 10
        tens = [f"{tens_a}+{tens_b}{'+1' * carry}={tens_a + tens_b + carry}"] if tens_a or tens_b else []
        return [f"{a}+{b}={a + b}", *tens]

    def _taken(self) -> list[str]:
        (tens_a, a), (tens_b, b) = divmod(self.a, 10), divmod(self.b, 10)
        borrow = int(a < b)
        a += 10 * borrow
        tens = [f"{tens_a}-{tens_b}{'-1' * borrow}={tens_a - tens_b - borrow}"] if tens_a else []
        return [f"{a}-{b}={a - b}", *tens]

    def _multiplied(self) -> list[str]:
        (tens, ones), carry = divmod(self.b, 10), self.a * (self.b % 10) // 10
        more = [f"{self.a}*{tens}{f'+{carry}' if carry else ''}={self.a * tens + carry}"] if tens else []
        return [f"{self.a}*{ones}={self.a * ones}", *more]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question with the operations that lead to its answer."""

    family: str
    question: str
    operations: tuple[Operation, ...]

    @property
    def answer(self) -> int:
        return self.operations[-1].result

    @property
    def steps(self) -> str:
        return "\n".join(operation.worked() for operation in self.operations)


def draw_problem(rng: random.Random, *, held: bool, families: tuple[str, ...] | None = None) -> Problem:
    """A problem of a family drawn evenly; with `held` a held-out one, without one to train on."""
    family = rng.choice(families or tuple(FAMILIES))
    make = FAMILIES[family]
    while True:
        question, *operations = make(rng)
        if not all(operation.possible for operation in operations):
            continue
        numbers = [number for operation in operations for number in (operation.a, operation.b)]
        if held and all(operation.held_out for operation in operations):
            break
        if not held and not any(held_out(a, b) for a in numbers for b in numbers):
            break
    return Problem(family=family, question=question, operations=tuple(operations))


def draw_operation(rng: random.Random) -> Operation:
    """An operation to train on."""
    while True:
        operation = Operation(a=rng.randint(1, LARGEST), sign=rng.choice("++--*"), b=rng.randint(1, LARGEST))
        if operation.sign == "*":
            operation = Operation(a=rng.randint(2, 9), sign="*", b=rng.randint(2, 49))
        if operation.possible and not operation.held_out:
            return operation


def _sum(rng: random.Random) -> tuple:
    a, b, sign = rng.randint(2, LARGEST), rng.randint(2, LARGEST), rng.choice("++--*")
    if sign == "*":
        a = rng.randint(2, 5)
    return f"What is {a}{sign}{b}?", Operation(a=a, sign=sign, b=b)


def _more(rng: random.Random) -> tuple:
    name, things, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, LARGEST), rng.randint(2, LARGEST)
    question = f"{name} has {a} {things} and {rng.choice(GAINS)} {b} more. How many {things} does {name} have now?"
    return question, Operation(a=a, sign="+", b=b)


def _fewer(rng: random.Random) -> tuple:
    name, things, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, LARGEST), rng.randint(2, LARGEST)
    question = f"{name} has {a} {things} and {rng.choice(LOSSES)} {b}. How many {things} does {name} have left?"
    return question, Operation(a=a, sign="-", b=b)


def _compare(rng: random.Random) -> tuple:
    (one, other), things = rng.sample(NAMES, 2), rng.choice(THINGS)
    a, b = rng.randint(2, LARGEST), rng.randint(2, LARGEST)
    low, high = sorted((a, b))
    more, less = (one, other) if a > b else (other, one)
    question = f"{one} has {a} {things}. {other} has {b}. How many more {things} does {more} have than {less}?"
    return question, Operation(a=high, sign="-", b=low)


def _together(rng: random.Random) -> tuple:
    (one, other), things = rng.sample(NAMES, 2), rng.choice(THINGS)
    a, b = rng.randint(2, LARGEST), rng.randint(2, LARGEST)
    question = f"{one} has {a} {things}. {other} has {b}. How many {things} do they have together?"
    return question, Operation(a=a, sign="+", b=b)


def _groups(rng: random.Random) -> tuple:
    things, boxes, a, b = rng.choice(THINGS), rng.choice(BOXES), rng.randint(2, 5), rng.randint(2, LARGEST)
    question = f"There are {a} {boxes} with {b} {things} in each. How many {things} are there in all?"
    return question, Operation(a=a, sign="*", b=b)


def _two_steps(rng: random.Random) -> tuple:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c = (rng.randint(2, LARGEST) for _ in range(3))
    gain, loss = rng.choice(GAINS), rng.choice(LOSSES)
    if rng.random() < 0.5:
        first, events = Operation(a=a, sign="+", b=b), f"{gain} {b} more. Then {name} {loss} {c}"
        second = Operation(a=first.result, sign="-", b=c)
    else:
        first, events = Operation(a=a, sign="-", b=b), f"{loss} {b}. Then {name} {gain} {c} more"
        second = Operation(a=first.result, sign="+", b=c)
    return f"{name} has {a} {things} and {events}. How many {things} does {name} have now?", first, second


FAMILIES: dict[str, Callable[[random.Random], tuple]] = {
    "sum": _sum,
    "more": _more,
    "fewer": _fewer,
    "compare": _compare,
    "together": _together,
    "groups": _groups,
    "two_steps": _two_steps,
}
