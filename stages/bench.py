"""
Sweep the concurrency against one server with genai-perf: python -m stages.bench RUN SERVER_IMAGE CLIENT_IMAGE

in:   results/<profile>/base_model, results/<profile>/machine/machine.json, and what RUN serves: repository/base,
      repository/lora, or the adapters in finetune
out:  results/<profile>/bench/RUN/points.json, points.csv   one entry a concurrency, and what made it
      results/<profile>/bench/RUN/raw/<concurrency>/        genai-perf's own files, untouched
      results/<profile>/bench/RUN/prompts.jsonl, *.log

A finished point waits in .work/<profile>/bench-RUN-<fingerprint>/ until the sweep is whole, for DVC deletes a stage's
outs before it runs: a sweep that was stopped goes on at the first point that is missing.
"""

import csv
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.points import judged, per_request, read_point, told
from stages.servers import SERVERS, read_counters
from stages.serving import run_client, serving
from stages.stage import (
    UserError,
    fingerprint,
    flags,
    read_json,
    read_params,
    results,
    run,
    work_dir,
    write_json,
    write_metrics,
)


@dataclass
class Bench:
    servers: list
    input_tokens: int
    output_tokens: int
    concurrency: list
    requests_per_stream: int
    min_requests: int
    warmup_requests: int
    seed: int
    ready_seconds: int
    point_seconds: int
    server_options: list

    def __post_init__(self):
        if unknown := [name for name in self.servers if name not in SERVERS]:
            raise UserError(f"params.yaml: bench.servers has {unknown[0]!r}; use {', '.join(SERVERS)}")
        if not self.concurrency or any(type(one) is not int or one < 1 for one in self.concurrency):
            raise UserError(f"params.yaml: bench.concurrency is {self.concurrency}; use whole numbers from 1")
        for name in ("input_tokens", "output_tokens", "requests_per_stream", "min_requests"):
            if getattr(self, name) < 1:
                raise UserError(f"params.yaml: bench.{name} is {getattr(self, name)}; use 1 or more")
        if words := [word for word in self.server_options if type(word) is not str]:
            raise UserError(f"params.yaml: bench.server_options has {words[0]!r}; write it as text, in quotes")

    def requests(self, concurrency):
        return max(self.min_requests, concurrency * self.requests_per_stream)

    def warmup(self, concurrency):
        return concurrency * self.warmup_requests


def client_command(p, server, concurrency, work):
    """genai-perf for one point: streaming, the same prompts for every server, the output length pinned."""
    options = {
        **server.client(p.output_tokens),
        "streaming": True,
        "tokenizer": results("base_model") / "model",
        "concurrency": concurrency,
        "request-count": p.requests(concurrency),
        "warmup-request-count": p.warmup(concurrency),
        "input-file": work / "prompts.jsonl",
        "output-tokens-mean": p.output_tokens,
        "output-tokens-stddev": 0,
        "random-seed": p.seed,
        "artifact-dir": work / "raw" / str(concurrency),
    }
    return ["genai-perf", "profile", *flags(options)]


def prompts_command(p, work):
    """As many prompts as the largest point sends, warm-up and all, so that none is sent twice."""
    count = max(p.requests(one) + p.warmup(one) for one in p.concurrency)
    tokenizer = results("base_model") / "model"
    words = [tokenizer, p.input_tokens, count, p.seed, work / "prompts.jsonl"]
    return ["python3", "containers/client/prompts.py", *(str(word) for word in words)]


