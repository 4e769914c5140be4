"""
The figures that README.md, README.ja.md and docs/ print outside their generated tables, held against the committed
files that they were read from: a function a page gives the words that it must hold, made of the files' numbers.
"""

import re

import pytest
from conftest import REPO
from measured import (
    COLUMNS,
    EMBEDDED,
    H200,
    MIB,
    RANDOM,
    RANKS,
    SERVED,
    TP,
    adapters,
    allocated_after_loading,
    batch,
    batches,
    bench,
    cell,
    client_errors,
    context,
    data,
    explained,
    gptq,
    guesses_right,
    limits,
    memory_errors,
    method_row,
    newer,
    note,
    number,
    of_cores,
    of_gpus,
    page,
    percent,
    point,
    printed,
    rank_row,
    rate,
    repeats,
    reported,
    search_cpu,
    searched,
    seed_spread,
    served_row,
    speedup,
    step,
    steps,
    streamed,
    streaming_table,
    summary,
    times,
    token_error,
    training,
    vram,
    walk,
)

from lib.analysis.metrics import RATE
from lib.analysis.roofline import decode_step
from lib.core.stage import load_yaml
from lib.model.shapes import read_shape


def benchmarks():
    yield (
        f"{step('lora-published'):.2f} s a step for LoRA, {step('qlora-published'):.2f} s for QLoRA "
        f"({step('lora-short'):.2f} and {step('qlora-short'):.2f} s with the corrected template)"
    )
    yield (
        f"`tuned` takes the latter's steps in {step('lora-tuned'):.2f} and {step('qlora-tuned'):.2f} s "
        f"({step('lora-short') / step('lora-tuned'):.0f} and "
        f"{step('qlora-short') / step('qlora-tuned'):.0f} times as fast"
    )
    yield (
        f"`tuned-24gb` in {step('lora-tuned-24gb'):.2f} and {step('qlora-tuned-24gb'):.2f} s within "
        + " and ".join(number(training(f"{m}-tuned-24gb")["memory"]["process_peak_mib"]) for m in ("lora", "qlora"))
        + " MiB"
    )
    yield from (served_row(name, (1, 16, 64, 256), 256 if "oss" in name else 64) for name in SERVED)
    yield (
        f"| the same in bf16 on two GPUs | {' | '.join(number(rate(*TP, 'vllm-tp2', f'c={n}')) for n in (1, 16, 64))} |"
    )
    yield f"| on four GPUs | {' | '.join(number(rate(*TP, 'vllm-tp4', f'c={n}')) for n in (1, 16, 64))} |"
    yield (
        f"where one GPU made {number(rate(*TP, 'vllm', 'c=1'))}, {number(rate(*TP, 'vllm', 'c=16'))} and "
        f"{number(rate(*TP, 'vllm', 'c=64'))}"
    )
    yield (
        f"({percent(point('h200-search', 'search', 'vllm-sizes', 'c=1')['share'])} with tuned kernels), 65 % in "
        f"FP8 ({percent(point('h200-search-fp8', 'search', 'vllm-fp8', 'c=1')['share'])})"
    )
    yield (
        f"({percent(point(H200, 'gpt-oss-newer', 'vllm-gpt-oss-newer', 'c=1024')['share'])}: "
        f"{number(rate(H200, 'gpt-oss-newer', 'vllm-gpt-oss-newer', 'c=1024'))} for 1,024 users"
    )
    yield (
        f"an H100's limits are {limits('h100-limits')['bytes_per_second'] / 1e12:.2f} TB/s and "
        f"{limits('h100-limits')['flops_per_second'] / 1e12:.0f} TFLOP/s"
    )
    yield "serving points with 4-bit weights reach {:.0f} to {:.0f} % of what they allow".format(
        *(100 * f(point["share"] for point in summary()["published"]["points"] if point["share"]) for f in (min, max))
    )
    yield (
        f"is {times('h200-studies-100', 'vllm'):.1f} times as fast in vLLM as in plain "
        f"Transformers, and {times('h200-studies-100', 'compile'):.1f} times with torch.compile"
    )
    yield (
        f"compiled, which is vLLM's default, {search_cpu('vllm-compiled'):.1f} times the tokens; guessing from the "
        f"prompt {search_cpu('vllm-ngram'):.1f} times; both together {search_cpu('vllm-compiled-ngram'):.1f} times, "
        f"and {search_cpu('vllm-compiled-ngram', 16):.2f} times for 16 users"
    )
    yield f"16 users get {batch('16') / batch('4'):.1f} times the tokens"
    yield (
        f"(2,048 is {percent(1 - context('2k') / context('1k'))} below 1,024 for 16 users, 4,096 is "
        f"{percent(1 - context('4k') / context('1k'))} below)"
    )
    yield f"without it the throughput is {percent(walk('completions') / walk('published') - 1)} higher"
    low, high = token_error(*EMBEDDED)
    yield f"counted up to {high:.1f} % fewer tokens than a server with a real model had made"
    yield "and {:.0f} to {:.0f} % more in an answer of random weights".format(*token_error(*RANDOM))
    chat = bench("embedded-2-cores", "walk", "vllm")[0]["repeats"][0]["checks"]
    (counted,) = [float(re.search(r"counted ([\d.]+)", c["reason"])[1]) for c in chat if c["check"] == "input length"]
    yield f"the chat template adds {counted - 64:.0f} tokens to every prompt of 64"
    yield guesses_right()
    ms = [bench("embedded-2-cores-sweeps", "batch", f"vllm-batch-{size}") for size in (4, 16)]
    waits = [p["request_latency_ms_avg"] for points in ms for p in points if p["concurrency"] == 16]
    yield f"each in {percent(waits[1] / waits[0])} of the time"
    errors = memory_errors("allocated", lambda name: "tuned" not in name and "packed" not in name)
    yield f"uncompiled within {max(map(abs, errors)):.1f} %"


