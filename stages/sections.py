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
METHODS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


def not_measured(command):
    return ("text", f"Not measured yet. `{command}` measures it.")


def folders(ledger):
    """(name, folder, facts) of every run."""
    return [(name, Path(facts["folder"]), facts) for name, facts in ledger["runs"].items()]


def slug(kind, name):
    """A figure's name: serving-this-checkout."""
    return f"{kind}-{name.replace(' ', '-')}"


def predictions(ledger):
    """{(model, method): terms} of every run's prediction."""
    found = [optional(folder / "vram/vram.json").get("models", {}) for _, folder, _ in folders(ledger)]
    return {
        (m, method): by[method] for models in found for m, by in models.items() for method in METHODS if method in by
    }


def predicted_bars(ledger):
    """The predicted totals of the writeup's shape, for the figure."""
    terms = predictions(ledger)
    wanted = [(method, terms.get(("llama-2-7b", method))) for method in ("lora", "qlora")]
    return [(f"predicted, {METHODS[m]}", entry["total_bytes"] / 2**20, "predicted") for m, entry in wanted if entry]


def predicted_memory(ledger):
    """The terms that a model's shape alone gives."""
    yield ("heading", 2, "Predicted memory")
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
    yield ("text", "GB of 10^9 bytes, from each model's shape; activations, buffers and the CUDA context come on top.")
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
        for path in sorted(folder.glob("bench/*/points.json")):
            data, server = read_json(path), path.parent.name
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
        yield not_measured("dvc repro bench@triton-base bench@vllm-base")
    yield ("table", ["run", "server", "engine", "model", *SERVING, "valid"], rows)


def point_cells(point):
    """One measured point as table cells."""
    reasons = "; ".join(point.get("invalid_reasons") or ["no reason given"])
    return [
        *(show(point.get(key)) for key in SERVING.values()),
        "yes" if point.get("valid", True) else f"no: {reasons}",
    ]
