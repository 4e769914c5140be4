"""
The claims page: every claim as a row that a small script (data/report/claims.js) searches, filters and sorts. Without
the script all rows show.
"""

import html
from collections import Counter

from lib.claims.kinds import EVIDENCE, VERDICTS
from lib.report.overview import measured, why, writeup_blocks
from lib.report.page import html_blocks, html_cell, inline

SORTS = {"place": "place in the writeup", "verdictRank": "verdict", "evidenceRank": "evidence", "says": "text"}


def claims_body(ledger, script):
    """The page between its head and its end."""
    claims = ledger["claims"]
    rows = "\n".join(claim_row(place, claim) for place, claim in enumerate(claims))
    abouts = "".join(html_blocks(writeup_blocks(writeup), VERDICTS) for writeup in ledger["writeups"])
    return (
        f'<p id="count" aria-live="polite">{len(claims)} claims</p>\n{controls(claims)}\n'
        f'<table id="claims"><tbody>\n{rows}</tbody></table>\n'
        f"<h2>The writeups</h2>\n{abouts}\n<script>\n{script}</script>"
    )


def controls(claims):
    """The search box, a filter each for writeup, verdict and evidence, and the order."""
    parts = ['<label>search <input type="search" id="search" placeholder="vLLM tokens/s"/></label>']
    for key, order in (("writeup", None), ("verdict", VERDICTS), ("evidence", EVIDENCE)):
        counts = Counter(claim[key] for claim in claims)
        options = [(name, f"{name} ({counts[name]})") for name in order or counts if counts[name]]
        parts.append(select(key, key, [("", "all"), *options]))
    return f'<form class="controls">{"".join(parts)}{select("sort", "sort by", SORTS.items())}</form>'


def select(name, label, options):
    inner = "".join(f'<option value="{html.escape(value, quote=True)}">{inline(text)}</option>'
                    for value, text in options)  # fmt: skip
    return f'<label>{label} <select id="{name}">{inner}</select></label>'


def claim_row(place, claim):
    """A claim: verdict, text with its figures, and the reasons folded."""
    data = {
        "place": place,
        "writeup": claim["writeup"],
        "verdict": claim["verdict"],
        "evidence": claim["evidence"],
        "verdict-rank": list(VERDICTS).index(claim["verdict"]),
        "evidence-rank": list(EVIDENCE).index(claim["evidence"]),
        "says": claim["says"],
    }
    attributes = " ".join(f'data-{key}="{html.escape(str(value), quote=True)}"' for key, value in data.items())
    name = html.escape(f"claim-{claim['id']}", quote=True)
    figures = f"published {claim['published']}; measured {measured(claim)}" if claim["published"] != "—" else ""
    return (
        f'<tr id="{name}" {attributes}>{html_cell(claim["verdict"], "", VERDICTS)}<td><p>{inline(claim["says"])} '
        f'<a class="here" href="#{name}" title="link to this claim">#</a></p><p class="soft">{inline(figures)}</p>'
        f"<details><summary>why: {inline(claim['evidence'])}</summary><p><code>{inline(claim['id'])}</code> "
        f"({inline(claim['writeup'])}, {inline(claim['section'])})</p><p>{inline(why(claim))}</p></details></td></tr>"
    )
