"""
The most that a machine allows of a served point: the roofline of its model at its load.
"""

from lib.analysis.metrics import RATE
from lib.analysis.roofline import BITS, KV_BYTES, closed_loop, decode_step, rates, seconds
from lib.model.shapes import read_shape

# The writeup's serving points: 7B on one H100, 512 tokens in, 256 out.
PUBLISHED_CARD, PUBLISHED_SHAPE, PUBLISHED_LENGTHS = "NVIDIA H100", "llama-2-7b", (512, 256)


def point_limit(data, point, limits):
    """{concurrency, tokens_per_second, per_user_tokens_per_second, itl_ms} that no engine exceeds at this load.

    `data` is the points.json of the point, `limits` the machine's limits.json. None where the format, the model's size
    or the machine's rates are unknown, and for speculative decoding, which reads the weights once for several tokens.
    """
    base, weights, kv = data["base_model"], data["weights_format"], data["kv_format"]
    if not limits or weights not in BITS or kv not in KV_BYTES or "config" not in base or speculates(data):
        return None
    config, machine = base["config"], rates(limits, tensor_parallel_gpus(data["server_command"]))
    tokens_in = round(point.get("input_tokens") or point["input_tokens_asked"])
    tokens_out = round(point.get("output_tokens") or point["output_tokens_asked"])
    loop = closed_loop(config, weights, kv, machine, point["concurrency"], tokens_in, tokens_out)
    step = seconds(decode_step(config, weights, kv, point["concurrency"], tokens_in + tokens_out // 2), machine)
    if not step or not loop["tokens_per_second"]:
        return None
    return {
        "concurrency": point["concurrency"],
        "tokens_per_second": loop["tokens_per_second"],
        "per_user_tokens_per_second": 1 / step,
        "itl_ms": 1000 * step,
    }


def limit_share(point, limit):
    """Throughput over the limit; None where either is unknown."""
    rate = point[RATE]
    return rate / limit["tokens_per_second"] if limit and rate else None


def published_limit(limits, formats, concurrency):
    """The most output tokens/s that a card with these limits allows at the writeup's shape and lengths."""
    config = read_shape(PUBLISHED_SHAPE, "the shape is")
    return closed_loop(config, *formats, rates(limits), concurrency, *PUBLISHED_LENGTHS)["tokens_per_second"]


def most_bandwidth(runs):
    """The run, of {name: limits}, that measured the most bandwidth."""
    return max(runs, key=lambda name: runs[name]["bytes_per_second"] or 0)


def speculates(data):
    """Whether a server decodes speculatively."""
    return any("--speculative" in word for word in data["server_command"] or [])


def tensor_parallel_gpus(command):
    """The GPUs that share the model, out of the words that started the server."""
    for word in command or []:
        name, _, number = word.partition("=")
        if name in ("--tensor-parallel-size", "--tp_size"):
            return int(number)
    return 1