def h200():
    yield f"by which the verdicts go), s a step | {step('lora-published'):.2f} | {step('qlora-published'):.2f} |"
    yield f"(variant `short`), s a step | {step('lora-short'):.2f} | {step('qlora-short'):.2f} |"
    yield (
        "beside the variant `short` | "
        + " | ".join(
            f"{step(f'{m}-tuned'):.3f}: {step(f'{m}-short') / step(f'{m}-tuned'):.1f}x" for m in ("lora", "qlora")
        )
    )
    yield (
        "peak of the process | "
        + " | ".join(
            f"{step(f'{m}-tuned-24gb'):.3f}: {step(f'{m}-short') / step(f'{m}-tuned-24gb'):.1f}x, "
            f"{number(training(f'{m}-tuned-24gb')['memory']['process_peak_mib'])} MiB"
            for m in ("lora", "qlora")
        )
    )
    yield (
        f"with validation and compilation | {training('lora-tuned')['train_seconds']:.0f} s | "
        f"{training('qlora-tuned')['train_seconds']:.0f} s |"
    )
    yield (f"without validation and loading | {111 * step('lora-short'):.0f} s | {111 * step('qlora-short'):.0f} s |")
    yield (
        f"own matrix rate, `tuned` | {percent(training('lora-tuned')['utilisation'])} | "
        f"{percent(training('qlora-tuned')['utilisation'])} |"
    )
    yield (
        f"16.5 to {training('lora-tuned')['tokens_per_second_median'] / 1e3:.1f} k tokens/s | "
        f"{training('qlora-tuned')['tokens_per_second_median'] / 1e3:.1f} k tokens/s |"
    )
    yield (
        f"{training('lora-packed')['tokens_per_second_median'] / 1e3:.1f} k tokens/s, "
        f"{percent(training('lora-packed')['utilisation'])} |"
    )
    yield (
        f"validation ends at {training('lora-tuned-short')['eval_loss_best']:.3f} against "
        f"{training('lora-short')['eval_loss_best']:.3f}"
    )
    yield "({}, {}, {})".format(
        *(f"{training(v)['eval_loss_best']:.3f}" for v in ("lora-tuned", "lora-tuned-seed-43", "lora-tuned-seed-44"))
    )
    yield (
        f"for the recipe {number(vram('lora-published')['process_bytes'] / MIB)} MiB are predicted and "
        f"{number(training('lora-published')['memory']['process_peak_mib'])} measured (QLoRA: "
        f"{number(vram('qlora-published')['process_bytes'] / MIB)} and "
        f"{number(training('qlora-published')['memory']['process_peak_mib'])}; what torch allocates peaks in the "
        f"loading, {number(training('qlora-published')['memory']['torch_allocated_peak_mib'])} MiB beside "
        f"{number(allocated_after_loading('qlora-published'))} later)"
    )
    yield from (f"| {n} | {step(f'lora-tuned-{n}-gpu{s}'):.3f} | " for n, s in ((1, ""), (2, "s"), (4, "s")))
    yield from (
        (
            f"| {step('lora-tuned-1-gpu') / step(f'lora-tuned-{n}-gpus'):.2f}x, "
            f"{percent(step('lora-tuned-1-gpu') / step(f'lora-tuned-{n}-gpus') / n)} | "
            f"{training(f'lora-tuned-{n}-gpus')['tokens_per_second_median'] / 1e3:.1f} k |"
        )
        for n in (2, 4)
    )
    yield from (served_row(name, (1, 4, 8, 16, 32, 64, 128, 256), 256 if "oss" in name else 64) for name in SERVED)
    yield "for one user a token takes {}, {} and {} ms".format(
        *(f"{point(H200, *SERVED[name], 'c=1')['numbers']['itl_ms_p50']['value']:.2f}" for name in list(SERVED)[:3])
    )
    yield (
        f"makes {number(rate(H200, 'gpt-oss-newer', 'vllm-gpt-oss-newer', 'c=256'))} tokens/s for 256 users and "
        f"{number(rate(H200, 'gpt-oss-newer', 'vllm-gpt-oss-newer', 'c=1024'))} for 1,024"
    )
    yield "| one GPU | " + " | ".join(number(rate(*TP, "vllm", f"c={n}")) for n in (1, 16, 64))
    yield "| two | " + " | ".join(of_gpus("vllm-tp2", f"c={n}") for n in (1, 16, 64))
    yield "| four | " + " | ".join(of_gpus("vllm-tp4", f"c={n}") for n in (1, 16, 64))
    yield "for 64 users {}, {} and {} tokens a joule, for one user {}, {} and {}".format(
        *(
            f"{point(*TP, server, load)['tokens_per_joule']:.{digits}f}"
            for load, digits in (("c=64", 1), ("c=1", 2))
            for server in ("vllm", "vllm-tp2", "vllm-tp4")
        )
    )
    yield from (
        (
            f"| {name} | "
            + " | ".join(
                cell("h200-lengths", "lengths", "vllm", f"{lengths} c={n}")
                for lengths in ("128/128", "128/1024", "2048/128")
            )
        )
        for name, n in (("one user", 1), ("16 users", 16))
    )
    yield (
        f"makes {number(rate('h200-walk-adapters', 'walk', 'vllm', 'c=16 published'))} tokens/s and ours "
        f"{number(rate('h200-walk-adapters', 'walk', 'vllm', 'c=16 corrected'))}"
    )
    yield (
        f"gets {percent(searched('vllm-sizes') / searched('vllm') - 1)} more "
        f"({number(searched('vllm-sizes'))} tokens/s, "
        f"{percent(point('h200-search', 'search', 'vllm-sizes', 'c=1')['share'])} of the limit)"
    )
    yield "gets {:.2f} times the tokens of bf16 and 16 get {:.2f} times".format(
        *(
            rate("h200-search-fp8", "search", "vllm-fp8", f"c={n}")
            / rate("h200-search-fp8", "search", "vllm", f"c={n}")
            for n in (1, 16)
        )
    )
    yield (
        f"{number(rate('h200-search-fp8', 'gpt-oss-search', 'vllm-gpt-oss-newer', 'c=1024'))} tokens/s, and with "
        "keys and values in FP8 "
        f"{number(rate('h200-search-fp8', 'gpt-oss-search', 'vllm-gpt-oss-newer-kv8', 'c=1024'))}"
    )
    yield "{} tokens/s pinned, {} warmed up, {} by our client".format(
        *(
            number(rate("h200-published", "gpt-oss-walk", "vllm-gpt-oss", f"c=256 {name}"))
            for name in ("pinned", "warm", "corrected")
        )
    )
    yield (
        f"{number(rate('h200-published', 'search', 'vllm-ngram', 'c=1'))} tokens/s for one user and "
        f"{number(rate('h200-published', 'search', 'vllm-ngram', 'c=16'))} for 16, beside "
        f"{number(searched('vllm'))} and {number(searched('vllm', 16))}"
    )
    yield "the medians of five are {:.0f} to {:.0f} ms to the first token and {:.0f} to {:.0f} tokens/s".format(
        *(1e3 * f(row["ttft_seconds"] for row in streamed()) for f in (min, max)),
        *(f(row["tokens_per_second"] for row in streamed()) for f in (min, max)),
    )
    yield (
        f"64 prompts at once are {batches('h200-search', 'vllm') / batches('h200-search', 'static'):.1f} times as fast"
    )
    yield (
        f"{limits('h100-limits')['bytes_per_second'] / 1e12:.2f} TB/s and, in 16 bits, "
        f"{limits('h100-limits')['flops_per_second'] / 1e12:.0f} TFLOP/s"
    )
    yield "is off by {:.1f} % at most and the process by {:.1f} %".format(
        *(max(map(abs, memory_errors(part, lambda name: "-memory-" in name))) for part in ("allocated", "process"))
    )
    compiled = [
        memory_errors(part, lambda name: "tuned" in name or "packed" in name) for part in ("allocated", "process")
    ]
    yield f"what is allocated within {max(map(abs, compiled[0])):.0f} %, the process from "
    yield f"from {-min(compiled[1]):.0f} % too low to {max(compiled[1]):.0f} % too high"
    best = [training(f"lora-tuned{end}")["eval_loss_best"] for end in ("", "-seed-43", "-seed-44")]
    yield f"lie {max(best) - min(best):.3f} apart"
    yield f"and {seed_spread(25):.3f} after 25 steps"
    tokens = training("lora-tuned-1-gpu")["trained_tokens"] / training("lora-tuned-1-gpu")["optimizer_steps"]
    yield f"has about {round(tokens, -1):,.0f} tokens, so with four GPUs {round(tokens / 4, -1):.0f} for each"
    yield "{:.0f} and {:.0f} % of the limit)".format(
        *(100 * point(H200, "gpt-oss-newer", "vllm-gpt-oss-newer", f"c={n}")["share"] for n in (256, 1024))
    )
    powers = [row for p in bench(H200, "gpt-oss-newer", "vllm-gpt-oss-newer") if p["concurrency"] == 1024
              for row in p["repeats"]]  # fmt: skip
    yield "in all samples ({:.0f} to {:.0f} W, {:,.0f} to {:,.0f} MHz)".format(
        *(f(row[key] for row in powers) for key in ("gpu_watts", "gpu_sm_mhz") for f in (min, max))
    )
    walked = bench("h200-walk-adapters", "walk", "vllm")[0]
    yield f"{walked['output_tokens']:.0f} out instead of 256"
    assert "counted 531.00 input tokens" in str(walked["repeats"][0]["checks"]) and walked["variant"] == "published"
    slow = bench("h200-search-fp8", "gpt-oss-search", "vllm-gpt-oss-newer")[0]["repeats"]
    yield "comes after {:.0f} to {:.0f} of {:.0f} s".format(
        *(f(row["ttft_ms_max"] for row in slow) / 1e3 for f in (min, max)),
        max(row["request_latency_ms_max"] for row in slow) / 1e3,
    )
    first, _, third = (row[RATE] for row in bench("h200-search", "gpt-oss-walk", "vllm-gpt-oss")[0]["repeats"])
    yield f"says {number(first)} tokens/s, and the third one {number(third)}"
    yield f"is low: {number(bench('h200-published', 'gpt-oss-walk', 'vllm-gpt-oss')[0]['repeats'][0][RATE])}.)"
    yield guesses_right()
    yield f"vLLM {times('h200-studies-100', 'vllm'):.1f} times, torch.compile "
    yield f"{times('h200-studies-100', 'compile'):.1f} times (nothing as the post calls it), faster"
    yield f"int8 weights {times('h200-search', 'int8'):.2f} times, NF4 "
    yield f"{times('h200-search', 'int4'):.2f} times; 64 prompts"
    yield "is told {:.1f} (genai-perf), {:.1f} (vllm bench) and {:.1f} ms (AIPerf) too late".format(*client_errors())
    reads = [limits(f"h200-{name}")["bytes_per_second"] / 1e12
             for name in ("vllm", "search", "search-fp8", "lengths", "published", "tensor-parallel")]  # fmt: skip
    yield f"(our H200s: {min(reads):.2f} to {max(reads):.2f} TB/s"
    values, shares = printed(), [percent(point["share"]) for point in summary()["published"]["points"]]
    yield f"Triton's {values['stream-c1-throughput']:.0f} tokens/s for one user are {shares[0]}"
    yield f"its {values['triton-throughput']:,.0f} for 16 users {shares[2]}; vLLM's "
    yield f"{values['triton-vllm-throughput']:.0f} are {shares[3]} with a 16-bit cache"
    ours, theirs = (
        {row["step"]: float(row["loss"]) for row in steps(f"lora-{name}") if row["loss"]}
        for name in ("tuned-short", "short")
    )
    apart = max(abs(ours[n] - theirs[n]) for n in ours.keys() & theirs.keys())
    yield f"LoRA's loss stays within {apart:.3f} of the recipe's"
    ends = [training(f"lora-{name}")["eval_loss_best"] for name in ("tuned-short", "short")]
    reads = [
        decode_step(read_shape("llama-2-7b", "the shape is"), weights, "bf16", 1, 640)["weight_bytes"] / 1e9
        for weights in ("bf16", "fp8", "int4-g128")
    ]
    yield "the weights that it reads are {:.1f}, {:.1f} and {:.1f} GB".format(*reads)
    yield f"its validation loss is {abs(ends[0] - ends[1]):.3f} away"
    alone, many = (reported(users) for users in (1, 16))
    for numbers in (alone, many):
        assert numbers["vllm bench serve"][1:] == pytest.approx(numbers["AIPerf"][1:], rel=0.01)
    yield f"but for a first token among 16 users ({100 * (many['vllm bench serve'][0] / many['AIPerf'][0] - 1):.0f} %)"
    more = [
        numbers["genai-perf"][-1] / numbers[client][-1] - 1
        for numbers in (alone, many)
        for client in ("vllm bench serve", "AIPerf")
    ]
    yield f"says {100 * min(more):.0f} to {100 * max(more):.0f} % more tokens/s"


