"""
The five findings of the answer page, as blocks (lib/report/page.py): a sentence, a figure, and the chapter that has the
rest. A finding whose run is missing says which command makes it.
"""

from lib.analysis.metrics import RATE, panel_title
from lib.claims.format import show
from lib.report import answer_plots, h100, plots
from lib.report.memory import MIB, bar, compared_runs, published_memory
from lib.report.own_run import beside_published, engines
from lib.report.result_files import best_spoken, found_in, not_measured
from lib.report.streaming_and_adapters import of_runs


def findings(ledger, summary):
    """All five, numbered."""
    claims = {claim["id"]: claim for claim in ledger["claims"]}
    parts = (memory(ledger, claims), style(ledger), comparison(ledger, summary), triton_cost(ledger, summary))
    for number, (title, *blocks) in enumerate(map(list, (*parts, beside_published(summary))), 1):
        yield ("heading", 3, f"{number}. {title}")
        yield from blocks


def memory(ledger, claims):
    """Predicted, measured and published memory of the writeup's two trainings."""
    yield "Where does the memory go?"
    published = published_memory(claims)
    for name, predicted, measured in compared_runs(ledger):
        known = {m: v for m in published for v in (f"{m}-published", m) if v in predicted and v in measured}
        if len(known) == len(published):
            yield ("text", memory_words(name, known, predicted, measured, published))
            rows = [bar(variant, predicted[variant], measured[variant], published) for variant in known.values()]
            caption = f"Predicted terms, measured process (line), the writeup's figure (grey band): {name}."
            yield ("figure", "answer-memory", plots.memory("answer-memory", rows), caption)
            break
    else:
        yield not_measured("make reproduce PROFILE=weightless")
    yield ("link", "Memory: every variant", "memory.html")


def memory_words(name, known, predicted, measured, published):
    """The sentence: predicted, measured, published of both methods."""
    numbers = {
        method: (
            show(predicted[variant]["process_bytes"] / MIB),
            show(measured[variant]["process_peak_mib"]),
            show(published[method][1]),
        )
        for method, variant in known.items()
    }
    lora, qlora = numbers["lora"], numbers["qlora"]
    return (
        f"The memory of a training can be predicted without a GPU: LoRA {lora[0]} MiB, measured {lora[1]} ({name}), "
        f"published up to {lora[2]}; QLoRA {qlora[0]} MiB, measured {qlora[1]}, published {qlora[2]}."
    )


def style(ledger):
    """How many measures tell LoRA from QLoRA, and each from the base model."""
    yield "Does QLoRA write as LoRA does?"
    scored = [(name, data) for name, data in found_in(ledger, "style/style.json") if "style_differs" in data]
    if not scored:
        yield not_measured("dvc repro style")
    else:
        yield from style_of(*best_spoken(scored))
    yield ("link", "Answers and style: every measure with its interval", "answers.html")


def style_of(name, data):
    """The sentence and the figure of one run."""
    of_style = len(data["measures"]) - ("completion_loss" in data["measures"])
    apart = data["style_differs"]
    means = data["measures"].get("completion_loss", {}).get("means", {})
    losses = ", ".join(f"{who} {means[key]['mean']:.2f}" for key, who in
                       (("base", "base"), ("lora", "LoRA"), ("qlora", "QLoRA")) if key in means)  # fmt: skip
    random = "" if data.get("weights", "real") == "real" else " Random weights: the answers mean nothing."
    yield (
        "text",
        f"Of {of_style} measures of style, {apart['lora_minus_qlora']} tell LoRA from QLoRA, and "
        f"{apart['lora_minus_base']} tell LoRA from the base model ({data['model']}, {data['prompts']} held-out "
        f"prompts, {name}). Loss of the reference answers: {losses or 'not measured'}.{random}",
    )
    measures = {measure: entry["distances"] for measure, entry in data["measures"].items()
                if None not in entry.get("distances", {None: None}).values()}  # fmt: skip
    if measures:
        caption = "How far the base model, LoRA and QLoRA lie from the held-out answers, measure by measure."
        yield ("figure", "answer-style", answer_plots.style_distances("answer-style", measures), caption)


