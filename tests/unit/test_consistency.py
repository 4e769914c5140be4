"""Printed figures as intervals, and the checks of a printed table."""

import pickle

import pytest

from lib.claims.consistency import Printed, check, evaluate, printed_range, table_checks

TABLE = {
    "ttft_avg": Printed(14.0, "14.00"),
    "ttft_min": Printed(12.34, "12.34"),
    "ttft_max": Printed(17.17, "17.17"),
    "itl_avg": Printed(5.83, "5.83"),
    "itl_min": Printed(4.6, "4.60"),
    "itl_max": Printed(6.88, "6.88"),
    "latency_avg": Printed(1398.62, "1398.62"),
    "output_length_avg": Printed(240.0, "240.00"),
    "output_length_min": Printed(1.0, "1.00"),
    "output_length_max": Printed(338.0, "338.00"),
    "per_user_max": Printed(217.57, "217.57"),
    "per_user_min": Printed(145.32, "145.32"),
    "throughput": Printed(171.29, "171.29"),
    "requests_per_second": Printed(0.71, "0.71"),
    "requests": Printed(38.0, "38.00"),
    "users": 1,
}


def broken(**changes):
    """The cells of checks that fail when some cells are printed otherwise."""
    cells = TABLE | {name: Printed(float(text), text) for name, text in changes.items()}
    checks = [one for each in table_checks(cells, {}).values() for one in each]
    return {frozenset(one["cells"]) for one in checks if not one["holds"]}


def test_a_printed_figure_is_a_range_and_an_integer_exact():
    assert printed_range(Printed(0.5, "0.50")) == (0.495, 0.505)
    assert printed_range(83) == (83, 83)
    assert pickle.loads(pickle.dumps(Printed(0.5, "0.50"))).text == "0.50"


def test_the_tolerance_follows_from_the_rounding():
    figures = {"tokens": 83, "seconds": Printed(0.5, "0.50")}
    assert evaluate("tokens / seconds", figures) == (83 / 0.505, 83 / 0.495)
    assert check("equals", Printed(167.38, "167.38"), "tokens / seconds", figures, "rate")["holds"]
    assert not check("equals", Printed(168.38, "168.38"), "tokens / seconds", figures, "rate")["holds"]


@pytest.mark.parametrize(
    ("value", "kind", "holds"), [(9, "at_most", True), (11, "at_most", False), (9, "at_least", False)]
)
def test_a_bound_is_kept_or_broken(value, kind, holds):
    assert check(kind, value, "limit", {"limit": 10}, "limit")["holds"] is holds


def test_the_printed_table_breaks_no_check():
    assert broken() == set()


@pytest.mark.parametrize(
    ("changes", "cells"),
    [
        ({"throughput": "175.29"}, ("throughput", "requests_per_second", "output_length_avg")),
        ({"latency_avg": "1450.00"}, ("throughput", "users", "output_length_avg", "latency_avg")),
        ({"per_user_max": "218.57"}, ("per_user_max", "itl_min")),
        ({"ttft_min": "14.50"}, ("ttft_min", "ttft_avg")),
        ({"output_length_avg": "240.01"}, ("output_length_avg", "requests")),
    ],
)
def test_a_changed_cell_is_found_with_its_partner(changes, cells):
    assert frozenset(cells) in broken(**changes)


def test_a_figure_beyond_the_card_is_found():
    cells = TABLE | {"step_ms": 4.7}
    failed = [one["cells"] for one in table_checks(cells, {})["itl_min"] if not one["holds"]]
    assert ["itl_min", "step_ms"] in failed
