"""
Is a measured point what was asked for? Each check passes, fails or is unknown, with the figure it rests on. A point
with a failed check stays in the data and makes no verdict.
"""

import os
import statistics

# A mean length further off than this is another workload.
LENGTH_TOLERANCE = 0.02
# Minimum mean concurrency reached, as a share of the requested one, over the whole load with its start and end.
CONCURRENCY_SHARE = 0.7
# Maximum change in time from the first to the last third of the requests, and the fewest requests to tell.
DRIFT, DRIFT_REQUESTS = 0.25, 12
# Maximum share of the machine's cores for the client, and for other programs: with more they may limit the result.
CORES_SHARE = 0.5


def check_point(point, asked, counted, seen, other_processes, latencies, beside=0):
    """[{check, verdict, reason}] of one point; verdict is "pass", "fail" or "unknown".

    point: what the client measured; asked: {requests, warmup, concurrency, input_tokens, output_tokens}; counted: the
    server's own counts during the load, warm-up included, with missing ones left out; seen: Monitor.summary();
    other_processes: those on the GPU before the server started, None if unknown; latencies: seconds of every request in
    the order of sending, None if the client did not keep them; beside: other servers of the experiment that share the
    GPU and have no load.
    """
    return [
        {"check": name, "verdict": verdict, "reason": reason}
        for name, (verdict, reason) in {
            "requests": requests(point, asked),
            "input length": length("input", counted, point["input_tokens"], asked["input_tokens"]),
            "output length": length("output", counted, point["output_tokens"], asked["output_tokens"]),
            "prefix cache": prefix_cache(counted),
            "warm-up": warmed_up(asked),
            "steady": steady(latencies),
            "concurrency": concurrency(point, asked["concurrency"]),
            "client": share("the client", seen["client_cores"]),
            "other programs": share("other programs", seen["other_cores"]),
            "GPU alone": gpu_alone(other_processes, beside),
            "GPU clocks": gpu_clocks(seen),
        }.items()
    ]


def failed_reasons(checks):
    """The reasons of the checks that failed."""
    return [check["reason"] for check in checks if check["verdict"] == "fail"]


def never_valid(checks):
    """Whether a point was asked for in a way that no second try makes valid: a variant without a warm-up."""
    return any(check["check"] == "warm-up" and check["verdict"] == "fail" for check in checks)


def requests(point, asked):
    missing = max(0, asked["requests"] - point["requests"])
    return "fail" if missing else "pass", f"{missing} of {asked['requests']} requests failed"


def length(which, counted, clients, wanted):
    """The server's count decides: a client tokenises the text again, which may have another spelling in tokens."""
    server_tokens = per_request(counted, f"{which}_tokens")
    who, tokens = ("the client counted", clients) if server_tokens is None else ("the server counted", server_tokens)
    if tokens is None:
        return "unknown", f"neither server nor client counted {which} tokens"
    reason = f"{who} {tokens:.2f} {which} tokens a request, {wanted} were asked for"
    return "fail" if off(tokens, wanted) else "pass", reason


def per_request(counted, name):
    """A mean by the server's own counters, warm-up included; None without counters."""
    if name not in counted or not counted.get("requests"):
        return None
    return counted[name] / counted["requests"]


def off(tokens, wanted):
    return abs(tokens / wanted - 1) > LENGTH_TOLERANCE


def prefix_cache(counted):
    hits = counted.get("cache_hits")
    if hits is None:
        return "unknown", "the server does not tell how many prompt tokens it had cached"
    return "fail" if hits else "pass", f"{hits:.0f} prompt tokens came from the prefix cache"


def warmed_up(asked):
    return "pass" if asked["warmup"] else "fail", f"{asked['warmup']} requests before those that count"


def steady(latencies):
    """Finds a drift during the load: kernels compiled on first use, a cache that fills, a card that heats up."""
    if latencies is None:
        return "unknown", "the client kept no single requests"
    if len(latencies) < DRIFT_REQUESTS:
        return "unknown", f"{len(latencies)} requests are too few to tell, {DRIFT_REQUESTS} are enough"
    third = len(latencies) // 3
    first, last = statistics.median(latencies[:third]), statistics.median(latencies[-third:])
    reason = f"the first third of the requests took {first:.3g} s each, the last {last:.3g} s (medians)"
    return "fail" if max(first, last) > (1 + DRIFT) * min(first, last) else "pass", reason


def concurrency(point, wanted):
    """Little's law: requests a second times their mean seconds is how many were in flight."""
    rate, milliseconds = point["requests_per_second"], point["request_latency_ms_avg"]
    if rate is None or milliseconds is None:
        return "unknown", "the client gave no latency"
    reached = rate * milliseconds / 1000
    reason = f"{reached:.2f} requests in flight on average, {wanted} were asked for"
    return "fail" if reached < CONCURRENCY_SHARE * wanted else "pass", reason


def share(who, cores):
    if cores is None:
        return "unknown", f"nothing tells what {who} used: the load was too short, or a container has no figures"
    machine = len(os.sched_getaffinity(0))
    return "fail" if cores > CORES_SHARE * machine else "pass", f"{who} used {cores:.2f} of {machine} cores"


def gpu_alone(other_processes, beside):
    if other_processes is None:
        return "unknown", "no NVIDIA GPU"
    numbers = ", ".join(map(str, other_processes))
    if other_processes:
        return "fail", f"processes {numbers} were on the GPU before"
    return "pass", "nothing was on the GPU" + (f" before; {beside} other servers on it had no load" if beside else "")


def gpu_clocks(seen):
    """A card that was slowed by heat or by its supply measured its cooling; its own power limit belongs to it."""
    if seen["gpu_slowed"] is None:
        return "unknown", "no NVIDIA GPU"
    clock, watts, celsius = (seen[name] for name in ("gpu_sm_mhz", "gpu_watts", "gpu_celsius_max"))
    speed = f"{figure(clock, '.0f')} MHz, {figure(watts, '.0f')} W, at most {figure(celsius, '')} °C"
    if seen["gpu_slowed"]:
        return "fail", f"{', '.join(seen['gpu_slowed'])}; {speed}"
    return "pass", f"{speed}; at its power limit in {figure(seen['gpu_capped'], '.0%')} of the samples"


def figure(value, form):
    """A figure of a reason; "unknown" where the driver did not tell it."""
    return "unknown" if value is None else format(value, form)
