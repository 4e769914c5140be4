"""
What the benchmark's own machinery costs beside its client: python -m stages.harness CLIENT_IMAGE

Against the server of known timing (stages/workers/mock_server.py), so that nothing else changes. First the sweep itself
(stages/bench.py) with more and more points: a line, whose beginning is what a start costs and whose slope is a point.
Then single points, by the bare client and by the sweep's measure() in the order A B B A: how much longer a point takes
under the gauges, and whether it measures something else. genai-perf's own start differs by more from run to run than
the sweep adds, so a client of known duration, one that sleeps, is put in its place as well.

in:   results/<profile>/machine/machine.json, results/<profile>/base_model
out:  results/<profile>/harness/harness.json   seconds of every sweep and of every run, the line, the ratios
      results/<profile>/harness/*.log          what was said
"""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, replace
from functools import partial

from lib.bench import metrics as bench_metrics
from lib.bench.experiments import Bench, Point
from lib.bench.inputs import make_inputs
from lib.bench.sweep import measure, sweep
from lib.core.provenance import write_metrics
from lib.core.stage import UserError, read_json, read_params, results, run
from lib.serving.clients import client_command, prompts_file
from lib.serving.monitor import Watch
from lib.serving.process import run_client, serving, session
from lib.serving.servers import SERVERS, URL, served_model
from lib.stats import ratio
from stages.workers.mock_server import MODEL, Mock

SLEEP_SECONDS = 3.0  # what the client of known duration does
NUMBERS = ("seconds", "output_tokens_per_second", "ttft_ms_p50", "itl_ms_p50")


@dataclass
class Harness:
    points: list
    pairs: int
    ttft_ms: int
    itl_ms: int
    concurrency: int
    input_tokens: int
    output_tokens: int
    requests_per_stream: int

    def __post_init__(self):
        if len(set(self.points)) < 2 or any(type(one) is not int or one < 1 for one in self.points):
            raise UserError(f"params.yaml: harness.points is {self.points}; a line needs two different numbers, from 1")
        for name in ("pairs", "concurrency", "input_tokens", "output_tokens", "requests_per_stream"):
            if getattr(self, name) < 1:
                raise UserError(f"params.yaml: harness.{name} is {getattr(self, name)}; use 1 or more")


class Known(Mock):
    """The mock as stages/bench.py starts and drives a server; it has neither counters nor gauges."""

    metrics, counters, gauges = URL + "/metrics", {}, {}
    timing, prompts = None, None  # of this run; set before it starts

    def __init__(self, model):
        super().__init__(served_model(model), self.prompts)

    def not_built(self):
        return None

    def command(self, options):
        return super().command()

    def client(self, p, output_tokens):
        pinned = ["ignore_eos:true", f"min_tokens:{output_tokens}"]
        return {"model": MODEL, "url": URL, "endpoint-type": "completions", "extra-inputs": pinned}

    def formats(self, options):
        return None, None

    def engine(self):
        """Sets the timing: a server is asked for its name just when it is ready."""
        with urllib.request.urlopen(URL + "/mock", json.dumps(self.timing).encode(), timeout=60) as response:
            response.read()
        return "a server of known timing", True


def as_bench(p, bench, repeats):
    """The benchmark's parameters for this load, `repeats` times."""
    return replace(
        bench, servers=["mock"], model="base", lengths=[[p.input_tokens, p.output_tokens]],
        concurrency=[p.concurrency], repeats=repeats, arms=["corrected"], requests_per_stream=p.requests_per_stream,
        min_requests=1, warmup_requests=1, endpoint="completions", prompts="unique", pinned=True, server_options=[],
    )  # fmt: skip


def sweeps(p, bench, images, out):
    """[{points, seconds}]: the whole sweep with so many points, the server's start and the prompts in it."""
    rows = []
    for count in p.points:
        work = out / f"sweep-{count}"
        work.mkdir()
        Known.prompts = prompts_file(work, p.input_tokens)
        begun = time.monotonic()
        sweep("harness", as_bench(p, bench, count), images, work)
        rows.append({"points": count, "seconds": time.monotonic() - begun})
        shutil.move(work / "mock.log", out / f"sweep-{count}.log")
        shutil.rmtree(work)
        print(f"harness: a sweep of {count} points took {rows[-1]['seconds']:.1f} s", flush=True)
    (out / "bench-harness.seconds.json").unlink()
    return rows


def line(rows):
    """{start_seconds, point_seconds, off_by_percent}: the straight line nearest to the sweeps (least squares), and how
    far the one furthest from it is off."""
    import numpy

    counts, seconds = (numpy.array([row[name] for row in rows], dtype=float) for name in ("points", "seconds"))
    slope, start = numpy.polyfit(counts, seconds, 1).tolist()
    off = float(numpy.max(numpy.abs(start + slope * counts - seconds) / seconds))
    return {"start_seconds": start, "point_seconds": slope, "off_by_percent": 100 * off}


