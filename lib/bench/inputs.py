"""
What the benchmark gives its client: genai-perf's command for a point, the prompts that all servers get, and the random
weights of a shape.
"""

from lib.model.shapes import INDEX
from lib.serving.clients import prompts_file
from lib.serving.process import run_client
from lib.serving.servers import OURS


def prompts_command(p, inputs, tokens, work):
    """As many prompts as the largest point sends, warm-up and all, so that none is sent twice."""
    variants = [p.with_variant(name) for name in p.variants]
    count = max(variant.requests(one) + variant.warmup(one) for variant in variants for one in p.concurrency)
    words = [inputs.served_model(p.model), tokens, count, p.seed, prompts_file(work, tokens)]
    return ["python3", "stages/workers/prompts.py", *(str(word) for word in words)]


def make_inputs(p, inputs, images, work):
    """The prompts of exactly so many tokens, once for all servers, variants and repeats; a shape's random weights."""
    if p.model not in OURS and not (inputs.served_model(p.model) / INDEX).exists():
        words = [*p.model.split(":"), inputs.served_model(p.model), p.seed]
        command = ["containers/run", images["vllm"], "python3", "-m", "stages.workers.random_weights", *map(str, words)]
        print(f"making random weights of {p.model}", flush=True)
        run_client("random_model", command, work / "random_model.log", None, p.ready_seconds, "bench.ready_seconds")
    loads = [p.with_variant(name) for name in p.variants]
    # vllm bench serve makes its prompts itself; these warm the server up.
    if any(load.prompts == "unique" or load.client != "genai-perf" for load in loads):
        for tokens in sorted({tokens for tokens, _ in p.lengths}):
            command = ["containers/run", images["client"], *prompts_command(p, inputs, tokens, work)]
            run_client("prompts.py", command, work / "prompts.log", None, p.point_seconds, "bench.point_seconds")
