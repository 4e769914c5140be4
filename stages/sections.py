"""
The report's sections on memory, chat and serving, as blocks (stages/page.py), each beside the published figures. A
part that no run has says which command makes it.
"""

from pathlib import Path

from stages import figures
from stages.claims import show
from stages.runs import optional
from stages.stage import read_json

# The published serving points: server, concurrency, and the claims that hold throughput, per user, first token, ITL.
POINTS = (
    ("Triton, TensorRT-LLM", 1, [f"stream-c1-{key}" for key in ("throughput", "per-user-avg", "ttft-avg", "itl-avg")]),
    ("Triton, TensorRT-LLM", 2, [f"stream-c2-{key}" for key in ("throughput", "per-user-avg", "ttft-avg", "itl-avg")]),
    ("Triton, TensorRT-LLM", 16, ["triton-throughput", None, None, None]),
    ("vLLM 0.11.0", 16, ["triton-vllm-throughput", None, None, None]),
)
# Columns of the tables: heading and key in a result file.
SERVING = {
    "concurrency": "concurrency",
    "tokens/s": "output_tokens_per_second",
    "tokens/s a user": "per_user_tokens_per_second",
    "first token ms (p50)": "ttft_ms_p50",
    "ITL ms (p50)": "itl_ms_p50",
}
TERMS = ("weights", "adapter", "gradients", "optimizer", "total")
MIB = 2**20
METHODS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


def not_measured(command):
    return ("text", f"Not measured yet. `{command}` measures it.")


def folders(ledger):
    """(name, folder, facts) of every run."""
    return [(name, Path(facts["folder"]), facts) for name, facts in ledger["runs"].items()]


def variants(folder):
    """{variant: metrics} of every fine-tuning of a run."""
    return {path.parent.name: read_json(path) for path in sorted(folder.glob("finetune/*/metrics.json"))}


def slug(kind, name):
    """A figure's name: serving-this-checkout."""
    return f"{kind}-{name.replace(' ', '-')}"


def predictions(ledger):
    """{(model, method): terms} of every run's prediction."""
    found = [optional(folder / "vram/vram.json").get("models", {}) for _, folder, _ in folders(ledger)]
    return {
        (m, method): by[method] for models in found for m, by in models.items() for method in METHODS if method in by
    }


def memory(ledger, claims):
    """Memory of fine-tuning: what was predicted without a GPU, what was measured, what was published."""
    yield ("heading", 2, "Memory")
    published = {
        "lora": (claims["lora-memory-low"]["value"], claims["lora-memory-high"]["value"]),
        "qlora": (claims["qlora-memory"]["value"],) * 2,
    }
    for name, folder, _ in folders(ledger):
        predicted = optional(folder / "vram/vram.json").get("finetune", {}).get("variants", {})
        measured = {
            variant: entry
            for variant, metrics in variants(folder).items()
            if (entry := metrics.get("memory", {})).get("torch_allocated_peak_mib")
        }
        known = {v: predicted[v] for v in measured if "process_bytes" in predicted.get(v, {})}
        if known:
            yield from predicted_beside_measured(name, known, measured, published)
    yield from static_memory(ledger)


def predicted_beside_measured(name, predicted, measured, published):
    """A bar and a table row for every fine-tuning of one run on a GPU."""
    yield ("heading", 3, f"Predicted and measured: {name}")
    yield (
        "text",
        "Predicted from the operations of a training step, without a GPU (`dvc repro vram`); the one number that is "
        "measured and not derived is the CUDA context. Allocated: the tensors, as torch counts them. Process: what "
        "NVML shows, with the context and what torch's allocator holds in reserve (≈: of compiled layers with rows of "
        "different lengths that reserve is a guess). MiB.",
    )
    bars, rows = [], []
    for variant, entry in predicted.items():
        pairs = [
            (entry["peak_allocated_bytes"] / MIB, measured[variant]["torch_allocated_peak_mib"]),
            (entry["process_bytes"] / MIB, measured[variant]["process_peak_mib"]),
        ]
        cells = [cell for ours, theirs in pairs for cell in (show(ours), show(theirs), f"{ours / theirs - 1:+.1%}")]
        if entry.get("slack_is_a_guess"):
            cells[3] = f"≈ {cells[3]}"
        recipe = variant in (f"{method}{end}" for method in published for end in ("", "-short", "-published"))
        low, high = published[variant.partition("-")[0]] if recipe else (None, None)
        span = "—" if not recipe else f"{low:,}" if low == high else f"{low:,} to {high:,}"
        rows.append([variant, *cells, span, entry["peak_phase"].replace("_", " ")])
        terms = {term: size / MIB for term, size in entry["terms"].items()}
        if not variant.endswith("-packed"):  # of four times the others' size: in the table only
            bars.append((variant, terms, measured[variant]["process_peak_mib"], (low, high)))
    figure = slug("memory", name)
    caption = (
        f"Memory of every fine-tuning of {name}: the predicted terms, the measured process (line), the writeup's "
        "figure (grey band)."
    )
    yield ("figure", figure, figures.memory(figure, bars), caption)
    header = ["variant", "allocated", "measured", "off by", "process", "measured", "off by", "published", "peak in"]
    yield ("table", header, rows)