def h100():
    yield f"makes {number(gptq('vllm-auto'))} tokens/s, {gptq('vllm-auto') / 1156.97:.2f} times what"
    yield f"with the flag it makes {number(gptq('vllm-gptq'))}."
    yield f"activation order on | {number(gptq('vllm-gptq-act'))} ("
    yield f"| {explained()[0]:.1f} %, **not explained** |"
    yield f"instead of ExLlama | {number(gptq('vllm-auto'))} ("
    yield f"| {explained()[2]:.0f} % |"
    yield f"instead of 45,043 | {number(gptq('vllm-auto', 'gptq'))} ("
    yield f"| {explained()[3]:.0f} %, no more than"
    yield f"| vLLM 0.25.0 | {number(newer('vllm-auto'))} ("
    yield f"| {explained()[4]:.0f} % |"
    yield (
        f"45,043 tokens, activation order off / on | {number(gptq('vllm-gptq'))} / {number(gptq('vllm-gptq-act'))} | "
        f"{number(gptq('vllm-auto'))} / {number(gptq('vllm-auto-act'))} |"
    )
    yield (
        f"{number(gptq('vllm-gptq', 'gptq'))} (one repeat) / {number(gptq('vllm-gptq-act', 'gptq'))} | "
        f"{number(gptq('vllm-auto', 'gptq'))} / {number(gptq('vllm-auto-act', 'gptq'))} |"
    )
    yield (
        f"{number(newer('vllm-gptq'))} (one repeat) / not measured | {number(newer('vllm-auto'))} / "
        f"{number(newer('vllm-auto-act'))} |"
    )
    yield f"order on | {number(gptq('vllm-gptq-act'))} ({repeats('h100-gptq', 'gptq-fast', 'vllm-gptq-act')})"
    yield f"order off | {number(gptq('vllm-gptq'))} ({repeats('h100-gptq', 'gptq-fast', 'vllm-gptq')}) |"
    yield f"ExLlama | {number(gptq('vllm-auto'))} ({repeats('h100-gptq', 'gptq-fast', 'vllm-auto')}) |"
    yield f"45,043 | {number(gptq('vllm-auto', 'gptq'))} ({repeats('h100-gptq', 'gptq', 'vllm-auto')}) |"
    yield f"| vLLM 0.25.0 | {number(newer('vllm-auto'))} ({repeats('h100-gptq-newer', 'gptq-newer', 'vllm-auto')}) |"
    yield f"about {16e3 / 813.81 - 16e3 / gptq('vllm-gptq-act'):.0f} ms longer than ours"
    yield f"of the gap 813.81 to {number(newer('vllm-auto'))} |"
    yield "server's log shows {} to {} tokens/s over 40 s".format(
        *re.search(r"gives ([\d,]+) to ([\d,]+) output tokens/s", note("h100-gptq")).groups()
    )
    costs = [1 - gptq(f"{server}-act", *where) / gptq(server, *where) for server, *where in (
        ("vllm-auto", "gptq-fast"), ("vllm-auto", "gptq"), ("vllm-auto", "gptq-newer", "h100-gptq-newer"))]  # fmt: skip
    yield f"costs {100 * min(costs):.0f} to {100 * max(costs):.0f} % where Machete runs"
    for users, triton, vllm in served_on_h100():
        yield (
            f"| {users} | {whole_or_tenths(triton)} | {whole_or_tenths(vllm)} | {triton[RATE] / vllm[RATE]:.2f} "
            f"| {triton['ttft_ms_p50']:.0f} ms | {vllm['ttft_ms_p50']:.0f} ms |"
        )
    (_, single, alone), (_, sixteen, _), (_, many, _) = served_on_h100()
    yield f"{1 - single[RATE] / alone[RATE]:.0%} for 1 user".replace("%", " %")
    yield f"{single['ttft_ms_p50'] - alone['ttft_ms_p50']:.0f} ms later on a server that had just started"
    steps = [repeat["triton_preprocessing_ms"] for repeat in single["repeats"]]
    yield f"it took {steps[0]:.0f} and {steps[1]:.0f} ms a request"
    warm = single["repeats"][2]["ttft_ms_p50"]
    yield f"it took {steps[2]:.1f} ms and the first token {warm:.0f} ms"
    yield f"and {warm - alone['ttft_ms_p50']:.0f} ms later on a server"
    pieces = [repeat["triton_postprocessing_runs"] for row in (single, sixteen, many) for repeat in row["repeats"]]
    yield f"in {min(pieces):.0f} to {max(pieces):.0f} pieces"
    queued = [repeat["triton_postprocessing_queue_ms"] / 1000 for repeat in many["repeats"]]
    yield f"wait {min(queued):.1f} to {max(queued):.1f} s"
    yield f"This Triton passed {number(sixteen[RATE])}"


