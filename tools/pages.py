"""
The generated tables of README.md, README.ja.md and docs/, each between its two marks, such as <!-- results:begin -->
and <!-- results:end -->, README.md's figure, and docs/verdicts.csv: python -m tools.pages

in:   results/<profile>/claims/claims.json, data/{discrepancies,then_and_now,writeup_chapters,ja}.yaml,
      results/<profile>/report/answer-comparison.svg, drawn from reference runs alone
It prints the verdicts of this checkout that are not those of the last commit (tools/moved.py).
Verdicts are those by the reference runs and by arithmetic alone: the same in every checkout.
"""

import re
import shutil
from collections import Counter
from pathlib import Path

from lib.claims.kinds import EVIDENCE, UNANSWERED, VERDICTS, rank
from lib.core.stage import UserError, load_yaml, read_json, results, run
from lib.markdown import table
from lib.report.overview import HEADLINES, measured
from tools import moved

FIGURE = "answer-comparison.svg"
MARK = re.compile(r"<!-- [\w-]+:(?:begin|end) -->")
BLOCK = re.compile(r"(<!-- ([\w-]+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)


def public(claim):
    """A claim with its best outcome by a reference run or by arithmetic."""
    outcomes = [
        outcome for outcome in claim["outcomes"] if outcome["run"] and not outcome["run"].startswith("this checkout")
    ]
    reason = "no reference run has it" if claim["measure"] else "no stage measures it"
    nothing = {"run": None, "verdict": "not measured", "measured": None, "evidence": "none", "reason": reason}
    best = min(outcomes, key=rank, default=nothing)
    if claim["contradiction"]:
        shown = {"verdict": claim["verdict"], "evidence": claim["evidence"], "reason": claim["contradiction"]}
        return {**claim, **best, **shown}
    return {**claim, **best}


def headlines(claims):
    rows = [
        [c["says"], c["published"], measured(c), c["verdict"] + otherwise(c), c["evidence"]]
        for c in claims
        if c["id"] in HEADLINES
    ]
    header = ["claim", "published", "measured", "verdict", "evidence"]
    return table(header, rows, right=("published", "measured"))


def otherwise(claim):
    """The conditions of a figure that are not the claim's: without them a reader would compare it all the same."""
    shown = claim["verdict"] == "not comparable" and claim["measured"] is not None
    return ": " + ", ".join(claim["unmet"]) if shown else ""


def headlines_in(words, claims):
    """The same in another language: {header, claims, units, runs, verdicts, evidence}; a unit without a word stays."""
    rows = []
    for claim in (claim for claim in claims if claim["id"] in HEADLINES):
        figure, _, unit = claim["published"].partition(" ")
        shown = f"{figure} {words['units'].get(unit, unit)}".strip()
        got = measured({**claim, "run": words["runs"].get(claim["run"], claim["run"])}, words["evidence"]["estimated"])
        verdict = words["verdicts"][claim["verdict"]] + otherwise(claim)
        rows.append([words["claims"][claim["id"]], shown, got, verdict, words["evidence"][claim["evidence"]]])
    return table(words["header"], rows, right=words["header"][1:3])


def summary(claims):
    """How many claims have which verdict, in the order of the kinds."""
    counts = Counter(claim["verdict"] for claim in claims)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])


def of_writeup(claims):
    """Every claim of a writeup by section, with its conditions, verdict, evidence and reason; printed tables folded."""
    header, right = ["claim", "published", "measured", "verdict", "evidence", "why"], ("published", "measured")
    parts = [f"{len(claims)} claims: {summary(claims)}."]
    for section in dict.fromkeys(claim["section"] for claim in claims):
        for cells in (False, True):
            part = [c for c in claims if c["section"] == section and bool(c["table"]) == cells]
            if part:
                name = f"{section}, the printed tables" if cells else section
                fold = f"<details><summary>{name}: {summary(part)}</summary>"
                parts += [fold, table(header, [claim_row(claim) for claim in part], right), "</details>"]
    return "\n\n".join(parts)


def claim_row(claim):
    """A claim as a row: its text and conditions, and the reason of its verdict."""
    says = [claim["says"], f"({claim['conditions']})", claim["inferred"] and f"Inferred: {claim['inferred']}."]
    command = claim["verdict"] in UNANSWERED and claim["command"] and f"Command: `{claim['command']}`"
    why = [claim["reason"], command, claim["note"]]
    cells = [claim["published"], measured(claim), claim["verdict"], claim["evidence"]]
    return ["\n".join(filter(None, says)), *cells, "\n".join(filter(None, why))]


