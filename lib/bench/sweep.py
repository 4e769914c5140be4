"""
Measure the points of an experiment; a killed sweep resumes at the first missing point.
"""

import os
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

from lib.bench import metrics
from lib.bench.experiments import CUT_SHORT, LOAD_CLIENTS, Clock, key_of, seconds_of, visits
from lib.bench.inputs import load_of, make_inputs
from lib.bench.results import publish, what_was_asked
from lib.bench.triton_steps import step_times
from lib.bench.validity import check_point, failed_reasons, never_valid, per_request
from lib.core.gpu import other_gpu_processes
from lib.core.graph import dependencies
from lib.core.stage import UserError, fingerprint, read_json, write_json
from lib.core.work import work_dir
from lib.serving.answers import exposition, sums
from lib.serving.load import warm_up
from lib.serving.monitor import Monitor
from lib.serving.process import launched, run_client, serving, session, wait_until_ready

LEAST_RATE = 40  # output tokens a second: a quarter of a 7 B model's for a single user on an H100 (h100-triton)


def key(p, name, images):
    """Fingerprint of all that a finished point depends on; a point with another key is measured again."""
    unrelated = ("experiments", "definitions", "servers", "concurrency", "repeats", "variants", "ready_seconds",
                 "point_seconds")  # fmt: skip
    params = {name: value for name, value in asdict(p).items() if name not in unrelated}
    return fingerprint([params, images], dependencies(f"bench@{name}"))


def limit(p, point):
    """Seconds after which a point has failed: bench.point_seconds for the client's start and the prompts, and what its
    answers take at LEAST_RATE."""
    requests = p.requests(point.concurrency) + p.warmup(point.concurrency)
    return p.point_seconds + round(requests * point.output_tokens / LEAST_RATE)


def measure_point(p, server, point, images, process, other_processes, work):
    """One point, written to points/: the client's numbers, the server's own counts, the validity checks."""
    p = p.with_variant(point.variant)
    path, raw = work / "points" / f"{point}.json", work / "raw" / str(point)
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir(parents=True)
    monitor, before = Monitor(server, partial(session, process)), exposition(server)
    client, load = LOAD_CLIENTS[p.client], load_of(p, server, point, work)
    if p.client != "genai-perf":  # which warms the server up itself
        warm_up(load)
    log = work / f"client-{point}.log"
    command = ["containers/run", images[client.image], *client.command(load)]
    run_client(p.client, command, log, process, limit(p, point), "bench.point_seconds and its tokens", monitor)
    after = exposition(server)
    start, end = (sums(text, server.counters) for text in (before, after))
    counted = {name: end[name] - start[name] for name in start.keys() & end.keys()}
    asked = {
        "requests": p.requests(point.concurrency),
        "warmup": p.warmup(point.concurrency),
        **{name: getattr(point, name) for name in ("concurrency", "input_tokens", "output_tokens")},
    }
    read, seen = metrics.named_as_points(client.read(raw)), monitor.summary()
    beside = len(p.servers) - 1 if p.together else 0
    checks = check_point(read, asked, counted, seen, other_processes, client.latencies(raw), beside)
    record = {
        "concurrency": point.concurrency,
        "input_tokens_asked": point.input_tokens,
        "output_tokens_asked": point.output_tokens,
        "variant": point.variant,
        "repeat": point.repeat,
        **metrics.correct(read, per_request(counted, "output_tokens"), seen["gpu_watts"]),
        "failed_requests": max(0, asked["requests"] - read["requests"]),
        "preemptions": counted.get("preemptions"),
        **metrics.guess_counts(counted),
        **step_times(before, after),
        **seen,
        "valid": not failed_reasons(checks),
        "invalid_reasons": failed_reasons(checks),
        "checks": checks,
        "refused_tries": refused_tries(path),
    }
    write_json(path, record)
    return record


def refused_tries(path):
    """The earlier, invalid tries of this point, oldest first: a second try does not hide the first."""
    last = read_json(path) if path.exists() else {"valid": True}
    return [] if last["valid"] else [*last.pop("refused_tries"), last]


def read_finished(work, point):
    """The point as it was measured; None where it is missing, or not valid and could be: it is measured (again)."""
    path = work / "points" / f"{point}.json"
    record = read_json(path) if path.exists() else None
    return record if record and (record["valid"] or never_valid(record["checks"])) else None


def missing_points(plan, work):
    """The points of [(server, points)] that are not measured yet."""
    left = [(server, [point for point in group if not read_finished(work, point)]) for server, group in plan]
    return [(server, group) for server, group in left if group]


def sweep(name, p, inputs, images, work):
    """Measure the points that are not there yet, one server start for each group; stops when BUDGET is used up."""
    plan, clock = list(visits(p)), Clock(work.parent / f"bench-{name}.seconds.json")
    left, total = missing_points(plan, work), sum(len(group) for _, group in plan)
    count = sum(len(group) for _, group in left)
    budget = seconds_of(os.environ.get("BUDGET"))
    deadline = float("inf") if budget is None else time.monotonic() + budget
    print(f"{name}: {count} of {total} points to measure{format_left(clock.left(left))}", flush=True)
    if left:
        make_inputs(p, inputs, images, work)
    with ExitStack() as together:
        other_processes = other_gpu_processes() if p.together else None
        running = start_together(name, p, inputs, left, images, work, clock, together) if p.together else {}
        measure_groups(name, p, inputs, images, work, clock, left, deadline, running, other_processes)