def sleepers(server, process, out, pairs):
    """{seconds, bare, watched, added_seconds}: how long a client that only sleeps takes, as it is and under the sweep's
    gauges; the difference of the medians is what waiting and looking adds to every point."""
    command, found = ["sleep", str(SLEEP_SECONDS)], {"bare": [], "watched": []}
    for _ in range(2 * pairs):
        for way, seconds in found.items():
            begun = time.monotonic()
            if way == "bare":
                subprocess.run(command, check=True)
            else:
                watch = Watch(server, partial(session, process))
                run_client(
                    "sleep", command, out / "sleep.log", process, 10 * SLEEP_SECONDS, "ten times its time", watch
                )
            seconds.append(time.monotonic() - begun)
    added = statistics.median(found["watched"]) - statistics.median(found["bare"])
    return {"seconds": SLEEP_SECONDS, **found, "added_seconds": added}


def both_ways(p, bench, images, out):
    """([{by, seconds, ...}], what sleepers() found): one point by the bare client and by measure(), in turns, with what
    genai-perf said."""
    work, asked = out / "points", as_bench(p, bench, 1)
    work.mkdir()
    Known.prompts = prompts_file(work, p.input_tokens)
    make_inputs(asked, images, work)
    server = Known("base")
    command = ["containers/run", images["mock"], *server.command([])]
    ways, rows = ["bare client", "sweep"], []
    with serving(server, command, out / "points.log", bench.ready_seconds, "bench.ready_seconds") as (process, _):
        server.engine()
        for turn in range(1, 2 * p.pairs + 1):
            for by in ways if turn % 2 else reversed(ways):
                point = Point("mock", p.input_tokens, p.output_tokens, p.concurrency, "corrected", turn)
                rows.append({"by": by, "turn": turn, **one_way(by, asked, server, point, images, process, work)})
                print(f"harness: {by}: {rows[-1]['seconds']:.1f} s", flush=True)
        slept = sleepers(server, process, out, p.pairs)
    shutil.rmtree(work)
    return rows, slept


def one_way(by, asked, server, point, images, process, work):
    """Seconds, our own CPU seconds in them, and genai-perf's numbers of one point."""
    raw = work / "raw" / str(point)
    shutil.rmtree(raw, ignore_errors=True)
    begun, busy = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    if by == "sweep":
        measure(asked, server, point, images["client"], process, None, work)
    else:
        command = ["containers/run", images["client"], *client_command(asked, server, point, work)]
        with (work / "bare.log").open("w") as log:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if done.returncode:
            raise UserError(f"genai-perf failed (exit code {done.returncode}); its output: {work / 'bare.log'}")
    seconds, used = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_SELF)
    own = used.ru_utime + used.ru_stime - busy.ru_utime - busy.ru_stime
    said = bench_metrics.read_point(raw)
    return {"seconds": seconds, "own_cpu_seconds": own} | {name: said[name] for name in NUMBERS[1:]}


def ratios(rows):
    """{number: the sweep's divided by the bare client's, with its interval}."""
    by = {way: [row for row in rows if row["by"] == way] for way in ("sweep", "bare client")}
    return {name: ratio(*([row[name] for row in by[way]] for way in by)) for name in NUMBERS}


def main():
    if len(sys.argv) != 2:
        raise UserError("usage: python -m stages.harness CLIENT_IMAGE")
    images = {"client": sys.argv[1], "mock": sys.argv[1]}
    p, bench = read_params(Harness), read_params(Bench)
    machine = read_json(results("machine") / "machine.json")
    out = results("harness")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    SERVERS["mock"] = Known
    Known.timing = {"ttft_ms": p.ttft_ms, "itl_ms": p.itl_ms}

    grown = sweeps(p, bench, images, out)
    rows, slept = both_ways(p, bench, images, out)
    found = {"sweeps": grown, "line": line(grown), "runs": rows, "sweep_divided_by_bare_client": ratios(rows)}
    found["sleeping_client"] = slept
    asked = {name: getattr(p, name) for name in ("ttft_ms", "itl_ms", "concurrency", "input_tokens", "output_tokens")}
    asked["requests"] = p.concurrency * p.requests_per_stream
    write_metrics(out / "harness.json", {"machine": machine, "images": images, "load": asked, **found})
    share = slept["added_seconds"] / found["line"]["point_seconds"]
    print(f"harness: {slept['added_seconds']:.2f} s a point, {share:.1%} of one like these: {out / 'harness.json'}")


if __name__ == "__main__":
    run(main)