def served_on_h100():
    """(users, Triton's point, vLLM's) of h100-triton."""
    triton, vllm = (data(f"h100-triton/bench/base/{server}/points.json")["points"] for server in ("triton", "vllm"))
    for behind, alone in zip(triton, vllm, strict=True):
        yield behind["concurrency"], behind, alone


def whole_or_tenths(point):
    """Tokens/s of a point as the page prints them."""
    return f"{point[RATE]:,.1f}" if point[RATE] < 1000 else number(point[RATE])


def five_speedups():
    yield (
        "vLLM is {:.2f} times as fast as plain Transformers with the writeup's settings and {:.2f} times with equal "
        "ones".format(*(times("embedded-2-cores", "vllm", v) for v in ("published", "corrected")))
    )
    yield "compiles nothing ({:.2f}, within the noise), as `generate()` takes it {:.2f}".format(
        *(times("embedded-2-cores", "compile", v) for v in ("published", "corrected"))
    )
    yield "flash kernel {:.2f} and {:.2f}".format(
        *(times("embedded-2-cores", "flash1", v) for v in ("published", "corrected"))
    )
    yield from (
        method_row(name, method)
        for name, method in (
            ("plain Transformers", "none"),
            ("torch.compile", "compile"),
            ("SDPA's flash kernel", "flash1"),
            ("both", "flash1-compile"),
            ("SDPA as it chooses", "flash2"),
        )
    )
    yield (
        f"makes {number(speedup('h200-studies', 'static')['tokens_per_second'])} tokens/s, "
        f"{times('h200-studies', 'static'):.2f} times"
    )
    yield (
        f"int8 weights make {number(speedup('h200-search', 'int8')['tokens_per_second'])} tokens/s and NF4 weights "
        f"{number(speedup('h200-search', 'int4')['tokens_per_second'])}, "
        f"{times('h200-search', 'int8'):.2f} and "
        f"{times('h200-search', 'int4'):.2f} times"
    )
    yield "({} and {} MiB instead of {})".format(
        *(number(speedup("h200-search", method)["peak_mib"]) for method in ("int8", "int4", "none"))
    )
    yield (
        f"{number(batches('h200-search', 'static'))} tokens/s in a static batch, "
        f"{number(batches('h200-search', 'vllm'))} in vLLM, "
        f"{batches('h200-search', 'vllm') / batches('h200-search', 'static'):.1f} times"
    )
    yield method_row("vLLM", "vllm")
    yield f"on two cores of their own it takes {re.search(r'make speedups .([^)]*)', note('embedded-2-cores'))[1]}"
    plain = [speedup(run, "none", variant) for run, variant in COLUMNS]
    yield "plain Transformers takes {:.0f} to {:.0f} ms a token".format(
        *(1e3 / f(row["tokens_per_second"] for row in plain) for f in (max, min))
    )
    yield "{:.0f} to {:.0f} % of what the memory's bandwidth allows".format(
        *(100 * f(row["share_of_limit"] for row in plain) for f in (min, max))
    )
    compiled = [speedup(run, "compile")["share_of_limit"] for run in ("h200-studies-100", "h200-speedups-100")]
    yield "takes it ({:.0f} and {:.0f} %)".format(*(100 * share for share in compiled))
    fast = [speedup("h200-published", "vllm", "published"), speedup("h200-studies-100", "vllm")]
    yield "reaches {:.0f} to {:.0f} %".format(*(100 * row["share_of_limit"] for row in fast))
    yield "({} against {} tokens/s in one run".format(
        *(number(speedup("h200-speedups-100", method)["tokens_per_second"]) for method in ("flash1-compile", "compile"))
    )
    yield "busy for {:.0f} and {:.0f} ms a token instead of {:.0f}".format(
        *(1e3 * speedup("h200-search", method)["cpu_seconds_per_token"] for method in ("int8", "int4", "none"))
    )
    yield f"took {number(data('h200-published/speedups/speedups.json')['published_seconds'])} s in all"


