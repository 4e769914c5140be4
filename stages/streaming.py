"""
The writeup's three streaming prompts to one idle server, and what one BLS instance does to two requests at once:
python -m stages.streaming SERVER SERVER_IMAGE CLIENT_IMAGE

in:   data/streaming_prompts.json, results/<profile>/base_model, results/<profile>/dataset/metrics.json (the template),
      results/<profile>/machine/machine.json, for triton results/<profile>/repository/base
out:  results/<profile>/streaming/SERVER/streaming.json   times by client and prompt, and by BLS instances
      results/<profile>/streaming/SERVER/raw/              what was asked and answered, the servers' logs

The base model answers, as in the writeup, whose client names no adapter. Medians, with the range beside them.
"""

import re
import shutil
import statistics
import sys
from dataclasses import dataclass

from lib.core.provenance import write_metrics
from lib.core.stage import UserError, check_bounds, read_json, read_params, results, run, write_json
from lib.serving.answers import URL
from lib.serving.process import run_client, serving
from lib.serving.servers import SERVERS, Inputs
from lib.streaming.http import Request
from lib.streaming.load import begin, in_template, load, write_not_measured
from stages.workers.stream_client import CLIENTS

CLIENTS_OF = {"triton": {"triton": URL, "triton-stream": "127.0.0.1:8001"}, "vllm": {"vllm": URL}}
BLS = "tensorrt_llm_bls"


@dataclass
class Streaming:
    servers: list
    prompts: str
    max_new_tokens: int
    repeats: int
    bls_instances: list
    bls_concurrency: list
    bls_requests: int
    bls_tokens: int
    seed: int
    ready_seconds: int
    client_seconds: int
    server_options: list

    def __post_init__(self):
        if unknown := [name for name in self.servers if name not in CLIENTS_OF]:
            raise UserError(f"params.yaml: streaming.servers has {unknown[0]!r}; use {', '.join(CLIENTS_OF)}")
        ones = ("max_new_tokens", "repeats", "bls_requests", "bls_tokens", "ready_seconds", "client_seconds")
        check_bounds("streaming", self, dict.fromkeys(ones, 1) | {"seed": 0})
        for name in ("bls_instances", "bls_concurrency"):
            if any(type(number) is not int or number < 1 for number in getattr(self, name)):
                raise UserError(f"params.yaml: streaming.{name} is {getattr(self, name)}; use whole numbers from 1")


def prompt_loads(p, kind, model, prompts):
    """Every prompt once to warm up, then `repeats` times in turn, by each client of the server."""
    asked = [Request(text, None, p.max_new_tokens, 0, 0.0, 1.0, p.seed) for text in prompts.values()]
    return [load(client, url, model, asked * (1 + p.repeats)) for client, url in CLIENTS_OF[kind].items()]


def bls_cases(p):
    """(case, model, instances, concurrency): the ensemble and every instance count, at every concurrency."""
    models = {"ensemble": None, **{f"{BLS}_{count}": count for count in p.bls_instances}}
    return [
        (f"{model.removeprefix('tensorrt_llm_')}-{concurrency}", model, count, concurrency)
        for concurrency in p.bls_concurrency
        for model, count in models.items()
    ]


def bls_loads(p, folder, text):
    """One round to warm up and the measured ones, for each case."""
    asked = Request(text, None, p.bls_tokens, p.bls_tokens, 0.0, 1.0, p.seed)
    url, loads = CLIENTS_OF["triton"]["triton-stream"], []
    for _, model, _, concurrency in bls_cases(p):
        for rounds in (1, p.bls_requests):
            loads.append(load("triton-text", url, folder, [asked] * (concurrency * rounds), concurrency, model=model))
    return loads


def write_bls_models(source, out, counts):
    """A model repository of BLS models that differ in the number of instances only, named after it."""
    for count in counts:
        shutil.copytree(source, out / f"{BLS}_{count}", ignore=shutil.ignore_patterns("__pycache__"))
        config = out / f"{BLS}_{count}" / "config.pbtxt"
        text, named = re.subn(rf'(?m)^name: "{BLS}"', f'name: "{BLS}_{count}"', config.read_text())
        text, counted = re.subn(r"\bcount: *\d+", f"count: {count}", text)
        if (named, counted) != (1, 1):
            raise UserError(f"{source}/config.pbtxt: want one name and one count in it, found {named} and {counted}")
        config.write_text(text)


