"""
Markdown tables of the result files and the docs.

Not tabulate: it escapes neither bars nor line ends, it pads every row of a column when one cell grows, and the
environment of the fine-tuning does not have it.
"""


def table(header, rows, right=()):
    """A Markdown table; the columns named in `right` are right-aligned. Bars and line ends may stand in any cell."""
    rule = ["---:" if name in right else "---" for name in header]
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(header), rule, *cells))
