"""
The generated tables of README.md, README.ja.md and docs/, each between its two marks, such as <!-- results:begin -->
and <!-- results:end -->: python -m tools.pages

in:   results/<profile>/claims/claims.json, data/discrepancies.yaml, data/then_and_now.yaml, data/ja.yaml
Verdicts are those by the reference runs and by arithmetic alone: the same in every checkout.
"""

import re
from collections import Counter
from pathlib import Path

from lib.claims.format import VERDICTS
from lib.claims.judge import rank
from lib.core.stage import UserError, load_yaml, read_json, results, run
from lib.report.overview import HEADLINES, measured

MARK = re.compile(r"<!-- [\w-]+:(?:begin|end) -->")
BLOCK = re.compile(r"(<!-- ([\w-]+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)
# What no run of ours answers stands folded below what one does.
FOLDED = ("not comparable", "not measured")


def table(header, rule, rows):
    """Markdown; cells are our own Markdown already."""
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *cells))


def public(claim):
    """A claim with its best outcome by a reference run or by arithmetic."""
    outcomes = [one for one in claim["outcomes"] if one["run"] and not one["run"].startswith("this checkout")]
    reason = "no reference run has it" if claim["measure"] else "no stage measures it"
    nothing = {"run": None, "verdict": "not measured", "measured": None, "reason": reason}
    best = min(outcomes, key=rank, default=nothing)
    if claim["contradiction"]:
        return {**claim, **best, "verdict": claim["verdict"], "reason": claim["contradiction"]}
    return {**claim, **best}


def headlines(claims):
    rows = [
        [c["says"], c["published"], measured(c), c["verdict"] + otherwise(c)] for c in claims if c["id"] in HEADLINES
    ]
    return table(["claim", "published", "measured", "verdict"], ["---", "---:", "---:", "---"], rows)


def otherwise(claim):
    """The conditions of a figure that are not the claim's: without them a reader would compare it all the same."""
    shown = claim["verdict"] == "not comparable" and claim["measured"] is not None
    return ": " + ", ".join(claim["apart"]) if shown else ""


def headlines_in(words, claims):
    """The same with another language's words: {header, claims, units, runs, verdicts}; a unit without one stays."""
    rows = []
    for claim in (claim for claim in claims if claim["id"] in HEADLINES):
        figure, _, unit = claim["published"].partition(" ")
        shown = f"{figure} {words['units'].get(unit, unit)}".strip()
        got = measured({**claim, "run": words["runs"].get(claim["run"], claim["run"])})
        verdict = words["verdicts"][claim["verdict"]] + otherwise(claim)
        rows.append([words["claims"][claim["id"]], shown, got, verdict])
    return table(words["header"], ["---", "---:", "---:", "---"], rows)


def of_writeup(claims):
    """Every claim of a writeup with its verdict, the reason and the note; what no run answers is folded."""
    counts = Counter(claim["verdict"] for claim in claims)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    header, rule = ["claim", "published", "measured", "verdict", "why"], ["---", "---:", "---:", "---", "---"]

    def rows(verdicts):
        return [
            [c["says"], c["published"], measured(c), c["verdict"], "\n".join(filter(None, (c["reason"], c["note"])))]
            for c in claims
            if c["verdict"] in verdicts
        ]

    parts = [f"{len(claims)} claims: {summary}."]
    if answered := rows(set(VERDICTS) - set(FOLDED)):
        parts.append(table(header, rule, answered))
    for verdict in FOLDED:
        if counts[verdict]:
            fold = f"<details><summary>{counts[verdict]} {verdict}</summary>"
            parts += [fold, table(header, rule, rows({verdict})), "</details>"]
    return "\n\n".join(parts)


def then_and_now(steps):
    """A writeup's own commands beside those of the pinned versions, and what runs them here."""
    rows = [[one["step"], code(one["then"]), code(one["now"]), one["here"]] for one in steps]
    return table(["step", "as published", "in the pinned versions", "here"], ["---"] * 4, rows)


def code(lines):
    return "\n".join(f"`{line}`" for line in lines.strip().splitlines()) if lines else "—"


def discrepancies(entries):
    """A row an entry; what is handled links to the file that does it."""
    rows = []
    for one in entries:
        file = one.get("handled")
        here = f"[{file}](../{file})" if file else f"as published: {one['as_published']}"
        rows.append([one["id"], one["writeup"], one["finding"], here])
    return table(["", "in the writeup", "what the pinned versions do", "here"], ["---"] * 4, rows)


def tables(ledger):
    """{name: Markdown} of every table that a page may hold."""
    claims = [public(claim) for claim in ledger["claims"]]
    found = {
        "results": headlines(claims),
        "results-ja": headlines_in(load_yaml("data/ja.yaml"), claims),
        "discrepancies": discrepancies(load_yaml("data/discrepancies.yaml")),
    }
    for writeup, steps in load_yaml("data/then_and_now.yaml").items():
        found[f"commands-{writeup}"] = then_and_now(steps)
    for writeup in ledger["writeups"]:
        found[f"claims-{writeup['id']}"] = of_writeup([c for c in claims if c["writeup"] == writeup["id"]])
    return found


def filled(text, made, where):
    """The page with every table anew; UserError for marks that do not pair up or name no table."""
    blocks = BLOCK.findall(text)
    if len(MARK.findall(text)) != 2 * len(blocks):
        raise UserError(f"{where}: want the marks <!-- NAME:begin --> and <!-- NAME:end --> in pairs, in this order")
    if unknown := [name for _, name, _ in blocks if name not in made]:
        raise UserError(f"{where}: there is no table {unknown[0]!r}; there are {', '.join(made)}")
    return BLOCK.sub(lambda block: f"{block[1]}{made[block[2]]}\n{block[3]}", text)


def pages():
    return [Path("README.md"), Path("README.ja.md"), *sorted(Path("docs").glob("*.md"))]


def main():
    made = tables(read_json(results("claims") / "claims.json"))
    texts = {path: filled(path.read_text(), made, path) for path in pages()}
    shown = {name for text in texts.values() for _, name, _ in BLOCK.findall(text)}
    if missing := [name for name in made if name not in shown]:
        raise UserError(f"no page has the marks of the table {missing[0]!r}; put them back where it belongs")
    for path, text in texts.items():
        path.write_text(text)


if __name__ == "__main__":
    run(main)
