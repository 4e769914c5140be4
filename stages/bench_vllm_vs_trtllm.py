"""
The servers' curves side by side and their ratios, out of the serving summary; any servers, Triton and vLLM by default.

in:   results/<profile>/serving_summary/summary.json
out:  results/<profile>/bench_vllm_vs_trtllm/comparison.{json,csv,svg,png}
"""

import csv
from dataclasses import dataclass

from lib.claims.runs import OWN_RUN
from lib.core.provenance import write_metrics
from lib.core.stage import read_json, read_params, results, run
from lib.report.comparison import check_percentile, compared_experiments, draw_comparison, panels, ratio_rows, remarks


@dataclass
class BenchVllmVsTrtllm:
    percentile: str

    def __post_init__(self):
        check_percentile(self.percentile)


def write_points(path, experiments):
    """One line a point, with every number of the summary and its interval."""
    rows = []
    for name, experiment in experiments.items():
        for point in experiment["points"]:
            row = {"experiment": name, **{k: point[k] for k in ("server", "load", "concurrency", "valid", "share")}}
            for number, value in point["numbers"].items():
                row |= {number: value["value"], f"{number}_low": value["low"], f"{number}_high": value["high"]}
            rows.append(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["experiment", "server", "load"])
        writer.writeheader()
        writer.writerows(rows)


def main():
    p = read_params(BenchVllmVsTrtllm)
    summary = read_json(results("serving_summary") / "summary.json")
    experiments = compared_experiments(summary["runs"].get(OWN_RUN, {"experiments": {}}))
    out = results("bench_vllm_vs_trtllm")
    out.mkdir(parents=True, exist_ok=True)
    ratios = ratio_rows(experiments, p.percentile)
    first = next(iter(experiments.values()))
    write_metrics(
        out / "comparison.json",
        {
            "base_model": first["base_model"],
            "lengths": first["settings"]["lengths"],
            "percentile": p.percentile,
            "servers": {name: experiment["servers"] for name, experiment in experiments.items()},
            "ratios": ratios,
            "remarks": remarks(experiments),
        },
    )
    write_points(out / "comparison.csv", experiments)
    figure = draw_comparison(experiments, p.percentile)
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "comparison"}):  # the same numbers give the same bytes
        figure.savefig(out / "comparison.svg", metadata={"Date": None})
    figure.savefig(out / "comparison.png", dpi=150)
    for row in ratios:
        numbers = ", ".join(
            f"{number} {row[number]['ratio']:.2f} ({row[number]['verdict']})"
            for number in panels(p.percentile)
            if row[number]
        )
        print(f"{row['server']} / {row['divided_by']}, {row['experiment']}, {row['load']}: {numbers or 'not valid'}")


if __name__ == "__main__":
    run(main)
