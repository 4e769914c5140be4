"""
The report's section on five ways to speed up a local model, and on many prompts at once (stage speedups), as blocks
(lib/report/page.py).
"""

from lib.claims.format import show
from lib.report import canvas
from lib.report.result_files import found_in, not_measured, slug

# The writeup's methods and the claims that hold its figures.
CLAIMS = {
    "none": "five-baseline",
    "compile": "five-compile",
    "flash1": "five-flash1",
    "flash1-compile": "five-flash1-compile",
    "flash2": "five-flash2",
    "vllm": "five-vllm",
}
BUSY = 0.9  # CPU seconds a second, at least, of a process that nobody disturbs


def speedups(ledger, claims):
    """Every method in its two variants beside the writeup's figure, and many prompts at once."""
    yield ("heading", 2, "Five ways to speed up a local model")
    runs = found_in(ledger, "speedups/speedups.json")
    if not runs:
        yield not_measured("make speedups")
        return
    yield (
        "text",
        "Two variants. `published` does what the writeup's code does: every token computes the whole sequence again "
        "(`use_cache=False`), torch.compile is wrapped around the model, the first answer counts, an answer ends where "
        "it ends, and vLLM runs in float16 with its default of 16 new tokens. `corrected` gives all of them a KV "
        "cache, bf16 weights, answers of the same length and a warm-up that is not counted; torch.compile gets the "
        "static cache that it needs. `to_bettertransformer()` is gone in transformers 5 and "
        '`torch.backends.cuda.sdp_kernel` deprecated: the flash rows take `attn_implementation="sdpa"` under '
        "`torch.nn.attention.sdpa_kernel(FLASH_ATTENTION)`. In torch 2.2 or newer that kernel is FlashAttention-2, so "
        "that the first FlashAttention cannot be measured any more. With a static cache attention has a mask, which a "
        "GPU's flash kernel does not take; there SDPA may take its other fused kernel.",
    )
    published = {method: claims[name]["value"] for method, name in CLAIMS.items()}
    for name, data in runs:
        yield from one_run(name, data, published)


def one_run(name, data, published):
    """Figure and tables of one run."""
    yield ("heading", 3, f"One answer at a time: {name}")
    random = " Its weights are random: what is guessed from the prompt means nothing." * (data["weights"] == "random")
    busy = data["load_average_before"]
    when = "" if busy is None else f", when {busy:.1f} processes wanted a core"
    yield (
        "text",
        f"{data['model']} on {machine(data)}; {data['answers']} answers a method to one prompt, up to "
        f"{data['max_new_tokens']} new tokens; the mean of tokens/s over answers, as in the writeup, with its 95 % "
        f"interval. Begun {data['begun']}{when}.{random}",
    )
    if shared(data):
        yield (
            "text",
            "Others were at work on this machine: these speeds are too low, and they differ for reasons that are not "
            "the methods'; the intervals do not cover that. The CPU time a token, of all threads, suffers less "
            "(vLLM's threads use it for waiting too). "
            "Measure again on a quiet machine before you compare.",
        )
    figure = slug("speedups", name)
    caption = (
        f"Tokens per second of each method, and how many times that of doing nothing in the same variant it is: the "
        f"writeup (RTX 3080 Laptop, llm-jp-1.3b) and {name} ({data['model']})."
    )
    yield ("figure", figure, bars(figure, data, published), caption)
    yield ("table", list(COLUMNS), [cells(row, published) for row in data["rows"]])
    yield from worth(data)
    yield from together(name, data)


def shared(data):
    """Whether others were at work on the cores that were measured: a Transformers method on a CPU computes all the
    time, so that less than a second of CPU time a second means that it had to wait."""
    if data["machine"]["gpus"]:
        return False
    known = [row for row in data["rows"] if not row["not_measured"] and row["method"] != "vllm"]
    return any(row["cpu_seconds_per_token"] * row["tokens_per_second"] < BUSY for row in known)


def machine(data):
    """The GPUs, or the CPU where there are none."""
    gpus = [gpu["name"] for gpu in data["machine"]["gpus"]]
    return ", ".join(gpus) or f"{data['machine']['cpu']}, {data['machine']['cores']} cores"


COLUMNS = ("method", "variant", "writeup", "tokens/s", "95 %", "over none", "of the limit", "first token s", "tokens",
           "CPU ms a token", "MiB", "compiled graphs")  # fmt: skip


def cells(row, published):
    """One row of the table; what was not measured says why."""
    writeup = show(published.get(row["method"])) if row["variant"] == "published" else "—"
    if row["not_measured"]:
        return [row["says"], row["variant"], writeup, f"— ({row['not_measured']})", *["—"] * 8]
    share = row["share_of_limit"]
    return [
        row["says"],
        row["variant"],
        writeup,
        show(row["tokens_per_second"]),
        span(row["interval"]),
        times(row["over_none"]),
        "—" if share is None else f"{100 * share:.0f} %",
        show(row["ttft_seconds"]),
        show(row["output_tokens"]),
        show(1000 * row["cpu_seconds_per_token"]),
        show(row["peak_mib"] and round(row["peak_mib"])),
        show(row["compiled_graphs"]),
    ]