def measure_groups(name, p, inputs, images, work, clock, left, deadline, running, other_processes):
    """The points of [(server, points)], group by group; running: {name: (server, process)} of those that run already,
    before which `other_processes` were on the GPU."""
    while left and time.monotonic() < deadline:
        server_name, group = left[0]
        with ExitStack() as stack:
            if server_name in running:
                server, process = running[server_name]
            else:
                other_processes = other_gpu_processes()
                server, process = start(name, p, inputs, server_name, images, work, clock, stack)
            for point in tries(group, work, other_processes):
                if time.monotonic() > deadline:
                    break
                begun = time.monotonic()
                record = measure_point(p, server, point, images, process, other_processes, work)
                clock.seconds["points"][key_of(point)] = time.monotonic() - begun
                write_json(clock.path, clock.seconds)
                rest = [(server_name, [other for other in group if not read_finished(work, other)]), *left[1:]]
                where = f"{name}, {server_name}, repeat {point.repeat}"
                print(f"{where}: {metrics.format_line(record)}{format_left(clock.left(rest, 1))}", flush=True)
        left = left[1:]


def tries(group, work, other_processes):
    """The points of a server start, and once more those that were not valid: kernels that are compiled on
    first use, a neighbour that came by. Another start would cost more than they do; it alone helps where others were on
    the GPU before."""
    yield from group
    if not other_processes:
        yield from [point for point in group if not read_finished(work, point)]


def format_left(seconds):
    return "" if seconds is None else f"; about {seconds:.0f} s left"


def start(name, p, inputs, server_name, images, work, clock, stack):
    """(server, process) of a server that is ready; its facts and its command go to servers/."""
    server, command = server_command(name, p, inputs, server_name, images)
    starting = serving(server, command, work / f"{server_name}.log", p.ready_seconds, "bench.ready_seconds")
    process, ready = stack.enter_context(starting)
    note_start(name, p, server, server_name, command, ready, work, clock)
    return server, process


def start_together(name, p, inputs, left, images, work, clock, stack):
    """{name: (server, process)} of the servers that still have points, started at once, on ports of their own.

    They share the GPU's memory and are loaded one at a time: the settings of one server can be compared in many short
    turns without a start for each.
    """
    running, commands = {}, {}
    for server_name in dict.fromkeys(server_name for server_name, _ in left):
        server, commands[server_name] = server_command(name, p, inputs, server_name, images)
        log = work / f"{server_name}.log"
        running[server_name] = server, stack.enter_context(launched(server, commands[server_name], log))
    begun = time.monotonic()
    for server_name, (server, process) in running.items():
        wait_until_ready(server, process, p.ready_seconds, "bench.ready_seconds")
        note_start(name, p, server, server_name, commands[server_name], time.monotonic() - begun, work, clock)
    return running


def server_command(name, p, inputs, server_name, images):
    """(server, the command that starts it)."""
    server, options = p.server(server_name, inputs)
    image = images[server_name.partition("-")[0]]
    print(f"{name}: starting {server_name} in {image}", flush=True)
    return server, ["containers/run", image, *server.command(options)]


def note_start(name, p, server, server_name, command, ready, work, clock):
    """Writes to servers/ what a server is, how it was started, and after how many seconds it was ready."""
    engine, is_stand_in = server.engine()
    weights, cache = server.formats(p.options(server_name))
    facts = {"engine": engine, "engine_is_stand_in": is_stand_in, "weights_format": weights, "kv_format": cache}
    start = {"server_ready_seconds": round(ready, 1), "server_command": command}
    write_json(work / "servers" / f"{server_name}.json", facts | start)
    clock.seconds["ready"][server_name] = ready
    print(f"{name}: {engine} is ready after {ready:.0f} s", flush=True)


def measure_experiment(out, name, asked, inputs, images):
    """Run the experiment to its end, or to the end of BUDGET, and write what there is."""
    work = work_dir(f"bench-{name}", key(asked, name, images))
    try:
        sweep(name, asked, inputs, images, work)
    except (UserError, KeyboardInterrupt, SystemExit):
        total, left = count_points(asked, work)
        kept = f"{total - left} of {total} points are finished and kept in {work}"
        print(f"{name}: {kept}; run the same again to resume", file=sys.stderr)
        raise
    shutil.copytree(work, out, ignore=shutil.ignore_patterns("points", "servers"), dirs_exist_ok=True)
    for server in asked.servers:
        publish(out, work, asked, server, what_was_asked(name, asked, inputs, server, images))
    total, left = count_points(asked, work)
    if any(not (work / "points" / f"{point}.json").exists() for _, group in visits(asked) for point in group):
        budget = os.environ["BUDGET"]
        print(
            f"{name}: BUDGET={budget} ended after {total - left} of {total} points; run the same again to resume",
            file=sys.stderr,
        )
        sys.exit(CUT_SHORT)
    shutil.rmtree(work)


def count_points(asked, work):
    """(all, those still to be measured) of an experiment's points."""
    plan = list(visits(asked))
    return tuple(sum(len(group) for _, group in each) for each in (plan, missing_points(plan, work)))
