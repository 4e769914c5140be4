"""
The inputs of the benchmark's clients: the load of a point, the prompts that all servers get, and the random weights of
a shape.
"""

from lib.model.shapes import INDEX
from lib.serving.load import Load
from lib.serving.process import run_client
from lib.serving.servers import OURS


def load_of(p, server, point, work):
    """The load of a point, as both clients take it."""
    options = server.client(p, point.output_tokens)
    return Load(
        url=options["url"],
        model=options["model"],
        concurrency=point.concurrency,
        requests=p.requests(point.concurrency),
        warmup=p.warmup(point.concurrency),
        input_tokens=point.input_tokens,
        output_tokens=point.output_tokens,
        prompts=prompts_file(work, point.input_tokens),
        tokenizer=server.inputs.served_model(p.model),
        seed=p.seed,
        folder=work / "raw" / str(point),
        options=options | client_variant_options(p, point),
    )


def client_variant_options(p, point):
    """genai-perf's options for what the client variant asks for; None takes away an option of every load."""
    options = {"warmup-request-count": p.warmup(point.concurrency) if p.warmup_requests else None}
    if not p.pinned:
        options["output-tokens-stddev"] = None
    if p.prompts == "synthetic":
        options |= {"synthetic-input-tokens-mean": point.input_tokens, "synthetic-input-tokens-stddev": 0}
        options["input-file"] = None
    return options


def prompts_file(work, tokens):
    return work / f"prompts-{tokens}.jsonl"


def prompts_command(p, inputs, tokens, work):
    """As many prompts as the largest point sends, warm-up and all, so that none is sent twice."""
    variants = [p.with_variant(name) for name in p.variants]
    count = max(
        variant.requests(concurrency) + variant.warmup(concurrency)
        for variant in variants
        for concurrency in p.concurrency
    )
    words = [inputs.served_model(p.model), tokens, count, p.seed, prompts_file(work, tokens)]
    return ["python3", "stages/workers/prompts.py", *(str(word) for word in words)]


def make_inputs(p, inputs, images, work):
    """Make the prompts of each length, once for all servers, variants and repeats, and a shape's random weights."""
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
