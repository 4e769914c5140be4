"""The Markdown tables of the result files and the docs."""

from lib.markdown import table


def test_no_cell_breaks_a_table():
    assert table(["name", "claims"], [["a|b", "1\n2"]], right=("claims",)).splitlines() == [
        "| name | claims |",
        "| --- | ---: |",
        "| a\\|b | 1<br>2 |",
    ]
