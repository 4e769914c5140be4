"""
Both servers' curves side by side: throughput, throughput of one user, time to first token, time between tokens; what
counts as a difference stands in lib/analysis/compare.py.

in:   results/<profile>/bench/{base,lora}/*/points.json
out:  results/<profile>/bench_vllm_vs_trtllm/comparison.{csv,json,svg,png}
"""

import csv
import textwrap
from dataclasses import dataclass
from pathlib import Path

from lib.analysis.compare import compared, noise
from lib.bench.metrics import span, value
from lib.core.provenance import write_metrics
from lib.core.stage import UserError, read_json, read_params, results, run

PERCENTILES = ("p50", "p90", "p95", "p99")
# Colours that colour-blind readers tell apart (Okabe and Ito); the model is told by marker and dash.
COLOURS = {"triton": "#0072B2", "vllm": "#D55E00"}
STYLES = {"base": "o-", "lora": "s--"}
GREY = "#999999"
SAME = ("base_model", "input_tokens_asked", "output_tokens_asked")  # in all runs, or they are not comparable
EXPERIMENTS = ("base", "lora")
NAMES = ("Triton", "vLLM")


@dataclass
class BenchVllmVsTrtllm:
    percentile: str

    def __post_init__(self):
        if self.percentile not in PERCENTILES:
            known = ", ".join(PERCENTILES)
            raise UserError(f"params.yaml: bench_vllm_vs_trtllm.percentile is {self.percentile!r}; use one of {known}")


def read_runs(folder):
    """Every run's points.json, as SERVER-MODEL; UserError where two of them did not measure the same work."""
    found = [read_json(path) for name in EXPERIMENTS for path in sorted((folder / name).glob("*/points.json"))]
    runs = {f"{one['server']}-{one['model']}": one for one in found}
    if not runs:
        raise UserError(f"{folder}: no benchmark there; `dvc repro bench` makes them")
    first, *others = runs
    for name in others:
        for key in SAME:
            if runs[name][key] != runs[first][key]:
                values = f"{key} is {runs[name][key]!r} in {name} and {runs[first][key]!r} in {first}"
                raise UserError(f"{folder}: {values}; `dvc repro bench` measures both alike")
    return runs


def panels(percentile):
    """What the figure and the ratios show: the number's name in points.json, and its title."""
    return {
        "output_tokens_per_second": "output tokens per second, all users",
        "per_user_tokens_per_second": "output tokens per second, each user",
        f"ttft_ms_{percentile}": f"time to first token, ms ({percentile})",
        f"itl_ms_{percentile}": f"time between tokens, ms ({percentile})",
    }


def ratios(runs, percentile):
    """Triton divided by vLLM at each concurrency that both measured: {ratio, low, high, verdict} a panel; null where
    one of the points is not valid."""
    rows, floor = [], {name: noise(runs.values(), name) for name in panels(percentile)}
    by_run = {(one["server"], one["model"]): {p["concurrency"]: p for p in one["points"]} for one in runs.values()}
    for model in sorted({model for _, model in by_run}):
        triton, vllm = by_run.get(("triton", model), {}), by_run.get(("vllm", model), {})
        for concurrency in sorted(triton.keys() & vllm.keys()):
            pair = triton[concurrency], vllm[concurrency]
            row = {"model": model, "concurrency": concurrency, "both_valid": all(point["valid"] for point in pair)}
            row |= {name: compared(*pair, name, floor[name], NAMES) for name in panels(percentile)}
            rows.append(row)
    return rows


def remarks(runs):
    """What a reader of the figure must know: stand-ins, runs without points, invalid points."""
    lines = []
    for name, one in runs.items():
        if one["engine_is_stand_in"]:
            lines.append(f"{name}: {one['engine']}")
        if one["not_measured"]:
            lines.append(f"{name}: not measured ({one['not_measured']})")
        for point in one["points"]:
            lines += [f"{name}, concurrency {point['concurrency']}: {reason}" for reason in point["invalid_reasons"]]
    return lines


def label(one):
    """A line's name in the legend; a stand-in is never shown under another engine's name."""
    engine = "stand-in engine" if one["engine_is_stand_in"] else one["engine"]
    return f"{'Triton, ' if one['server'] == 'triton' else ''}{engine}, {one['model']}"


