"""
What the report and the comparison read of served points: limit, share, order.
"""

import re

from lib.analysis.roofline import BITS, KV_BYTES, closed_loop, decode_step, rates, seconds
from lib.bench.metrics import RATE, value
from lib.core.stage import read_json
from lib.model.shapes import read_shape

CARD, SHAPE, LENGTHS = "NVIDIA H100", "llama-2-7b", (512, 256)


def limit(measured, formats, concurrency):
    """The most output tokens/s that a card with these limits allows at the published lengths."""
    config = read_shape(SHAPE, "the shape is")
    return closed_loop(config, *formats, rates(measured), concurrency, *LENGTHS)["tokens_per_second"]


def load_of(data, point):
    """A load in a word: its concurrency, with lengths and arm where the experiment has several."""
    words = [f"{point['input_tokens_asked']}/{point['output_tokens_asked']}"] * (len(data["settings"]["lengths"]) > 1)
    words += [f"c={point['concurrency']}"]
    return " ".join(words + [point["arm"]] * (len(data["settings"]["arms"]) > 1))


def share(data, point, limits):
    """A point's throughput over the limit; 0 where either is not known."""
    limit, rate = bound(data, point, limits), value(point, RATE)
    return rate / limit["tokens_per_second"] if limit and rate else 0


def bound(data, point, limits):
    """{tokens_per_second, per_user_tokens_per_second, itl_ms}: what no engine exceeds for this load on this machine, by
    the lengths that the server counted; None where the format, the model's size or the machine's rates are not known,
    and for a server that guesses tokens: it reads the weights once for several.
    """
    base, weights, kv = data["base_model"], data["weights_format"], data["kv_format"]
    if not limits or weights not in BITS or kv not in KV_BYTES or "config" not in base or guesses(data):
        return None
    config, machine = base["config"], rates(limits, gpus(data["server_command"]))
    tokens_in = round(point.get("input_tokens") or point["input_tokens_asked"])
    tokens_out = round(point.get("server_output_tokens") or point["output_tokens_asked"])
    found = closed_loop(config, weights, kv, machine, point["concurrency"], tokens_in, tokens_out)
    step = seconds(decode_step(config, weights, kv, point["concurrency"], tokens_in + tokens_out // 2), machine)
    if not step or not found["tokens_per_second"]:
        return None
    return {
        "concurrency": point["concurrency"],
        "tokens_per_second": found["tokens_per_second"],
        "per_user_tokens_per_second": 1 / step,
        "itl_ms": 1000 * step,
    }


def experiments(folder):
    """{experiment: {server: points.json}} of a run, in the order of names with their numbers as numbers: the first
    server is what the others are divided by, vllm before vllm-batch-4 before vllm-batch-16."""
    found = {}
    for path in sorted(folder.glob("bench/*/*/points.json"), key=by_number):
        experiment, server = path.parts[-3:-1]
        found.setdefault(experiment, {})[server] = read_json(path)
    return found


def by_number(path):
    return [[int(word) if word.isdigit() else word for word in re.split(r"(\d+)", part)] for part in path.parts]


def same_answers(reference, data):
    """Whether a server computes what the first one computes, as far as its start says: the same formats; and guessed
    tokens only where the weights are real, for what random weights say is easy to guess."""
    formats = ("weights_format", "kv_format")
    random = data["base_model"]["weights"] == "random"
    return all(reference[name] == data[name] for name in formats) and not (guesses(data) and random)


def guesses(data):
    """Whether a server decodes speculatively."""
    return any("--speculative" in word for word in data["server_command"] or [])


def gpus(command):
    """The GPUs that share the model, out of the words that started the server."""
    for word in command or []:
        name, _, number = word.partition("=")
        if name in ("--tensor-parallel-size", "--tp_size"):
            return int(number)
    return 1