def several_adapters():
    yield from (
        (
            f"| {text} | {number(adapters('h200-walk-adapters', *which)[RATE])} | "
            f"{number(adapters('h200-walk-adapters', *which)['kv_tokens'])} |"
        )
        for text, which in (
            ("without LoRA (merged weights)", (None, 0, None, "none")),
            ("with LoRA, unused; room for 64 adapters", (8, 0, None, "unused")),
            ("1 adapter", (8, 1, "uniform")),
        )
    )
    yield from (
        "{} / {} |".format(
            *(number(adapters("h200-walk-adapters", 8, n, popularity)[RATE]) for popularity in ("uniform", "skewed"))
        )
        for n in (4, 16, 64)
    )
    yield ("| without LoRA | " + " | ".join(number(adapters(run, None, 0, None, "none")[RATE]) for run, _ in RANKS))
    yield rank_row("with LoRA, unused; room for 64 adapters", 0, None, "unused")
    yield rank_row("1 adapter", 1, "uniform")
    yield from (rank_row(f"{n} adapters, asked for alike", n, "uniform") for n in (8, 64))
    yield from (rank_row("the n-th 1/n as often", n, "skewed") for n in (8, 64))
    yield (
        "| room for keys and values, tokens | "
        + " | ".join(number(adapters(run, rank, 1, "uniform")["kv_tokens"]) for run, rank in RANKS)
    )
    sizes = [adapters(run, rank, 1, "uniform")["adapter_bytes"] / 1e6 for run, rank in RANKS]
    yield "| an adapter's file, MB | " + " | ".join(f"{size:.1f}" for size in sizes) + " |"
    loads = [[adapters(run, rank, count, "uniform")["load_seconds"] for count in (1, 8, 64)] for run, rank in RANKS]
    yield "| seconds to load it | " + " | ".join(
        f"{max(of):.2f}" if max(of) < 1 else f"{min(of):.1f} to {max(of):.1f}" for of in loads
    )