def comparison(ledger, summary):
    """The writeup's Triton and vLLM at 16 users beside what the same vLLM gives on such a card, and an estimate."""
    yield "What was the writeup's Triton-against-vLLM comparison worth?"
    printed = {who: of[h100.USERS] for who, of in h100.published(summary).items() if h100.USERS in of}
    measured = h100.measured(summary)
    if len(measured) < len(h100.GPTQ):
        yield not_measured("make bench EXPERIMENT=gptq-fast")
    else:
        estimate = h100.estimate_at(h100.read_estimates(ledger))
        words = comparison_words(printed, *(number["value"] for number in measured.values()))
        yield ("text", words + estimate_words(printed, estimate))
        entries = [(f"published: {who}", rate, "published") for who, rate in printed.items()]
        entries += [(label, number["value"], "measured", *ends(number)) for label, number in measured.items()]
        if estimate:
            entries.append(
                ("estimated: TensorRT-LLM, bf16", estimate["tokens_per_second"], "estimated", *ends(estimate))
            )
        caption = (
            "Output tokens/s for 16 users, 512 tokens in, 256 out, Llama-2-7B shape on an H100, in 4 bits unless said; "
            "measured with random weights, vLLM 0.25.0 with a vocabulary of 32,000. Hollow: estimated, with its band."
        )
        drawn = answer_plots.bars("answer-comparison", entries, panel_title(RATE))
        yield ("figure", "answer-comparison", drawn, caption)
    yield ("link", "Serving: every point with its interval and checks", "serving.html")


def ends(number):
    return number["low"], number["high"]


def comparison_words(printed, same, free, newer):
    """What the flag and the age of the writeup's vLLM were worth, in tokens/s."""
    than = "each more than" if min(same, free, newer) > printed["Triton"] else "beside"
    return (
        f"Little: its vLLM ran with a flag that forces a slow kernel. Published are {printed['vLLM']:,} tokens/s for "
        f"vLLM and {printed['Triton']:,} for Triton. On our H100 the same command gives {same:,.0f}, without the flag "
        f"{free:,.0f}, in vLLM 0.25.0 {newer:,.0f}: {than} the figure for Triton. Why the writeup got less than "
        f"{same:,.0f} is not explained, and TensorRT-LLM itself was not measured here."
    )


def estimate_words(printed, estimate):
    """What NVIDIA's kernel measurements let expect of the engine that was not measured; empty without an estimate."""
    if not estimate:
        return ""
    rate, low, high = (f"{estimate[key]:,.0f}" for key in ("tokens_per_second", "low", "high"))
    below = " The published Triton lies below that." if printed["Triton"] < estimate["low"] else ""
    return f" Estimated from NVIDIA's kernel measurements, it gives {rate} [{low}, {high}] unquantised.{below}"


def same_engine(summary):
    """A sentence on Triton in front of the engine that also answers alone: tokens/s as a share of the engine's own."""
    for name, run in summary["runs"].items():
        for experiment in run["experiments"].values():
            engine, shares = engines(experiment), []
            for row in experiment["comparisons"]:
                ratio = (row["numbers"] or {}).get(RATE)
                if not ratio or ratio["low"] is None:  # not valid, or fewer than three repeats
                    continue
                if (engine[row["server"]] or "").startswith(f"{engine[row['divided_by']]} behind"):
                    shares.append(
                        f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] for {users_in(row['load'])}"
                    )
            if shares:
                return f"Of the same engine's tokens/s without it, Triton gave {' and '.join(shares)} ({name})."
    return "One and the same engine with and without Triton was not measured."


def users_in(load):
    """c=1 in words."""
    return "1 user" if load == "c=1" else f"{load.removeprefix('c=')} users" if load.startswith("c=") else load


def triton_cost(ledger, summary):
    """Triton in front of one and the same engine, and the wait behind one BLS instance."""
    yield "What does Triton cost in front of an engine?"
    studied = [(name, data) for name, data in of_runs(ledger, "streaming") if data["bls"]]
    if not studied:
        yield not_measured("make streaming")
    else:
        name, data = studied[0]
        cases = {(row["model"], row["instances"], row["concurrency"]): row for row in data["bls"]}
        waits = [
            (label, row["ttft_ms"], "measured")
            for label, key in (("ensemble", None), ("BLS, 1 instance", 1), ("BLS, 2 instances", 2))
            for (_, instances, users), row in cases.items()
            if instances == key and users == 2
        ]
        words = ", ".join(f"{label} {wait:,.0f} ms" for label, wait, _ in waits)
        yield (
            "text",
            f"{same_engine(summary)} A BLS model (Triton's Python script of a model's steps) answers one request an "
            f"instance, so the second of two users waits for the first's whole answer. First token: {words} "
            f"({name}, {'a stand-in for TensorRT-LLM' if data['engine_is_stand_in'] else data['engine']}).",
        )
        drawn = answer_plots.bars("answer-triton", waits, "first token after ms (median), two users")
        yield ("figure", "answer-triton", drawn, "Wait for the first token with two users, by Triton's model.")
    yield ("link", "Streaming and several adapters", "streaming.html")
