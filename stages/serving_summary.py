"""
One table of every served point of every run: corrected numbers, limit, share, ratio, interval, valid.

in:   results/<profile>/bench, results/<profile>/limits, results/reference/*/{bench,limits}, data/claims/*.yaml
out:  results/<profile>/serving_summary/summary.json   what the report and `bench_vllm_vs_trtllm` render
"""

from lib.analysis.summary import summarise
from lib.claims.claims import load_claims
from lib.claims.runs import runs
from lib.core.provenance import write_metrics
from lib.core.stage import results, run


def main():
    _, claims = load_claims()
    summary = summarise(runs(results("machine").parent), {claim.id: claim.value for claim in claims})
    path = results("serving_summary") / "summary.json"
    write_metrics(path, summary)
    points = sum(len(one["points"]) for each in summary["runs"].values() for one in each["experiments"].values())
    print(f"serving_summary: {points} points of {len(summary['runs'])} runs in {path}")


if __name__ == "__main__":
    run(main)