def span(interval):
    return "—" if not interval else f"{show(interval[0])} to {show(interval[1])}"


def times(ratio):
    """A ratio with its interval: 1.31x (1.2 to 1.42)."""
    if not ratio:
        return "—"
    return f"{show(ratio['ratio'])}x" + (
        "" if ratio["low"] is None else f" ({show(ratio['low'])} to {show(ratio['high'])})"
    )


def measured(data, variant):
    """{method: row} of a variant, those that were measured."""
    return {row["method"]: row for row in data["rows"] if row["variant"] == variant and not row["not_measured"]}


def worth(data):
    """What the writeup's table mixes: the cache that its code leaves out, and the method itself."""
    before, after = measured(data, "published"), measured(data, "corrected")
    if "none" in before and "none" in after and not shared(data):
        gain = after["none"]["tokens_per_second"] / before["none"]["tokens_per_second"]
        yield (
            "text",
            f"Doing nothing but keeping the cache, with the warm-up apart, is {show(gain)} times the speed of the "
            "published baseline; what the code leaves out grows with the length of an answer. The limit is the "
            "memory's: every weight read once a token.",
        )
    wrapped = [row for method, row in before.items() if "compile" in method]
    if wrapped and not any(row["compiled_graphs"] for row in wrapped):
        yield (
            "text",
            "In the published variant torch.compile compiles nothing: `generate()` of the wrapped model is that of the "
            "model inside, which calls itself and not the wrapper. No graph was made. That fits the writeup's 43.60 "
            "beside 44.36 tokens/s; it leaves its 65.59 beside 48.97 unexplained.",
        )


def together(name, data):
    """Many prompts at once: Transformers in batches of both kinds against vLLM."""
    systems = data["systems"]
    known = [system for system in systems if not system["not_measured"]]
    yield ("heading", 3, f"Many prompts at once: {name}")
    if not known:
        yield ("text", "Not measured: `speedups.batch_systems` in params.yaml is empty.")
        return
    yield (
        "text",
        f"{len(known[0]['output_tokens'])} held-out prompts of the dataset, each answered with the length of its own "
        f"answer ({min(known[0]['output_tokens'])} to {max(known[0]['output_tokens'])} tokens), at most "
        f"{data['batch_size']} at a time; medians of repeats. A static batch ends with its longest answer: what it "
        "computes beyond that length is not counted.",
    )
    rows = [
        [
            system["system"],
            show(system.get("tokens_per_second")) if not system["not_measured"] else f"— ({system['not_measured']})",
            span(system.get("interval")),
            times(system.get("over_static")),
            *(show(system.get(key)) for key in ("tokens", "computed_tokens")),
            "—" if system["not_measured"] else show(1000 * system["cpu_seconds_per_token"]),
            show(system.get("peak_mib") and round(system["peak_mib"])),
        ]
        for system in systems
    ]
    yield (
        "table",
        ["system", "tokens/s", "95 %", "over static", "tokens asked", "computed", "CPU ms a token", "MiB"],
        rows,
    )


def bars(name, data, published):
    """Two panels of grouped bars: tokens/s, and times doing nothing in the same variant; over the writeup's methods and
    what was measured besides."""
    variants = {variant: rows for variant in ("published", "corrected") if (rows := measured(data, variant))}
    methods = list(dict.fromkeys([*published, *(method for rows in variants.values() for method in rows)]))
    speeds = {"writeup": published} | {
        variant: {method: row["tokens_per_second"] for method, row in rows.items()}
        for variant, rows in variants.items()
    }
    ratios = {"writeup": {method: {"ratio": value / published["none"]} for method, value in published.items()}} | {
        variant: {method: row["over_none"] for method, row in rows.items() if row["over_none"]}
        for variant, rows in variants.items()
    }
    figure, panels = canvas.new_figure(1.2 * len(methods), panels=2)
    width = 0.26
    colours = {"writeup": canvas.GREY, "published": canvas.ORANGE, "corrected": canvas.BLUE}
    for number, variant in enumerate(speeds):
        label = "the writeup's figures" if variant == "writeup" else f"here, {variant}"
        places = [place + (number - (len(speeds) - 1) / 2) * width for place in range(len(methods))]
        for axes, values in zip(
            panels,
            (speeds[variant], {method: ratio["ratio"] for method, ratio in ratios[variant].items()}),
            strict=True,
        ):
            axes.barh(
                places, [values.get(method, 0) for method in methods], height=width, color=colours[variant], label=label
            )
        for place, method in zip(places, methods, strict=True):
            ratio = ratios[variant].get(method, {})
            if ratio.get("low") is not None and method != "none":
                panels[1].plot([ratio["low"], ratio["high"]], [place, place], color=canvas.TEXT, linewidth=1)
    for axes in panels:
        axes.set_yticks(range(len(methods)), methods)
        axes.invert_yaxis()
    panels[0].set_xlabel("tokens/s, one answer at a time")
    panels[1].set_xlabel("times `none` of the same variant (line: 95 % interval)")
    panels[1].axvline(1, color=canvas.TEXT, linewidth=0.8, linestyle=":")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return canvas.drawn(figure, name, tokens_per_second=speeds, over_none=ratios)