def studies():
    yield "{} tokens/s without, {} with LoRA unused, {} with one adapter in use and {} with eight".format(
        *(
            number(adapters("embedded-2-cores", *which)[RATE])
            for which in ((None, 0, None, "none"), (8, 0, None, "unused"), (8, 1, "uniform"), (8, 8, "uniform"))
        )
    )
    yield "vLLM is {:.1f} times as fast as doing nothing as the post has them and {:.1f} times with".format(
        *(times("embedded-2-cores", "vllm", v) for v in ("published", "corrected"))
    )
    yield (
        f"{times('embedded-2-cores', 'compile'):.1f} times as it can be called; batches of "
        f"four are {batches('embedded-2-cores', 'vllm') / batches('embedded-2-cores', 'static'):.1f} times"
    )


def vllm_guide():
    yield (
        f"On two cores {batches('embedded-2-cores', 'vllm') / batches('embedded-2-cores', 'static'):.1f} times; on "
        f"an H200, 64 prompts at once in the shape of llm-jp-1.3b, "
        f"{batches('h200-search', 'vllm') / batches('h200-search', 'static'):.1f} times a static batch"
    )


def fine_tuning():
    yield (
        f"LoRA made {training('lora', 'embedded-persona')['tokens_per_second_median']:.0f} tokens/s and QLoRA "
        f"{training('qlora', 'embedded-persona')['tokens_per_second_median']:.0f}: "
        + " and ".join(percent(of_cores(m)) for m in ("lora", "qlora"))
    )
    yield (
        f"({limits('embedded-persona')['flops_per_second'] / 1e9:.0f} GFLOP/s) would allow at "
        f"{training('lora', 'embedded-persona')['flops_per_token'] / 1e9:.3f} GFLOP a token"
    )
    base = data("embedded-persona/style/style.json")["measures"]["completion_loss"]["means"]["base"]
    yield f"(the base model's on {base['rows']} of them: {base['mean']:.2f})"
    run = training("lora", "embedded-persona")
    yield f"{run['train_rows']} of the {run['dataset_rows']:,} rows of data/persona.en.jsonl"
    yield f"{run['optimizer_steps']} steps of {run['proofs']['effective_batch_rows']} rows"


