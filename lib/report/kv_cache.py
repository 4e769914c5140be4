"""
The report's section on what keys and values cost (stage kv_cache, and vLLM's own figures of stage speedups), as blocks
(lib/report/page.py).
"""

from lib.claims.format import show
from lib.report import canvas
from lib.report.result_files import found_in, not_measured, slug

KIB = 1024


def kv_cache(ledger):
    """Bytes a token of each shape, by formula and counted, and the waste of contiguous room beside blocks."""
    yield ("heading", 2, "Keys and values")
    runs = found_in(ledger, "kv_cache/kv_cache.json")
    if not runs:
        yield not_measured("make speedups")
        return
    yield (
        "text",
        "A token leaves 2 x layers x KV heads x head size numbers in the cache, here of 16 bits. Counted: what "
        "Transformers' own cache holds after a forward pass, per token; a layer with a sliding window keeps its window "
        "alone, which the formula leaves out.",
    )
    shapes = {model: entry for _, data in runs for model, entry in data["shapes"].items()}
    header = ["model", "layers", "KV heads", "head size", "KiB a token", "counted", "tokens counted", "by"]
    yield ("table", header, [shape_cells(model, entry) for model, entry in shapes.items()])
    for name, data in found_in(ledger, "speedups/speedups.json"):
        if cache := data["vllm_kv_cache"]:
            each = cache["bytes"] and cache["bytes"] / cache["blocks"] / cache["block_tokens"]
            yield (
                "text",
                f"{name}: vLLM made {cache['blocks']} blocks of {cache['block_tokens']} tokens for {data['model']}"
                + (f" out of {cache['bytes'] / 2**20:,.0f} MiB, {each / KIB:.2f} KiB a token." if each else "."),
            )
    for name, data in runs:
        yield ("heading", 3, f"Room for a sequence: {name}")
        yield (
            "text",
            f"{data['rows']} rows of the dataset, {data['tokens_per_row']:.0f} tokens on average and "
            f"{data['longest_row']} at most ({data['model']}). In one piece, a sequence's room is as long as any may "
            "become; in blocks, only the last one is partly empty.",
        )
        figure = slug("kv-waste", name)
        caption = f"Share of the room for keys and values that holds tokens, and that holds none: {name}."
        yield ("figure", figure, waste(figure, data["policies"]), caption)
        rows = [
            [
                f"{policy['policy']}, {policy['says']}",
                show(policy["unit_tokens"]),
                f"{100 * policy['wasted_share']:.1f} %",
                show(round(policy["sequences_per_gib"])),
            ]
            for policy in data["policies"]
        ]
        yield ("table", ["room", "tokens at a time", "wasted", "sequences a GiB"], rows)


def shape_cells(model, entry):
    counts = (entry[key] for key in ("layers", "kv_heads", "head_size"))
    sizes = (f"{entry[key] / KIB:,.2f}" for key in ("bytes_per_token", "counted_bytes_per_token"))
    return [model, *map(show, counts), *sizes, show(entry["counted_tokens"]), entry["counted"]]


def waste(name, policies):
    """A bar for every way to hand out room: the part that holds tokens, and the part that holds none."""
    figure, (axes,) = canvas.new_figure(1.1 + 0.36 * len(policies))
    used = [100 * (1 - policy["wasted_share"]) for policy in policies]
    labels = [f"{policy['policy']},\n{policy['says']}" for policy in policies]
    axes.barh(range(len(used)), used, height=0.62, color=canvas.BLUE, label="holds tokens")
    empty = [100 - share for share in used]
    axes.barh(range(len(used)), empty, left=used, height=0.62, color=canvas.GREY, label="wasted", alpha=0.6)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="% of the room", xlim=(0, 100))
    figure.legend(loc="outside lower center", ncols=2)
    return canvas.drawn(figure, name, policies=policies)
