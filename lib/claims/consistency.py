"""
Whether printed figures agree with each other and with what the card can do.

A printed figure is an interval: 0.71 is anything from 0.705 to 0.715. A check compares the interval of a claim with
that of an expression over other printed figures, so its tolerance follows from the rounding alone.
"""

import ast
from itertools import pairwise, product

KINDS = ("equals", "at_most", "at_least", "holds")
COLUMNS = ("min", "p75", "p90", "p99", "max")
# Checks of a genai-perf table: the cell, the kind, the expression, the law in words.
TABLE_RULES = [
    ("throughput", "equals", "requests_per_second * output_length_avg", "tokens/s = requests/s x tokens a request"),
    ("throughput", "at_most", "users * output_length_avg * 1000 / latency_avg",
     "Little's law: users = requests/s x latency"),
    ("throughput", "at_most", "users * per_user_max", "all users together are at most users x the fastest user"),
    ("latency_avg", "equals", "ttft_avg + (output_length_avg - 1) * itl_avg",
     "latency = first token + (tokens - 1) x ITL"),
    ("per_user_max", "equals", "1000 / itl_min", "the fastest user = 1 / the shortest ITL"),
    ("per_user_min", "equals", "1000 / itl_max", "the slowest user = 1 / the longest ITL"),
    ("per_user_avg", "at_least", "1000 / itl_avg", "a mean of 1 / ITL is at least 1 / the mean ITL"),
    ("itl_min", "at_least", "step_ms", "a token takes at least what the card needs to read the weights"),
    ("ttst_min", "at_least", "step_ms", "a token takes at least what the card needs to read the weights"),
    ("ttft_min", "at_least", "prompt_ms", "the first token takes at least what the card needs for the prompt"),
    ("per_user_max", "at_most", "1000 / step_ms", "no user is faster than the card reads the weights"),
    ("throughput", "at_most", "card_tokens_per_second", "the card's own limit for this load"),
    *((f"latency_{column}", "at_least", f"ttft_{column}", "the whole answer takes at least its first token")
      for column in ("avg", *COLUMNS)),
]  # fmt: skip
# A mean of products differs from the product of means, at most by a quarter of both ranges (Popoviciu's inequality).
SPREAD = {"latency_avg": "(itl_max - itl_min) * (output_length_max - output_length_min) / 4"}


class Printed(float):
    """A number with the text that it was printed as: 0.50 keeps its last digit."""

    def __new__(cls, value, text):
        printed = super().__new__(cls, value)
        printed.text = text
        return printed

    def __reduce__(self):
        return Printed, (float(self), self.text)


def decimals(value):
    """Digits after the point, as printed."""
    return len(value.text.partition(".")[2]) if isinstance(value, Printed) else 0


def printed_range(value):
    """The range of a printed figure: half of its last digit up or down; an integer is exact."""
    half = 0.5 * 10 ** -decimals(value) if isinstance(value, Printed) else 0.0
    return value - half, value + half


def evaluate(expression, figures):
    """(lowest, highest) value of an expression over figures; each is monotone in every figure, so corners suffice."""
    names = [name for name in identifiers(expression) if name in figures]
    code = compile(expression, "check", "eval")
    values = [
        eval(code, {"__builtins__": {}}, dict(zip(names, corner, strict=True)))
        for corner in product(*(printed_range(figures[name]) for name in names))
    ]
    return min(values), max(values)


def check(kind, value, expression, figures, rule, spread=0.0):
    """{rule, expected, residual, allowed, holds} of one figure; residual is relative to what is expected.

    value: the printed figure; None for kind "holds", whose expression is a comparison.
    """
    low, high = evaluate(expression, figures)
    if kind == "holds":
        return {"rule": rule, "expected": None, "residual": None, "allowed": None, "holds": bool(low)}
    expected = (low + high) / 2
    least, most = printed_range(value)
    holds = {
        "equals": low - spread <= most and least <= high + spread,
        "at_most": least <= high,
        "at_least": most >= low,
    }[kind]
    allowed = (most - least) / 2 + (high - low) / 2 + spread if kind == "equals" else None
    return {
        "rule": rule,
        "expected": expected,
        "residual": value / expected - 1,
        "allowed": allowed and allowed / expected,
        "bound": kind != "equals",
        "spread": spread,
        "holds": holds,
    }


def text(value):
    """A figure with the digits that were printed, or two of a computed one."""
    if isinstance(value, Printed):
        return f"{value:,.{decimals(value)}f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 100 else f"{value:,.2f}"


def describe(result, value, unit):
    """A check in words: the printed figure beside the expected one."""
    if result["expected"] is None:
        return f"{result['rule']}: {'holds' if result['holds'] else 'does not hold'}"
    beside = f"{text(value)} beside {text(result['expected'])} {unit}".strip()
    if result["bound"]:
        return f"{result['rule']}: {beside}, {1 + result['residual']:.0%}"
    cause = "unequal lengths and rounding allow" if result["spread"] else "rounding allows"
    return f"{result['rule']}: {beside}, {result['residual']:+.2%} ({cause} {result['allowed']:.2%})"


def table_checks(cells, units):
    """{cell: [check]} of one genai-perf table; cells: {name: value}, with users and the card's limits among them."""
    checks = {cell: [] for cell in cells}
    cells = cells | {name: int(cells[name]) for name in ("requests",) if name in cells}  # a count is exact
    for cell, kind, expression, rule in [*TABLE_RULES, *wholes(cells)]:
        names = identifiers(expression)
        if {cell, *names} <= cells.keys():
            spread = evaluate(SPREAD[cell], cells)[1] if kind == "equals" and cell in SPREAD else 0.0
            result = check(kind, cells[cell], expression, cells, rule, spread)
            add(checks, [cell, *names], {**result, "says": describe(result, cells[cell], units.get(cell, ""))})
    for less, more, row in orders(cells):
        result = check("at_most", cells[less], more, cells, "ordered")
        names = [f"{row}_{column}" for column in COLUMNS if f"{row}_{column}" in cells]
        whole = "ordered: " + " <= ".join(text(cells[name]) for name in names)
        pair = f"out of order: {less} {text(cells[less])}, {more} {text(cells[more])}"
        add(checks, [less, more], {**result, "says": whole if result["holds"] else pair})
    return checks


def add(checks, cells, result):
    """Note a check under every cell that it reads."""
    for cell in cells:
        checks[cell].append({**result, "cells": cells})


def identifiers(expression):
    """The names in an expression, each once."""
    return list(dict.fromkeys(node.id for node in ast.walk(ast.parse(expression)) if isinstance(node, ast.Name)))


def orders(cells):
    """(smaller cell, larger cell, row): each percentile is at most the next, the mean between minimum and maximum."""
    for row in sorted({cell.removesuffix("_min") for cell in cells if cell.endswith("_min")}):
        for less, more in (*pairwise(COLUMNS), ("min", "avg"), ("avg", "max")):
            if {f"{row}_{less}", f"{row}_{more}"} <= cells.keys():
                yield f"{row}_{less}", f"{row}_{more}", row


def wholes(cells):
    """The tokens of all requests are a whole number."""
    for row in ("input_length", "output_length"):
        if f"{row}_avg" in cells and "requests" in cells:
            total = round(cells[f"{row}_avg"] * cells["requests"])
            yield f"{row}_avg", "equals", f"{total} / requests", "the tokens of all requests are a whole number"
