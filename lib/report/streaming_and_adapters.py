"""
The report's sections on streaming and on several adapters (studies/dvc.yaml), as blocks (lib/report/page.py). A
stand-in is named by the engine's own name.
"""

from pathlib import Path

from lib.analysis.metrics import RATE, panel_title
from lib.claims.format import show
from lib.claims.runs import optional
from lib.report import canvas
from lib.report.result_files import not_measured, slug

CLIENTS = ("triton", "triton-stream", "vllm")  # of streaming.json
# Columns: heading and key of a row.
PROMPT = {
    "first token s": "ttft_seconds",
    "from": "ttft_seconds_min",
    "to": "ttft_seconds_max",
    "tokens": "tokens",
    "s": "seconds",
    "tokens/s": "tokens_per_second",
}
BLS = {"concurrency": "concurrency", "first token ms": "ttft_ms", "to": "ttft_ms_max", "tokens/s": "tokens_per_second"}
POINT = {
    "adapters": "adapters",
    "rank": "rank",
    "asked for": "adapters_asked_for",
    "tokens/s": "output_tokens_per_second",
    "first token ms (p50)": "ttft_ms_p50",
    "loading s": "load_seconds",
    "server MiB": "resident_mib",
    "GPU MiB": "gpu_mib",
    "room for tokens": "kv_tokens",
}


def of_runs(ledger, stage):
    """(run, data) of each server's STAGE.json that measured something."""
    for name, facts in ledger["runs"].items():
        for path in sorted(Path(facts["folder"]).glob(f"{stage}/*/{stage}.json")):
            if (data := optional(path))["engine"]:
                yield name, data


def cells(row, columns):
    return [show(row.get(key)) for key in columns.values()]


def streaming(ledger):
    """The writeup's prompts by every client of every server, and what one BLS instance does."""
    yield ("heading", 2, "Streaming")
    runs = list(of_runs(ledger, "streaming"))
    if not runs:
        yield not_measured("make streaming")
        return
    yield ("text", "Medians of each prompt's repeats; a client without a first token does not stream.")
    rows, cases = [], []
    for name, data in runs:
        for client in CLIENTS:
            rows += [[name, data["engine"], client, row["prompt"], *cells(row, PROMPT)] for row in data.get(client, [])]
        cases += [
            [name, row["model"] or "ensemble", show(row["instances"]), *cells(row, BLS)] for row in data["bls"] or []
        ]
    yield ("table", ["run", "engine", "client", "prompt", *PROMPT], rows)
    if cases:
        yield ("heading", 3, "What one BLS instance does")
        yield (
            "text",
            "An instance of a BLS model answers one request at a time: with one, the second of two requests waits for "
            "the whole answer of the first. All answers have the same length.",
        )
        yield ("table", ["run", "model", "instances", *BLS], cases)


def multilora(ledger):
    """Did each request get its own adapter, and what do adapters cost?"""
    yield ("heading", 2, "Several adapters")
    runs = list(of_runs(ledger, "multilora"))
    if not runs:
        yield not_measured("make multilora")
        return
    yield (
        "text",
        "Six requests at once that name no adapter, the first and the second in turn, greedily; then each alone, on "
        "the same server. In float32 no rounding decides between two tokens; batch-invariant kernels, on a GPU, "
        "compute a request alike in every batch; as served, a batch may change the last bits.",
    )
    rows, points = [], []
    for name, data in runs:
        for precision, proof in data["proof"].items():
            rows.append([name, data["engine"], precision, *proof_cells(proof)])
        points += [[name, row["variant"], row["popularity"] or "—", *cells(row, POINT)] for row in data["points"]]
    header = ["run", "engine", "precision", "as from its adapter alone", "other than with the adapter off"]
    yield ("table", header, rows)
    if not points:
        return
    yield ("heading", 3, "What adapters cost")
    sizes = "; ".join(
        f"{name}: {data['trained_adapter_bytes'] / 1e6:,.1f} MB beside {data['base_model_bytes'] / 1e6:,.0f} MB"
        for name, data in runs
        if data["points"]
    )
    yield (
        "text",
        "`none` is a server without LoRA, which is what merged weights cost; `unused` one with LoRA whose requests "
        "name no adapter; the adapters have random weights. A trained adapter's file beside the base model's: "
        f"{sizes}.",
    )
    for name, data in runs:
        if len({row["adapters"] for row in data["points"]} - {0}) > 2:
            figure = slug("adapters", name)
            caption = (
                f"Tokens per second and the wait for the first token by the number of adapters asked for, {name}: "
                f"{data['base_model']['name']} on {data['engine']}; solid: all adapters alike, dashed: the n-th 1/n as "
                "often as the first; across: a server without LoRA (dotted) and those with LoRA unused."
            )
            yield ("figure", figure, by_adapters(figure, data["points"]), caption)
    yield ("table", ["run", "variant", "popularity", *POINT], points)


def proof_cells(proof):
    if "not_measured" in proof:
        return [f"not measured: {proof['not_measured']}", "—"]
    same = f"{proof['same_as_alone']} of {proof['requests']}"
    return [same, f"{proof['other_than_adapter_off']} of {proof['with_an_adapter']}"]


PANELS = {name: panel_title(name) for name in (RATE, "ttft_ms_p50")}


def by_adapters(name, points):
    """Throughput and first token over the number of adapters: a colour and a marker a rank, a dash a popularity."""
    figure, panels = canvas.new_figure(5.6, panels=2)
    counts = sorted({row["adapters"] for row in points} - {0})
    for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
        for number, rank in enumerate(sorted({row["rank"] for row in points if row["rank"]})):
            of_rank = [row for row in points if row["rank"] == rank]
            style = canvas.look(number)
            for popularity, dash, label in (("uniform", "-", f"rank {rank}"), ("skewed", "--", None)):
                line = [(row["adapters"], row[key]) for row in of_rank if row["popularity"] == popularity]
                if line:
                    axes.plot(*zip(*line, strict=True), dash, label=label, **style)
            for row in (row for row in of_rank if row["variant"] == "unused"):
                axes.axhline(row[key], color=style["color"], linewidth=0.8)
        for row in (row for row in points if row["variant"] == "none"):
            axes.plot([counts[0], counts[-1]], [row[key]] * 2, ":", color=canvas.TEXT, label="without LoRA")
        axes.set(title=title, ylim=(0, None))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.grid()
        canvas.concurrency_axis(axes, counts)
    panels[-1].set_xlabel("adapters")
    canvas.label_lines(figure, panels)
    return canvas.drawn(figure, name, points=points)
