"""
A verdict for every published number: the claims of data/claims/ joined with this checkout's run and with every
reference run. Every result file is optional: a figure of an absent file is not measured.

in:   data/claims/*.yaml, results/<profile>/, results/reference/*/
out:  results/<profile>/claims/claims.json   each claim with its verdict, evidence, reason, and its outcome in every run
      results/<profile>/claims/verdicts.json the counts alone, for `dvc exp show`
"""

from collections import Counter
from dataclasses import dataclass

from lib.analysis.own_figures import all_checks, card_limits
from lib.claims.claims import load_claims
from lib.claims.kinds import EVIDENCE, VERDICTS
from lib.claims.runs import run_facts, runs
from lib.claims.settle import settle
from lib.core.provenance import write_metrics
from lib.core.stage import UserError, read_params, results, run, write_json


@dataclass
class Claims:
    tolerance: float

    def __post_init__(self):
        if not 0 <= self.tolerance < 1:
            raise UserError(f"params.yaml: claims.tolerance is {self.tolerance}; use a share from 0, below 1")


def counts(claims):
    """{verdict: claims}, in the order of the kinds."""
    number = Counter(claim["verdict"] for claim in claims)
    return {verdict: number[verdict] for verdict in VERDICTS}


def counts_by_evidence(claims):
    """{evidence: {verdict: claims}} without empty cells."""
    number = Counter((claim["evidence"], claim["verdict"]) for claim in claims)
    return {
        name: {verdict: number[name, verdict] for verdict in VERDICTS if number[name, verdict]}
        for name in EVIDENCE
        if any(number[name, verdict] for verdict in VERDICTS)
    }


def main():
    p = read_params(Claims)
    writeups, claims = load_claims()
    all_runs = runs(results("machine").parent)
    published = {name: folder for name, folder in all_runs.items() if name != "this checkout"}
    checks = all_checks(claims, card_limits(claims, published))
    settled = [settle(claim, p.tolerance, all_runs, checks) for claim in claims]
    out = results("claims")
    write_metrics(
        out / "claims.json",
        {
            "runs": {name: {"folder": str(folder), **run_facts(folder)} for name, folder in all_runs.items()},
            "kinds": VERDICTS,
            "evidence": EVIDENCE,
            "counts": counts(settled),
            "counts_by_evidence": counts_by_evidence(settled),
            "writeups": writeups,
            "claims": settled,
        },
    )
    write_json(out / "verdicts.json", {"claims": counts(settled)})
    print(f"claims: {', '.join(f'{count} {verdict}' for verdict, count in counts(settled).items() if count)}")


if __name__ == "__main__":
    run(main)
