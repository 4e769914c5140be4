"""
Speed and memory of a running vLLM by the number, the rank and the popularity of its adapters (stages/multilora.py).

Adapters with random weights, loaded while the server runs. "none" is a server without LoRA: what merged weights cost,
for they have the base's shapes. "unused" is a server with LoRA whose requests name no adapter.
"""

import random
import re
import shutil
import statistics
import time
from contextlib import suppress

from lib.core.attempt import attempt
from lib.core.gpu import gpu_mib
from lib.serving.answers import URL, exposition
from lib.serving.containers import container_memory_mib, container_name
from lib.serving.process import session
from lib.serving.servers import Vllm
from lib.streaming.http import Request, post
from lib.streaming.load import in_template, load
from lib.text.rows import read_rows

POPULARITY = {"uniform": lambda rank: 1.0, "skewed": lambda rank: 1.0 / rank}  # skewed: Zipf's law


def questions(p, dataset):
    """Prompts of the dataset, as many as a point asks."""
    rows = read_rows(p.questions)
    return [
        in_template(rows[number % len(rows)]["instruction"], dataset) for number in range(p.requests + p.concurrency)
    ]


def draw_adapters(names, popularity, count, seed):
    """The adapter that each of `count` requests names, by popularity; the first name is the most popular."""
    weights = [POPULARITY[popularity](rank) for rank in range(1, len(names) + 1)]
    return random.Random(seed).choices(names, weights, k=count)


def point(p, asking, name, names, popularity):
    """One load on the running server; names: the adapters there are, empty for the base model alone."""
    texts = questions(p, asking.inputs.dataset)
    chosen = draw_adapters(names, popularity, len(texts), p.seed) if names else [None] * len(texts)
    asked = [
        Request(text, adapter, p.output_tokens, p.output_tokens, 0.0, 1.0, p.seed)
        for text, adapter in zip(texts, chosen, strict=True)
    ]
    warm, measured = asked[: p.concurrency], asked[p.concurrency :]
    # Every adapter once before: bringing it in is no part of the speed.
    first = {request.adapter: request for request in measured}.values()
    loads = [load("vllm", URL, asking.inputs.model, each, p.concurrency) for each in ([*first, *warm], measured)]
    answered = asking.ask(name, loads)[1]
    firsts = [1000 * answer["ttft_seconds"] for answer in answered["answers"]]
    tokens = sum(answer["tokens"] for answer in answered["answers"])
    return {
        "requests": len(measured),
        "adapters_asked_for": len({request.adapter for request in measured} - {None}),
        "output_tokens": tokens / len(measured),
        "output_tokens_per_second": tokens / answered["wall_seconds"],
        "ttft_ms_p50": statistics.median(firsts),
        "ttft_ms_max": max(firsts),
        **memory(asking.process),
    }


def memory(process):
    """MiB that the server's processes hold (None where its container does not tell) and the GPUs in all, and for how
    many tokens there is room for keys and values: on a GPU vLLM takes its share at the start, and what adapters take of
    it is missing there."""
    return {
        "resident_mib": attempt(resident_mib, process),
        "gpu_mib": gpu_mib(),
        "kv_tokens": kv_tokens(exposition(Vllm)),
    }


def resident_mib(process):
    """MiB that a program's living processes hold, in its container too."""
    import psutil

    total, containers = 0, []
    for pid in session(process):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            member = psutil.Process(pid)
            total += member.memory_info().rss
            containers.append(container_name(member.cmdline()))
    return total / 2**20 + sum(container_memory_mib(name) for name in containers if name)


def kv_tokens(text):
    """Blocks of vLLM's KV cache times their tokens, out of its metrics; None where they do not tell."""
    facts = re.search(r"^vllm:cache_config_info{(.*)}", text, re.MULTILINE)
    labels = dict(re.findall(r'(\w+)="(\d+)"', facts[1])) if facts else {}
    sizes = [int(labels[name]) for name in ("num_gpu_blocks", "block_size") if name in labels]
    return sizes[0] * sizes[1] if len(sizes) == 2 else None


def load_adapter(name, folder):
    """Load an adapter into the running vLLM under a name; returns the seconds it took."""
    begun = time.monotonic()
    post(f"{URL}/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())}).close()
    return time.monotonic() - begun


def study_rank(p, asking, rank):
    """Points of one server with LoRA of this rank: unused, then more and more adapters, by each popularity."""
    random_ones = asking.out / f"adapters-{rank}"
    words = [asking.inputs.model, random_ones, max(p.adapters), rank, p.seed, *p.target_modules]
    asking.client(f"random-{rank}", "stages/workers/random_lora.py", *words)
    bytes_each = (random_ones / "0" / "adapter_model.safetensors").stat().st_size
    same = {"rank": rank, "slots": p.slots, "adapter_bytes": bytes_each}
    points = [{"variant": "unused", "adapters": 0, "popularity": None, **same, "load_seconds": None,
               **point(p, asking, f"unused-{rank}", [], None)}]  # fmt: skip
    loaded, names = [], []
    for count in p.adapters:
        for number in range(len(names), count):
            loaded.append(load_adapter(f"random-{number}", random_ones / str(number)))
            names.append(f"random-{number}")
        for popularity in p.popularity if count > 1 else p.popularity[:1]:
            measured = point(p, asking, f"{popularity}-{count}-{rank}", names, popularity)
            points.append({"variant": "adapters", "adapters": count, "popularity": popularity, **same,
                           "load_seconds": statistics.median(loaded), **measured})  # fmt: skip
            print(f"multilora: {format_line(points[-1])}", flush=True)
    shutil.rmtree(random_ones)  # the seed makes them again
    return points


def format_line(point):
    adapters = f"{point['adapters']} adapters of rank {point['rank']}, {point['popularity']}"
    who = adapters if point["adapters"] else point["variant"]
    return f"{who}: {point['output_tokens_per_second']:.1f} tokens/s, first token after {point['ttft_ms_p50']:.0f} ms"
