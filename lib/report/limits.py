"""
The report's section on what a machine allows, as blocks (lib/report/page.py): its measured limits beside the maker's,
and the least that a step reads and the most tokens a second that follow, for each model, format and concurrency.
"""

from lib.analysis.machine_limit import most_bandwidth
from lib.analysis.roofline import closed_loop, decode_step, rates, seconds
from lib.claims.format import show
from lib.core.stage import load_yaml
from lib.model.shapes import read_shape
from lib.report.result_files import found_in

# What is served on a GPU: a shape and the format of its weights. Keys and values in 16 bits.
MODELS = (("llama-2-7b", "bf16"), ("llama-2-7b", "fp8"), ("llama-2-7b", "int4-g128"), ("gpt-oss-20b", "mxfp4"))
CONCURRENCIES, INPUT, OUTPUT = (1, 16, 64), 512, 256
# The limit -> what it is called, its unit and that unit's size.
LIMITS = {
    "bytes_per_second": ("memory", "GB/s", 1e9),
    "flops_per_second": ("matrix products in 16 or 32 bits", "TFLOP/s", 1e12),
    "fp8_flops_per_second": ("matrix products in FP8", "TFLOP/s", 1e12),
}


def limits(ledger):
    """The section: every run that measured its machine; nothing where none has."""
    measured = dict(found_in(ledger, "limits/limits.json"))
    if not measured:
        return
    yield ("heading", 2, "What the machine allows")
    yield (
        "text",
        "Measured by `dvc repro limits`, medians; a limit is its fastest probe. The maker's figures are those without "
        "sparsity.",
    )
    header = ["run", "device", "limit", "measured", "probe", "least", "most", "maker", "share"]
    yield ("table", header, list(rows(measured)))
    by_device = {}
    for name, entry in measured.items():
        if entry["made_by"]["gpus"]:
            by_device.setdefault(entry["device"], {})[name] = entry
    for device, runs in by_device.items():
        yield from served(device, runs)


def rows(measured):
    """One row for each limit of each run."""
    cards = load_yaml("data/cards.yaml")
    for name, entry in measured.items():
        card = next((card for card in cards if entry["device"].startswith(card["name"])), {})
        for limit, (what, unit, size) in LIMITS.items():
            probes = {probe: result for probe, result in entry["probes"][limit].items() if result["median"]}
            if not probes:
                reasons = {result["not_measured"] for result in entry["probes"][limit].values()}
                yield [name, entry["device"], what, "not measured", "; ".join(reasons), "—", "—", "—", "—"]
                continue
            best = max(probes, key=lambda probe: probes[probe]["median"])
            numbers = [f"{show(probes[best][key] / size)} {unit}" for key in ("median", "least", "most")]
            maker = f"{show(card[limit] / size)} {unit} ({card['source']})" if card else "—"
            share = f"{probes[best]['median'] / card[limit]:.0%}" if card else "—"
            yield [name, entry["device"], what, numbers[0], best.replace("_", " "), *numbers[1:], maker, share]


def served(device, runs):
    """The roofline of every model on one GPU of a kind."""
    best = most_bandwidth(runs)
    machine = rates(runs[best])
    yield ("heading", 3, f"The most that one GPU can serve: {device}")
    yield (
        "text",
        f"With the limits of {best}: of the runs on this device it measured the most bandwidth; a point is held "
        f"against its own run's. {INPUT} tokens in, {OUTPUT} out. GB: the least that a step reads when half of the "
        "answer is made. Limit: the longer of all bytes over the bandwidth and all operations over the matrix rate; no "
        "engine is faster. Apart: the limit of an engine that never reads a prompt in a step that also decodes. Of a "
        "mixture of experts a step reads those experts that its tokens use; even routing is assumed, which random "
        "weights almost have and trained ones have less.",
    )
    header = ["model", "weights", "concurrency", "weights GB", "keys and values GB", "step ms", "limit tokens/s"]
    lines = [line(*model, concurrency, machine) for model in MODELS for concurrency in CONCURRENCIES]
    yield ("table", [*header, "apart tokens/s"], lines)


def line(model, weights, concurrency, machine):
    """One model at one concurrency."""
    config = read_shape(model, "the shape is")
    step = decode_step(config, weights, "bf16", concurrency, INPUT + OUTPUT // 2)
    throughput = closed_loop(config, weights, "bf16", machine, concurrency, INPUT, OUTPUT)
    least, total = seconds(step, machine), throughput["tokens_per_second"]
    cells = [f"{step['weight_bytes'] / 1e9:.2f}", f"{step['kv_bytes'] / 1e9:.2f}"]
    bounds = [show(total), show(throughput["apart_tokens_per_second"])] if total else ["not measured"] * 2
    return [model, weights, str(concurrency), *cells, f"{least * 1e3:.2f}" if least else "not measured", *bounds]