def spread(name, values):
    """{name: median, name_min, name_max}; None where nothing was measured."""
    values = [value for value in values if value is not None]
    if not values:
        return {name: None, f"{name}_min": None, f"{name}_max": None}
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def by_prompt(client, answered, prompts):
    """One row a prompt of a client's answers, the first of each left out; a client that does not stream has no TTFT."""
    rows = []
    for number, name in enumerate(prompts):
        answers = answered["answers"][number :: len(prompts)][1:]
        firsts = [answer["ttft_seconds"] if CLIENTS[client].streams else None for answer in answers]
        rates = [answer["tokens"] / answer["seconds"] if answer["tokens"] else None for answer in answers]
        rows.append(
            {
                "prompt": name,
                **spread("ttft_seconds", firsts),
                **spread("seconds", [answer["seconds"] for answer in answers]),
                **spread("tokens_per_second", rates),
                "tokens": answers[0]["tokens"],
                "tokens_counted": CLIENTS[client].counts,
                "same_text_every_time": len({answer["text"] for answer in answers}) == 1,
                "text": answers[0]["text"],
            }
        )
    return rows


def by_case(p, answered_loads):
    """One row a BLS case: TTFT, and the tokens of all requests over the wall time."""
    rows = []
    for (case, model, count, concurrency), answered in zip(bls_cases(p), answered_loads[1::2], strict=True):
        row = {"case": case, "model": model, "instances": count, "concurrency": concurrency}
        firsts = spread("ttft_ms", [1000 * answer["ttft_seconds"] for answer in answered["answers"]])
        rate = len(answered["answers"]) * p.bls_tokens / answered["wall_seconds"]
        rows.append({**row, "requests": len(answered["answers"]), **firsts, "tokens_per_second": rate})
    return rows


def measure(p, kind, images, out):
    """Start the server once and ask it everything; returns what streaming.json says."""
    prompts = {name: in_template(text, results("dataset")) for name, text in read_json(p.prompts).items()}
    server = SERVERS[kind]("base", Inputs(results("base_model"), results("repository")))
    folder = results("base_model") / "model"
    loads = prompt_loads(p, kind, folder, prompts)
    command = ["containers/run", images[0], *server.command(p.server_options)]
    if kind == "triton":
        write_bls_models(results("repository") / "base" / "models" / BLS, out / "models", p.bls_instances)
        command += ["--model-repository", str(out / "models")]
        loads += bls_loads(p, folder, next(iter(prompts.values())))
    asked, answers = out / "raw" / "ask.json", out / "raw" / "told.json"
    write_json(asked, loads)
    client = ["containers/run", images[1], "python3", "-m", "stages.workers.stream_client", str(asked), str(answers)]
    print(f"streaming: starting {images[0]}", flush=True)
    log = out / "raw" / "server.log"
    with serving(server, command, log, p.ready_seconds, "streaming.ready_seconds") as (process, ready):
        engine, is_stand_in = server.engine()
        weights, cache = server.formats(p.server_options)
        print(f"streaming: {engine} is ready after {ready:.0f} s", flush=True)
        log = out / "raw" / "client.log"
        run_client("streams.py", client, log, process, p.client_seconds, "streaming.client_seconds")
    shutil.rmtree(out / "models", ignore_errors=True)
    loads_answered = read_json(answers)
    clients = list(CLIENTS_OF[kind])
    by_client = {
        name: by_prompt(name, answered, prompts) for name, answered in zip(clients, loads_answered, strict=False)
    }
    bls = by_case(p, loads_answered[len(clients) :]) if kind == "triton" else None
    facts = {"engine": engine, "engine_is_stand_in": is_stand_in, "weights_format": weights, "kv_format": cache}
    return {**facts, "server_command": command, **by_client, "bls": bls}


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in CLIENTS_OF:
        known = ", ".join(CLIENTS_OF)
        raise UserError(
            f"usage: python -m stages.streaming SERVER SERVER_IMAGE CLIENT_IMAGE, with SERVER one of {known}"
        )
    kind, *images = sys.argv[1:]
    p = read_params(Streaming)
    out = results("streaming") / kind
    facts = begin(out, results("base_model")) | {
        "max_new_tokens": p.max_new_tokens,
        "repeats": p.repeats,
        "not_measured": None,
    }
    reason = (
        f"params.yaml: streaming.servers has no {kind}"
        if kind not in p.servers
        else SERVERS[kind]("base", Inputs(results("base_model"), results("repository"))).not_built()
    )
    if reason:
        write_not_measured(out / "streaming.json", facts, reason)
        return
    measured = measure(p, kind, images, out)
    write_metrics(out / "streaming.json", {**facts, **measured})
    for name in CLIENTS_OF[kind]:
        for row in measured[name]:
            first = f"first token after {row['ttft_seconds']:.3f} s, " if row["ttft_seconds"] else ""
            print(f"streaming: {name}, {row['prompt']}: {first}{row['tokens']} tokens in {row['seconds']:.2f} s")
    for row in measured["bls"] or []:
        rate = f"{row['tokens_per_second']:.1f} tokens/s"
        print(f"streaming: {row['case']}: first token after {row['ttft_ms']:.0f} ms, {rate}")


if __name__ == "__main__":
    run(main)
