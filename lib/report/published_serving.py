"""
The serving points that the main writeup published, as blocks (lib/report/page.py), beside what a card of its kind allows.
"""

from lib.analysis.summary import CARD, limit
from lib.claims.format import show
from lib.report.limits import most_bandwidth
from lib.report.result_files import found_in
from lib.report.serving_points import NUMBERS

# The points: server, concurrency, formats of weights and of keys and values, and the claims that hold throughput, per
# user, first token, ITL.
AWQ, GPTQ = ("int4-g128-zeros", "int8"), ("int4-g128", "bf16")
STREAMED = ("throughput", "per-user-avg", "ttft-avg", "itl-avg")
POINTS = (
    ("Triton, TensorRT-LLM", 1, AWQ, [f"stream-c1-{name}" for name in STREAMED]),
    ("Triton, TensorRT-LLM", 2, AWQ, [f"stream-c2-{name}" for name in STREAMED]),
    ("Triton, TensorRT-LLM", 16, AWQ, ["triton-throughput", None, None, None]),
    ("vLLM 0.11.0", 16, GPTQ, ["triton-vllm-throughput", None, None, None]),
)


def published(ledger, claims):
    """The published points, and their share of what such a card allows, where a run has measured one."""
    measured = found_in(ledger, "limits/limits.json")
    cards = {name: limits for name, limits in measured if limits["device"].startswith(CARD)}
    best = most_bandwidth(cards) if cards else None
    words = "Published, for ELYZA 7B in 4 bits on one H100, 512 tokens in, 256 asked for, lengths not controlled"
    yield ("text", words + (f" (the limit: of the card in {best}, for just these lengths):" if best else ":"))
    rows = []
    for server, level, formats, ids in POINTS:
        rate, *others = (claims[name]["value"] if name else None for name in ids)
        share = f"{rate / limit(cards[best], formats, level):.0%}" if best else "—"
        rows.append([server, str(level), show(rate), share, *map(show, others)])
    rate, *others = NUMBERS.values()
    yield ("table", ["server", "concurrency", rate, "of the limit", *others], rows)