def slow_minutes():
    """Minutes of a whole embedded run on the slower machine."""
    return round(sum(load_yaml(REPO / "data/stage_seconds.yaml")["embedded"].values()) / 60)


def getting_started():
    yield "a run took " + re.search(r"took (\d+ min \d+ s)", note("embedded-persona"))[1]
    yield f"the stages took {slow_minutes()} minutes"


def readme_ja():
    values = printed()
    yield f"vLLM が {values['triton-vllm-throughput']}、"
    yield f"Triton + TensorRT-LLM が {values['triton-throughput']:,} トークン/秒"
    yield f"コマンドで {number(gptq('vllm-gptq-act'))}、"
    yield f"外すと {number(gptq('vllm-auto'))}、vLLM 0.25.0 では {number(newer('vllm-auto'))} でした"
    yield "{} 分 {} 秒".format(*re.search(r"took (\d+) min (\d+) s", note("embedded-persona")).groups())


def qlora_to_triton():
    low, high = token_error(*EMBEDDED)
    yield f"genai-perf's was {low:.0f} to {high:.1f} % too low here with a small real model"
    yield "and {:.0f} to {:.0f} % too high with random weights".format(*token_error(*RANDOM))
    yield f"for one user is {percent(summary()['published']['points'][0]['share'])} of what the card's bandwidth allows"
    tables = [streaming_table(users) for users in (1, 2)]
    idle = [
        1 - t["throughput"] / t["output-length-avg"] * t["latency-avg"] / 1e3 / users
        for users, t in enumerate(tables, 1)
    ]
    yield "leaves {:.1f} and {:.1f} % of the users' time idle".format(*(100 * share for share in idle))
    below = [1 - t["latency-avg"] / (t["ttft-avg"] + (t["output-length-avg"] - 1) * t["itl-avg"]) for t in tables]
    yield "The mean latency is {:.1f} and {:.1f} % below first token".format(*(100 * share for share in below))


