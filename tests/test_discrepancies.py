"""The forty places where the writeup and the pinned tools differ, and the page that shows them."""

import yaml
from conftest import REPO

from tools.discrepancies import with_table

ENTRIES = yaml.safe_load((REPO / "data/discrepancies.yaml").read_text())
WRITTEN = yaml.safe_load((REPO / "tests/fixtures/writeup_commands.yaml").read_text())


def test_every_discrepancy_is_handled_in_a_file_that_is_there_or_says_why_it_stays():
    ids = [one["id"] for one in ENTRIES]
    assert ids == [f"P{n}" for n in range(1, 23)] + [f"M{n}" for n in range(1, 19)]
    for one in ENTRIES:
        assert ("handled" in one) != ("as_published" in one), one["id"]
        assert (REPO / one.get("handled", "README.md")).is_file(), one


def test_every_remark_about_a_line_of_the_writeup_is_a_discrepancy_of_the_table():
    ids = {one["id"] for one in ENTRIES}
    assert {remark for line in WRITTEN for remark in line.get("remarks", [])} - ids == set()


def test_the_page_shows_the_table_as_it_is_now():
    page = (REPO / "docs/writeup.md").read_text()
    assert with_table(page, ENTRIES) == page, "run: containers/run venv:tools python -m tools.discrepancies"
    assert page.count("\n| P") + page.count("\n| M") == 40