def static_memory(ledger):
    """The terms that a model's shape alone gives."""
    rows = [
        [
            model,
            METHODS[method],
            *(f"{terms[f'{t}_bytes'] / 1e9:,.2f}" for t in TERMS),
            show(terms["bytes_per_parameter"]),
        ]
        for (model, method), terms in predictions(ledger).items()
    ]
    if not rows:
        yield not_measured("dvc repro vram")
        return
    yield ("heading", 3, "From a model's shape alone")
    yield ("text", "GB of 10^9 bytes; activations, buffers and the CUDA context come on top.")
    yield ("table", ["model", "method", *TERMS, "byte/parameter"], rows)


def chat(ledger):
    """The answers side by side, of every run that has any."""
    yield ("heading", 2, "Chat")
    answered = [
        (name, data)
        for name, folder, _ in folders(ledger)
        if (data := optional(folder / "chat/chat.json")).get("prompts")
    ]
    if not answered:
        yield not_measured("dvc repro chat")
    for name, data in answered:
        random = " Its weights are random, so the answers mean nothing." if data.get("weights") == "random" else ""
        yield ("text", f"{name}: {data.get('model', 'a model without a name')}.{random}")
        rows = [[entry.get(who) or "—" for who in ("prompt", "base", "lora", "qlora")] for entry in data["prompts"]]
        yield ("table", ["prompt", "base", "LoRA", "QLoRA"], rows)


def serving(ledger, claims):
    """Curves and points of every server, the published points first."""
    yield ("heading", 2, "Serving")
    rows, measured = [], 0
    for server, level, ids in POINTS:
        cells = [show(claims[name]["value"]) if name else "—" for name in ids]
        rows.append(["published", server, "—", "ELYZA 7B, 4 bits, H100", str(level), *cells, "length not controlled"])
    for name, folder, _ in folders(ledger):
        curves = {}
        for path in sorted(folder.glob("bench/*/*/points.json")):
            data, server = read_json(path), "/".join(path.parts[-3:-1])
            if not data.get("points"):
                why = data.get("not_measured") or "it has no points"
                yield ("text", f"{name}, {server}: not measured, {why}.")
                continue
            stand_in = bool(data.get("engine_is_stand_in"))
            engine = data.get("engine") or "—"
            if stand_in and "stand-in" not in engine:
                engine += " (stand-in for TensorRT-LLM)"
            model = data.get("base_model", {}).get("name", "—")
            curves[f"{server}: {engine}"] = (data["points"], stand_in)
            rows += [[name, server, engine, model, *point_cells(point)] for point in data["points"]]
        if curves:
            figure = slug("serving", name)
            caption = (
                f"Throughput and wait for the first token: {name}. Dashed: a stand-in engine. Hollow: an invalid point."
            )
            yield ("figure", figure, figures.serving(figure, curves), caption)
            measured += len(curves)
    if not measured:
        yield not_measured("dvc repro bench@base")
    yield ("table", ["run", "server", "engine", "model", *SERVING, "valid"], rows)


def point_cells(point):
    """One measured point as table cells."""
    reasons = "; ".join(point.get("invalid_reasons") or ["no reason given"])
    return [
        *(show(point.get(key)) for key in SERVING.values()),
        "yes" if point.get("valid", True) else f"no: {reasons}",
    ]
