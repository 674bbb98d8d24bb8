"""Verifies the arithmetic of GSM8K-Aug steps, and that each answer is the value of a step.

In the 500 published validation examples all 1,573 steps are exact, without rounding. A value with decimals may still
be off by half a unit of its last decimal here, so that `<<10/3=3.33>>` is right and `<<10/3=3.34>>` is not; a whole
number must be exact.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction

LAST = "value of the last step"
EARLIER = "value of an earlier step"
ABSENT = "not a value of any step"
NO_STEPS = "no steps"
NOT_EVALUABLE = "step not evaluable"
OUTCOMES = (LAST, EARLIER, ABSENT, NO_STEPS, NOT_EVALUABLE)

_STEP = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_BARE = re.compile(r"[+-]?[0-9.]+")
_DECIMALS = re.compile(r"-?[0-9]*\.([0-9]+)")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_PERCENT = re.compile(r"([0-9.]+)%(?=[-+*/)]|$)")
_ALLOWED = re.compile(r"[0-9.+\-*/%() ]+")
_LONGEST = 600  # characters; the longest published expression has 28, and each may nest the tree one deeper
_MOST_BITS = 4096  # of a power's numerator or denominator


@dataclass(frozen=True)
class Step:
    """`exact`: value of the expression; `written`: value after `=`; `bare`: the expression is a number alone."""

    exact: Fraction
    written: Fraction
    tolerance: Fraction
    bare: bool

    @property
    def holds(self) -> bool:
        return abs(self.exact - self.written) <= self.tolerance


@dataclass
class Report:
    """Counts over a file and record indices (from 0); `restated`: the answer comes from bare steps only."""

    records: int = 0
    steps: int = 0
    bare_steps: int = 0
    wrong_steps: list[tuple[int, str]] = field(default_factory=list)
    restated: list[int] = field(default_factory=list)
    outcomes: dict[str, list[int]] = field(default_factory=lambda: {outcome: [] for outcome in OUTCOMES})

    @property
    def holds(self) -> bool:
        return not (self.wrong_steps or self.outcomes[ABSENT] or self.outcomes[NOT_EVALUABLE])


def evaluate(expression: str) -> Fraction:
    """The exact value of numbers joined by `+ - * / % **` and parentheses.

    `$` and commas between thousands are ignored; `%` is a percentage unless a number or `(` follows.
    Raises ValueError for anything else, a division by zero and powers of more than 4,096 bits.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"an expression of {len(expression)} characters, at most {_LONGEST} are evaluated")
    text = _THOUSANDS.sub("", expression.replace("$", "")).strip()
    text = _PERCENT.sub(r"(\1/100)", text)
    if not _ALLOWED.fullmatch(text):
        raise ValueError(f"{expression!r} is not arithmetic")
    try:
        return _value(ast.parse(text, mode="eval").body, text)
    except ZeroDivisionError:
        raise ValueError(f"{expression!r} divides by zero") from None
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is not arithmetic") from None


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant():
            return Fraction(text[node.col_offset : node.end_col_offset])  # as written: 0.1 is a tenth
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, text)
        case ast.UnaryOp(op=ast.UAdd()):
            return _value(node.operand, text)
        case ast.BinOp():
            return _combine(node.op, _value(node.left, text), _value(node.right, text))
    raise ValueError(f"{text!r} has a {type(node).__name__}")


def _combine(operator: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    match operator:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.Mod():
            return left % right
        case ast.Pow():
            return _power(left, right)
    raise ValueError(f"operator {type(operator).__name__} is not evaluated")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("a power that is not whole is not evaluated")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent.numerator)
    if bits > _MOST_BITS:
        raise ValueError(f"a power of more than {_MOST_BITS} bits is not evaluated")
    return base**exponent.numerator


def read_step(step: str) -> Step:
    """Parse `<<expression=value>>`. Raises ValueError if it has another form or cannot be evaluated."""
    parts = _STEP.fullmatch(step)
    if not parts:
        raise ValueError(f"{step!r} is not of the form <<expression=value>>")
    expression, value = parts.groups()
    decimals = _DECIMALS.fullmatch(value)
    tolerance = Fraction(1, 2 * 10 ** len(decimals[1])) if decimals else Fraction(0)
    return Step(evaluate(expression), evaluate(value), tolerance, bool(_BARE.fullmatch(expression)))


def outcome_of(steps: list[Step], answer: str) -> str:
    """The source of the answer, one of OUTCOMES; numbers are compared by value (`5,000` is 5000)."""
    if not steps:
        return NO_STEPS
    try:
        value = evaluate(answer)
    except ValueError:
        return ABSENT
    if steps[-1].written == value:
        return LAST
    return EARLIER if any(step.written == value for step in steps) else ABSENT


def check(records: Iterable[dict]) -> Report:
    """Check every record with `steps` and `answer` in the format that `gsm8k.py convert` writes."""
    report = Report()
    for index, record in enumerate(records):
        report.records += 1
        report.steps += len(record["steps"])
        try:
            steps = [read_step(step) for step in record["steps"]]
        except ValueError as error:
            report.outcomes[NOT_EVALUABLE].append(index)
            report.wrong_steps.append((index, str(error)))
            continue
        report.bare_steps += sum(step.bare for step in steps)
        for text, step in zip(record["steps"], steps):
            if not step.holds:
                report.wrong_steps.append((index, f"{text} should be {_decimal(step.exact)}"))
        outcome = outcome_of(steps, record["answer"])
        report.outcomes[outcome].append(index)
        if outcome in (LAST, EARLIER):
            value = evaluate(record["answer"])
            if all(step.bare for step in steps if step.written == value):
                report.restated.append(index)
    return report


def _decimal(value: Fraction) -> str:
    try:
        return str(value.numerator) if value.denominator == 1 else f"{value} (about {float(value):.6g})"
    except (OverflowError, ValueError):  # beyond a float's range, or beyond the digits Python writes
        return f"a number of about 10^{(value.numerator.bit_length() - value.denominator.bit_length()) * 0.30103:.0f}"


def lines(report: Report, most: int | None) -> Iterable[str]:
    """The report as lines of text; each list of indices is truncated to `most` (None: all)."""
    yield f"{'records':>26}  {report.records:,}"
    yield f"{'steps':>26}  {report.steps:,}"
    yield f"{'that are only a number':>26}  {report.bare_steps:,}"
    yield f"{'wrong or not evaluable':>26}  {len(report.wrong_steps):,}"
    for index, problem in report.wrong_steps[:most]:
        yield f"{'':28}record {index}: {problem}"
    if most is not None and len(report.wrong_steps) > most:
        yield f"{'':28}and {len(report.wrong_steps) - most:,} more"
    yield "answer:"
    for outcome, indices in report.outcomes.items():
        share = len(indices) / max(report.records, 1)
        yield f"{outcome:>26}  {len(indices):,} ({share:.1%}){'' if outcome == LAST else _named(indices, most)}"
    yield f"{'only restated by a step':>26}  {len(report.restated):,}{_named(report.restated, most)}"


def _named(indices: list[int], most: int | None) -> str:
    if not indices:
        return ""
    left = 0 if most is None else max(len(indices) - most, 0)
    named = ", ".join(map(str, indices[:most]))
    return f": records {named}{f' and {left:,} more' if left else ''}"