def draw(axes, runs, name):
    """One panel: valid points joined, invalid ones as grey crosses apart from the line."""
    for one in runs.values():
        known = [point for point in one["points"] if value(point, name) is not None]
        good = [(point["concurrency"], value(point, name)) for point in known if point["valid"]]
        bad = [(point["concurrency"], value(point, name)) for point in known if not point["valid"]]
        if good:
            style = {"color": COLOURS[one["server"]], "label": label(one), "markersize": 5}
            axes.plot(*zip(*good, strict=True), STYLES[one["model"]], **style)
            for point in known:
                if point["valid"] and (ends := span(point, name)):
                    axes.plot(
                        [point["concurrency"]] * 2, ends, "-", color=COLOURS[one["server"]], linewidth=3, alpha=0.5
                    )
        if bad:
            axes.plot(*zip(*bad, strict=True), "x", color=GREY, label="not valid, see below")


def heading(one):
    base = one["base_model"]
    weights = "" if base["weights"] == "real" else f" ({base['weights']} weights)"
    return f"{base['name']}{weights}: {one['input_tokens_asked']} tokens in, {one['output_tokens_asked']} out"


def figure(runs, percentile):
    """The comparison as a matplotlib figure: four panels, the legend above, the remarks below."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    # Text stays text in the SVG, and the same numbers give the same bytes.
    style = {"svg.fonttype": "none", "svg.hashsalt": "comparison", "font.size": 9, "axes.titlesize": 9}
    matplotlib.rcParams.update(style)
    concurrencies = sorted({point["concurrency"] for one in runs.values() for point in one["points"]})
    notes = [textwrap.fill(line, 150, subsequent_indent="    ") for line in remarks(runs)]
    drawn = Figure(figsize=(9, 6.6 + 0.16 * "\n".join(notes).count("\n")), layout="constrained")
    handles = {}
    for axes, (name, title) in zip(drawn.subplots(2, 2).flat, panels(percentile).items(), strict=True):
        draw(axes, runs, name)
        handles |= {handle.get_label(): handle for handle in axes.get_legend_handles_labels()[0]}
        axes.set_title(title, loc="left")
        axes.set_xlabel("concurrent users")
        axes.set_xscale("log", base=2)
        axes.xaxis.set(major_locator=FixedLocator(concurrencies), minor_locator=NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    title = heading(next(iter(runs.values())))
    drawn.legend(handles=handles.values(), loc="outside upper center", ncols=2, frameon=False, title=title)
    drawn.supxlabel("\n".join(notes), fontsize=7, ha="left", x=0.01)
    return drawn


def write_csv(path, runs):
    """All repeats of all points of all runs in one table."""
    places = ("server", "model", "engine", "engine_is_stand_in")
    rows = [
        {**{key: one[key] for key in places}, **{key: figure for key, figure in repeat.items() if key != "checks"}}
        for one in runs.values()
        for point in one["points"]
        for repeat in point["repeats"]
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else list(places))
        writer.writeheader()
        writer.writerows({**row, "invalid_reasons": "; ".join(row["invalid_reasons"])} for row in rows)


def main():
    p = read_params(BenchVllmVsTrtllm)
    runs = read_runs(results("bench"))
    out = Path(results("bench_vllm_vs_trtllm"))
    out.mkdir(parents=True, exist_ok=True)

    first = next(iter(runs.values()))
    keys = ("server", "model", "engine", "engine_is_stand_in", "server_ready_seconds", "not_measured", "points")
    write_metrics(
        out / "comparison.json",
        {
            **{key: first[key] for key in SAME},
            "percentile": p.percentile,
            "runs": {name: {key: one[key] for key in keys} for name, one in runs.items()},
            "noise": {name: noise(runs.values(), name) for name in panels(p.percentile)},
            "triton_divided_by_vllm": ratios(runs, p.percentile),
            "remarks": remarks(runs),
        },
    )
    write_csv(out / "comparison.csv", runs)
    drawn = figure(runs, p.percentile)
    drawn.savefig(out / "comparison.svg", metadata={"Date": None})
    drawn.savefig(out / "comparison.png", dpi=150)
    for row in ratios(runs, p.percentile):
        told = [f"{name} {one['ratio']:.2f} ({one['verdict']})" for name, one in row.items() if type(one) is dict]
        print(f"triton / vllm, {row['model']}, concurrency {row['concurrency']}:", ", ".join(told) or "not valid")


if __name__ == "__main__":
    run(main)
