"""The answers in texts: what stands behind a marker, and the number that a worked solution comes to."""

import re
from fractions import Fraction

_LONGEST = 100  # characters of a number; longer ones are no answers, and slow to convert

# A minus is a sign where nothing stands before it that could be subtracted from. The digits are ASCII's.
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-\u2212])?(?:[$€£¥₹][ ]?(?P<inner>[-\u2212])?)?(?:"
    rf"(?<!/)(?:(?P<units>{_WHOLE})[ ])?(?P<over>{_WHOLE})[ ]?/[ ]?(?P<under>{_WHOLE})(?![0-9]*[./][0-9])"
    rf"|(?P<decimal>{_WHOLE}(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+))"
)
_BOXED = re.compile(r"\\boxed\s*\{")
_LATEX_FRACTION = re.compile(r"(?P<before>[0-9]\s?)?\\[dt]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")


def behind(text: str, marker: str | None) -> str | None:
    """What follows the last marker; None where there is none."""
    if marker is None:
        return text
    _, found, rest = text.rpartition(marker)
    return rest if found else None


def answered_number(text: str) -> Fraction | None:
    """The number that a worked answer comes to: the first one in its marked part, or without one the last in it."""
    marked = _marked(text)
    behind_equals = _numbers(marked.rpartition("=")[2]) if marked else []
    found = _numbers(text)[-1:] if marked is None else behind_equals or _numbers(marked)
    return _value(found[0]) if found else None


def reference_number(text: str) -> Fraction | None:
    """The number in the marked part of a text, or the only one in it; None where it has none or several."""
    if _marked(text) is not None:
        return answered_number(text)
    found = _numbers(text)
    return _value(found[0]) if len(found) == 1 else None


def _value(match: re.Match[str]) -> Fraction | None:
    """The number that was found; None where it is too long, or has no value."""
    if len(match[0]) > _LONGEST:
        return None
    units, over, under, decimal = (
        Fraction((match[name] or "0").replace(",", "")) for name in ("units", "over", "under", "decimal")
    )
    if match["under"] and not under:
        return None
    value = units + over / under if under else decimal
    return -value if match["sign"] or match["inner"] else value


def _numbers(text: str) -> list[re.Match[str]]:
    return list(_NUMBER.finditer(_plain(text)))


def _plain(text: str) -> str:
    """The text with LaTeX's ways to write numbers replaced by plain ones."""
    for latex, plain in (("{,}", ","), (r"\!", ""), (r"\,", ""), (r"\$", "$"), (r"\%", "%")):
        text = text.replace(latex, plain)

    def fraction(match: re.Match[str]) -> str:
        before = match["before"]
        return (before.rstrip() + " " if before else "") + f"{match[2] or match[3]}/{match[4] or match[5]}"

    return _LATEX_FRACTION.sub(fraction, text)


def _marked(text: str) -> str | None:
    """The part of an answer that is marked as its result: the line behind `####`, or the last box."""
    if (rest := behind(text, "####")) is not None:
        return rest.strip().partition("\n")[0]
    boxes = list(_BOXED.finditer(text))
    return _inside(text, boxes[-1].end()) if boxes else None


def _inside(text: str, start: int) -> str:
    """What stands from `start` to the brace that closes the one before it; nothing where it is not closed."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return ""
