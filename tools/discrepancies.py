"""
The table of discrepancies in docs/writeup.md, written from data/discrepancies.yaml: python -m tools.discrepancies
"""

from pathlib import Path

from stages.stage import load_yaml, run

DATA, PAGE = Path("data/discrepancies.yaml"), Path("docs/writeup.md")
MARKS = ("<!-- discrepancies:begin -->", "<!-- discrepancies:end -->")


def table(entries):
    """Markdown, a row an entry; what is handled links to the file that does it."""
    rows = ["| | in the writeup | what the pinned versions do | here |", "|---|---|---|---|"]
    for one in entries:
        here = (
            f"[{one['handled']}](../{one['handled']})" if "handled" in one else f"as published: {one['as_published']}"
        )
        rows.append(f"| {one['id']} | {one['writeup']} | {one['finding']} | {here} |")
    return "\n".join(rows)


def with_table(text, entries):
    """The page with the table between its two marks."""
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{table(entries)}\n{MARKS[1]}{after}"


def main():
    PAGE.write_text(with_table(PAGE.read_text(), load_yaml(DATA)))


if __name__ == "__main__":
    run(main)
