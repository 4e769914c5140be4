"""
What the benchmark gives its client: genai-perf's command for a point, the prompts that all servers get, and the random
weights of a shape.
"""

from stages.random_model import INDEX
from stages.servers import OURS, served_model
from stages.serving import run_client
from stages.stage import flags


def client_command(p, server, point, work):
    """genai-perf for one point: streaming, and what the experiment asks for."""
    options = {
        **server.client(p, point.output_tokens),
        "streaming": True,
        "tokenizer": served_model(p.model),
        "concurrency": point.concurrency,
        "request-count": p.requests(point.concurrency),
        **({"warmup-request-count": p.warmup(point.concurrency)} if p.warmup_requests else {}),
        **prompt_options(p, point, work),
        "output-tokens-mean": point.output_tokens,
        **({"output-tokens-stddev": 0} if p.pinned else {}),
        "random-seed": p.seed,
        "artifact-dir": work / "raw" / str(point),
    }
    return ["genai-perf", "profile", *flags(options)]


def prompt_options(p, point, work):
    """The same unique prompts for every server, or genai-perf's own."""
    if p.prompts == "unique":
        return {"input-file": prompts_file(work, point.input_tokens)}
    return {"synthetic-input-tokens-mean": point.input_tokens, "synthetic-input-tokens-stddev": 0}


def prompts_file(work, tokens):
    return work / f"prompts-{tokens}.jsonl"


def prompts_command(p, tokens, work):
    """As many prompts as the largest point sends, warm-up and all, so that none is sent twice."""
    arms = [p.with_arm(name) for name in p.arms]
    count = max(arm.requests(one) + arm.warmup(one) for arm in arms for one in p.concurrency)
    words = [served_model(p.model), tokens, count, p.seed, prompts_file(work, tokens)]
    return ["python3", "containers/client/prompts.py", *(str(word) for word in words)]


def make_inputs(p, images, work):
    """The prompts of exactly so many tokens, once for all servers, arms and repeats; a shape's random weights."""
    if p.model not in OURS and not (served_model(p.model) / INDEX).exists():
        words = [*p.model.split(":"), served_model(p.model), p.seed]
        command = ["containers/run", images["vllm"], "python3", "-m", "stages.random_model", *map(str, words)]
        print(f"making random weights of {p.model}", flush=True)
        run_client("random_model", command, work / "random_model.log", None, p.ready_seconds, "bench.ready_seconds")
    if "unique" in {p.with_arm(name).prompts for name in p.arms}:
        for tokens in sorted({tokens for tokens, _ in p.lengths}):
            command = ["containers/run", images["client"], *prompts_command(p, tokens, work)]
            run_client("prompts.py", command, work / "prompts.log", None, p.point_seconds, "bench.point_seconds")
