"""
One table of every served point of every run: corrected numbers, limit, share, ratio, interval, valid.

in:   results/<profile>/bench, results/<profile>/limits, results/reference/*/{bench,limits}, data/claims/*.yaml
out:  results/<profile>/serving_summary/summary.json      what the report and `bench_vllm_vs_trtllm` render
      results/<profile>/serving_summary/throughput.json   this checkout's points in short, for `dvc exp show`
"""

from lib.analysis.metrics import RATE
from lib.analysis.summary import summarise
from lib.claims.claims import load_claims
from lib.claims.runs import OWN_RUN, runs
from lib.core.provenance import write_metrics
from lib.core.stage import results, run, write_json


def short_points(experiment):
    """{server: {load: the few numbers}} of the valid points with the corrected client."""
    names = (RATE, "ttft_ms_p50", "itl_ms_p50")
    short = {}
    for point in experiment["points"]:
        if point["valid"] and point["variant"] == "corrected":
            load = f"{point['input_tokens_asked']}-{point['output_tokens_asked']}-c{point['concurrency']}"
            numbers = {name: point["numbers"][name]["value"] for name in names}
            short.setdefault(point["server"], {})[load] = numbers
    return short


def main():
    _, claims = load_claims()
    summary = summarise(runs(results("machine").parent), {claim.id: claim.value for claim in claims})
    path = results("serving_summary") / "summary.json"
    write_metrics(path, summary)
    own = summary["runs"].get(OWN_RUN, {"experiments": {}})["experiments"]
    write_json(path.with_name("throughput.json"), {name: short_points(data) for name, data in own.items()})
    points = sum(
        len(experiment["points"]) for each in summary["runs"].values() for experiment in each["experiments"].values()
    )
    print(f"serving_summary: {points} points of {len(summary['runs'])} runs in {path}")


if __name__ == "__main__":
    run(main)
