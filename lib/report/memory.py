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