def key(p, server, images):
    """What a finished point depends on: with another key it is measured again."""
    unrelated = ("servers", "concurrency", "ready_seconds", "point_seconds")
    params = {name: value for name, value in asdict(p).items() if name not in unrelated}
    files = [results("machine") / "machine.json", Path(__file__), Path(__file__).with_name("points.py")]
    for folder in (results("base_model") / "model", *server.served):
        files += [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    settings = [params, [str(path) for path in files], images]
    return fingerprint(settings, files)


def measure(p, server, client_image, process, concurrency, work):
    """One point: genai-perf, its numbers, the server's own count; written to points/ when it is whole."""
    raw = work / "raw" / str(concurrency)
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir(parents=True)
    before = read_counters(server)
    command = ["containers/run", client_image, *client_command(p, server, concurrency, work)]
    run_client("genai-perf", command, work / f"client-{concurrency}.log", process, p.point_seconds)
    counted = {"server_output_tokens": per_request(before, read_counters(server))}
    point = judged({"concurrency": concurrency, **read_point(raw), **counted}, p.requests(concurrency), p.output_tokens)
    write_json(work / "points" / f"{concurrency}.json", point)
    return point


def finished(work):
    """The valid points that are there, by concurrency; an invalid one is measured again when the stage runs again."""
    points = [read_json(path) for path in (work / "points").glob("*.json")]
    return {point["concurrency"]: point for point in points if point["valid"]}


def sweep(p, name, server, images, work):
    """Measure the points that are not there yet, one server start for all of them."""
    server_image, client_image = images
    missing = [one for one in p.concurrency if one not in finished(work)]
    if not missing:
        return
    if len(missing) < len(p.concurrency):
        print(f"{name}: going on with the {len(p.concurrency) - len(missing)} points of an earlier run, in {work}")
    past = work.parent / f"bench-{name}.seconds.json"
    print(f"{name}: starting {server_image}; {duration(p, missing, past)}", flush=True)

    prompts = ["containers/run", client_image, *prompts_command(p, work)]
    command = ["containers/run", server_image, *server.command(p.server_options)]
    seconds = {}
    with serving(server, command, work / "server.log", p.ready_seconds) as (process, ready):
        run_client("prompts.py", prompts, work / "prompts.log", process, p.point_seconds)
        engine, is_stand_in = server.engine()
        facts = {"engine": engine, "engine_is_stand_in": is_stand_in, "server_ready_seconds": round(ready, 1)}
        write_json(work / "server.json", facts | {"server_command": command})
        print(f"{name}: {engine} is ready after {ready:.0f} s", flush=True)
        for done, concurrency in enumerate(missing, start=1):
            begun = time.monotonic()
            point = measure(p, server, client_image, process, concurrency, work)
            seconds[str(concurrency)] = time.monotonic() - begun
            left = sum(seconds.values()) / done * (len(missing) - done)
            print(f"{name}: {told(point)}; {seconds[str(concurrency)]:.0f} s, about {left:.0f} s left", flush=True)
    write_json(past, {"ready": ready, "points": seconds})


def duration(p, missing, past):
    """How long the sweep will take, judged by the last one here."""
    most = (p.ready_seconds + len(missing) * p.point_seconds) / 60
    if not past.exists():
        return f"no earlier run to judge the time by; {most:.0f} min at the very most"
    last = read_json(past)
    each = max(last["points"].values())
    return f"about {last['ready'] + sum(last['points'].get(str(one), each) for one in missing):.0f} s, by the last run"


def publish(out, work, facts, points):
    """The stage's outs, written in one go."""
    shutil.rmtree(out, ignore_errors=True)
    if work:
        shutil.copytree(work, out, ignore=shutil.ignore_patterns("points", "server.json"))
    write_metrics(out / "points.json", {**facts, "points": points})
    with (out / "points.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(points[0]) if points else ["concurrency"])
        writer.writeheader()
        lists = ("invalid_reasons", "notes")
        writer.writerows({**point, **{name: "; ".join(point[name]) for name in lists}} for point in points)


def what_was_asked(p, server, model, images):
    """The part of points.json that is known before anything runs."""
    base = read_json(results("base_model") / "metrics.json")
    return {
        "server": server,
        "model": model,
        "server_image": images[0],
        "client_image": images[1],
        "base_model": {name: base[name] for name in ("name", "weights", "parameters")},
        "input_tokens_asked": p.input_tokens,
        "output_tokens_asked": p.output_tokens,
    }


def main():
    kinds = [f"{server}-{model}" for server in SERVERS for model in ("base", "lora")]
    if len(sys.argv) != 4 or sys.argv[1] not in kinds:
        raise UserError(
            f"usage: python -m stages.bench RUN SERVER_IMAGE CLIENT_IMAGE, with RUN one of {', '.join(kinds)}"
        )
    name, *images = sys.argv[1:]
    p = read_params(Bench)
    kind, model = name.split("-")
    server = SERVERS[kind](model)
    # DVC and Slurm end a stage with SIGTERM: leave through every `finally`, as with Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    facts = what_was_asked(p, kind, model, images)
    out = results("bench") / name
    reason = f"params.yaml: bench.servers has no {kind}" if kind not in p.servers else server.not_built()
    if reason:
        nothing = {"engine": None, "engine_is_stand_in": False, "server_ready_seconds": None, "server_command": None}
        publish(out, None, {**facts, **nothing, "not_measured": reason}, [])
        print(f"{name}: not measured ({reason})")
        return

    work = work_dir(f"bench-{name}", key(p, server, images))
    try:
        sweep(p, name, server, images, work)
    except (UserError, KeyboardInterrupt, SystemExit):
        kept = f"{len(finished(work))} of {len(p.concurrency)} points are finished and kept in {work}"
        print(f"{name}: {kept}; run the same again to go on", file=sys.stderr)
        raise
    points = [read_json(work / "points" / f"{one}.json") for one in p.concurrency]
    publish(out, work, {**facts, **read_json(work / "server.json"), "not_measured": None}, points)
    shutil.rmtree(work)


if __name__ == "__main__":
    run(main)
