"""
A verdict for every published number: the claims of data/claims.yaml joined with this checkout's run and with every
reference run. Every result file is optional: what is absent is not measured.

in:   data/claims.yaml, results/<profile>/, results/reference/*/
out:  results/<profile>/claims/claims.json   each claim with its verdict, the reason, and its outcome in every run
      results/<profile>/claims/claims.md     counts and verdicts as tables
"""

from collections import Counter
from dataclasses import dataclass

from lib.claims.claims import load_ledger
from lib.claims.format import VERDICTS, show
from lib.claims.judge import settle
from lib.claims.runs import run_facts, runs
from lib.core.provenance import write_metrics
from lib.core.stage import read_params, results, run


@dataclass
class Claims:
    tolerance: float


def as_markdown(claims):
    """Counts and verdicts as two tables."""
    counts = Counter(claim["verdict"] for claim in claims)
    lines = ["| verdict | claims |", "|---|---:|", *(f"| {verdict} | {counts[verdict]} |" for verdict in VERDICTS), ""]
    lines += ["| claim | published | measured | verdict | run | reason |", "|---|---:|---:|---|---|---|"]
    for claim in claims:
        row = [
            claim["id"],
            claim["published"],
            show(claim["measured"]),
            claim["verdict"],
            claim["run"] or "—",
            claim["reason"],
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def main():
    p = read_params(Claims)
    writeups, claims = load_ledger()
    all_runs = runs(results("machine").parent)
    settled = [settle(claim, p.tolerance, all_runs) for claim in claims]
    counts = Counter(claim["verdict"] for claim in settled)
    out = results("claims")
    write_metrics(
        out / "claims.json",
        {
            "runs": {name: {"folder": str(folder), **run_facts(folder)} for name, folder in all_runs.items()},
            "counts": {verdict: counts[verdict] for verdict in VERDICTS},
            "writeups": writeups,
            "claims": settled,
        },
    )
    (out / "claims.md").write_text(as_markdown(settled))
    print(f"claims: {', '.join(f'{counts[verdict]} {verdict}' for verdict in VERDICTS)}")


if __name__ == "__main__":
    run(main)
