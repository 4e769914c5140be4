"""
The report's sections on memory and chat, as blocks (lib/report/page.py), each beside the published figures. A part
that no run has says which command makes it.
"""

from lib.claims.format import show
from lib.claims.runs import optional
from lib.report import plots
from lib.report.result_files import METHODS, folders, not_measured, slug, variants

TERMS = ("weights", "adapter", "gradients", "optimizer", "total")
MIB = 2**20


def predictions(ledger):
    """{(model, method): terms} of every run's prediction."""
    runs = [optional(folder / "vram/vram.json").get("models", {}) for _, folder, _ in folders(ledger)]
    return {
        (m, method): by[method] for models in runs for m, by in models.items() for method in METHODS if method in by
    }


def memory(ledger, claims):
    """Memory of fine-tuning: what was predicted without a GPU, what was measured, what was published."""
    yield ("heading", 2, "Memory")
    for name, predicted, measured in compared_runs(ledger):
        yield from predicted_beside_measured(name, predicted, measured, published_memory(claims))
    yield from static_memory(ledger)


def published_memory(claims):
    """{method: (least, most) MiB} that the writeup prints."""
    high = {method: claims[name]["value"] for method, name in (("lora", "lora-memory-high"), ("qlora", "qlora-memory"))}
    return {"lora": (claims["lora-memory-low"]["value"], high["lora"]), "qlora": (high["qlora"],) * 2}


def compared_runs(ledger):
    """(run, {variant: predicted}, {variant: measured}) of every run on a GPU that has both."""
    for name, folder, _ in folders(ledger):
        predicted = optional(folder / "vram/vram.json").get("finetune", {}).get("variants", {})
        measured = {
            variant: entry
            for variant, metrics in variants(folder).items()
            if (entry := metrics.get("memory", {})).get("torch_allocated_peak_mib")
        }
        if known := {v: predicted[v] for v in measured if "process_bytes" in predicted.get(v, {})}:
            yield name, known, measured


def published_for(variant, published):
    """(least, most) MiB published for a variant; (None, None) where it is not the writeup's recipe."""
    recipe = variant in (f"{method}{end}" for method in published for end in ("", "-short", "-published"))
    return published[variant.partition("-")[0]] if recipe else (None, None)


def bar(variant, predicted, measured, published):
    """One bar of plots.memory."""
    terms = {term: size / MIB for term, size in predicted["terms"].items()}
    return variant, terms, measured["process_peak_mib"], published_for(variant, published)


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
        low, high = published_for(variant, published)
        span = "—" if low is None else f"{low:,}" if low == high else f"{low:,} to {high:,}"
        rows.append([variant, *cells, span, entry["peak_phase"].replace("_", " ")])
        if not variant.endswith("-packed"):  # of four times the others' size: in the table only
            bars.append(bar(variant, entry, measured[variant], published))
    figure = slug("memory", name)
    caption = (
        f"Memory of every fine-tuning of {name}: the predicted terms, the measured process (line), the writeup's "
        "figure (grey band)."
    )
    yield ("figure", figure, plots.memory(figure, bars), caption)
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
