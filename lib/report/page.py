"""
A report as a list of blocks, written as one HTML page and as its Markdown twin: the same content in the same order.

A block is ("heading", level, text), ("text", text), ("link", text, address), ("table", header, rows),
("figure", name, drawn, alt), or ("fold", summary, blocks), which a reader opens. `code` in back quotes is the only
markup inside text.
"""

import html
import re

NUMBER = re.compile(r"[-+−]?[\d,.]+( ?[^\s\d]\S*)?")
# What no text file may hold: it would end the page for some readers.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
LONG = 60  # letters of a cell that needs room


class Grey(list):
    """A row of a table that does not count."""


def to_html(title, style, blocks, badges, links=None):
    """The page; `badges` are cell texts that get a coloured mark (the verdicts).

    links: [(text, address)] above the page; without them, its own headings of level 2.
    """
    own = [(b[2], f"#{anchor(b[2])}") for b in blocks if b[0] == "heading" and b[1] == 2]
    return frame(title, style, own if links is None else links, html_blocks(blocks, badges))


def html_blocks(blocks, badges):
    return "\n".join(html_block(block, badges) for block in blocks)


def frame(title, style, links, body):
    """A whole HTML page around `body`; links: [(text, address)], the page's own with address None."""
    shown = "".join(html_link(text, address) if address else f"<b>{inline(text)}</b>" for text, address in links)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{html.escape(title)}</title><style>\n{style}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1><nav>{shown}</nav>\n{body}\n</body></html>\n"
    )


def html_link(text, address):
    return f'<a href="{html.escape(address, quote=True)}">{inline(text)}</a>'


def html_block(block, badges):
    """One block as HTML."""
    kind, *parts = block
    if kind == "heading":
        level, text = parts
        return f'<h{level} id="{anchor(text)}">{inline(text)}</h{level}>'
    if kind == "text":
        return f"<p>{inline(parts[0])}</p>"
    if kind == "link":
        return f"<p>{html_link(*parts)}</p>"
    if kind == "table":
        return html_table(*parts, badges)
    if kind == "figure":
        _, drawn, alt = parts
        named = drawn.svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt, quote=True)}"', 1)
        return f"<figure>{named}<figcaption>{inline(alt)}</figcaption></figure>"
    summary, inner = parts
    return f"<details><summary>{inline(summary)}</summary>\n{html_blocks(inner, badges)}</details>"


def html_table(header, rows, badges):
    """A table in a box of its own that scrolls, so that a phone's page stays as wide as the phone; where two columns
    hold sentences, a phone shows the cells of a row below each other, each with its heading."""
    kinds = ["number" if right else "" for right in numeric(header, rows)]
    head = "".join(f'<th class="{kind}">{inline(cell)}</th>' for cell, kind in zip(header, kinds, strict=True))
    lines = "\n".join(
        ('<tr class="grey">' if isinstance(row, Grey) else "<tr>")
        + "".join(html_cell(cell, kind, badges, name) for cell, kind, name in zip(row, kinds, header, strict=True))
        + "</tr>"
        for row in rows
    )
    prose = sum(any(len(row[n]) > LONG for row in rows) for n in range(len(header))) > 1
    name = ' class="prose"' if prose else ""
    return f'<div class="scroll"><table{name}><thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table></div>'


def html_cell(text, kind, badges, heading=""):
    """One table cell: a verdict gets its mark, long text gets room."""
    named = f' data-heading="{html.escape(heading, quote=True)}"' if heading else ""
    if text in badges:
        return f'<td{named}><span class="verdict {text.replace(" ", "-")}">{inline(text)}</span></td>'
    kind = kind or ("long" if len(text) > LONG else "text" if len(text) > 20 else "short")
    return f'<td class="{kind}"{named}>{inline(text)}</td>'


def numeric(header, rows):
    """For each column, whether it holds nothing but numbers (with a unit, or a dash for none)."""
    return [bool(rows) and all(row[n] == "—" or NUMBER.fullmatch(row[n]) for row in rows) for n in range(len(header))]


def inline(text):
    """Text made safe for HTML; back quotes become code, line ends breaks."""
    safe = html.escape(CONTROL.sub("\ufffd", text))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", safe).replace("\n", "<br/>")


def anchor(text):
    """The id of a heading."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def to_markdown(title, blocks):
    """The same blocks as Markdown; figures are links to NAME.svg beside it."""
    return f"# {title}\n\n" + "\n".join(markdown_block(block) for block in blocks)


def markdown_block(block):
    """One block as Markdown, with an empty line after it."""
    kind, *parts = block
    if kind == "heading":
        return f"{'#' * parts[0]} {plain(parts[1])}\n"
    if kind == "text":
        return plain(parts[0]) + "\n"
    if kind == "link":
        return f"[{plain(parts[0])}]({parts[1]})\n"
    if kind == "table":
        return markdown_table(*parts)
    if kind == "figure":
        return f"![{plain(parts[2])}]({parts[0]}.svg)\n"
    summary, inner = parts
    return f"**{plain(summary)}**\n\n" + "\n".join(markdown_block(b) for b in inner)


def markdown_table(header, rows):
    """A table; a column of numbers stands right."""
    rule = ["---:" if right else "---" for right in numeric(header, rows)]
    cells = [[plain(cell).replace("|", "\\|") for cell in line] for line in (header, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (cells[0], rule, *cells[1:])) + "\n"


def plain(text):
    """Text that Markdown shows as it is: no tags, links, pictures or emphasis; line ends become breaks."""
    parts = re.split(r"(`[^`]+`)", CONTROL.sub("\ufffd", text))
    safe = [re.sub(r"([\\*\[\]`])", r"\\\1", html.escape(part, quote=False)) for part in parts]
    safe[1::2] = parts[1::2]  # code stays as it is
    return "".join(safe).replace("\n", "<br>")