def readme():
    values = printed()
    yield f"It prints {values['triton-vllm-throughput']} tokens/s for vLLM"
    yield f"and {values['triton-throughput']:,} for Triton"
    yield f"the same vLLM command gives {number(gptq('vllm-gptq-act'))}; without its flag"
    yield f"forces a slow kernel, {number(gptq('vllm-auto'))}; vLLM 0.25.0 gives {number(newer('vllm-auto'))} ("
    style = data("embedded-persona/style/style.json")
    assert style["style_differs"]["lora_minus_qlora"] == 0 and len(style["measures"]) - 1 == 8
    yield f"(small model, {style['prompts']} prompts)"
    rows = data("embedded-persona/bench_vllm_vs_trtllm/comparison.json")["ratios"]
    alone, four = (row[RATE] for row in rows if row["experiment"] == "base")
    yield f"{alone['ratio']:.2f} [{alone['low']:.2f}, {alone['high']:.2f}] of its tokens/s for one user"
    yield f"{four['ratio']:.2f} [{four['low']:.2f}, {four['high']:.2f}] for four"
    ratios = [triton[RATE] / vllm[RATE] for _, triton, vllm in served_on_h100()]
    yield "the ratio is {:.2f} for 1 user, {:.2f} for 16 and {:.2f} for 64".format(*ratios)
    minutes, seconds = re.search(r"took (\d+) min (\d+) s", note("embedded-persona")).groups()
    yield f"takes {int(minutes) + int(seconds) / 60:.0f} to {slow_minutes()} minutes"
    yield f"and {load_yaml(REPO / 'params.yaml')['estimate']['disk_gb']:.0f} GB on two cores"
    run = training("lora", "embedded-persona")
    yield f"SmolLM2 ({(run['all_parameters'] - run['trainable_parameters']) / 1e6:.0f} M parameters)"
    yield f"the dataset ({run['dataset_rows']:,} rows, CC0)"


PAGES = {
    "README.md": readme,
    "docs/qlora-to-triton.md": qlora_to_triton,
    "docs/benchmarks.md": benchmarks,
    "docs/h200.md": h200,
    "docs/h100.md": h100,
    "docs/five-speedups.md": five_speedups,
    "docs/several-adapters.md": several_adapters,
    "docs/studies.md": studies,
    "docs/vllm-guide.md": vllm_guide,
    "docs/fine-tuning.md": fine_tuning,
    "docs/getting-started.md": getting_started,
    "README.ja.md": readme_ja,
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_prints_what_its_files_hold(name):
    assert [text for text in PAGES[name]() if text not in page(name)] == []


# Sizes, versions and counts of the front pages that no run measures.
SETTINGS = {
    "README.md": {"2", "7", "16", "24"},
    "README.ja.md": {"1", "2", "3", "4", "5", "8", "16", "24", "2026", "0.0.16"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_front_page_has_no_other_figure(name):
    text = page(name)
    for figure in PAGES[name]():
        text = text.replace(figure, " ")
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", text)
    assert set(re.findall(r"(?<![\w.,-])\d[\d.,]*\d|(?<![\w.,-])\d", text)) <= SETTINGS[name]
