"""
The accuracy of the load clients: python -m stages.client_accuracy CLIENT_IMAGE VLLM_IMAGE AIPERF_IMAGE

First against a server of known timing (stages/workers/mock_server.py), which keeps when it really wrote each token:
a client's report beside the truth, its seconds beyond the load, and its CPU time. Then against vLLM
with the base model: what the three say of the same server. Each part in the order A B C C B A, so that a machine that
drifts does so for all of them, and two runs of one client show how far apart runs are that differ in nothing.

in:   results/<profile>/machine/machine.json, results/<profile>/base_model
out:  results/<profile>/client_accuracy/client_accuracy.json    every run, and whose ITL is whose (CONVERSION)
      results/<profile>/client_accuracy/raw, *.log     the clients' own files and output, and what the mock wrote down
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

from lib.client_accuracy.truth import COUNTERS, judge_run, server_counts
from lib.core.provenance import write_metrics
from lib.core.stage import UserError, check_bounds, read_json, read_params, results, run, write_json
from lib.core.web import open_url
from lib.serving.answers import URL, read_metrics
from lib.serving.clients import CLIENTS
from lib.serving.load import Load, warm_up
from lib.serving.process import run_client, serving
from lib.serving.servers import Inputs, Vllm
from stages.workers.mock_server import MODEL, Mock

# Our name, its formula, and what each client calls it (None: it has no such number). Read in the sources named below.
CONVERSION = (
    ("ttft_ms", "first token's chunk - request sent", "Time To First Token", "TTFT", "Time to First Token"),
    ("tpot_ms", "(latency - TTFT) / (output tokens - 1), a value a request", "Inter Token Latency", "TPOT",
     "Inter Token Latency"),
    ("itl_ms", "gaps between an answer's chunks, those of all requests in one pool", None, "ITL",
     "Inter Chunk Latency"),
    ("request_latency_ms", "last token's chunk - request sent", "Request Latency", "E2EL", "Request Latency"),
    ("per_user_tokens_per_second", "1 / TPOT, a value a request", "Output Token Throughput Per User", None,
     "Output Token Throughput Per User"),
    ("output_tokens_per_second", "all output tokens / (last token - first request sent)", "Output Token Throughput",
     None, "Output Token Throughput"),
    ("output_tokens_per_second", "all output tokens / time until the last answer is closed", None,
     "Output token throughput", None),
    ("output_tokens", "counted by tokenising the answer's text again", "Output Sequence Length", None, None),
    ("output_tokens", "the server's count (usage)", None, "Total generated tokens", "Output Sequence Length"),
)  # fmt: skip
SOURCES = {
    "genai-perf": "genai_perf/profile_data_parser/llm_profile_data_parser.py",
    "vllm bench serve": "vllm/benchmarks/serve.py, vllm/benchmarks/lib/endpoint_request_func.py",
    "AIPerf": "aiperf/metrics/types/*_metric.py",
}


@dataclass
class ClientAccuracy:
    timings: list
    input_tokens: int
    output_tokens: int
    requests_per_stream: int
    server_concurrency: list
    warmup_requests: int
    seed: int
    ready_seconds: int
    run_seconds: int
    server_options: list

    def __post_init__(self):
        for timing in self.timings:
            numbers = type(timing) is list and len(timing) == 3 and all(type(part) in (int, float) for part in timing)
            if not numbers or min(timing) < 0 or type(timing[2]) is not int or timing[2] < 1:
                raise UserError(
                    f"params.yaml: client_accuracy.timings has {timing}; want [TTFT in ms, ITL in ms, concurrency]"
                )
        levels = self.server_concurrency
        if any(type(level) is not int or level < 1 for level in levels):
            raise UserError(f"params.yaml: client_accuracy.server_concurrency is {levels}; use whole numbers from 1")
        ones = ("input_tokens", "requests_per_stream", "ready_seconds", "run_seconds")
        check_bounds(
            "client_accuracy", self, dict.fromkeys(ones, 1) | {"output_tokens": 2, "warmup_requests": 0, "seed": 0}
        )

    def load(self, model, concurrency, out, run_name):
        """The load of a client at one concurrency; its own files go to raw/RUN_NAME."""
        return Load(
            url=URL,
            model=model,
            concurrency=concurrency,
            requests=concurrency * self.requests_per_stream,
            warmup=self.warmup_requests,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            prompts=out / "prompts.jsonl",
            tokenizer=results("base_model") / "model",
            seed=self.seed,
            folder=out / "raw" / run_name,
        )


def order():
    """The clients' names as they take turns, with the number of their run: A B C C B A."""
    return [*((name, 1) for name in CLIENTS), *((name, 2) for name in reversed(CLIENTS))]


def make_prompts(p, images, out):
    """prompts.jsonl with as many prompts as the largest load sends, so that none is sent twice."""
    largest = max([timing[2] for timing in p.timings] + p.server_concurrency)
    count = largest * p.requests_per_stream + p.warmup_requests
    words = [results("base_model") / "model", p.input_tokens, count, p.seed, out / "prompts.jsonl"]
    command = ["containers/run", images["client"], "python3", "stages/workers/prompts.py", *map(str, words)]
    run_client("prompts.py", command, out / "prompts.log", None, p.run_seconds, "client_accuracy.run_seconds")


def version(name, images):
    """The version of a client, as the environment that runs it has it installed."""
    client = CLIENTS[name]
    code = "import sys\nfrom importlib.metadata import distribution\nprint(distribution(sys.argv[1]).version)"
    for package in client.packages:
        command = ["containers/run", images[client.image], "python3", "-c", code, package]
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.returncode:
            return f"{package} {done.stdout.strip()}"
    raise UserError(f"{images[client.image]}: {client.packages[0]} does not start there: {done.stderr[-200:].strip()}")