def kinds(claims):
    """The meaning of each verdict and each evidence, and how many claims have it."""
    verdicts = Counter(claim["verdict"] for claim in claims)
    evidence = Counter(claim["evidence"] for claim in claims)
    verdict_rows = [[name, says, str(verdicts[name])] for name, says in VERDICTS.items()]
    evidence_rows = [[name, says, str(evidence[name])] for name, says in EVIDENCE.items()]
    return "\n\n".join(
        [
            table(["verdict", "meaning", "claims"], verdict_rows, right=("claims",)),
            table(["evidence", "meaning", "claims"], evidence_rows, right=("claims",)),
        ]
    )


def unanswered(claims):
    """The claims without an answer, each with the command that gives it."""
    rows = [[c["says"], c["verdict"], f"`{c['command']}`"] for c in claims if c["verdict"] in UNANSWERED]
    asked = sum(claim["verdict"] != "opinion" for claim in claims)
    return f"{len(rows)} of {asked} claims that a run or a source can decide have no answer.\n\n" + table(
        ["claim", "verdict", "command that answers it"], rows
    )


def then_and_now(steps):
    """A writeup's own commands beside those of the pinned versions, and what runs them here."""
    rows = [[step["step"], code(step["then"]), code(step["now"]), step["here"]] for step in steps]
    return table(["step", "as published", "in the pinned versions", "here"], rows)


def code(lines):
    return "\n".join(f"`{line}`" for line in lines.strip().splitlines()) if lines else "—"


def discrepancies(entries):
    """A row an entry, with a link to the file that handles it."""
    rows = []
    for entry in entries:
        file = entry.get("handled")
        here = f"[{file}](../{file})" if file else f"as published: {entry['as_published']}"
        rows.append([entry["id"], entry["writeup"], entry["finding"], here])
    return table(["", "in the writeup", "what the pinned versions do", "here"], rows)


def chapters(entries, claims):
    """A row a chapter of the main writeup: its claims, the commands that run it, and what they leave out."""
    counts = Counter(claim["section"] for claim in claims if claim["writeup"] == "fixstars")
    rows = []
    for entry in entries:
        commands = "\n".join(f"`{command}`" for command in entry["commands"])
        stages = ", ".join(f"`{stage}`" for stage in entry["stages"])
        claimed = str(counts[entry["section"]])
        rows.append([entry["section"], claimed, commands, stages, entry["minutes"], entry["leaves_out"]])
    header = ["chapter", "claims", "command", "stages", "minutes, estimated", "left out"]
    return table(header, rows, right=("claims",))


def tables(settled):
    """{name: Markdown} of every table that a page may hold."""
    claims = [public(claim) for claim in settled["claims"]]
    by_name = {
        "results": headlines(claims),
        "results-ja": headlines_in(load_yaml("data/ja.yaml"), claims),
        "kinds": kinds(claims),
        "unanswered": unanswered(claims),
        "chapters": chapters(load_yaml("data/writeup_chapters.yaml"), claims),
        "discrepancies": discrepancies(load_yaml("data/discrepancies.yaml")),
    }
    for writeup, steps in load_yaml("data/then_and_now.yaml").items():
        by_name[f"commands-{writeup}"] = then_and_now(steps)
    for writeup in settled["writeups"]:
        by_name[f"claims-{writeup['id']}"] = of_writeup([c for c in claims if c["writeup"] == writeup["id"]])
    return by_name


def fill_page(text, contents, where):
    """The page with every table anew; UserError for marks that do not pair up or name no table."""
    blocks = BLOCK.findall(text)
    if len(MARK.findall(text)) != 2 * len(blocks):
        raise UserError(f"{where}: want the marks <!-- NAME:begin --> and <!-- NAME:end --> in pairs, in this order")
    if unknown := [name for _, name, _ in blocks if name not in contents]:
        raise UserError(f"{where}: there is no table {unknown[0]!r}; there are {', '.join(contents)}")
    return BLOCK.sub(lambda block: f"{block[1]}{contents[block[2]]}\n{block[3]}", text)


def pages():
    return [Path("README.md"), Path("README.ja.md"), *sorted(Path("docs").glob("*.md"))]


def main():
    settled = read_json(results("claims") / "claims.json")
    contents = tables(settled)
    texts = {path: fill_page(path.read_text(), contents, path) for path in pages()}
    shown = {name for text in texts.values() for _, name, _ in BLOCK.findall(text)}
    if missing := [name for name in contents if name not in shown]:
        raise UserError(f"no page has the marks of the table {missing[0]!r}; put them back where it belongs")
    for path, text in texts.items():
        path.write_text(text)
    shutil.copyfile(results("report") / FIGURE, Path("docs") / FIGURE)
    Path(moved.FILE).write_text(moved.as_csv(map(public, settled["claims"])))
    print(moved.as_text(moved.committed(), settled["claims"]))


if __name__ == "__main__":
    run(main)
