"""
Monitors the machine while a client loads a server: once a second the server's gauges, the CPU time of client and
server, and what NVML says about the GPUs. A look takes milliseconds; without a GPU or a gauge its part is missing.
"""

import time
from contextlib import suppress

import psutil

from lib.core.attempt import attempt
from lib.core.gpu import gpu_handles, gpu_sample
from lib.serving.answers import read_metrics
from lib.serving.containers import container_cpu_seconds, container_name

INTERVAL_SECONDS = 1.0


class Monitor:
    """look() from time to time, with the processes of the client; samples then holds one dict a second."""

    def __init__(self, server, server_processes):
        self.server, self.server_processes = server, server_processes
        self.samples, self.last, self.gpus = [], 0.0, gpu_handles()

    def look(self, client_processes):
        now = time.monotonic()
        if now - self.last < INTERVAL_SECONDS:
            return
        self.last = now
        sample = {
            "seconds": now,
            "client_cpu_seconds": attempt(lambda: cpu_seconds(client_processes())),
            "server_cpu_seconds": attempt(lambda: cpu_seconds(self.server_processes())),
            "all_cpu_seconds": attempt(busy_seconds),
            **(attempt(lambda: read_metrics(self.server, self.server.gauges)) or {}),
        }
        if self.gpus:
            sample["gpus"] = [gpu_sample(handle) for handle in self.gpus]
        self.samples.append(sample)

    def loaded(self):
        """The samples while requests ran; all of them where the server has no gauge that tells."""
        if not any("running" in sample for sample in self.samples):
            return self.samples
        return [sample for sample in self.samples if sample.get("running")]

    def summary(self):
        """Means over the load: batch size, queue, CPU cores used by client, server and everything else, and the GPUs'
        watts, clocks and temperature. None: not measured."""
        samples = self.loaded()
        means = {name: mean([sample.get(name) for sample in samples]) for name in ("running", "waiting")}
        return {
            "batch_mean": means["running"],
            "batch_max": max((sample["running"] for sample in samples if "running" in sample), default=None),
            "queue_mean": means["waiting"],
            **cores(samples),
            **gpu_summary([sample["gpus"] for sample in samples if "gpus" in sample]),
        }


def busy_seconds():
    """CPU time of the whole machine so far, idle time left out."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def mean(values):
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def cpu_seconds(pids):
    """CPU time of the processes so far, and of the containers that they are Docker's client of; one that has just ended
    counts nothing. LookupError or OSError where a container does not tell."""
    total, containers = 0.0, []
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            times = process.cpu_times()
            total += times.user + times.system
            containers.append(container_name(process.cmdline()))
    return total + sum(container_cpu_seconds(name) for name in containers if name)


def cores(samples):
    """{client_cores, server_cores, other_cores}: CPU cores in use on average, of neighbouring samples under load.

    None (unknown) where a sample lacks one of the times.
    """
    names = ("client", "server", "all")
    used, seconds = dict.fromkeys(names, 0.0), 0.0
    for before, after in zip(samples, samples[1:], strict=False):
        if after["seconds"] - before["seconds"] > 2 * INTERVAL_SECONDS:  # not neighbours: the load paused between them
            continue
        times = [sample[f"{name}_cpu_seconds"] for sample in (before, after) for name in names]
        if None in times:
            continue
        seconds += after["seconds"] - before["seconds"]
        for name in names:  # a process that ended takes its time with it: no negative share
            used[name] += max(0.0, after[f"{name}_cpu_seconds"] - before[f"{name}_cpu_seconds"])
    if not seconds:
        return {"client_cores": None, "server_cores": None, "other_cores": None}
    share = {name: time / seconds for name, time in used.items()}
    other = max(0.0, share["all"] - share["client"] - share["server"])
    return {"client_cores": share["client"], "server_cores": share["server"], "other_cores": other}


def gpu_summary(samples):
    """Over all samples of all GPUs: mean watts of all together, clocks, highest temperature, what slowed them."""
    if not samples:
        return {"gpu_watts": None, "gpu_sm_mhz": None, "gpu_celsius_max": None, "gpu_slowed": None, "gpu_capped": None}
    every = [gpu for sample in samples for gpu in sample]
    watts = [sum(gpu["watts"] for gpu in sample) for sample in samples if all(gpu["watts"] for gpu in sample)]
    reasons = [gpu["slowed"] for gpu in every if gpu["slowed"] is not None]
    capped = [gpu["capped"] for gpu in every if gpu["capped"] is not None]
    return {
        "gpu_watts": mean(watts),
        "gpu_sm_mhz": mean([gpu["sm_mhz"] for gpu in every]),
        "gpu_celsius_max": max((gpu["celsius"] for gpu in every if gpu["celsius"] is not None), default=None),
        "gpu_slowed": sorted({name for names in reasons for name in names}) if reasons else None,
        "gpu_capped": mean([float(value) for value in capped]),
    }