def ask(path, body=None):
    """The JSON with which the mock answers."""
    data = None if body is None else json.dumps(body).encode()
    with open_url(URL + path, data, timeout=60) as response:
        return json.load(response)


def run_load(p, name, load, images, server_process):
    """Run a client to its end; returns its report, wall and CPU seconds (its start included; None in a container)."""
    load.folder.mkdir(parents=True)
    client, log = CLIENTS[name], load.folder.parent.parent / f"{load.folder.name}.log"
    command = ["containers/run", images[client.image], *client.command(load)]
    busy, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    run_client(name, command, log, server_process, p.run_seconds, "client_accuracy.run_seconds")
    wall, used = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - busy.ru_utime - busy.ru_stime
    inside = images[client.image].startswith("docker:")
    return client.read(load.folder), {"wall": wall, "client_cpu": None if inside else cpu}


def against_the_mock(p, images, out):
    """Every client at every timing, twice: its report, the truth, and its cost."""
    mock, runs = Mock(results("base_model") / "model", out / "prompts.jsonl"), []
    command = ["containers/run", images["client"], *mock.command()]
    with serving(mock, command, out / "mock.log", p.ready_seconds, "client_accuracy.ready_seconds") as (process, _):
        for ttft, itl, concurrency in p.timings:
            for name, turn in order():
                load = p.load(MODEL, concurrency, out, run_name("mock", f"{ttft}-{itl}-{concurrency}", name, turn))
                timing = {"ttft_ms": ttft, "itl_ms": itl}
                ask("/mock", timing)
                warm_up(load)
                ask("/mock", timing)  # forgets what warmed it up
                reported, seconds = run_load(p, name, load, images, process)
                requests = ask("/mock")
                write_json(load.folder / "mock.json", requests)
                runs.append({"client": name, "run": turn, **timing, "concurrency": concurrency}
                            | judge_run(load, reported, seconds, requests))  # fmt: skip
                print(format_line(runs[-1]), flush=True)
    return runs


def against_vllm(p, images, out):
    """Every client on the same vLLM, twice: its report, and the server's counts."""
    server, runs = Vllm("base", Inputs(results("base_model"))), []
    command = ["containers/run", images["vllm"], *server.command(p.server_options)]
    with serving(server, command, out / "vllm.log", p.ready_seconds, "client_accuracy.ready_seconds") as (process, _):
        engine, _ = server.engine()
        for concurrency in p.server_concurrency:
            for name, turn in order():
                load = p.load(server.model, concurrency, out, run_name("vllm", concurrency, name, turn))
                warm_up(load)
                before = read_metrics(server, COUNTERS)
                reported, seconds = run_load(p, name, load, images, process)
                counts = server_counts(load, before, read_metrics(server, COUNTERS))
                runs.append({"client": name, "run": turn, "concurrency": concurrency, "said": reported}
                            | counts | {"seconds": seconds})  # fmt: skip
                print(format_line(runs[-1]), flush=True)
    return engine, runs


def run_name(*parts):
    return "-".join(str(part) for part in parts).replace(" ", "-")


def format_line(result):
    """One run in one line."""
    where = f"{result['ttft_ms']} ms + {result['itl_ms']} ms a token" if "known" in result else "vLLM"
    numbers = ", ".join(
        f"{label} {result['said'][name]:.2f} ms" + (f" ({result['error'][name]:+.2f})" if "error" in result else "")
        for label, name in (("TTFT", "ttft_ms_avg"), ("TPOT", "tpot_ms_avg"))
        if result["said"][name] is not None
    )
    invalid = "" if result["valid"] else f", INVALID: {'; '.join(result['invalid_reasons'])}"
    where += f", concurrency {result['concurrency']}, {result['client']}"
    return f"{where}: {numbers}; {result['seconds']['wall']:.1f} s{invalid}"


def main():
    if len(sys.argv) != 4:
        raise UserError("usage: python -m stages.client_accuracy CLIENT_IMAGE VLLM_IMAGE AIPERF_IMAGE")
    images = dict(zip(("client", "vllm", "aiperf"), sys.argv[1:], strict=True))
    p = read_params(ClientAccuracy)
    base = read_json(results("base_model") / "metrics.json")
    machine = read_json(results("machine") / "machine.json")
    out = results("client_accuracy")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    begun, busy = time.strftime("%Y-%m-%d %H:%M:%S"), os.getloadavg()[0]
    clients = {name: {"version": version(name, images), "source": SOURCES[name]} for name in CLIENTS}
    make_prompts(p, images, out)
    mock = against_the_mock(p, images, out)
    engine, server = against_vllm(p, images, out)
    write_metrics(
        out / "client_accuracy.json",
        {
            "begun": begun,
            "ended": time.strftime("%Y-%m-%d %H:%M:%S"),
            # Processes that wanted a core in the minute before: more than 0 means that others were at work.
            "load_average_before": busy,
            "machine": machine,
            "images": images,
            "base_model": {name: base[name] for name in ("name", "weights", "parameters")},
            "engine": engine,
            "input_tokens": p.input_tokens,
            "output_tokens": p.output_tokens,
            "requests_per_stream": p.requests_per_stream,
            "clients": clients,
            "conversion": [dict(zip(("name", "formula", *CLIENTS), row, strict=True)) for row in CONVERSION],
            "mock": mock,
            "server": server,
        },
    )
    print(f"client_accuracy: {out / 'client_accuracy.json'}")


if __name__ == "__main__":
    run(main)
